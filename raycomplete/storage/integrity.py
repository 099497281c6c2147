"""Sizes and sha256 of a checkpoint's files, written when it is finished and compared before it is loaded."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from raycomplete.runtime.errors import WorkError
from raycomplete.runtime.files import PRIVATE, write_json

logger = logging.getLogger(__name__)

COMPLETE = "complete.json"  # a checkpoint counts once this file is in it
REFUSED = "refused.json"  # the name it gets when the checkpoint turns out to be damaged
_HASHERS = 4  # sha256 lets go of the interpreter; more threads than this outrun most disks

Digest = dict[str, Any]
"""{"size": bytes, "sha256": hex, or None where hashing is off}."""


def sha256_of(path: Path) -> str:
    """Returns the sha256 of a file's content in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def digests(folder: Path, *, hashed: bool = True) -> dict[str, Digest]:
    """Returns size and sha256 of every file of a checkpoint but `complete.json`, by path relative to it."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    paths = [path for path in paths if path not in (folder / COMPLETE, folder / REFUSED)]
    with ThreadPoolExecutor(_HASHERS) as pool:
        sums = pool.map(lambda path: sha256_of(path) if hashed else None, paths)
        return {
            path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": found}
            for path, found in zip(paths, sums, strict=True)
        }


def seal(folder: Path, content: Mapping[str, Any], *, hashed: bool = True) -> None:
    """Writes `complete.json` with `content` and the digests of all files: from here on the checkpoint counts."""
    (folder / REFUSED).unlink(missing_ok=True)  # of an earlier checkpoint in this place
    write_json(folder / COMPLETE, {**content, "files": digests(folder, hashed=hashed)}, mode=PRIVATE)


def damage(folder: Path, *, hashed: bool = True, found: Mapping[str, Digest] | None = None) -> str | None:
    """Says in a few words what is wrong with a checkpoint; None where it is whole."""
    try:
        if not (folder / COMPLETE).is_file():
            return "it was never finished"
        known = json.loads((folder / COMPLETE).read_text(encoding="utf-8")).get("files") or {}
        found = digests(folder, hashed=hashed) if found is None else found
        for name, digest in known.items():
            if name not in found:
                return f"{name} is missing"
            if found[name]["size"] != digest["size"]:
                return f"{name} holds {found[name]['size']} bytes instead of {digest['size']}"
            if None not in (digest["sha256"], found[name]["sha256"]) and digest["sha256"] != found[name]["sha256"]:
                return f"{name} has another sha256"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"it cannot be read ({type(error).__name__})"
    return None


def complete_checkpoints(folder: Path) -> list[Path]:
    """Lists finished checkpoints, oldest first."""
    return sorted(path.parent for path in folder.glob(f"step-*/{COMPLETE}"))


def step_of(checkpoint: Path | str) -> int:
    """Reads the step from a name: `step-000040` -> 40."""
    return int(Path(checkpoint).name.removeprefix("step-"))


def scan(folder: Path, *, hashed: bool = True) -> tuple[Path | None, dict[Path, str]]:
    """Finds the newest checkpoint that is whole, or None, and what is wrong with each newer one."""
    refused: dict[Path, str] = {}
    for path in reversed(complete_checkpoints(folder)):
        found = damage(path, hashed=hashed)
        if found is None:
            return path, refused
        refused[path] = found
    return None, refused


def newest_whole(folder: Path, *, hashed: bool = True, warn: Callable[[str], None] = logger.warning) -> Path | None:
    """Finds the newest checkpoint that is whole, or None; damaged newer ones are renamed, so that they do not count."""
    whole, refused = scan(folder, hashed=hashed)
    if whole is None and refused:
        named = "; ".join(f"{path.name}: {why}" for path, why in refused.items())
        raise WorkError(
            f"No checkpoint in {folder} is whole ({named}).",
            "Check that disk, then run again with --overwrite to start from the beginning.",
        )
    for path, why in refused.items():
        warn(f"The checkpoint {path} is damaged ({why}) and left out.")
        (path / COMPLETE).rename(path / REFUSED)
    return whole


def superseded(steps: list[int], keep: int, keep_every: int = 0) -> list[int]:
    """Lists the steps whose checkpoints may go: not the newest `keep`, at least one, nor multiples of `keep_every`."""
    old = sorted(steps)[:-keep]
    return [step for step in old if not (keep_every and step % keep_every == 0)]


def drop(checkpoint: Path) -> None:
    """Removes a checkpoint; a failure is a warning, since it must not end a run."""
    try:
        (checkpoint / COMPLETE).unlink(missing_ok=True)  # first, so that a half-removed one never counts
        shutil.rmtree(checkpoint)
    except OSError as error:
        logger.warning("The old checkpoint %s cannot be removed (%s).", checkpoint, error.strerror or error)


def prune(folder: Path, keep: int, keep_every: int = 0) -> None:
    """Drops the checkpoints that retention no longer asks for."""
    for step in superseded([step_of(path) for path in complete_checkpoints(folder)], keep, keep_every):
        drop(folder / f"step-{step:06d}")


def drop_unfinished(folder: Path) -> None:
    """Removes what a kill or a full disk left half-written. No worker may be writing meanwhile."""
    for path in folder.glob("step-*"):
        if not (path / COMPLETE).is_file():
            shutil.rmtree(path, ignore_errors=True)
