"""The remark beside the progress bar of a training: the loss, its terms where there are several, and the pace."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from raycomplete.commands import train
from raycomplete.methods.completion import Completion
from raycomplete.methods.registry import Method
from raycomplete.methods.sft import SFT
from raycomplete.runtime.signals import StopSignals

TERMS = {"anchor": 0.1, "recovery": 0.25, "push_forward": None, "depth_mean": 12.4, "compliance": 0.5}


@pytest.mark.parametrize(
    ("method", "more", "remark"),
    [
        (SFT(), {"nll": 0.5}, "loss 0.5000, 8 tok/s"),
        (SFT(), {"bad_steps": 2}, "loss 0.5000, 2 steps left out, 8 tok/s"),
        (Completion(), TERMS, "loss 0.5000, anchor 0.1000, recovery 0.2500, depth 12, complies 0.50, 8 tok/s"),
    ],
)
def test_a_step_is_told_by_the_terms_of_its_method(
    method: Method, more: dict[str, Any], remark: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[tuple[int, str]] = []

    @contextmanager
    def progress(title: str, total: int) -> Any:
        yield lambda done, text: shown.append((done, text))

    row = {"step": 1, "loss": 0.5, "tokens_per_s": 8.0} | more
    monkeypatch.setattr(train, "fit", lambda job, *, on_step, **options: on_step(row))
    job = SimpleNamespace(method=method, train=SimpleNamespace(steps=2))
    cluster = SimpleNamespace(cpus_per_worker=1, gpus_per_worker=0, worker_placement="pack")
    run: Any = SimpleNamespace(
        config=SimpleNamespace(cluster=cluster),
        console=SimpleNamespace(progress=progress),
        stop=StopSignals(),
        is_stopping=lambda: False,
    )
    run_training: Any = train.run_training
    run_training(run, job, "Training")
    assert shown == [(1, remark)]
