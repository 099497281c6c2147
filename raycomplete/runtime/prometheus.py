"""Prometheus metrics of a run, through Ray: every node's metrics agent exports them as `ray_raycomplete_...`.

`record` takes no other names than those of `METRICS`. Where Ray is not running nothing happens, and a metric that
cannot be recorded never ends a run. `jobs/deploy/grafana.json` is a dashboard of them.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import ray
from ray.util.metrics import Counter, Gauge, Histogram

from raycomplete.runtime import logs

logger = logging.getLogger(__name__)

PREFIX = "raycomplete_"
_SECONDS = [0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0]  # boundaries of every histogram


class Metric(NamedTuple):
    """A metric: its `tags` beside run and role, and the `key` in a row of metrics.jsonl that it records."""

    kind: type[Counter] | type[Gauge] | type[Histogram]
    about: str
    tags: tuple[str, ...] = ()
    key: str = ""


METRICS: dict[str, Metric] = {
    "process_starts": Metric(Counter, "Starts of engines and workers; more than one of a role may be a restart."),
    "teacher_tokens": Metric(Counter, "Tokens that a frozen model read."),
    "teacher_seconds": Metric(Counter, "Time that a frozen model took to read them."),
    "score_cache_hits": Metric(Counter, "Sequences whose scores were there already."),
    "score_cache_misses": Metric(Counter, "Sequences that had to be read."),
    "rollout_tokens": Metric(Counter, "Tokens that a rollout engine generated."),
    "rollout_seconds": Metric(Counter, "Time that a rollout engine took to generate them."),
    "weight_load_seconds": Metric(Histogram, "Time for loading weights into an engine."),
    # The trainer's rank 0 records these once a step.
    "train_step": Metric(Gauge, "Finished steps.", key="step"),
    "train_tokens": Metric(Counter, "Tokens trained on, all workers together.", key="tokens"),
    "train_tokens_per_s": Metric(Gauge, "Tokens a second in the last step, all workers together.", key="tokens_per_s"),
    "step_seconds": Metric(Histogram, "Time of a step.", key="seconds"),
    "sync_seconds": Metric(Histogram, "Time for handing weights to all engines."),
    "loss": Metric(Gauge, "Loss of the last step, and of each of its terms.", tags=("part",)),
    "loss_weight": Metric(Gauge, "Weight of a loss term that is held under a budget.", tags=("part",)),
    "loss_metric": Metric(Gauge, "Mean over the rows of a loss term in the last step.", tags=("part", "metric")),
    "wait_fraction": Metric(Gauge, "Share of the last step spent waiting.", tags=("what",)),
    "queue_depth": Metric(Gauge, "Steps whose scores are asked for and not taken yet.", tags=("queue",)),
    "staleness": Metric(Gauge, "Steps by which the weights of the last rollouts lagged behind.", key="staleness"),
    "compliance": Metric(Gauge, "Share of the last rollouts in which the student complied.", key="compliance"),
    "learning_rate": Metric(Gauge, "Learning rate of the last step.", key="lr"),
    "grad_norm": Metric(Gauge, "Norm of the gradient of the last step.", key="grad_norm"),
    "bad_steps": Metric(Gauge, "Steps left out so far: loss or gradient was not finite.", key="bad_steps"),
}
_WAITS = {"teacher_wait_s": "teacher", "rollout_wait_s": "rollout", "sync_s": "sync"}
_made: dict[str, Any] = {}


def begin(role: str, rank: int | None = None) -> None:
    """Gives this actor or worker its role in logs and metrics; called once, first thing."""
    logs.begin(role, rank)
    record("process_starts")


def record(name: str, value: float = 1.0, **tags: str) -> None:
    """Adds to a counter, sets a gauge, or enters a value into a histogram; a value that is not finite is left out."""
    kind, about, own_tags, _ = METRICS[name]
    if not ray.is_initialized() or not math.isfinite(value):
        return
    who = logs.identity()
    labels = {"run": who.run, "role": who.role, **tags}
    try:
        if name not in _made:
            more: dict[str, Any] = {"boundaries": _SECONDS} if kind is Histogram else {}
            _made[name] = kind(PREFIX + name, about, tag_keys=("run", "role", *own_tags), **more)
        if kind is Gauge:
            _made[name].set(value, tags=labels)
        elif kind is Histogram:
            _made[name].observe(value, tags=labels)
        elif value > 0:
            _made[name].inc(value, tags=labels)
    except Exception:  # whatever Ray's metrics have against it, the run goes on
        logger.debug("The metric %s was not recorded.", name, exc_info=True)


def finished_step(row: Mapping[str, Any], terms: Mapping[str, Mapping[str, Any]]) -> None:
    """Records a row of metrics.jsonl as metrics, and logs it; `terms` are loss terms with their "metrics" by name."""
    logs.set_step(int(row["step"]))
    numbers = {key: float(value) for key, value in row.items() if isinstance(value, int | float)}
    fields = {key: value for key, value in numbers.items() if key != "step"}
    logger.info("Finished step %d.", row["step"], extra={"fields": fields})
    known: dict[str, tuple[str, dict[str, str]]] = {metric.key: (name, {}) for name, metric in METRICS.items()}
    known["loss"] = ("loss", {"part": "total"})
    for term, about in terms.items():
        known[term] = ("loss", {"part": term})
        known[f"{term}_weight"] = ("loss_weight", {"part": term})
        known |= {metric: ("loss_metric", {"part": term, "metric": metric}) for metric in about["metrics"]}
    for key, (name, tags) in known.items():
        if key in numbers:
            record(name, numbers[key], **tags)
    for key, what in _WAITS.items():
        if key in numbers and numbers.get("seconds", 0.0) > 0:
            record("wait_fraction", numbers[key] / numbers["seconds"], what=what)
    if numbers.get("sync_s", 0.0) > 0:
        record("sync_seconds", numbers["sync_s"])
