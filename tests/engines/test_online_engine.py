"""The engine that answers requests as they come, on real vLLM."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from raycomplete.data.chat import ChatCodec
from raycomplete.data.organism import checkpoint_path
from tests.engines.online_session import MAX_TOKENS, SPEC
from tests.engines.test_rollout_worker import greedy_by_transformers

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def said() -> dict[str, Any]:
    """Everything that one engine answered, in a process of its own."""
    found = subprocess.run(
        [sys.executable, "-m", "tests.engines.online_session"],
        env=os.environ | SPEC.environment(),
        capture_output=True,
        text=True,
        timeout=580,
        check=False,
    )
    assert found.returncode == 0, found.stderr[-3000:]
    return dict(json.loads(found.stdout.splitlines()[-1]))


def joined(pieces: list[dict[str, Any]]) -> str:
    return "".join(piece["text"] for piece in pieces)


def test_greedy_answers_are_those_of_transformers(said: dict[str, Any]) -> None:
    codec = ChatCodec(checkpoint_path("aligned"))
    expected = greedy_by_transformers("aligned", said["sequences"], codec.eos_ids)
    found = [[token for token in answer[0]["token_ids"] if token not in codec.eos_ids] for answer in said["whole"]]
    assert found == expected
    assert MAX_TOKENS >= max(map(len, found)) > 1


def test_pieces_of_a_stream_make_the_whole_answer(said: dict[str, Any]) -> None:
    for whole, pieces in zip(said["whole"], said["streamed"], strict=True):
        assert len(whole) == 1 < len(pieces)
        assert joined(pieces) == whole[0]["text"]
        assert [token for piece in pieces for token in piece["token_ids"]] == whole[0]["token_ids"]
        assert [piece["finish_reason"] for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
        assert pieces[-1]["finish_reason"] == whole[0]["finish_reason"]


def test_stop_strings_end_an_answer_and_are_no_part_of_it(said: dict[str, Any]) -> None:
    whole, streamed = said["cut"]
    assert whole[0]["finish_reason"] == "stop"
    assert said["word"] not in whole[0]["text"]
    assert said["whole"][0][0]["text"].startswith(whole[0]["text"])
    assert joined(streamed) == whole[0]["text"]


def test_seeds_repeat_a_draw(said: dict[str, Any]) -> None:
    first, again, other = (pieces[0]["token_ids"] for pieces in said["seeded"])
    assert first == again
    assert first != other


def test_log_probabilities_come_for_prompt_and_answer(said: dict[str, Any]) -> None:
    (piece,) = said["ranked"][0]
    assert len(piece["prompt_logprobs"]) == len(said["sequences"][0])
    assert piece["prompt_logprobs"][0] is None
    assert all(item[1] <= 0 for item in piece["prompt_logprobs"][1:])
    token, logprob, top = piece["logprobs"][0]
    assert top[0] == [token, logprob], "greedy takes the likeliest"
    assert top[0][1] >= top[1][1]


def test_who_leaves_ends_a_request_and_errors_are_sentences(said: dict[str, Any]) -> None:
    assert said["after"][0] == said["whole"][0], "others go on as before"
    assert said["open"] == 0
    too_long, stopped = said["errors"]
    assert too_long.startswith("The engine refuses the request: ")
    assert stopped.startswith("The engine has failed")
