"""What every section of a run file has in common."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

Dtype = Literal["float32", "bfloat16"]


class Section(BaseModel):
    """Frozen; unknown keys are an error (reported by `loading` with the nearest known key)."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())
