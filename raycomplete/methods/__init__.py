"""Training methods: what a step trains. One file a method, with its settings, rows, teacher contexts and loss terms.

A user's file adds a method without touching the package, by the names below: docs/examples/add_method.py does so, and
`plugins:` in the run file names it. Importable without torch, since a method is the section `method` of the run file.
"""

from raycomplete.methods import completion, sft  # noqa: F401  each registers itself
from raycomplete.methods.registry import (
    AnchorItem,
    Item,
    LongestHarmful,
    Method,
    OwnTerm,
    RecoveryItem,
    RolloutGroups,
    RowSpan,
    StudentPass,
    TeacherContext,
    TrainSequence,
    harmless_answer,
    register,
)
from raycomplete.methods.rivals import (  # noqa: F401  each registers itself
    augmentation,
    circuit_breakers,
    door,
    latent_adversarial,
    npo,
    opct,
    policy_gradient,
    presto,
    unlikelihood,
    w_door,
)
from raycomplete.runtime.section import Section

__all__ = [
    "AnchorItem",
    "Item",
    "LongestHarmful",
    "Method",
    "OwnTerm",
    "RecoveryItem",
    "RolloutGroups",
    "RowSpan",
    "Section",
    "StudentPass",
    "TeacherContext",
    "TrainSequence",
    "harmless_answer",
    "register",
]
