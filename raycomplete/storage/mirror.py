"""A thread that mirrors a run folder while the run works, and the way back: fetching what a run folder lacks.

    manifests/00000012.json                                 size, sha256, mode and place of every file that counts
    checkpoints/step-000040/, best/step-000040/, student/   pieces that are whole or do not count
    files/<sha256>/<path>                                   every other result, a new object for each new content

A manifest is written after the files that it names and carries its own sha256: what was cut off counts as absent.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import stat
import threading
import time
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import pyarrow as pa

from raycomplete.runtime.errors import WorkError
from raycomplete.runtime.files import PRIVATE
from raycomplete.runtime.machine import free_bytes
from raycomplete.storage import integrity
from raycomplete.storage.remote import FAILURES, Remote, reason_of

CLOSE_TIMEOUT_S = 900.0  # longest wait at the end of a run for what is not mirrored yet
FILES, CHECKPOINTS, BEST, STUDENT = "files", "checkpoints", "best", "student"
_MANIFESTS = "manifests"
_PIECE = re.compile(rf"{FILES}|{STUDENT}|({CHECKPOINTS}|{BEST})/step-\d{{6,}}")
# Pieces of their own, and what is no result: Ray Train's bookkeeping, logs of other tools, models of attacks.
_NO_FILES = {CHECKPOINTS, BEST, STUDENT, "ray_train", "tensorboard", "wandb", "finetune"}
_STAGE, _LOCK = ".mirror", ".mirror.lock"
_REPEAT_BYTES_PER_S = 100_000  # of one growing file: 10 MB of log every 100 s
# Without these a run would go on from something else than it began with.
_NEEDED = ("config.yaml", "inputs.json", "samples.jsonl")
_SPARE_BYTES = 64 * 2**20


class StoredFile(NamedTuple):
    """A file in the storage: bytes, sha256, permissions, and the path of its content."""

    size: int
    sha256: str
    mode: int
    path: str


Pieces = dict[str, dict[str, StoredFile]]
"""By piece ("files", "student", "checkpoints/step-000040") and path relative to it."""


class Manifest:
    """The pieces that are whole in a storage, which has one writer.

    `pieces` is what the newest manifest names that can be read; `holds_run` where there is any, readable or not.
    """

    def __init__(self, remote: Remote) -> None:
        self._remote, self._paths = remote, sorted(remote.sizes(_MANIFESTS))
        readable = (pieces for path in reversed(self._paths) if (pieces := decode(remote.read(path))) is not None)
        self.pieces: Pieces = next(readable, {})
        self.holds_run = bool(self._paths)

    def publish(self, pieces: Pieces) -> None:
        """Makes these pieces count and no others."""
        newest = int(Path(self._paths[-1]).stem) if self._paths else 0
        path = f"{_MANIFESTS}/{newest + 1:08d}.json"
        self._remote.write(path, encode(pieces))
        self.pieces = pieces
        self._paths.append(path)
        while len(self._paths) > 2:  # the one before stays, for the case that this one never reaches the disk
            self._remote.delete(self._paths.pop(0))

    def withdraw(self, *gone: str) -> None:
        """Makes some pieces count no longer."""
        self.publish({piece: files for piece, files in self.pieces.items() if piece not in gone})

    def steps(self, kind: str) -> list[int]:
        """Lists the steps of "checkpoints" or "best", oldest first."""
        return sorted(integrity.step_of(piece) for piece in self.pieces if piece.startswith(f"{kind}/"))


def encode(pieces: Pieces) -> bytes:
    """Writes a manifest as JSON with its own sha256."""
    body = json.dumps(pieces, sort_keys=True)
    return json.dumps({"sha256": hashlib.sha256(body.encode()).hexdigest(), "pieces": body}).encode()


def decode(content: bytes) -> Pieces | None:
    """Reads a manifest; None where it is cut off, changed, or names a place outside the run folder."""
    try:
        outer = json.loads(content)
        if hashlib.sha256(outer["pieces"].encode()).hexdigest() != outer["sha256"]:
            return None
        found = json.loads(outer["pieces"]).items()
        pieces = {piece: {name: StoredFile(*file) for name, file in files.items()} for piece, files in found}
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    # Who can write there must not write anywhere else here.
    paths = [PurePosixPath(name) for files in pieces.values() for name in files]
    is_inside = not any(path.is_absolute() or ".." in path.parts or not path.parts for path in paths)
    return pieces if is_inside and all(map(_PIECE.fullmatch, pieces)) else None


class Mirror:
    """Mirrors one run folder; failures are told at once and tried again at the next look."""

    def __init__(
        self,
        remote: Remote,
        run_folder: Path,
        *,
        keep: int,
        keep_every: int = 0,
        warn: Callable[[str], None],
        interval_s: float = 10.0,
        ready: Callable[[], bool] = lambda: True,
        anew: bool = False,
    ) -> None:
        self._remote, self._folder, self._warn, self._ready, self._anew = remote, run_folder, warn, ready, anew
        self._interval_s, self._superseded = interval_s, partial(integrity.superseded, keep=keep, keep_every=keep_every)
        # Sizes and times on the disk of what is mirrored, by piece and by file, and when a file was sent.
        self._seen: dict[str, list[tuple[int, int]]] = {}
        self._sent: dict[str, tuple[tuple[int, int], float, StoredFile]] = {}
        self._is_swept = False
        self.missing: dict[str, str] = {}
        self._lock: int | None = None  # the kernel lets go of it when this process ends
        self._insists = True
        self._ending, self._gave_up = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._work, name="storage-mirror", daemon=True)

    @cached_property
    def _manifest(self) -> Manifest:
        return Manifest(self._remote)

    def start(self) -> None:
        """Begins to look at the run folder."""
        self._thread.start()

    def close(self, timeout_s: float, *, insist: bool = True) -> None:
        """Mirrors what is left and ends; failures are tried again until the time is up, or once unless `insist`."""
        self._insists = insist
        self._ending.set()
        self._thread.join(timeout_s)
        self._gave_up.set()
        is_alive, missing = self._thread.is_alive(), dict(self.missing)
        if is_alive:
            missing = missing or {"something": f"the upload is still under way after {timeout_s:.0f} s"}
        elif self._lock is not None:
            os.close(self._lock)
        if missing:
            named = "; ".join(f"{piece}: {reason}" for piece, reason in missing.items())
            raise WorkError(
                f"Not mirrored to {self._remote.uri}: {named}.",
                f"It is kept in {self._folder}; the same command with --resume mirrors it.",
            )

    def _work(self) -> None:
        while not self._gave_up.is_set():
            is_last = self._ending.is_set()  # read first: what is finished by now is seen below
            try:
                if self._ready() and self._is_only_one():
                    self.look()
            except Exception as error:  # whatever it is, the end of the run must hear of it
                self._fail("the run folder", error)
            if is_last and not (self.missing and self._insists):
                return
            (self._gave_up if is_last else self._ending).wait(self._interval_s)

    def _is_only_one(self) -> bool:
        """Takes the lock of the folder; another process that has it takes along what this one makes."""
        if self._lock is None:
            self._lock = os.open(self._folder / _LOCK, os.O_RDWR | os.O_CREAT, PRIVATE)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return not isinstance(error, BlockingIOError)  # some file systems know no locks
        return True

    def look(self) -> None:
        """Uploads what is new; `missing` then says what could not be, by piece."""
        finished = finished_pieces(self._folder)  # before the files: metrics of a checkpoint's steps come with it
        try:
            for folder in (_MANIFESTS, FILES, CHECKPOINTS, BEST, STUDENT) if self._anew else ():
                for path in self._remote.sizes(folder):  # manifests go first: without them nothing counts
                    self._remote.delete(path)
            self._anew = False
            steps = {*self._manifest.steps(CHECKPOINTS)}
        except FAILURES as error:
            for piece in (FILES, *finished):
                self._fail(piece, error)
            return
        self._attempt(FILES, self._mirror_files)
        steps |= {integrity.step_of(piece) for piece in finished if piece.startswith(CHECKPOINTS)}
        old = {step_piece(CHECKPOINTS, step) for step in self._superseded([*steps])}
        for piece in finished:
            if piece not in old:  # the storage would drop it at once
                self._attempt(piece, partial(self._mirror_folder, piece))
        for piece in [name for name in self.missing if name != FILES and not (self._folder / name).is_dir()]:
            del self.missing[piece]  # overtaken by a newer one and removed
        try:
            self._retain(finished)
        except FAILURES as error:
            self._warn(f"What is no longer needed in {self._remote.uri} cannot be removed ({reason_of(error)}).")

    def _attempt(self, piece: str, work: Callable[[], None]) -> None:
        try:
            work()
            self.missing.pop(piece, None)
        except FAILURES as error:
            self._fail(piece, error)

    def _fail(self, piece: str, error: Exception) -> None:
        reason = reason_of(error)
        if self.missing.get(piece) != reason:
            self._warn(f"{piece} cannot be mirrored to {self._remote.uri} for now ({reason}); trying again.")
        self.missing[piece] = reason

    def _mirror_files(self) -> None:
        held, now = self._manifest.pieces.get(FILES, {}), {}
        for path in loose_files(self._folder):
            name = path.relative_to(self._folder).as_posix()
            try:
                now[name] = self._mirror_file(path, name, held.get(name))
            except FileNotFoundError:
                if path.exists():
                    raise
        if now != held:
            self._manifest.publish({**self._manifest.pieces, FILES: now})
            self._sweep(FILES)

    def _mirror_file(self, path: Path, name: str, held: StoredFile | None) -> StoredFile:
        info = path.stat()
        state, (before, sent_at, sent) = (info.st_size, info.st_mtime_ns), self._sent.get(name, (None, 0.0, None))
        # A file that grows is sent whole each time, so after a pause that grows with it. Metrics do not wait, since a
        # checkpoint needs the rows of its steps, and at the end nothing does.
        may_wait = name != "metrics.jsonl" and not self._ending.is_set()
        waits = may_wait and sent is not None and time.monotonic() < sent_at + sent.size / _REPEAT_BYTES_PER_S
        if sent is not None and (state == before or waits):
            return sent
        content = path.read_bytes()
        if path.suffix == ".jsonl":  # its last line may be in the middle of being written
            content = content[: content.rfind(b"\n") + 1]
        sha256 = hashlib.sha256(content).hexdigest()
        file = StoredFile(len(content), sha256, stat.S_IMODE(info.st_mode), f"{FILES}/{sha256[:20]}/{name}")
        if file != held:
            self._remote.write(file.path, content)
            sent_at = time.monotonic()
        self._sent[name] = state, sent_at, file
        return file

    def _mirror_folder(self, piece: str) -> None:
        source, stage = self._folder / piece, self._folder / _STAGE
        try:
            infos = [path.stat() for path in sorted(source.rglob("*"))]
            state = [(info.st_size, info.st_mtime_ns) for info in infos]
            if self._seen.get(piece) != state:
                self._send_folder(piece, _linked(source, stage / piece))
                self._seen[piece] = state
        except FileNotFoundError:
            if piece in finished_pieces(self._folder):
                raise
            # It was overtaken by newer ones and removed on the way.
        finally:
            shutil.rmtree(stage, ignore_errors=True)

    def _send_folder(self, piece: str, source: Path) -> None:
        seal = source / ("config.json" if piece == STUDENT else integrity.COMPLETE)
        if not seal.is_file():
            raise FileNotFoundError(f"{piece} is being removed")  # what is still there is no checkpoint
        found = integrity.digests(source)
        if piece != STUDENT:
            if fault := integrity.damage(source, found=found):
                raise ValueError(f"{fault}: the checkpoint is damaged on its disk")
            found[seal.name] = {"size": seal.stat().st_size, "sha256": integrity.sha256_of(seal)}
        files = {}
        for name, digest in found.items():
            mode = stat.S_IMODE((source / name).stat().st_mode)
            files[name] = StoredFile(digest["size"], digest["sha256"], mode, f"{piece}/{name}")
        held = self._manifest.pieces.get(piece)
        if held == files:
            return
        if held is not None:  # a resumed run wrote the step again, or a student got its model card
            self._manifest.withdraw(piece)
        for name, file in files.items():
            if held is None or held.get(name) != file:
                self._remote.upload(source / name, file.path)
        there = self._remote.sizes(piece)
        for file in files.values():
            if there.get(file.path) != file.size:
                raise OSError(f"{file.path} did not arrive whole")
        self._manifest.publish({**self._manifest.pieces, piece: files})

    def _retain(self, finished: list[str]) -> None:
        """Drops old checkpoints, best ones that the run folder has dropped, and remains of broken uploads."""
        if self.missing:
            return
        gone = [step_piece(CHECKPOINTS, step) for step in self._superseded(self._manifest.steps(CHECKPOINTS))]
        if any(piece.startswith(BEST) for piece in finished):
            gone += [piece for piece in self._manifest.pieces if piece.startswith(BEST) and piece not in finished]
        if gone:
            self._manifest.withdraw(*gone)
        if gone or not self._is_swept:
            self._sweep(CHECKPOINTS, BEST)
        self._is_swept = True

    def _sweep(self, *folders: str) -> None:
        """Removes what the manifest does not name."""
        named = {file.path for files in self._manifest.pieces.values() for file in files.values()}
        for path in {path for folder in folders for path in self._remote.sizes(folder)} - named:
            self._remote.delete(path)


def finished_pieces(run_folder: Path) -> list[str]:
    """Lists folders of a run that are whole, best checkpoints before the checkpoints that speak of them."""
    kinds = (BEST, CHECKPOINTS)
    steps = [f"{kind}/{path.name}" for kind in kinds for path in integrity.complete_checkpoints(run_folder / kind)]
    return [*steps, STUDENT] if (run_folder / STUDENT / "config.json").is_file() else steps


def loose_files(run_folder: Path) -> list[Path]:
    """Lists all other results: settings, samples, metrics, evaluation, summary, report.

    Checkpoints are not looked into at all: the trainer removes them at any time.
    """
    found = []
    for place, folders, names in os.walk(run_folder):
        folders[:] = [name for name in folders if name not in _NO_FILES and not name.startswith(".")]
        found += [Path(place) / name for name in names if not name.startswith(".")]
    return sorted(path for path in found if path.is_file())


def step_piece(kind: str, step: int) -> str:
    return f"{kind}/step-{step:06d}"


def _linked(source: Path, stage: Path) -> Path:
    """Hard-links a folder (itself where the disk knows none), since retention may remove it while it is on its way."""
    try:
        shutil.copytree(source, stage, copy_function=os.link)
    except OSError:
        return source
    return stage


def restore(remote: Remote, run_folder: Path, *, hashed: bool, warn: Callable[[str], None]) -> list[str]:
    """Fetches what the run folder lacks."""
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
