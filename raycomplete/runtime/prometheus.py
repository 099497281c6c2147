"""Prometheus metrics of a run, through Ray: every node's metrics agent exports them as `ray_raycomplete_...`.

All names stand in `METRICS`; `record` takes no other. Where Ray is not running nothing happens, and a metric that
cannot be recorded never ends a run. `jobs/deploy/grafana.json` is a dashboard of them.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import ray
from ray.util.metrics import Counter, Gauge, Histogram

from raycomplete.runtime import logs

logger = logging.getLogger(__name__)

PREFIX = "raycomplete_"


class Metric(NamedTuple):
    """A metric: its `tags` beside run and role, and the `key` in a row of metrics.jsonl that it records."""

    kind: Literal["counter", "gauge", "histogram"]
    about: str
    tags: tuple[str, ...] = ()
    key: str = ""


_SECONDS = [0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0]  # boundaries of every histogram

METRICS: dict[str, Metric] = {
    "process_starts": Metric("counter", "Starts of engines and workers; more than one of a role may be a restart."),
    # scorers
    "teacher_tokens": Metric("counter", "Tokens that a frozen model read."),
    "teacher_seconds": Metric("counter", "Time that a frozen model took to read them."),
    "score_cache_hits": Metric("counter", "Sequences whose scores were there already."),
    "score_cache_misses": Metric("counter", "Sequences that had to be read."),
    # rollout engines
    "rollout_tokens": Metric("counter", "Tokens that a rollout engine generated."),
    "rollout_seconds": Metric("counter", "Time that a rollout engine took to generate them."),
    "weight_load_seconds": Metric("histogram", "Time for loading weights into an engine."),
    # trainer, from rank 0 once a step
    "train_step": Metric("gauge", "Finished steps.", key="step"),
    "train_tokens": Metric("counter", "Tokens trained on, all workers together.", key="tokens"),
    "train_tokens_per_s": Metric(
        "gauge", "Tokens a second in the last step, all workers together.", key="tokens_per_s"
    ),
    "step_seconds": Metric("histogram", "Time of a step.", key="seconds"),
    "sync_seconds": Metric("histogram", "Time for handing weights to all engines."),
    "loss": Metric("gauge", "Loss of the last step, and of each of its terms.", tags=("part",)),
    "loss_weight": Metric("gauge", "Weight of a loss term that is held under a budget.", tags=("part",)),
    "loss_metric": Metric("gauge", "Mean over the rows of a loss term in the last step.", tags=("part", "metric")),
    "wait_fraction": Metric("gauge", "Share of the last step spent waiting.", tags=("what",)),
    "queue_depth": Metric("gauge", "Steps whose scores are asked for and not taken yet.", tags=("queue",)),
    "staleness": Metric("gauge", "Steps by which the weights of the last rollouts lagged behind.", key="staleness"),
    "compliance": Metric("gauge", "Share of the last rollouts in which the student complied.", key="compliance"),
    "learning_rate": Metric("gauge", "Learning rate of the last step.", key="lr"),
    "grad_norm": Metric("gauge", "Norm of the gradient of the last step.", key="grad_norm"),
    "bad_steps": Metric(
        "gauge", "Steps left out so far, since their loss or gradient was not finite.", key="bad_steps"
    ),
}
_WAITS = {"teacher_wait_s": "teacher", "rollout_wait_s": "rollout", "sync_s": "sync"}

_made: dict[str, Any] = {}


def begin(role: str, rank: int | None = None) -> None:
    """Gives this actor or worker its role in logs and metrics; called once, first thing."""
    logs.begin(role, rank)
    record("process_starts")


def record(name: str, value: float = 1.0, **tags: str) -> None:
    """Adds to a counter, sets a gauge, or enters a value into a histogram.

    Args:
        name: One of `METRICS`.
        value: Left out where it is not finite, and by a counter where it is 0.
        **tags: Those that the metric has beside run and role.
    """
    if name not in METRICS:
        raise KeyError(f"{name!r} is no metric of raycomplete.runtime.prometheus.METRICS")
    if not ray.is_initialized() or not math.isfinite(value):
        return
    kind = METRICS[name].kind
    who = logs.identity()
    labels = {"run": who.run, "role": who.role, **tags}
    try:
        metric = _made.get(name) or _made.setdefault(name, _make(name))
        if kind == "gauge":
            metric.set(value, tags=labels)
        elif kind == "histogram":
            metric.observe(value, tags=labels)
        elif value > 0:
            metric.inc(value, tags=labels)
    except Exception:  # whatever Ray's metrics have against it, the run goes on
        logger.debug("The metric %s was not recorded.", name, exc_info=True)


def scored(*, tokens: int, seconds: float, hits: int, misses: int) -> None:
    """Records a batch of scores."""
    record("teacher_tokens", tokens)
    record("teacher_seconds", seconds)
    record("score_cache_hits", hits)
    record("score_cache_misses", misses)


def rolled_out(*, tokens: int, seconds: float) -> None:
    """Records a batch of responses."""
    record("rollout_tokens", tokens)
    record("rollout_seconds", seconds)


def finished_step(row: Mapping[str, Any], terms: Mapping[str, Mapping[str, Any]]) -> None:
    """Records a row of metrics.jsonl as metrics, and logs it.

    Args:
        row: The row.
        terms: Loss terms by name, each with its "metrics" by name.
    """
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


def _make(name: str) -> Any:
    metric = METRICS[name]
    tags = ("run", "role", *metric.tags)
    if metric.kind == "histogram":
        return Histogram(PREFIX + name, metric.about, boundaries=_SECONDS, tag_keys=tags)
    return (Counter if metric.kind == "counter" else Gauge)(PREFIX + name, metric.about, tag_keys=tags)
