"""The base class of all sections of a run file."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

Dtype = Literal["float32", "bfloat16"]


class Section(BaseModel):
    """A section of a run file: frozen; unknown keys are refused (with the nearest known key), and so is infinity."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)
