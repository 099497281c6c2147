"""What of a run folder is mirrored, and the manifests without which nothing in the storage counts.

    manifests/<piece>.<generation>.json      sizes, sha256 and modes; written last, deleted first
    checkpoints/step-000040/, best/..., student/   pieces that are whole or not there at all
    files/<sha256>/<path>                    everything else, a new object for each new content

A manifest carries its own sha256, so one that was cut off counts as absent, whatever the file system promises.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath

from raycomplete.storage import integrity
from raycomplete.storage.remote import Remote

FILES = "files"
METRICS = "metrics.jsonl"
MANIFESTS = "manifests"
CHECKPOINTS, BEST, STUDENT = "checkpoints", "best", "student"
OWN_FOLDERS = (MANIFESTS, FILES, CHECKPOINTS, BEST, STUDENT)  # all that a run has in its storage
_PIECE = re.compile(r"files|student|(checkpoints|best)/step-\d{6,}")
# Pieces of their own, and what is no result: Ray Train's bookkeeping, logs of other tools, models of attacks.
_NOT_LOOSE = {CHECKPOINTS, BEST, STUDENT, "ray_train", "tensorboard", "wandb", "finetune"}


@dataclass(frozen=True)
class StoredFile:
    """One file of a piece: its size in bytes, sha256, permissions, and where its content lies in the storage."""

    size: int
    sha256: str
    mode: int
    object: str


@dataclass(frozen=True)
class Manifest:
    """A piece that is whole in the storage.

    Attributes:
        piece: "files", "student", "checkpoints/step-000040" and the like.
        generation: Counts up when a piece changes; the highest one that can be read is the piece.
        files: By path relative to the piece.
    """

    piece: str
    generation: int
    files: dict[str, StoredFile]

    @property
    def path(self) -> str:
        """Where it lies."""
        return f"{MANIFESTS}/{self.piece}.{self.generation:08d}.json"

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files.values())

    def encode(self) -> bytes:
        """As JSON, with the sha256 of itself."""
        body = json.dumps(asdict(self), sort_keys=True)
        return json.dumps({"sha256": hashlib.sha256(body.encode()).hexdigest(), "manifest": body}).encode()

    @classmethod
    def decode(cls, content: bytes) -> Manifest | None:
        """Reads one back; None where it is cut off or changed."""
        try:
            outer = json.loads(content)
            body = outer["manifest"]
            if hashlib.sha256(body.encode()).hexdigest() != outer["sha256"]:
                return None
            fields = json.loads(body)
            files = {name: StoredFile(**file) for name, file in fields["files"].items()}
            manifest = cls(fields["piece"], int(fields["generation"]), files)
        except (ValueError, KeyError, TypeError, AttributeError):
            return None
        # Who can write there must not write anywhere else here.
        paths = [PurePosixPath(name) for name in files]
        is_inside = not any(path.is_absolute() or ".." in path.parts or not path.parts for path in paths)
        return manifest if is_inside and _PIECE.fullmatch(manifest.piece) else None


class Catalog:
    """The manifests of a storage, newest generation first; kept in step by its one writer."""

    def __init__(self, remote: Remote) -> None:
        self._remote = remote
        self._held: dict[str, list[Manifest]] = {}
        for path in sorted(remote.sizes(MANIFESTS), reverse=True):
            manifest = Manifest.decode(remote.read(path))
            if manifest is not None:
                self._held.setdefault(manifest.piece, []).append(manifest)

    def pieces(self, folder: str = "") -> list[str]:
        """Names of pieces, of one folder where it is given."""
        return sorted(piece for piece in self._held if piece.startswith(folder))

    def generations(self, piece: str) -> list[Manifest]:
        """Newest first."""
        return list(self._held.get(piece, ()))

    def newest(self, piece: str) -> Manifest | None:
        """What counts, or None."""
        return next(iter(self._held.get(piece, ())), None)

    def publish(self, manifest: Manifest, *, keep: int = 1) -> None:
        """Makes a piece count, and drops manifests of it but the newest `keep`."""
        self._remote.write(manifest.path, manifest.encode())
        held = [manifest, *self._held.get(manifest.piece, ())]
        self._held[manifest.piece] = held[:keep]
        for old in held[keep:]:
            self._remote.delete(old.path)

    def withdraw(self, piece: str) -> None:
        """From here on the piece does not count."""
        for manifest in self._held.pop(piece, ()):
            self._remote.delete(manifest.path)


def step_piece(folder: str, step: int) -> str:
    """("checkpoints", 40) -> "checkpoints/step-000040"."""
    return f"{folder}/step-{step:06d}"


def finished_pieces(run_folder: Path) -> list[str]:
    """Folders of a run that are whole, best checkpoints before the checkpoints that speak of them."""
    best, checkpoints = (
        [f"{kind}/{path.name}" for path in integrity.complete_checkpoints(run_folder / kind)]
        for kind in (BEST, CHECKPOINTS)
    )
    student = [STUDENT] if (run_folder / STUDENT / "config.json").is_file() else []
    return [*best, *checkpoints, *student]


def loose_files(run_folder: Path) -> list[Path]:
    """Everything else that is a result: settings, samples, metrics, evaluation, summary, report.

    Checkpoints are not looked into at all: the trainer removes them at any time.
    """
    found = []
    for place, folders, names in os.walk(run_folder):
        folders[:] = [name for name in folders if name not in _NOT_LOOSE and not name.startswith(".")]
        found += [Path(place) / name for name in names if not name.startswith(".")]
    return sorted(path for path in found if path.is_file())
