"""A disk that fills up, named in one sentence."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from raycomplete.runtime.errors import DiskFullError

# torch and safetensors pass on the words of the system, or say only that a write failed, and no error number.
_FULL_WORDS = ("No space left on device", "file write failed", "Disk quota exceeded", "unexpected pos")
_FULL = {errno.ENOSPC, errno.EDQUOT}


@contextmanager
def named_when_full(folder: Path, what: str, needed: int = 0) -> Iterator[None]:
    """Turns a full disk into one sentence; other errors pass.

    Args:
        folder: Where the block writes.
        what: For the message: "the checkpoint of step 40".
        needed: Bytes that it takes, where known.

    Raises:
        DiskFullError: The disk, or a quota, is full.
    """
    try:
        yield
    except Exception as error:
        if not is_full(error):
            raise
        free = as_gib(free_bytes(folder))
        size = f" ({as_gib(needed)} needed, {free} free)" if needed else f" ({free} free)"
        raise DiskFullError(
            f"The disk is full: {what} could not be written to {folder}{size}.",
            "What was complete before is untouched. Free some space, then resume with --resume.",
        ) from error


def is_full(error: BaseException) -> bool:
    """Whether an error, or one that it came from, is about a full disk."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in _FULL:
            return True
        if any(words in str(seen) for words in _FULL_WORDS):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def free_bytes(folder: Path) -> int:
    """Bytes that an ordinary user may still write where a folder is or will be."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def as_gib(size: int) -> str:
    """1610612736 -> "1.5 GiB"; small sizes in MiB."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
