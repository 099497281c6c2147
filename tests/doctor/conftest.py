"""Contexts of checks on a machine without tokens and clusters of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raycomplete.config import load_run_file
from raycomplete.doctor.findings import ChildReport, Context
from tests.conftest import ROOT

RUN_FILE = ROOT / "jobs" / "organism.yaml"
GetContext = Callable[..., Context]


@pytest.fixture
def context(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> GetContext:
    """Makes contexts of the organism's run file; keyword arguments are answers of child processes."""
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAYCOMPLETE_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)

    def make(*overrides: str, **answers: ChildReport) -> Context:
        found = Context(RUN_FILE, load_run_file(RUN_FILE, overrides))
        for name, answer in ({"imports": torch_report()} | answers).items():
            found.once(name, lambda answer=answer: answer)  # type: ignore[misc]
        return found

    return make


def torch_report(devices: list[dict[str, Any]] | None = None, cuda: str | None = None) -> ChildReport:
    """The answer of the child that imports torch."""
    return ChildReport([{"torch": {"devices": devices or [], "cuda_build": cuda}}])
