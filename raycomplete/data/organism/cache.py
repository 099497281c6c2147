"""Organisms that are trained on demand, and where the cache folder holds them. Importable without torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raycomplete.runtime.errors import CheckpointError
from raycomplete.runtime.files import cache_folder

if TYPE_CHECKING:
    from raycomplete.data.organism.build import Blueprint

ROLES = ("base", "aligned")


@dataclass(frozen=True)
class BuiltOrganism:
    """An organism whose two checkpoints are trained when they are first asked for.

    Attributes:
        scheme: Name by which run files know it.
        prefix: Start of the name of its folder.
        config: Configuration of its models, in the words of config.json.
        settings: Everything else that decides its weights, as JSON can hold it.
        duration: How long a build takes, in words.
        load: Imports torch and returns what the builder needs to know.
    """

    scheme: str
    prefix: str
    config: Mapping[str, Any]
    settings: tuple[Any, ...]
    duration: str
    load: Callable[[], Blueprint]

    @property
    def folder(self) -> Path:
        """Where the cache folder holds it, present or not; other settings are another folder."""
        key = hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()[:8]
        return cache_folder() / "organisms" / f"{self.prefix}-{key}"

    def find(self, role: str) -> Path | None:
        """Returns the folder of a checkpoint that is built; None where it is not yet.

        Raises:
            CheckpointError: There is no such checkpoint.
        """
        if role not in ROLES:
            raise CheckpointError(
                f"There is no checkpoint {self.scheme}:{role}.", f"Choose {self.scheme}:base or {self.scheme}:aligned."
            )
        return self.folder / role if (self.folder / role).is_dir() else None

    def checkpoint(self, role: str) -> Path:
        """Returns the folder of a checkpoint, trained first where it is not built yet, which one sentence announces.

        Raises:
            CheckpointError: There is no such checkpoint.
            WorkError: The trained models lack the traits of the organism.
        """
        found = self.find(role)
        if found is None:
            from raycomplete.data.organism.build import build_into_cache

            found = build_into_cache(self) / role
        return found
