"""Metrics: names, what a step's row becomes, the dashboard, and the page that Prometheus reads."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import ray

from raycomplete.runtime import prometheus as observe
from raycomplete.serving import app

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
    endings = {"Counter": ("_total",), "Gauge": ("",), "Histogram": ("_bucket", "_sum", "_count")}
    for name, metric in observe.METRICS.items():
        kind = metric.kind.__name__
        names |= {f"ray_{observe.PREFIX}{name}{ending}": kind for ending in endings[kind]}
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
    counters = {name for name, kind in exported().items() if kind == "Counter"}
    for query in queries():
        for name in counters & set(re.findall(r"\bray_raycomplete_\w+", query)):
            assert re.search(rf"(rate|increase)\({name}\b", query), query


class Recorder:
    def __init__(self) -> None:
        observe.begin("base scorer")

    def record(self) -> list[str]:
        observe.record("teacher_tokens", 40)
        observe.finished_step(ROW, TERMS)
        return sorted(observe._made)


@pytest.mark.slow
def test_ray_takes_what_an_actor_records(ray_cluster: None) -> None:
    actor = ray.remote(Recorder).options(num_cpus=0.1).remote()
    made = ray.get(actor.record.remote(), timeout=60)
    assert {"process_starts", "teacher_tokens", "step_seconds", "loss"} <= set(made)
    ray.kill(actor)
