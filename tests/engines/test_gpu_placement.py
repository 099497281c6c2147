"""Fractions of GPUs and whole ones, on resources that Ray only believes in (`faked_gpus.py`)."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.conftest import ROOT


@pytest.mark.slow
def test_engines_and_trainer_share_a_card_and_a_sharded_engine_holds_its_own() -> None:
    command = [sys.executable, "-m", "tests.engines.faked_gpus"]  # the session's cluster has no GPU
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["uses_gpu"], found["problem"]) == (True, "")
    assert found["too large"] == "The run needs 4.6 GPU and the cluster has 2."
    assert found["shares"] == [0.2, 0.2, 0.2, 0.4]
    held = {"0": 0.0, "1": 0.0}
    for (device,), share in zip(found["one card"], found["shares"], strict=True):
        held[device] += share
    assert max(held.values()) <= 1.0 + 1e-9, f"a card is promised twice: {held}"
    assert [sorted(devices) for devices in found["sharded"]] == [["0", "1"]]
