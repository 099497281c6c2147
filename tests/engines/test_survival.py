"""Real raylets and real engines, killed at work: the scores are those of an undisturbed run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What two_nodes.py saw. In a process of its own: this one may be connected to another cluster."""
    records = tmp_path_factory.mktemp("quarantined")
    elsewhere = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    with tempfile.TemporaryDirectory(prefix="rc-", dir="/tmp") as short:  # sockets allow short paths only
        finished = subprocess.run(
            [sys.executable, "-m", "tests.engines.two_nodes", str(records)],
            cwd=ROOT,
            env=elsewhere | {"RAY_TMPDIR": short, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=500,
            check=False,
        )
    assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-3000:]
    found: dict[str, Any] = {}
    for line in finished.stdout.splitlines():
        if line.startswith("{"):
            found |= json.loads(line)
    return found


def test_scores_are_the_same_whatever_is_killed_meanwhile(seen: dict[str, Any]) -> None:
    """Equal up to rounding: a batch that is read again is cut elsewhere."""
    assert seen["nodes_before"] == 2
    assert seen["kill_hit_a_reading"]
    assert seen["kill_difference"] < 1e-4
    assert seen["node_hit_a_reading"]
    assert seen["node_difference"] < 1e-4
    assert seen["moved_off_the_dead_node"]
    assert seen["group"] == "CREATED"


def test_a_death_says_who_where_why_and_where_its_log_is(seen: dict[str, Any]) -> None:
    said = seen["error"]
    assert said["who"] == "aligned scorer 1 of 2"
    assert "aligned scorer 1 of 2 died: killed by SIGKILL" in said["text"]
    assert said["node"]
    assert said["log"].startswith("worker-")
    assert said["log_is_there"] == "True"


def test_a_sequence_that_kills_its_scorer_is_quarantined_and_recorded_without_its_tokens(seen: dict[str, Any]) -> None:
    assert seen["partial"] == [[11.0, 11.0], None]
    (record,) = seen["records"]
    assert (record["tokens"], record["prompt_tokens"], record["role"]) == (3, 1, "aligned")
    assert "13" not in json.dumps([value for value in record.values() if value != record["sequence"]])
