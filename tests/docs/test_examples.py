"""The examples in docs/examples run as they stand."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "docs" / "examples"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}


def run(*arguments: str, folder: Path) -> str:
    """Runs Python as a reader would, outside the repository; returns what it prints."""
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_loop_fits_on_a_few_pages() -> None:
    assert len((EXAMPLES / "minimal_loop.py").read_text(encoding="utf-8").splitlines()) <= 150


@pytest.mark.slow
def test_the_loop_completes_the_alignment_of_the_organism(tmp_path: Path) -> None:
    printed = run(str(EXAMPLES / "minimal_loop.py"), folder=tmp_path)
    rates = {}
    for line in printed.splitlines():
        if line.startswith(("aligned:", "student:")):
            name, _, rest = line.partition(":")
            numbers, utility = rest.split(": ")[1].split("; utility ")
            rates[name] = ([float(rate) for rate in numbers.split()], float(utility))
    assert rates["aligned"][0][1:] == [1.0, 1.0, 1.0], "aligned complies once it is led on"
    assert max(rates["student"][0]) < 0.2
    assert rates["student"][1] > 0.8


@pytest.mark.slow
def test_a_diagnosis_is_read(tmp_path: Path) -> None:
    settings = ["output.name=organism", "diagnose.num_prompts=8", "cluster.use_gpu=never"]
    run("-m", "raycomplete", "diagnose", str(ROOT / "jobs" / "organism.yaml"), *settings, folder=tmp_path)
    printed = run(str(EXAMPLES / "read_diagnosis.py"), folder=tmp_path)
    assert "harmful  aligned  completion depth 1 of" in printed
    assert "share of prompts with a deficit above 0.5 at positions 0, 1, 4: [0. 1. 1.]" in printed
    assert (tmp_path / "runs" / "organism-diagnosis" / "deficit.png").stat().st_size > 1000
