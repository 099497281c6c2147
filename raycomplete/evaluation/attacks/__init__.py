"""Attacks by name. Each is a small file: settings in, `plan` says what will be asked, `run` gets the responses."""

from collections.abc import Mapping
from typing import Any

from raycomplete.config.attacks import AttackConfig
from raycomplete.evaluation.attacks.adaptive import Adaptive
from raycomplete.evaluation.attacks.base import Attack
from raycomplete.evaluation.attacks.decoding import DecodingGrid
from raycomplete.evaluation.attacks.finetune import Finetune
from raycomplete.evaluation.attacks.gcg import Gcg
from raycomplete.evaluation.attacks.pair import Pair
from raycomplete.evaluation.attacks.prefill import Prefill
from raycomplete.evaluation.attacks.random_search import RandomSearch
from raycomplete.evaluation.attacks.rank_assisted_prefill import RankAssistedPrefill
from raycomplete.evaluation.attacks.static_strings import StaticStrings
from raycomplete.evaluation.attacks.templates import Templates

_ATTACKS: Mapping[str, type[Attack[Any]]] = {
    "prefill": Prefill,
    "rank_assisted_prefill": RankAssistedPrefill,
    "gcg": Gcg,
    "random_search": RandomSearch,
    "decoding": DecodingGrid,
    "templates": Templates,
    "static_strings": StaticStrings,
    "pair": Pair,
    "finetune": Finetune,
    "adaptive": Adaptive,
}

__all__ = ["Attack", "build_attack"]


def build_attack(config: AttackConfig) -> Attack[Any]:
    """The attack of checked settings."""
    return _ATTACKS[config.name](config)
