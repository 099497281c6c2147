"""Storages to test with: a folder, fsspec's memory, and S3 by a local server."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from raycomplete.storage.remote import Remote


def http(url: str, method: str = "GET", body: bytes | None = None) -> None:
    headers = {"Content-Type": "application/octet-stream"}
    with urllib.request.urlopen(urllib.request.Request(url, body, headers, method=method), timeout=10) as answer:
        answer.read()


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a local S3, with its one bucket "bucket"."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "no-real-secret", "AWS_EC2_METADATA_DISABLED": "true"}
    os.environ |= keys
    log = (tmp_path_factory.mktemp("s3") / "log").open("wb")
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with subprocess.Popen(command, stdout=log, stderr=log) as server:
        address, deadline = f"127.0.0.1:{port}", time.monotonic() + 120
        while True:
            try:
                http(f"http://{address}/bucket", "PUT")
                break
            except OSError:
                if server.poll() is not None or time.monotonic() > deadline:
                    raise
                time.sleep(0.2)
        yield address
        server.terminate()
    log.close()
    for name in keys:
        os.environ.pop(name)


@pytest.fixture(params=["file", "memory", pytest.param("s3", marks=pytest.mark.slow)])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A place of its own for a test."""
    if request.param == "file":
        return f"file://{tmp_path}/storage/run"
    if request.param == "memory":
        return f"memory://{uuid.uuid4().hex}/run"
    return s3_uri(request.getfixturevalue("s3_server"), uuid.uuid4().hex)


def s3_uri(address: str, prefix: str, bucket: str = "bucket") -> str:
    return f"s3://{bucket}/{prefix}?endpoint_override={address}&scheme=http&region=us-east-1"


@pytest.fixture
def remote(uri: str) -> Remote:
    return Remote(uri)


class BrokenRemote(Remote):
    """A storage whose uploads fail where the path holds `bad`, as long as `failures` lasts."""

    def __init__(self, uri: str, bad: str, failures: float = float("inf")) -> None:
        super().__init__(uri)
        self.bad, self.failures = bad, failures

    def _prepare(self, path: str, mode: int) -> None:
        if self.bad in path and self.failures > 0:
            self.failures -= 1
            raise OSError("the line is cut")
        super()._prepare(path, mode)
