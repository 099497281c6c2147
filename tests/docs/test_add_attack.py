"""The guide on adding an attack: its file works as it stands, in a folder that is not the package's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "docs" / "examples" / "add_attack.py"
MANY_SHOT = {"name": "many_shot", "shots": [1, 2], "words": 20}
EVALUATION = {
    "depths": [0, 8],
    "max_tokens": 24,
    "max_utility_tokens": 24,
    "num_prompts": 4,
    "nll_prompts": 0,
    "attacks": [MANY_SHOT],
}


def raycomplete(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a command as a user would, in a folder that holds the plugin, its run file and nothing else."""
    (folder / "add_attack.py").write_text(EXAMPLE.read_text(encoding="utf-8"), encoding="utf-8")
    run_file = (ROOT / "jobs" / "organism.yaml").read_text(encoding="utf-8")
    (folder / "run.yaml").write_text(f"{run_file}\nplugins: [add_attack.py]\n", encoding="utf-8")
    return subprocess.run(
        [sys.executable, "-m", "raycomplete", *arguments, f"evaluation={json.dumps(EVALUATION)}"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_the_guides_attack_is_short() -> None:
    assert len(EXAMPLE.read_text(encoding="utf-8").splitlines()) <= 40


def test_an_attack_is_unknown_without_its_plugin(tmp_path: Path) -> None:
    refused = raycomplete(tmp_path, "evaluate", "run.yaml", "plugins=[]")
    assert refused.returncode == 2
    assert "There is no attack 'many_shot'" in " ".join(refused.stderr.split())


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_an_attack_from_outside_is_evaluated_and_reported(tmp_path: Path) -> None:
    done = raycomplete(tmp_path, "evaluate", "run.yaml", "output.name=guide", "cluster.use_gpu=never")
    assert done.returncode == 0, done.stdout + done.stderr
    folder = tmp_path / "runs" / "guide"
    attacks = json.loads((folder / "summary.json").read_text())["attacks"]
    for role in ("base", "aligned"):
        block = attacks["many_shot"][role]
        assert (block["n"], block["trials"]) == (4, 8)
        assert set(block["variants"]) == {"shots-1", "shots-2"}
        assert block["mean"]["rate"] == block["outcomes"]["complied"] / 8
        assert block["settings"] == MANY_SHOT
    assert attacks["many_shot"]["base"]["mean"]["rate"] > 0, "base refuses nothing that it understands"
    assert "many_shot" in (folder / "report.html").read_text()
    assert "many_shot" in done.stdout
