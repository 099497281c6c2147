"""The thread that keeps a storage up to date while a run works, so that training never waits for it.

It looks at the run folder now and then and uploads what is new, one file at a time: nothing piles up, and whatever was
overtaken in the meantime is never sent. Failures are told at once, tried again with growing pauses, and are an error
only if something is still missing at the end.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import stat
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pyarrow as pa

from raycomplete.runtime.errors import WorkError
from raycomplete.runtime.files import PRIVATE
from raycomplete.storage import integrity
from raycomplete.storage.pieces import (
    BEST,
    CHECKPOINTS,
    FILES,
    METRICS,
    OWN_FOLDERS,
    STUDENT,
    Catalog,
    Manifest,
    StoredFile,
    finished_pieces,
    loose_files,
    step_piece,
)
from raycomplete.storage.remote import Remote, in_words

_STAGE = ".mirror"
_LOCK = ".mirror.lock"
_LONGEST_PAUSE_S = 60.0
_REPEAT_BYTES_PER_S = 100_000  # of one growing file: 10 MB of log every 100 s
_FAILURES = (OSError, pa.ArrowException, ValueError)
Signature = tuple[tuple[str, int, int], ...]
"""(name, size, time of change) of every file: tells cheaply whether a folder is still the same."""


class Mirror:
    """Mirrors one run folder.

    Args:
        remote: Where to.
        run_folder: What.
        keep: Checkpoints that stay in the storage, as `train.keep_checkpoints`.
        keep_every: As `train.keep_every`.
        warn: Is told of failures, in a sentence.
        interval_s: Pause between two looks.
        ready: Asked before each look; nothing is mirrored until it says yes.
        anew: What an earlier run left in the storage is removed first.
    """

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
        self._remote, self._folder = remote, run_folder
        self._keep, self._keep_every = keep, keep_every
        self._warn, self._interval_s, self._ready = warn, interval_s, ready
        self._anew, self._is_swept = anew, False
        self._catalog: Catalog | None = None
        self._seen: dict[str, Signature] = {}  # what is mirrored, as it was when it was
        self._known: dict[str, tuple[Signature, StoredFile]] = {}  # loose files, likewise
        self._sent_at: dict[str, float] = {}
        self.missing: dict[str, str] = {}
        self._lock: int | None = None  # the kernel lets go of it when this process ends
        self._insists = True
        self._ending = threading.Event()
        self._gave_up = threading.Event()
        self._thread = threading.Thread(target=self._work, name="storage-mirror", daemon=True)

    def start(self) -> None:
        """Begins to look at the run folder."""
        self._thread.start()

    def close(self, timeout_s: float, *, insist: bool = True) -> None:
        """Mirrors what is left and ends.

        Args:
            timeout_s: Longest wait.
            insist: Whether failures are tried again until then, or once only.

        Raises:
            WorkError: Something is not mirrored; the message names it, and it still lies in the run folder.
        """
        self._insists = insist
        self._ending.set()
        self._thread.join(timeout_s)
        self._gave_up.set()
        if self._lock is not None and not self._thread.is_alive():
            os.close(self._lock)
        missing = dict(self.missing)
        if self._thread.is_alive() and not missing:
            missing = {"something": f"the upload is still under way after {timeout_s:.0f} s"}
        if missing:
            named = "; ".join(f"{piece}: {reason}" for piece, reason in missing.items())
            raise WorkError(
                f"Not mirrored to {self._remote.uri}: {named}.",
                f"It is kept in {self._folder}; the same command with --resume mirrors it.",
            )

    def _work(self) -> None:
        pause_s = 1.0
        while not self._gave_up.is_set():
            is_last = self._ending.is_set()  # read first: what is finished by now is seen below
            try:
                if self._ready() and self._is_only_one():
                    self.look()
            except Exception as error:  # whatever it is, the end of the run must hear of it
                self._fail("the run folder", error)
            if is_last and not (self.missing and self._insists):
                return
            if self.missing:
                (self._gave_up if is_last else self._ending).wait(pause_s)
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
            else:
                pause_s = 1.0
                self._ending.wait(self._interval_s)

    def _is_only_one(self) -> bool:
        """Whether no other process mirrors this folder; one that does takes along what this one makes."""
        if self._lock is None:
            self._lock = os.open(self._folder / _LOCK, os.O_RDWR | os.O_CREAT, PRIVATE)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # a file system without locks
            return True
        return True

    def look(self) -> None:
        """Uploads what is new; `missing` then says what could not be, by piece."""
        finished = finished_pieces(self._folder)  # before the loose files: metrics of a checkpoint's steps come with it
        self._attempt(FILES, self._mirror_files)
        for piece in self._wanted(finished):
            self._attempt(piece, partial(self._mirror_folder, piece))
        for piece in [name for name in self.missing if name != FILES and not (self._folder / name).is_dir()]:
            del self.missing[piece]  # overtaken by a newer one and removed
        try:
            self._retain(finished)
        except _FAILURES as error:
            self._warn(f"What is no longer needed in {self._remote.uri} cannot be removed ({in_words(error)}).")

    def _attempt(self, piece: str, work: Callable[[], None]) -> None:
        try:
            if self._catalog is None:
                for folder in OWN_FOLDERS if self._anew else ():  # manifests are the first: then nothing counts
                    self._remote.delete_below(folder)
                self._anew = False
                self._catalog = Catalog(self._remote)
            work()
            self.missing.pop(piece, None)
        except _FAILURES as error:
            self._fail(piece, error)

    def _fail(self, piece: str, error: Exception) -> None:
        reason = in_words(error)
        if self.missing.get(piece) != reason:
            self._warn(f"{piece} cannot be mirrored to {self._remote.uri} for now ({reason}); trying again.")
        self.missing[piece] = reason

    def _wanted(self, finished: list[str]) -> list[str]:
        """Without checkpoints that the storage would drop at once."""
        there = [] if self._catalog is None else self._catalog.pieces()
        steps = [integrity.step_of(piece) for piece in {*finished, *there} if piece.startswith(f"{CHECKPOINTS}/")]
        old = {step_piece(CHECKPOINTS, step) for step in integrity.superseded(steps, self._keep, self._keep_every)}
        return [piece for piece in finished if piece not in old]

    # --- Loose files -------------------------------------------------------------------------------------------------

    def _mirror_files(self) -> None:
        assert self._catalog is not None
        before = self._catalog.newest(FILES)
        held = dict(before.files) if before else {}
        now: dict[str, StoredFile] = {}
        for path in loose_files(self._folder):
            name = path.relative_to(self._folder).as_posix()
            try:
                now[name] = self._mirror_file(path, name, held.get(name))
            except FileNotFoundError:
                if path.exists():
                    raise
        if now != held:
            generation = before.generation + 1 if before else 1
            self._catalog.publish(Manifest(FILES, generation, now), keep=2)
            self._collect()

    def _mirror_file(self, path: Path, name: str, held: StoredFile | None) -> StoredFile:
        info = path.stat()
        signature: Signature = ((name, info.st_size, info.st_mtime_ns),)
        known = self._known.get(name)
        if known is not None and (known[0] == signature or self._may_rest(name, known[1])):
            return known[1]
        content = path.read_bytes()
        if path.suffix == ".jsonl":  # its last line may be in the middle of being written
            content = content[: content.rfind(b"\n") + 1]
        sha256 = hashlib.sha256(content).hexdigest()
        stored = StoredFile(len(content), sha256, stat.S_IMODE(info.st_mode), f"{FILES}/{sha256[:20]}/{name}")
        if held != stored:
            self._remote.write(stored.object, content)
            self._sent_at[name] = time.monotonic()
        self._known[name] = (signature, stored)
        return stored

    def _may_rest(self, name: str, sent: StoredFile) -> bool:
        """A file that grows is sent whole each time, so after a pause that grows with it, and at the end at once."""
        if self._ending.is_set() or name == METRICS:  # a checkpoint needs the rows of its steps
            return False
        return time.monotonic() - self._sent_at.get(name, -1e9) < sent.size / _REPEAT_BYTES_PER_S

    def _collect(self) -> None:
        """Removes contents that neither of the two newest generations names."""
        assert self._catalog is not None
        named = {file.object for manifest in self._catalog.generations(FILES) for file in manifest.files.values()}
        for path in self._remote.sizes(FILES):
            if path not in named:
                self._remote.delete(path)

    # --- Folders -----------------------------------------------------------------------------------------------------

    def _mirror_folder(self, piece: str) -> None:
        try:
            self._send_folder(piece)
        except FileNotFoundError:
            if piece in finished_pieces(self._folder):
                raise
            # It was overtaken by newer ones and removed on the way.
        finally:
            shutil.rmtree(self._folder / _STAGE, ignore_errors=True)

    def _send_folder(self, piece: str) -> None:
        assert self._catalog is not None
        source = self._folder / piece
        signature = _signature(source)
        if self._seen.get(piece) == signature:
            return
        before = self._catalog.newest(piece)
        if before is None or not _is_same(source, before):
            source = _linked(source, self._folder / _STAGE / piece)  # retention may remove it while it is on its way
            if piece != STUDENT and not (source / integrity.COMPLETE).is_file():
                raise FileNotFoundError(f"{piece} is being removed")  # what was still there is no checkpoint
            self._catalog.withdraw(piece)
            files = self._upload(source, piece)
            there = self._remote.sizes(piece)
            short = [file.object for file in files.values() if there.get(file.object) != file.size]
            if short:
                raise OSError(f"{short[0]} did not arrive whole")
            self._catalog.publish(Manifest(piece, 1, files))
        self._seen[piece] = signature

    def _upload(self, source: Path, piece: str) -> dict[str, StoredFile]:
        files = {}
        for path in _files_of(source):
            name = path.relative_to(source).as_posix()
            target = f"{piece}/{name}"
            size, sha256 = self._remote.upload(path, target)
            files[name] = StoredFile(size, sha256, stat.S_IMODE(path.stat().st_mode), target)
        for name, digest in integrity.sealed(source).items():
            sent = files.get(name)
            if sent is None or sent.size != digest["size"] or digest["sha256"] not in (None, sent.sha256):
                raise ValueError(f"{name} is not what was written at first: the checkpoint is damaged on its disk")
        return files

    def _retain(self, finished: list[str]) -> None:
        """Old checkpoints go, and so do best ones that the run folder has dropped and remains of broken uploads."""
        if self._catalog is None or self.missing:
            return
        steps = [integrity.step_of(piece) for piece in self._catalog.pieces(f"{CHECKPOINTS}/")]
        gone = [step_piece(CHECKPOINTS, step) for step in integrity.superseded(steps, self._keep, self._keep_every)]
        if any(piece.startswith(BEST) for piece in finished):
            gone += [piece for piece in self._catalog.pieces(f"{BEST}/") if piece not in finished]
        for piece in gone:
            self._catalog.withdraw(piece)
        whole = {*self._catalog.pieces()}
        for kind in (CHECKPOINTS, BEST) if gone or not self._is_swept else ():
            for piece in {"/".join(path.split("/")[:2]) for path in self._remote.sizes(kind)} - whole:
                self._remote.delete_below(piece)
        self._is_swept = True
        self._seen = {piece: signature for piece, signature in self._seen.items() if piece in whole}


def _files_of(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != integrity.REFUSED]


def _signature(folder: Path) -> Signature:
    infos = [(path.relative_to(folder).as_posix(), path.stat()) for path in _files_of(folder)]
    return tuple((name, info.st_size, info.st_mtime_ns) for name, info in infos)


def _is_same(folder: Path, manifest: Manifest) -> bool:
    """Whether a local folder is what the storage holds; of a sealed checkpoint only the seal is read."""
    paths = {path.relative_to(folder).as_posix(): path for path in _files_of(folder)}
    if paths.keys() != manifest.files.keys():
        return False
    known = integrity.sealed(folder)
    for name, path in paths.items():
        stored = manifest.files[name]
        if path.stat().st_size != stored.size:
            return False
        sha256 = known.get(name, {}).get("sha256") or integrity.sha256_of(path)
        if sha256 != stored.sha256:
            return False
    return True


def _linked(source: Path, stage: Path) -> Path:
    """A second name for every file, which costs no space; the folder itself where the disk knows no hard links."""
    try:
        for path in _files_of(source):
            target = stage / path.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.link(path, target)
    except FileNotFoundError:
        raise
    except OSError:
        return source
    return stage
