"""vLLM's configuration of every engine as on an H100, built without one (`faked_h100.py`)."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from raycomplete.data.organism import checkpoint_path
from raycomplete.engines.rollout_worker import RolloutEngine
from raycomplete.engines.spec import EngineSpec
from tests.conftest import ROOT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def engines() -> dict[str, dict[str, Any]]:
    """The configurations that vLLM builds, by engine; from a process of its own, in which its platform is faked."""
    command = [sys.executable, "-m", "tests.engines.faked_h100", str(checkpoint_path("base"))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_every_engine_is_one_for_cuda_in_the_process_of_its_actor(engines: dict[str, dict[str, Any]]) -> None:
    assert set(engines) == {"scorer", "rollout", "colocated", "judge", "sharded"}
    for name, engine in engines.items():
        assert engine["device"] == "cuda", name
        assert "gpu_worker" in engine["worker"], name
        assert engine["dtype"] == "torch.bfloat16", name
        assert (engine["memory"], engine["batched_tokens"]) == (0.25, 8192 if name == "colocated" else 4096), name
        assert (engine["chunked_prefill"], engine["v2_runner"], engine["autotunes"]) == (True, True, False), name
        assert engine["executor"] == ("mp" if name == "sharded" else "uni"), name
        assert engine["tensor_parallel"] == (2 if name == "sharded" else 1), name
        assert not engine["compiles"], name
        assert engine["sleeps"] is (name == "colocated"), name


def test_rollouts_capture_graphs_of_decoding_alone(engines: dict[str, dict[str, Any]]) -> None:
    for name, engine in engines.items():
        has_graphs = name in ("rollout", "colocated", "sharded")
        assert engine["eager"] is not has_graphs, name
        assert engine["graphs"] == ("FULL_DECODE_ONLY" if has_graphs else "NONE"), name
        assert (max(engine["graph_sizes"], default=0) == 256) is has_graphs, name


def test_a_scorer_gives_states_of_tokens_and_reads_every_one(engines: dict[str, dict[str, Any]]) -> None:
    assert engines["scorer"]["task"] == "token_embed"
    assert engines["scorer"]["prefix_caching"] is False
    assert all(engine["prefix_caching"] for name, engine in engines.items() if name != "scorer")


def test_engines_that_receive_weights_hold_the_carrier_of_their_spec(engines: dict[str, dict[str, Any]]) -> None:
    expected = {"rollout": "nccl", "colocated": "ipc"}
    assert {name: engine["weight_transfer"] for name, engine in engines.items()} == {
        name: expected.get(name) for name in engines
    }
    assert "weight_transfer_config" not in RolloutEngine.arguments(EngineSpec("/model", "float32", 64)), "on a CPU"
