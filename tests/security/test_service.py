"""Doors that a run opens to others by default, and the checkpoints that the service may be made to load."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from raycomplete.config import ClusterConfig, load_run_file
from raycomplete.serving.requests import Admission, ForbiddenError
from raycomplete.serving.schemas import EvaluationRequest
from tests.conftest import ROOT
from tests.training.tiny import make_model


@pytest.mark.parametrize("address", [None, "local", "head:6379"])
def test_a_run_starts_no_dashboard_and_turns_no_authentication_off(
    address: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    from raycomplete.engines.cluster import ResourcePlan, connect
    from raycomplete.runtime.console import Console

    seen: dict[str, Any] = {}

    def start(**arguments: Any) -> None:
        seen.update(arguments, auth=os.environ.get("RAY_AUTH_MODE"))

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    monkeypatch.setattr(ray, "init", start)
    monkeypatch.setattr(ray, "nodes", list)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    with connect(ClusterConfig(address=address), ResourcePlan(), Console(quiet=True)):
        pass
    assert seen["auth"] is None, "Ray's default, which is on"
    assert not {"dashboard_host", "_node_ip_address"} & seen.keys()
    if address != "head:6379":
        assert seen["include_dashboard"] is False


@pytest.fixture
def admission(tmp_path: Path) -> Admission:
    root = tmp_path / "models"
    make_model(root / "mine", 0)
    make_model(tmp_path / "secret", 1)
    config = load_run_file(ROOT / "jobs" / "organism.yaml", [f"serve.model_roots=[{root}]"])
    return Admission(config)


def ask(admission: Admission, spec: Path | str) -> EvaluationRequest:
    return admission.admit(EvaluationRequest.model_validate({"models": {"student": str(spec)}}))


def test_links_lead_nowhere_else(admission: Admission, tmp_path: Path) -> None:
    root, secret = tmp_path / "models", tmp_path / "secret"
    (root / "folder").symlink_to(secret)
    with pytest.raises(ForbiddenError):
        ask(admission, root / "folder")
    with pytest.raises(ForbiddenError):
        ask(admission, root / "mine" / ".." / ".." / "secret")
    (root / "mine" / "model.safetensors").unlink()
    (root / "mine" / "model.safetensors").symlink_to(secret / "model.safetensors")
    with pytest.raises(ForbiddenError):
        ask(admission, root / "mine")


def test_links_below_a_root_stay_allowed(admission: Admission, tmp_path: Path) -> None:
    """A cache of the hub holds nothing but links to its own blobs."""
    mine = tmp_path / "models" / "mine"
    (tmp_path / "models" / "blob").write_bytes((mine / "model.safetensors").read_bytes())
    (mine / "model.safetensors").unlink()
    (mine / "model.safetensors").symlink_to(tmp_path / "models" / "blob")
    assert ask(admission, mine).models.student == str(mine)
