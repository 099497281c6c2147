"""One place on any file system: what pyarrow knows by itself, and through fsspec what it does not."""

from __future__ import annotations

import hashlib
import os
import uuid
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa
from pyarrow import fs as pafs

from raycomplete.runtime.errors import SetupError, WaitTimeoutError
from raycomplete.runtime.files import PRIVATE
from raycomplete.runtime.waiting import within

_BLOCK_BYTES = 8 * 2**20
# There a folder is no more than a common beginning of names, and making one may ask for rights over the bucket.
_WITHOUT_FOLDERS = {"s3", "gs", "gcs", "abfs", "abfss", "az", "oss", "oci"}
# What a storage says, and what to do about it; the first that matches counts.
_REMEDIES: tuple[tuple[tuple[str, ...], str], ...] = (
    (("NO_SUCH_BUCKET", "bucket does not exist", "NoSuchBucket"), "Create the bucket, or correct output.storage."),
    (
        (
            "ACCESS_DENIED",
            "INVALID_ACCESS_KEY",
            "SIGNATURE_DOES_NOT_MATCH",
            "Forbidden",
            "ermission denied",
            "redential",
        ),
        "Set credentials that may read, write and delete there (for S3 AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY).",
    ),
    (("No space left",), "Free space there."),
    (("",), "Check output.storage, the network and the credentials in the environment."),
)


class Remote:
    """A folder of a file system, and everything below it by path with slashes.

    Args:
        uri: As `output.storage`; credentials come from the environment.

    Raises:
        SetupError: No package that is installed knows this kind of storage.
        OSError: It cannot be reached.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri.split("?")[0]
        self._has_folders = urlsplit(uri).scheme not in _WITHOUT_FOLDERS
        self._fs, root = _open(uri)
        self._root = root.rstrip("/")

    def read(self, path: str) -> bytes:
        """Whole content; FileNotFoundError where there is none."""
        with self._fs.open_input_stream(self._full(path)) as stream:
            return bytes(stream.read())

    def write(self, path: str, content: bytes) -> None:
        """Whole content, replacing what is there."""
        with self._writer(path, PRIVATE) as stream:
            stream.write(content)

    def upload(self, source: Path, path: str) -> tuple[int, str]:
        """Copies a local file there; returns size and sha256 of what was sent."""
        digest, size = hashlib.sha256(), 0
        mode = source.stat().st_mode & 0o777
        with source.open("rb") as file, self._writer(path, mode) as stream:
            while block := file.read(_BLOCK_BYTES):
                digest.update(block)
                size += len(block)
                stream.write(block)
        return size, digest.hexdigest()

    def download(self, path: str, target: Path, *, mode: int) -> tuple[int, str]:
        """Copies a file from there into a new local one; returns size and sha256 of what came."""
        digest, size = hashlib.sha256(), 0
        with self._fs.open_input_stream(self._full(path)) as stream:
            target.parent.mkdir(parents=True, exist_ok=True)
            with os.fdopen(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, PRIVATE), "wb") as file:
                while block := stream.read(_BLOCK_BYTES):
                    digest.update(block)
                    size += len(block)
                    file.write(block)
                file.flush()
                os.fsync(file.fileno())
        target.chmod(mode & 0o777)
        return size, digest.hexdigest()

    def sizes(self, folder: str) -> dict[str, int]:
        """Bytes of every file below a folder, by path relative to this place; empty where there is none."""
        selector = pafs.FileSelector(self._full(folder), recursive=True, allow_not_found=True)
        found = self._fs.get_file_info(selector)
        return {
            info.path[len(self._root) :].lstrip("/"): info.size for info in found if info.type == pafs.FileType.File
        }

    def delete(self, path: str) -> None:
        """Removes a file; one that is gone already is fine."""
        try:
            self._fs.delete_file(self._full(path))
        except FileNotFoundError:
            return

    def delete_below(self, folder: str) -> None:
        """Removes a folder with all that is in it."""
        for path in self.sizes(folder):
            self.delete(path)
        if self._has_folders and self._fs.get_file_info(self._full(folder)).type == pafs.FileType.Directory:
            self._fs.delete_dir(self._full(folder))

    def _full(self, path: str) -> str:
        return f"{self._root}/{path}"

    def _writer(self, path: str, mode: int) -> Any:
        full = self._full(path)
        if self._has_folders:
            self._fs.create_dir(full.rsplit("/", 1)[0], recursive=True)
        stream = self._fs.open_output_stream(full)
        if isinstance(self._fs, pafs.LocalFileSystem):  # a mount may have other users
            os.chmod(full, mode)
        return stream


def connect(uri: str, *, timeout_s: float = 30.0) -> Remote:
    """Opens a storage and proves that it can be written, read and deleted from.

    Raises:
        SetupError: It cannot; one sentence with the reason and what to do.
    """
    shown = uri.split("?")[0]

    def probe() -> Remote:
        remote = Remote(uri)
        name, content = f".probe-{uuid.uuid4().hex}", uuid.uuid4().bytes
        remote.write(name, content)
        if remote.read(name) != content:
            raise OSError("what was written does not come back")
        remote.delete(name)
        return remote

    try:
        return within(timeout_s, f"The storage {shown} did not answer", probe)
    except WaitTimeoutError as error:
        raise SetupError(error.problem, "Check output.storage and the network.") from error
    except (OSError, pa.ArrowException, ValueError) as error:
        if isinstance(error, SetupError):
            raise
        reason = in_words(error)
        remedy = next(text for words, text in _REMEDIES if any(word in str(error) for word in words))
        raise SetupError(f"The storage {shown} cannot be used ({reason}).", remedy) from error


def in_words(error: BaseException) -> str:
    """The first line of an error, without the request ids that object stores add."""
    lines = str(error).strip().splitlines()
    text = lines[0].split(" (Request ID")[0].split(". Detail:")[0] if lines else type(error).__name__
    return text if len(text) <= 300 else text[:300] + " ..."


def _open(uri: str) -> tuple[Any, str]:
    try:
        found, path = pafs.FileSystem.from_uri(uri)
        return found, path
    except pa.ArrowInvalid as error:
        if "nrecognized filesystem type" not in str(error):
            raise
    except pa.ArrowNotImplementedError:
        pass  # this build of pyarrow leaves that file system out
    import fsspec

    place = uri.split("?")[0]
    try:
        found, path = fsspec.core.url_to_fs(place, use_listings_cache=False)
    except (ImportError, ValueError) as error:
        raise SetupError(
            f"No installed package knows the storage {place} ({in_words(error)}).",
            "Install the fsspec package that it names, or choose another output.storage.",
        ) from error
    return pafs.PyFileSystem(pafs.FSSpecHandler(found)), path
