"""The base class of all sections of a run file."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any, Literal, cast

import yaml
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


@cache
def removed_keys() -> Mapping[str, str]:
    """Keys of earlier versions, dotted, and what does their work now."""
    text = files("raycomplete.runtime").joinpath("removed_keys.yaml").read_text(encoding="utf-8")
    return cast("dict[str, str]", yaml.safe_load(text))


def removed(key: str) -> str | None:
    """Why a key is no longer known, or None if it never was; a removed section stands for every key in it."""
    while key:
        if key in removed_keys():
            return removed_keys()[key]
        key = key.rpartition(".")[0]
    return None


def without_removed(tree: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Copies the record of an earlier run without the keys that no longer exist."""
    return {
        name: without_removed(value, f"{above}{name}.") if isinstance(value, Mapping) else value
        for name, value in tree.items()
        if f"{above}{name}" not in removed_keys()
    }
