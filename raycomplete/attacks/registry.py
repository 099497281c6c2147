"""Attacks by name. Each is a small file: settings in, `plan` says what will be asked, `run` gets the responses."""

from collections.abc import Mapping
from typing import Any

from raycomplete.attacks.adaptive import Adaptive
from raycomplete.attacks.attack import Attack
from raycomplete.attacks.decoding import DecodingGrid
from raycomplete.attacks.finetune import Finetune
from raycomplete.attacks.gcg import Gcg
from raycomplete.attacks.pair import Pair
from raycomplete.attacks.prefill import Prefill
from raycomplete.attacks.random_search import RandomSearch
from raycomplete.attacks.rank_assisted_prefill import RankAssistedPrefill
from raycomplete.attacks.settings import AttackConfig
from raycomplete.attacks.static_strings import StaticStrings
from raycomplete.attacks.templates import Templates

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
