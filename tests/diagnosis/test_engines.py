"""How a driver readies itself for engines beside it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from raycomplete.diagnosis import engines as diagnose_engines
from tests.conftest import ROOT


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("cores", "engines", "expected"), [(8, 2, 6), (2, 2, 1), (2, 3, 1)])
def test_the_walk_takes_the_threads_that_engines_leave(
    threads: None, monkeypatch: pytest.MonkeyPatch, cores: int, engines: int, expected: int
) -> None:
    monkeypatch.setattr(diagnose_engines, "available_cpus", lambda: cores)
    torch.set_num_threads(7)
    diagnose_engines.make_room_for_engines(engines)
    assert torch.get_num_threads() == expected


@pytest.mark.parametrize(("given", "expected"), [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")])
def test_idle_threads_sleep_unless_the_user_says_otherwise(given: dict[str, str], expected: str) -> None:
    """Said before any room can load torch, which reads it once."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    code = "import os, sys, raycomplete; print('torch' in sys.modules, os.environ['OMP_WAIT_POLICY'])"
    command = [sys.executable, "-c", code]
    environment |= {"PYTHONPATH": str(ROOT), **given}
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert said.split() == ["False", expected]
