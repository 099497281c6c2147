"""A folder on any file system: pyarrow's own ones (S3, GCS, HDFS, a mount), and through fsspec all others."""

from __future__ import annotations

import os
import stat
import uuid
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

import pyarrow as pa
from pyarrow import fs as pafs

from raycomplete.runtime.errors import SetupError, WaitTimeoutError
from raycomplete.runtime.files import PRIVATE
from raycomplete.runtime.machine import within

FAILURES = (OSError, pa.ArrowException, ValueError)
_ANSWERS_WITHIN_S = 30.0
# There a folder is no more than a common beginning of names, and making one may ask for rights over the bucket.
_WITHOUT_FOLDERS = {"s3", "gs", "gcs", "abfs", "abfss", "az", "oss", "oci"}
# What to do, and the words of an error that ask for it; the first line that matches counts.
_REMEDIES = {
    "Create the bucket, or correct output.storage.": ("NO_SUCH_BUCKET", "bucket does not exist", "NoSuchBucket"),
    "Set credentials that may read, write and delete there (for S3 AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY).": (
        "ACCESS_DENIED INVALID_ACCESS_KEY SIGNATURE_DOES_NOT_MATCH Forbidden denied redential".split()
    ),
    "Free space there.": ("No space left",),
    "Check output.storage, the network and the credentials in the environment.": ("",),
}


class Remote:
    """A folder of a file system; files below it are named by paths with slashes."""

    def __init__(self, uri: str) -> None:
        self.uri = uri.split("?")[0]
        file_system, root = _open(uri)
        self._mount = Path(root) if isinstance(file_system, pafs.LocalFileSystem) else None
        self._fs = pafs.SubTreeFileSystem(root, file_system)

    def read(self, path: str) -> bytes:
        """Returns the content of a file; FileNotFoundError where there is none."""
        with self._fs.open_input_stream(path) as stream:
            return bytes(stream.read())

    def write(self, path: str, content: bytes) -> None:
        """Writes a file, replacing what is there."""
        self._prepare(path, PRIVATE)
        with self._fs.open_output_stream(path) as stream:
            stream.write(content)

    def upload(self, source: Path, path: str) -> None:
        """Copies a local file there."""
        self._prepare(path, stat.S_IMODE(source.stat().st_mode))
        pafs.copy_files(str(source.absolute()), path, pafs.LocalFileSystem(), self._fs)

    def download(self, path: str, target: Path, mode: int) -> None:
        """Copies a file from there into a new local one, with these permissions."""
        target.parent.mkdir(parents=True, exist_ok=True)
        target.touch(PRIVATE, exist_ok=False)
        pafs.copy_files(path, str(target.absolute()), self._fs, pafs.LocalFileSystem())
        with target.open("rb") as file:
            os.fsync(file.fileno())
        target.chmod(stat.S_IMODE(mode))

    def sizes(self, folder: str) -> dict[str, int]:
        """Returns the bytes of every file below a folder, by path; empty where there is none."""
        found = self._fs.get_file_info(pafs.FileSelector(folder, recursive=True, allow_not_found=True))
        return {info.path: info.size for info in found if info.type == pafs.FileType.File}

    def delete(self, path: str) -> None:
        """Removes a file; one that is gone already is fine."""
        with suppress(FileNotFoundError):
            self._fs.delete_file(path)
        if self._mount:
            with suppress(OSError):  # folders that are not empty yet
                for folder in [*Path(path).parents][:-1]:
                    (self._mount / folder).rmdir()

    def _prepare(self, path: str, mode: int) -> None:
        if urlsplit(self.uri).scheme not in _WITHOUT_FOLDERS:
            self._fs.create_dir(path.rpartition("/")[0], recursive=True)
        if self._mount:  # it may have other users
            (self._mount / path).touch(PRIVATE)
            (self._mount / path).chmod(mode)


def connect(uri: str) -> Remote:
    """Opens a storage and proves that it can be written, read and deleted from."""
    shown = uri.split("?")[0]

    def probe() -> Remote:
        remote = Remote(uri)
        name, content = f".probe/{uuid.uuid4().hex}", uuid.uuid4().bytes
        remote.write(name, content)
        if remote.read(name) != content:
            raise OSError("what was written does not come back")
        remote.delete(name)
        return remote

    try:
        return within(_ANSWERS_WITHIN_S, f"The storage {shown} did not answer", probe)
    except WaitTimeoutError as error:
        raise SetupError(error.problem, "Check output.storage and the network.") from error
    except SetupError:
        raise
    except FAILURES as error:
        remedy = next(text for text, words in _REMEDIES.items() if any(word in str(error) for word in words))
        raise SetupError(f"The storage {shown} cannot be used ({reason_of(error)}).", remedy) from error


def reason_of(error: BaseException) -> str:
    """Returns the first line of an error, without the request ids that object stores add."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    text = text.split(" (Request ID")[0].split(". Detail:")[0]
    return text if len(text) <= 300 else text[:300] + " ..."


def _open(uri: str) -> tuple[pafs.FileSystem, str]:
    try:
        file_system, path = pafs.FileSystem.from_uri(uri)
        return file_system, path
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:  # not pyarrow's, or left out of this build
        if isinstance(error, pa.ArrowInvalid) and "nrecognized filesystem type" not in str(error):
            raise
    import fsspec

    place = uri.split("?")[0]
    try:
        found, path = fsspec.core.url_to_fs(place, use_listings_cache=False)
    except (ImportError, ValueError) as error:
        raise SetupError(
            f"No installed package knows the storage {place} ({reason_of(error)}).",
            "Install the fsspec package that it names, or choose another output.storage.",
        ) from error
    return pafs.PyFileSystem(pafs.FSSpecHandler(found)), path
