"""The guides on adding a method and a loss term: their file works as it stands, in a folder outside the package."""

from __future__ import annotations

import ast
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.request import urlopen
from uuid import uuid4

import pytest

from raycomplete import methods
from raycomplete.methods import registry

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "docs" / "examples" / "add_method.py"
OVERRIDES = [
    "method={name: turn_away, strength: 0.5, anchor_batch_size: 6, recovery_batch_size: 6}",
    "data.limit_per_kind=12",
    "train.steps=4",
    "train.warmup_steps=1",
    "evaluation={depths: [0, 8], max_tokens: 16, max_utility_tokens: 16, num_prompts: 4, nll_prompts: 0}",
    "cluster.use_gpu=never",
]
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {
    "PYTHONPATH": str(ROOT),
    "HF_HUB_OFFLINE": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": uuid4().hex + uuid4().hex,  # of the cluster below, for those who join it
}
CLUSTER = """
import sys, ray
context = ray.init(
    address="local",
    num_cpus=4,
    include_dashboard=True,
    dashboard_host="127.0.0.1",
    dashboard_port=int(sys.argv[2]),
    _metrics_export_port=int(sys.argv[1]),
    log_to_driver=False,
    object_store_memory=500_000_000,
)
print("address", context.address_info["gcs_address"], flush=True)
sys.stdin.read()
"""


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def raycomplete(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """Starts a command as a user would, in a folder that holds the plugin, its run file and nothing else."""
    (folder / "add_method.py").write_text(EXAMPLE.read_text(encoding="utf-8"), encoding="utf-8")
    run_file = (ROOT / "jobs" / "organism.yaml").read_text(encoding="utf-8")
    (folder / "run.yaml").write_text(f"{run_file}\nplugins: [add_method.py]\n", encoding="utf-8")
    return subprocess.Popen(
        [sys.executable, "-m", "raycomplete", *arguments, *OVERRIDES],
        cwd=folder,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@contextmanager
def cluster(port: int) -> Iterator[str]:
    """A cluster of this machine whose metrics stand at a port; its address."""
    command = [sys.executable, "-c", CLUSTER, str(port), str(free_port())]
    process = subprocess.Popen(
        command, env=ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        assert process.stdout is not None
        yield next(line.split()[1] for line in process.stdout if line.startswith("address"))
    finally:
        process.communicate("", timeout=60)


def test_the_guides_method_is_short() -> None:
    assert len(EXAMPLE.read_text(encoding="utf-8").splitlines()) <= 80


def test_a_method_is_written_with_what_two_packages_export() -> None:
    imported = [node for node in ast.walk(ast.parse(EXAMPLE.read_text())) if isinstance(node, ast.ImportFrom)]
    own = {str(node.module) for node in imported if str(node.module).startswith("raycomplete")}
    assert own == {"raycomplete.losses", "raycomplete.methods"}
    guide = (ROOT / "docs" / "add-a-method.md").read_text(encoding="utf-8")
    named = {name for name in re.findall(r"`(\w+)[(`]", guide) if name in vars(registry)}
    assert {"AnchorItem", "RecoveryItem", "RowSpan", "harmless_answer"} <= named <= set(methods.__all__)


def test_a_method_is_unknown_without_its_plugin(tmp_path: Path) -> None:
    refused = raycomplete(tmp_path, "train", "run.yaml", "plugins=[]")
    said = refused.communicate(timeout=60)[0]
    assert refused.returncode == 2
    assert "There is no training method 'turn_away'" in " ".join(said.split())


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_method_and_a_term_from_outside_are_trained_evaluated_and_reported(tmp_path: Path) -> None:
    port, exported = free_port(), ""
    with cluster(port) as address:
        process = raycomplete(tmp_path, "train", "run.yaml", "output.name=guide", f"cluster.address={address}")
        while process.poll() is None:
            try:
                page = urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5).read().decode()
            except OSError:
                page = ""
            exported = page if "harmful_token_mass" in page else exported
            time.sleep(0.5)
        said = process.communicate()[0]
    assert process.returncode == 0, said
    folder = tmp_path / "runs" / "guide"

    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for row in rows:
        assert 0 < row["harmful_token_mass"] <= 1
        assert row["loss"] == pytest.approx(row["anchor"] + 0.5 * row["turn_away"], rel=1e-5)
        assert "recovery" not in row
    assert rows[-1]["turn_away"] < rows[0]["turn_away"]
    assert rows[0]["depth_loss"] != rows[-1]["depth_loss"], "the depth sampler follows the new term"

    lines = [line for line in exported.splitlines() if 'run="guide"' in line]
    assert any(line.startswith("ray_raycomplete_loss{") and 'part="turn_away"' in line for line in lines)
    (metric,) = (line for line in lines if line.startswith("ray_raycomplete_loss_metric{"))
    assert 'metric="harmful_token_mass"' in metric

    terms = json.loads((folder / "training.json").read_text())["terms"]
    assert list(terms) == ["anchor", "turn_away"]
    report = (folder / "report.html").read_text()
    assert "turn_away" in report
    assert "harmful_token_mass" in report
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["asr"]["student"]["by_depth"].keys() == {"0", "8"}
