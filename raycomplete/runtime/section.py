"""The base class of all sections of a run file."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

Dtype = Literal["float32", "bfloat16"]


class Section(BaseModel):
    """A section of a run file: frozen; unknown keys are refused (with the nearest known key), and so is infinity."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


def without_none(tree: Any) -> Any:
    """Drops keys without a value from nested mappings and lists.

    Records of earlier versions lack the keys that came later, whose value is None unless someone sets them.
    """
    if isinstance(tree, dict):
        return {key: without_none(value) for key, value in tree.items() if value is not None}
    return [without_none(item) for item in tree] if isinstance(tree, list) else tree
