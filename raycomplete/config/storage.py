"""Where results are mirrored: which URIs may stand in a run file."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import parse_qsl, unquote, urlsplit

SCHEMES = ("file", "s3", "gs", "gcs", "abfs", "abfss", "az", "hdfs", "webhdfs", "sftp", "oss", "oci", "memory")
_WITH_USER = ("abfs", "abfss", "sftp", "hdfs", "webhdfs")  # container@account, or a name that is no secret
# What may follow the question mark. Keys and passwords come from the environment and never stand in a file.
_OPTIONS = ("endpoint_override", "region", "scheme", "allow_bucket_creation")


def check_storage(uri: str) -> str:
    """Refuses a URI of no known kind, or one that carries a secret (which the message does not repeat).

    Raises:
        ValueError: See above.
    """
    parts = urlsplit(uri)
    user, at, _ = parts.netloc.rpartition("@")
    if at and (":" in user or parts.scheme not in _WITH_USER):
        raise ValueError(
            "must not hold a user, key or password, since run files are copied into run folders: name the place only, "
            "and give credentials in the environment (AWS_ACCESS_KEY_ID and the like)"
        )
    unknown = sorted({name for name, _ in parse_qsl(parts.query, keep_blank_values=True)} - {*_OPTIONS})
    if unknown or parts.fragment:
        raise ValueError(
            f"must not hold the options {', '.join(unknown) or '#'}: known are {', '.join(_OPTIONS)}; "
            "credentials belong in the environment"
        )
    if parts.scheme not in SCHEMES:
        raise ValueError(
            f"must be a URI that begins with one of {', '.join(f'{name}://' for name in SCHEMES)}, "
            f"such as s3://bucket/runs (found the scheme {parts.scheme or 'none'!r})"
        )
    if parts.scheme == "file" and (parts.netloc or not parts.path.startswith("/")):
        raise ValueError("needs an absolute path after file://, such as file:///mnt/runs")
    if not (parts.netloc or parts.path.strip("/")):
        raise ValueError("names no place: write s3://bucket/prefix")
    return uri


def inside(uri: str, folder: Path) -> bool:
    """Whether a file:// storage lies in a folder, which would then be mirrored into itself."""
    parts = urlsplit(uri)
    return parts.scheme == "file" and Path(unquote(parts.path)).resolve().is_relative_to(folder.resolve())


def joined(uri: str, name: str) -> str:
    """The URI of a name below it; options stay at the end."""
    parts = urlsplit(uri)
    place = f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}/{name}"
    return f"{place}?{parts.query}" if parts.query else place
