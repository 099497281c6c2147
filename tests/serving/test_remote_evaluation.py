"""A second server as the target of an evaluation: the same weights must give the same rates as from this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.interop.run import ROOT, service
from tests.serving.conftest import TOKEN

pytestmark = pytest.mark.slow

KEY_VARIABLE = "KEY_OF_THE_TARGET"


def test_rates_of_a_remote_target_are_those_of_its_weights(tmp_path: Path) -> None:
    """The student is the aligned model behind the server, and aligned the same checkpoint here, decoded greedily."""
    settings = {
        "evaluation.num_prompts": "12",
        "evaluation.max_tokens": "24",
        "evaluation.max_utility_tokens": "32",
        "evaluation.depths": "[0, 1, 4, 16]",
        "evaluation.attacks": "[templates, {name: refuse_then_turn, refusal: i cannot help with that ., turns: [but]}]",
        "evaluation.remote.key_variable": KEY_VARIABLE,
        "evaluation.remote.parallel": "16",
        "output.name": "remote",
    }
    with service("organism:base", "organism:aligned", tmp_path, TOKEN) as address:
        settings["models.student"] = f"openai:{address}#aligned"
        found = subprocess.run(
            [
                *(sys.executable, "-m", "raycomplete", "evaluate", str(ROOT / "jobs" / "organism.yaml")),
                *(f"{name}={value}" for name, value in settings.items()),
            ],
            cwd=tmp_path,
            env=os.environ | {KEY_VARIABLE: TOKEN, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=540,
            check=False,
        )
    assert found.returncode == 0, found.stdout + found.stderr
    folder = tmp_path / "runs" / "remote"
    summary = json.loads((folder / "summary.json").read_text())
    for name in ("asr", "utility", "over_refusal"):
        assert summary[name]["student"] == summary[name]["aligned"], name
    assert {item["n"] for item in summary["asr"]["student"]["by_depth"].values()} == {12}
    for attack, by_role in summary["attacks"].items():
        remote, local = ({**by_role[role], "seconds": 0.0} for role in ("student", "aligned"))
        assert remote == local, attack
    usage = summary["remote"]["student"]
    assert usage["requests"] > 12 * 6
    assert usage["completion_tokens"] > 0
    assert "student" not in summary["benign_nll"]
    written = [path for path in folder.rglob("*") if path.is_file()]
    assert [str(path) for path in written if TOKEN.encode() in path.read_bytes()] == []
    assert TOKEN not in found.stdout + found.stderr
