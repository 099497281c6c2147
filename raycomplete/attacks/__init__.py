"""Attacks: each with its settings, its code and its registration in one file, related ones together.

A user's file adds an attack without touching the package, by the names below: docs/examples/add_attack.py does so, and
`plugins:` in the run file names it. Everything here is importable without torch, except `white_box`.
"""

from raycomplete.attacks import (  # noqa: F401  each registers its attacks
    finetune,
    prefills,
    ranked,
    rewriting,
    sampling,
    suffix,
    templates,
)
from raycomplete.attacks.attack import Attack, AttackConfig, answer_ids, continued, plain_trials
from raycomplete.attacks.registry import ATTACKS, build_attack, parse_attack, register
from raycomplete.attacks.target import Attacker, AttackTools, Target
from raycomplete.attacks.trial import Decoding, Emit, Response, Trial

__all__ = [
    "ATTACKS",
    "Attack",
    "AttackConfig",
    "AttackTools",
    "Attacker",
    "Decoding",
    "Emit",
    "Response",
    "Target",
    "Trial",
    "answer_ids",
    "build_attack",
    "continued",
    "parse_attack",
    "plain_trials",
    "register",
]
