"""Checkpoints of a training run are DeepSpeed's own pickles, so only those that nobody else could write are loaded."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from raycomplete.runtime.errors import CheckpointError

TRUST_VARIABLE = "RAYCOMPLETE_TRUST_CHECKPOINTS"
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def make_private(folder: Path) -> None:
    """Creates a folder that other users can neither change nor look into, or closes the one that is there."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if folder.stat().st_uid == os.geteuid():
        folder.chmod(0o700)


def check_owned(folder: Path) -> None:
    """Refuses a folder of pickles that another user made or may have changed: loading a pickle runs what is in it.

    Args:
        folder: A run's `checkpoints/`, as `save` of `raycomplete.training.deepspeed_engine` wrote it.

    Raises:
        CheckpointError: Something in it belongs to another user, may be written by others, or is a link.
    """
    if os.environ.get(TRUST_VARIABLE) == "1":
        return
    trusted = {os.geteuid(), 0}  # root can do anything anyway
    closed = stat.S_IMODE(folder.stat().st_mode) & 0o077 == 0  # nobody else gets in, whatever stands on what is inside
    for path in (folder, *sorted(folder.rglob("*"))):
        status = path.lstat()
        if stat.S_ISLNK(status.st_mode):
            problem, remedy = f"{path} is a link", "Copy what it points to into its place if you made it."
        elif status.st_uid not in trusted:
            problem = f"{path} belongs to user {status.st_uid} and this process to {os.geteuid()}"
            remedy = f"Resume as that user, or set {TRUST_VARIABLE}=1 where the storage only shows other owners."
        elif status.st_mode & _OTHERS_WRITE and not closed:
            problem = f"other users may write to {path} (mode {stat.S_IMODE(status.st_mode):04o})"
            remedy = f"If nobody did: chmod -R go-w {folder}"
        else:
            continue
        raise CheckpointError(f"Loading a training checkpoint can run code, and {problem}.", remedy)
