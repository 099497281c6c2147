"""Metrics: names, what a step's row becomes, the dashboard, and the page that Prometheus reads."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from urllib.request import urlopen

import pytest

from raycomplete.runtime import prometheus as observe
from raycomplete.serving import app
from tests.conftest import free_port

ROOT = Path(__file__).resolve().parents[2]
DASHBOARD = ROOT / "jobs" / "deploy" / "grafana.json"
ROW = {
    "step": 3,
    "seconds": 2.0,
    "tokens": 100,
    "tokens_per_s": 50.0,
    "loss": 0.5,
    "anchor": 0.1,
    "recovery": 0.3,
    "push_forward": 0.1,
    "anchor_weight": 1.5,
    "distance": 0.7,
    "teacher_wait_s": 0.5,
    "sync_s": 0.0,
    "grad_norm": None,
    "depth_bins": [[1, 2]],
}

TERMS = {"anchor": {"metrics": {}}, "recovery": {"metrics": {"distance": "how far"}}, "push_forward": {"metrics": {}}}


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, ...], float]:
    """The values that `record` was given, by name and own tag."""
    seen: dict[tuple[str, ...], float] = {}

    def note(name: str, value: float = 1.0, **tags: str) -> None:
        assert set(tags) == set(observe.METRICS[name].tags)
        seen[name, *tags.values()] = value

    monkeypatch.setattr(observe, "record", note)
    return seen


def test_a_row_becomes_metrics(recorded: dict[tuple[str, ...], float]) -> None:
    observe.finished_step(ROW, TERMS)
    assert recorded["loss", "recovery"] == 0.3
    assert recorded["loss_weight", "anchor"] == 1.5
    assert recorded["loss_metric", "recovery", "distance"] == 0.7
    assert recorded["wait_fraction", "teacher"] == 0.25
    assert recorded["wait_fraction", "sync"] == 0.0
    assert recorded["train_tokens",] == 100
    assert ("sync_seconds",) not in recorded  # no update of the weights in this step
    assert ("grad_norm",) not in recorded


def test_without_ray_nothing_happens_and_unknown_names_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observe.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(observe, "_made", {})
    observe.record("train_step", 1)
    assert observe._made == {}
    with pytest.raises(KeyError, match="train_setp"):
        observe.record("train_setp", 1)


def exported() -> dict[str, str]:
    """Name in Prometheus -> kind: Ray's prefix, and the endings that Prometheus gives."""
    names: dict[str, str] = {}
    endings = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}
    for name, metric in observe.METRICS.items():
        names |= {f"ray_{observe.PREFIX}{name}{ending}": metric.kind for ending in endings[metric.kind]}
    source = Path(app.__file__).read_text(encoding="utf-8")
    return names | dict.fromkeys(re.findall(r'"(raycomplete_\w+)"', source), "service")


def queries() -> list[str]:
    tree = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    return [target["expr"] for panel in tree["panels"] for target in panel.get("targets", [])]


def test_every_metric_of_the_dashboard_is_one_that_the_code_registers() -> None:
    used = {name for query in queries() for name in re.findall(r"\b(?:ray_)?raycomplete_\w+", query)}
    assert used - set(exported()) == set()
    bases = {re.sub(r"_(bucket|sum|count|total)$", "", name) for name in used}
    assert {f"ray_{observe.PREFIX}{name}" for name in observe.METRICS} - bases == set()  # and none is forgotten


def test_counters_are_shown_as_rates() -> None:
    counters = {name for name, kind in exported().items() if kind == "counter"}
    for query in queries():
        for name in counters & set(re.findall(r"\bray_raycomplete_\w+", query)):
            assert re.search(rf"(rate|increase)\({name}\b", query), query


def test_the_dashboard_is_whole() -> None:
    tree = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    identifiers = [panel["id"] for panel in tree["panels"]]
    assert len(set(identifiers)) == len(identifiers)
    assert all(panel["title"] and panel["gridPos"]["w"] <= 24 for panel in tree["panels"])
    assert {item["name"] for item in tree["templating"]["list"]} == {"datasource", "run"}


SCRIPT = """
import sys

import ray

ray.init(
    address="local",
    num_cpus=1,
    include_dashboard=True,
    dashboard_host="127.0.0.1",
    dashboard_port=int(sys.argv[2]),
    _metrics_export_port=int(sys.argv[1]),
    log_to_driver=False,
    object_store_memory=80_000_000,
)

@ray.remote(num_cpus=0.5)
class Scorer:
    def __init__(self):
        from raycomplete.runtime.prometheus import begin
        begin("base scorer")
    def score(self):
        from raycomplete.runtime.prometheus import finished_step, scored
        scored(tokens=40, seconds=0.5, hits=2, misses=1)
        finished_step({"step": 1, "seconds": 2.0, "loss": 0.25, "tokens": 10}, {})
        return True

actor = Scorer.remote()
ray.get(actor.score.remote(), timeout=60)
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.mark.slow
def test_prometheus_reads_what_an_actor_recorded(tmp_path: Path) -> None:
    port = free_port()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {
        "PYTHONPATH": str(ROOT),
        "RAYCOMPLETE_RUN": "north",
        "RAYCOMPLETE_RUN_FOLDER": str(tmp_path),
        "RAYCOMPLETE_LOG": "json",
    }
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(port), str(free_port())],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        assert process.stdout is not None
        said = ""
        for line in process.stdout:
            said += line
            if line.startswith("ready"):
                break
        page, wanted = "", "ray_raycomplete_teacher_tokens_total{"
        deadline = time.monotonic() + 60
        while wanted not in page:
            assert process.poll() is None, said
            assert time.monotonic() < deadline, page[-2000:]
            time.sleep(0.5)
            try:
                page = urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5).read().decode()
            except OSError:
                continue
        ours = dict(line.rsplit(" ", 1) for line in page.splitlines() if line.startswith("ray_raycomplete_"))
        names = {key.partition("{")[0] for key in ours}
        assert names - set(exported()) == set()
        (tokens,) = (key for key in ours if key.startswith(wanted))
        assert float(ours[tokens]) == 40
        assert 'run="north"' in tokens
        assert 'role="base scorer"' in tokens
        (log,) = tmp_path.glob("logs/base-scorer-*.jsonl")
        last = json.loads(log.read_text().splitlines()[-1])
        assert (last["run"], last["role"], last["step"], last["loss"]) == ("north", "base scorer", 1, 0.25)
    finally:
        process.communicate("", timeout=60)
