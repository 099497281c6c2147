"""Installed packages, and a disk that fills up: named when it happens, and nothing half-written stays."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from raycomplete.runtime import machine
from raycomplete.runtime.errors import DiskFullError, SetupError
from raycomplete.runtime.machine import named_when_full, package_versions

FULL = Path("/dev/full")  # every write to it fails as on a full disk


def write_to_full_disk() -> None:
    FULL.write_text("row")


def save_to_full_disk() -> None:
    torch.save({"weight": torch.zeros(100_000)}, FULL)


def exceed_the_quota() -> None:
    raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))


@pytest.mark.parametrize("work", [write_to_full_disk, save_to_full_disk, exceed_the_quota])
def test_a_full_disk_is_told_in_one_sentence(work: Callable[[], None], tmp_path: Path) -> None:
    with pytest.raises(DiskFullError) as caught, named_when_full(tmp_path, "the checkpoint", 3 * 2**30):
        work()
    assert f"the checkpoint could not be written to {tmp_path} (3.0 GiB needed, " in caught.value.problem
    assert "--resume" in caught.value.remedy


def test_other_errors_pass(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="else"), named_when_full(tmp_path, "it"):
        raise OSError(errno.EIO, "something else")


def test_without_vllm_nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_PACKAGES", ("torch",))
    with pytest.raises(SetupError, match=r"vLLM is not installed\. Run `make setup`"):
        package_versions()
