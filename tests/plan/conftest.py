"""A request that most tests of a plan start from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from raycomplete.config import load_run_file
from raycomplete.plan.catalogue import find_hardware, preset
from raycomplete.plan.estimate import Request

JOBS = Path(__file__).resolve().parents[2] / "jobs"


def of_all(name: str) -> dict[str, Any]:
    """One shape for every role."""
    return dict.fromkeys(("student", "aligned", "base"), preset(name))


def a_request(*overrides: str, **changes: Any) -> Request:
    """The large example: an 8B student of 70B models on 8 nodes of 8 H100."""
    config = load_run_file(JOBS / "plan-70b.yaml", overrides)
    shapes = {"student": preset("8B"), "aligned": preset("70B"), "base": preset("70B")}
    return replace(Request(config, shapes, find_hardware("h100"), nodes=8, devices_per_node=8), **changes)
