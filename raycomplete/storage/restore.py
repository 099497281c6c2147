"""Fetches from a storage what a run folder lacks: all after a lost disk or on a new node, or what another node added.

Everything is fetched beside its place, compared with the manifest, and renamed: no piece is ever there by half.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa

from raycomplete.runtime.errors import WorkError
from raycomplete.runtime.machine import free_bytes
from raycomplete.storage import integrity
from raycomplete.storage.mirror import BEST, CHECKPOINTS, FILES, STUDENT, Manifest, StoredFile, step_piece
from raycomplete.storage.remote import Remote, reason_of

# Without these a run would go on from something else than it began with.
_NEEDED = ("config.yaml", "inputs.json", "samples.jsonl")
_SPARE_BYTES = 64 * 2**20


def restore(remote: Remote, run_folder: Path, *, hashed: bool, warn: Callable[[str], None]) -> list[str]:
    """Fetches what the run folder lacks.

    Args:
        remote: The storage.
        run_folder: May be missing. A folder that holds something else than a run is left alone.
        hashed: Compare local checkpoints by sha256 rather than by size only.
        warn: Is told of what was damaged in the storage, in a sentence.

    Returns:
        Names of what was fetched; empty where the run folder has it all.

    Raises:
        WorkError: The storage cannot be read, the disk is too full, or what is needed is damaged. What was fetched
            whole stays.
    """
    try:
        return _Restorer(remote, run_folder, warn).run(hashed)
    except (OSError, pa.ArrowException) as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise WorkError(
                f"The disk of {run_folder} is full; the run could not be fetched from {remote.uri}.",
                "Free space, or set output.root to another disk, then run again with --resume.",
            ) from error
        raise WorkError(
            f"The run could not be fetched from {remote.uri} ({reason_of(error)}).",
            "Check the storage and the disk, then run again with --resume.",
        ) from error


class _Restorer:
    def __init__(self, remote: Remote, run_folder: Path, warn: Callable[[str], None]) -> None:
        self._remote, self._folder, self._warn = remote, run_folder, warn
        self._manifest = Manifest(remote)

    def run(self, hashed: bool) -> list[str]:
        stored = self._manifest.pieces
        is_new = not (self._folder / "config.yaml").is_file()
        if is_new and self._folder.is_dir() and any(self._folder.iterdir()):
            return []
        if is_new and self._manifest.holds_run and not stored:
            raise self._lost(f"No manifest in {self._remote.uri} can be read")
        whole, _ = integrity.scan(self._folder / CHECKPOINTS, hashed=hashed)
        local_step = 0 if whole is None else integrity.step_of(whole)
        pieces: list[str] = []  # the first that is whole is enough
        newer: list[int] = []
        if not (self._folder / STUDENT / "config.json").is_file():
            newer = [step for step in reversed(self._manifest.steps(CHECKPOINTS)) if step > local_step]
            pieces = [STUDENT] if STUDENT in stored else []
            pieces += [step_piece(CHECKPOINTS, step) for step in newer]
        files = stored.get(FILES, {})
        files = {name: file for name, file in files.items() if self._is_older(name, file, is_new or bool(newer))}
        self._check_space([*files.values(), *(file for piece in pieces[:1] for file in stored[piece].values())])
        # Files first and config.yaml before all: a restore that is cut off goes on where it stopped.
        fetched = []
        for name in sorted(files, key=lambda name: name != "config.yaml"):
            if self._fetch(name, {"": files[name]}):
                fetched.append(name)
            elif name in _NEEDED and not (self._folder / name).is_file():
                raise self._lost(f"{name} in {self._remote.uri} is damaged, and the run cannot go on without it")
        for i, piece in enumerate(pieces):
            if self._fetch(piece, stored[piece]):
                steps = self._manifest.steps(BEST) if piece != STUDENT else []
                best = [step_piece(BEST, step) for step in steps if step <= integrity.step_of(piece)]
                fetched += [piece, *(name for name in best if self._fetch(name, stored[name]))]
                del pieces[i:]
                break
        else:
            if newer and not local_step:
                raise self._lost(f"No checkpoint in {self._remote.uri} is whole ({', '.join(pieces)})")
        if pieces:  # else the mirror would take them for the newest ones, and keep them in place of new ones
            self._manifest.withdraw(*pieces)
        return fetched

    def _is_older(self, name: str, file: StoredFile, is_behind: bool) -> bool:
        """Tells if the storage knows more: other content where another node went on, else only appended rows."""
        target = self._folder / name
        if not target.is_file():
            return True
        if is_behind:
            return not _is_same(target, file)
        return target.suffix == ".jsonl" and target.stat().st_size < file.size

    def _check_space(self, files: list[StoredFile]) -> None:
        needed, free = sum(file.size for file in files), free_bytes(self._folder)
        if needed and free < needed + _SPARE_BYTES:
            raise WorkError(
                f"Fetching the run from {self._remote.uri} needs {needed / 1e9:.2f} GB and the disk of {self._folder} "
                f"has {free / 1e9:.2f} GB free.",
                "Free space, or set output.root to another disk, then run again with --resume.",
            )

    def _fetch(self, name: str, files: dict[str, StoredFile]) -> bool:
        """Fetches a file or a folder into its place, unless it is damaged; a checkpoint that is whole here stays."""
        target = self._folder / name
        if integrity.damage(target) is None:
            return True
        self._folder.mkdir(parents=True, exist_ok=True)
        is_step = name.startswith((CHECKPOINTS, BEST))  # checkpoints are pickles: nobody else may change them
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o700 if is_step else 0o777)
        temporary = target.with_name(f".{target.name}.part")
        try:
            _remove(temporary)  # of a restore that was killed
            for path, file in files.items():
                if fault := self._download(file, temporary / path):
                    self._warn(f"{name} in {self._remote.uri} is damaged ({fault}) and left out.")
                    return False
            _remove(target)
            os.replace(temporary, target)
        finally:
            _remove(temporary)
        return True

    def _download(self, file: StoredFile, target: Path) -> str | None:
        """Fetches a file, and says what is wrong with it, if anything."""
        try:
            self._remote.download(file.path, target, file.mode)
        except FileNotFoundError:
            return f"{file.path} is missing"
        return None if _is_same(target, file) else f"{file.path} has another sha256"

    def _lost(self, problem: str) -> WorkError:
        return WorkError(f"{problem}.", "Run again with --overwrite to start from the beginning.")


def _is_same(path: Path, file: StoredFile) -> bool:
    return path.stat().st_size == file.size and integrity.sha256_of(path) == file.sha256


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
