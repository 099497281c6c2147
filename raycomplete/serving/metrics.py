"""Prometheus text. Everything comes from the store, so that every replica answers the same."""

from __future__ import annotations

from collections.abc import Mapping

from raycomplete.serving.store import EvaluationStore

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def render_metrics(store: EvaluationStore) -> str:
    """All metrics of the service; those of HTTP itself are Ray Serve's own."""
    counts, totals = store.counts(), store.totals()
    lines = [
        *_metric(
            "raycomplete_evaluations",
            "gauge",
            "Evaluations by state.",
            {f'{{state="{state}"}}': count for state, count in counts.items()},
        ),
        *_metric("raycomplete_attempts", "gauge", "Starts of evaluations, without stops.", {"": totals["attempts"]}),
        *_metric(
            "raycomplete_evaluation_seconds_total",
            "counter",
            "Time from start to end, over all evaluations that ended.",
            {"": totals["seconds"]},
        ),
        *_metric("raycomplete_queue_oldest_seconds", "gauge", "Age of the oldest that waits.", {"": totals["oldest"]}),
    ]
    return "\n".join(lines) + "\n"


def _metric(name: str, kind: str, about: str, values: Mapping[str, float]) -> list[str]:
    return [
        f"# HELP {name} {about}",
        f"# TYPE {name} {kind}",
        *(f"{name}{labels} {value:.17g}" for labels, value in values.items()),
    ]
