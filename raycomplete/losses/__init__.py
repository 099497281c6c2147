"""The distillation loss: terms over packed token rows, computed without [N, V] logits in memory.

`raycomplete.losses.loss` shows how to use it in any trainer, `raycomplete.losses.terms` says which terms there are and
how one is added. Names are imported when they are first used, so that `raycomplete.losses.settings` loads no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raycomplete.losses.heads import Head, HiddenStates
    from raycomplete.losses.loss import LossInputs, LossOutput, distillation_loss
    from raycomplete.losses.settings import ContrastiveSettings, DivergenceSettings, LossSettings, PushForwardSettings
    from raycomplete.losses.terms import LogProbs, Term, get, register
    from raycomplete.losses.torch_rows import TermRows

_PLACES = {
    "heads": ("Head", "HiddenStates"),
    "loss": ("LossInputs", "LossOutput", "distillation_loss"),
    "settings": ("ContrastiveSettings", "DivergenceSettings", "LossSettings", "PushForwardSettings"),
    "terms": ("LogProbs", "Term", "get", "register"),
    "torch_rows": ("TermRows",),
}
__all__ = [
    "ContrastiveSettings",
    "DivergenceSettings",
    "Head",
    "HiddenStates",
    "LogProbs",
    "LossInputs",
    "LossOutput",
    "LossSettings",
    "PushForwardSettings",
    "Term",
    "TermRows",
    "distillation_loss",
    "get",
    "register",
]


def __getattr__(name: str) -> Any:
    for place, names in _PLACES.items():
        if name in names:
            return getattr(import_module(f"raycomplete.losses.{place}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
