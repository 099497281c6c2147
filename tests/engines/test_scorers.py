"""Scorers on real vLLM engines: log-probabilities of transformers, the parity gate, and engines that are killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from raycomplete.config import Dtype, TeacherConfig
from raycomplete.data.chat import ChatCodec
from raycomplete.data.checkpoints import TORCH_DTYPES, load_model, save_checkpoint
from raycomplete.data.heads import HeadSpec, load_head, read_head_spec
from raycomplete.data.organism import checkpoint_path, prompts
from raycomplete.engines.score_cache import ScoreRequest, to_tensor
from raycomplete.engines.scorers import TeacherClient
from raycomplete.engines.scoring_engine import PARITY_TOLERANCE
from raycomplete.engines.spec import EngineSpec
from raycomplete.runtime.errors import ParityError

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.slow


def head_of(path: Path, codec: ChatCodec) -> HeadSpec:
    return read_head_spec(path, codec.vocab_size, codec.fingerprint())


def make_requests(codec: ChatCodec, count: int) -> list[ScoreRequest]:
    found = []
    for prompt in prompts("heldout", "harmful", 0, count):
        prompt_ids = codec.encode_prompt(prompt.text)
        found.append(ScoreRequest((*prompt_ids, *codec.encode_answer(prompt.answer or "")), len(prompt_ids)))
    return found


@pytest.fixture(scope="module")
def codec() -> ChatCodec:
    return ChatCodec(checkpoint_path("aligned"))


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory, codec: ChatCodec) -> Path:
    """The organism with a head of its own that differs from its embedding."""
    model = load_model(checkpoint_path("aligned"), "float32")
    config = model.config
    config.tie_word_embeddings = False
    other = LlamaForCausalLM(config)
    other.load_state_dict(model.state_dict())
    torch.manual_seed(0)
    with torch.no_grad():
        other.lm_head.weight = torch.nn.Parameter(model.lm_head.weight + 0.05 * torch.randn_like(model.lm_head.weight))
    folder = tmp_path_factory.mktemp("untied") / "model"
    save_checkpoint(folder, other, codec)
    return folder


def start(path: Path, codec: ChatCodec, dtype: Dtype, head: HeadSpec | None = None) -> TeacherClient:
    return TeacherClient.start(
        "aligned",
        head or head_of(path, codec),
        EngineSpec(str(path), dtype, 256),
        TeacherConfig(),
        make_requests(codec, 2),
    )


@pytest.fixture
def started(ray_cluster: None) -> Iterator[list[TeacherClient]]:
    clients: list[TeacherClient] = []
    yield clients
    for client in clients:
        client.stop()


@pytest.mark.parametrize(("which", "dtype"), [("tied", "float32"), ("untied", "float32"), ("tied", "bfloat16")])
def test_rebuilt_log_probabilities_are_those_of_transformers(
    which: str, dtype: Dtype, untied: Path, codec: ChatCodec, started: list[TeacherClient]
) -> None:
    path = checkpoint_path("aligned") if which == "tied" else untied
    client = start(path, codec, dtype)
    started.append(client)
    stats = client.wait_until_ready(timeout_s=300)
    assert stats["head"]["tied"] == (which == "tied")
    assert stats["parity"]["mean_expected_difference"] <= PARITY_TOLERANCE[dtype]

    requests = make_requests(codec, 6)[2:]  # other prompts than those of the gate
    head = load_head(head_of(path, codec), dtype=TORCH_DTYPES[dtype])
    model = load_model(path, dtype)
    for request, array in zip(requests, client.collect(client.submit(requests)), strict=True):
        assert array.shape == (request.num_rows, head.hidden_size)
        with torch.inference_mode():
            logits_TV = model(torch.tensor([request.token_ids])).logits[0, request.num_prompt_tokens - 1 : -1]
        expected_TV = torch.log_softmax(logits_TV.float(), -1)
        rebuilt_TV = torch.log_softmax(head.logits(to_tensor(array)), -1)
        if dtype == "float32":
            torch.testing.assert_close(rebuilt_TV, expected_TV, rtol=0, atol=1e-4)
        else:
            # bf16 keeps 8 bits and rounds after other kernels in every layer, so log-probabilities of unlikely tokens
            # move by tenths. What distillation sees is the expected difference under the model itself.
            difference_T = (expected_TV.exp() * (expected_TV - rebuilt_TV).abs()).sum(-1)
            assert float(difference_T.mean()) <= PARITY_TOLERANCE["bfloat16"]
    if which == "tied" and dtype == "float32":
        check_cache(client, requests)


def check_cache(client: TeacherClient, requests: list[ScoreRequest]) -> None:
    """Sequences read before cost no engine time and come back the same, repeats within one batch included."""
    before = client.stats()
    again = client.collect(client.submit([requests[0], requests[0], *requests]))
    after = client.stats()
    assert after["tokens"] == before["tokens"]
    assert after["hits"] == before["hits"] + len(requests) + 2
    np.testing.assert_array_equal(again[0], again[2])


def test_the_gate_refuses_a_head_that_does_not_fit(
    untied: Path, codec: ChatCodec, started: list[TeacherClient]
) -> None:
    wrong: Any = replace(head_of(untied, codec), weight_key="model.embed_tokens.weight")
    client = start(untied, codec, "float32", wrong)
    started.append(client)
    with pytest.raises(ParityError, match="aligned scorer's rebuilt log-probabilities differ"):
        client.wait_until_ready(timeout_s=300)


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Runs two_nodes.py in a process of its own, since this one may be connected to another cluster."""
    records = tmp_path_factory.mktemp("quarantined")
    elsewhere = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    with tempfile.TemporaryDirectory(prefix="rc-", dir="/tmp") as short:  # sockets allow short paths only
        finished = subprocess.run(
            [sys.executable, "-m", "tests.engines.two_nodes", str(records)],
            cwd=ROOT,
            env=elsewhere | {"RAY_TMPDIR": short, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=500,
            check=False,
        )
    assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-3000:]
    found: dict[str, Any] = {}
    for line in finished.stdout.splitlines():
        if line.startswith("{"):
            found |= json.loads(line)
    return found


def test_scores_are_the_same_whatever_is_killed_meanwhile(seen: dict[str, Any]) -> None:
    """Equal up to rounding: a batch that is read again is cut elsewhere."""
    assert seen["nodes_before"] == 2
    assert seen["kill_hit_a_reading"]
    assert seen["kill_difference"] < 1e-4
    assert seen["node_hit_a_reading"]
    assert seen["node_difference"] < 1e-4
    assert seen["moved_off_the_dead_node"]
    assert seen["group"] == "CREATED"


def test_a_death_says_who_where_why_and_where_its_log_is(seen: dict[str, Any]) -> None:
    said = seen["error"]
    assert said["who"] == "aligned scorer 1 of 2"
    assert "aligned scorer 1 of 2 died: killed by SIGKILL" in said["text"]
    assert said["node"]
    assert said["log"].startswith("worker-")
    assert said["log_is_there"] == "True"


def test_a_sequence_that_kills_its_scorer_is_quarantined_and_recorded_without_its_tokens(seen: dict[str, Any]) -> None:
    assert seen["partial"] == [[11.0, 11.0], None]
    (record,) = seen["records"]
    assert (record["tokens"], record["prompt_tokens"], record["role"]) == (3, 1, "aligned")
    assert "13" not in json.dumps([value for value in record.values() if value != record["sequence"]])
