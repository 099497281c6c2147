"""From a storage into a run folder that is empty (a new node, a lost disk) or behind (another node went on).

Everything is fetched beside its place, compared with its manifest, and renamed: a run folder never holds half a piece.
"""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa

from raycomplete.runtime.errors import WorkError
from raycomplete.storage import integrity
from raycomplete.storage.pieces import BEST, CHECKPOINTS, FILES, STUDENT, Catalog, Manifest, StoredFile
from raycomplete.storage.remote import Remote, in_words

# Without these a run would go on from something else than it began with.
_NEEDED = ("config.yaml", "inputs.json", "samples.jsonl")
_SPARE_BYTES = 64 * 2**20

Warn = Callable[[str], None]


class _DamagedError(Exception):
    """Content that is not what its manifest says."""


def holds_run(remote: Remote) -> bool:
    """Whether a run was mirrored there."""
    return Catalog(remote).newest(FILES) is not None


def restore(remote: Remote, run_folder: Path, *, hashed: bool, warn: Warn) -> list[str]:
    """Fetches what the run folder lacks.

    Args:
        remote: The storage.
        run_folder: May be missing. A folder that holds something else than a run is left alone.
        hashed: Whether local checkpoints are compared by sha256, or by size only.
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
            f"The run could not be fetched from {remote.uri} ({in_words(error)}).",
            "Check the storage and the disk, then run again with --resume.",
        ) from error


class _Restorer:
    def __init__(self, remote: Remote, run_folder: Path, warn: Warn) -> None:
        self._remote, self._folder, self._warn = remote, run_folder, warn
        self._catalog = Catalog(remote)

    def run(self, hashed: bool) -> list[str]:
        generations = self._catalog.generations(FILES)
        is_new = not (self._folder / "config.yaml").is_file()
        if not generations or (is_new and self._folder.is_dir() and any(self._folder.iterdir())):
            return []
        whole, _ = integrity.scan(self._folder / CHECKPOINTS, hashed=hashed)
        local_step = 0 if whole is None else integrity.step_of(whole)
        steps = sorted((integrity.step_of(piece) for piece in self._catalog.pieces(f"{CHECKPOINTS}/")), reverse=True)
        has_student = (self._folder / STUDENT / "config.json").is_file()
        is_behind = is_new or (not has_student and bool(steps) and steps[0] > local_step)
        self._check_space(generations[0], local_step, has_student)
        # Loose files first and config.yaml before all: a restore that is cut off goes on where it stopped.
        fetched = self._fetch_files(generations, is_behind)
        if not has_student and self._fetch_folder(STUDENT):
            fetched.append(STUDENT)
        elif not has_student and steps and steps[0] > local_step:
            fetched += self._fetch_checkpoint(steps, local_step)
        return fetched

    def _check_space(self, files: Manifest, local_step: int, has_student: bool) -> None:
        needed = 0 if (self._folder / "config.yaml").is_file() else files.size
        student = self._catalog.newest(STUDENT)
        newest = self._catalog.pieces(f"{CHECKPOINTS}/")[-1:]
        if not has_student and student is not None:
            needed += student.size
        elif not has_student and newest and integrity.step_of(newest[0]) > local_step:
            names = [*newest, *self._catalog.pieces(f"{BEST}/")]
            needed += sum(manifest.size for name in names if (manifest := self._catalog.newest(name)) is not None)
        place = next(path for path in (self._folder.absolute(), *self._folder.absolute().parents) if path.exists())
        free = shutil.disk_usage(place).free
        if needed and free < needed + _SPARE_BYTES:
            raise WorkError(
                f"Fetching the run from {self._remote.uri} needs {needed / 1e9:.2f} GB and {place} has "
                f"{free / 1e9:.2f} GB free.",
                "Free space, or set output.root to another disk, then run again with --resume.",
            )

    def _fetch_checkpoint(self, steps: list[int], local_step: int) -> list[str]:
        """The newest checkpoint that is whole, with the best ones of its past."""
        damaged: list[str] = []
        for step in (step for step in steps if step > local_step):
            piece = f"{CHECKPOINTS}/step-{step:06d}"
            if self._fetch_folder(piece):
                for bad in damaged:
                    self._catalog.withdraw(bad)
                best = [name for name in self._catalog.pieces(f"{BEST}/") if integrity.step_of(name) <= step]
                return [piece, *(name for name in best if self._fetch_folder(name))]
            damaged.append(piece)
        if local_step == 0:
            raise WorkError(
                f"No checkpoint in {self._remote.uri} is whole ({', '.join(damaged)}).",
                "Run again with --overwrite to start from the beginning.",
            )
        for bad in damaged:  # else the mirror would take them for the newest ones, and keep them in place of new ones
            self._catalog.withdraw(bad)
        return []

    def _fetch_folder(self, piece: str) -> bool:
        """Whether a piece was there and whole; one that is whole here already is not fetched."""
        manifest = self._catalog.newest(piece)
        if manifest is None:
            return False
        target = self._folder / piece
        if integrity.damage(target) is None:
            return True
        self._folder.mkdir(parents=True, exist_ok=True)
        if target.parent != self._folder:
            target.parent.mkdir(exist_ok=True, mode=0o700)  # checkpoints are pickles: nobody else may change them
        for remains in target.parent.glob(f".{target.name}.*"):  # of a restore that was killed
            shutil.rmtree(remains, ignore_errors=True)
        temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
        try:
            for name, stored in manifest.files.items():
                self._fetch(stored, temporary / name)
            if target.is_dir():
                shutil.rmtree(target)
            temporary.rename(target)
        except _DamagedError as error:
            self._warn(f"{piece} in {self._remote.uri} is damaged ({error}) and left out.")
            return False
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return True

    def _fetch_files(self, generations: list[Manifest], is_behind: bool) -> list[str]:
        names = {name: None for manifest in generations for name in manifest.files}
        fetched = []
        for name in sorted(names, key=lambda name: name != "config.yaml"):
            target = self._folder / name
            versions = [manifest.files[name] for manifest in generations if name in manifest.files]
            if target.is_file() and not _is_older(target, versions[0], is_behind):
                continue
            if any(self._fetch_file(name, stored) for stored in dict.fromkeys(versions)):
                fetched.append(name)
            elif name in _NEEDED and not target.is_file():
                raise WorkError(
                    f"{name} in {self._remote.uri} is damaged, and the run cannot go on without it.",
                    "Run again with --overwrite to start from the beginning.",
                )
        return fetched

    def _fetch_file(self, name: str, stored: StoredFile) -> bool:
        target = self._folder / name
        temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
        try:
            self._fetch(stored, temporary)
            os.replace(temporary, target)
        except _DamagedError as error:
            self._warn(f"{name} in {self._remote.uri} is damaged ({error}); looking for an older one.")
            return False
        finally:
            temporary.unlink(missing_ok=True)
        return True

    def _fetch(self, stored: StoredFile, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            size, sha256 = self._remote.download(stored.object, target, mode=stored.mode)
        except FileNotFoundError:
            raise _DamagedError(f"{stored.object} is missing") from None
        if (size, sha256) != (stored.size, stored.sha256):
            raise _DamagedError(f"{stored.object} has another sha256")


def _is_older(target: Path, stored: StoredFile, is_behind: bool) -> bool:
    """Whether the storage knows more: any other content where the run is behind, else only rows that were appended."""
    size = target.stat().st_size
    if is_behind:
        return size != stored.size or integrity.sha256_of(target) != stored.sha256
    return target.suffix == ".jsonl" and size < stored.size
