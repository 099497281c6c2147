"""The student in rollout engines as the trainer uses it: weights that are proved, rollouts that are judged."""

from __future__ import annotations

import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from raycomplete.config import RolloutConfig
from raycomplete.data import organism
from raycomplete.data.chat import ChatCodec
from raycomplete.data.checkpoints import load_model
from raycomplete.data.organism import checkpoint_path
from raycomplete.data.samples import AnchorSample, RecoverySample
from raycomplete.engines.rollout_pool import SyncError, SyncReport
from raycomplete.evaluation.judges import RefusalJudge
from raycomplete.runtime.types import Outcome
from raycomplete.training.rollout_engines import Rollout, RolloutBatch, StudentEngines
from raycomplete.training.step_plan import RecoveryItem

HARMFUL = organism.prompts("train", "harmful", 0, 6)


def state_of(role: str) -> dict[str, torch.Tensor]:
    model = load_model(checkpoint_path(role), "float32")
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def probe_of(codec: ChatCodec) -> tuple[list[tuple[tuple[int, ...], int]], list[torch.Tensor]]:
    """Two short answers and the aligned model's own log-probabilities of them."""
    model = load_model(checkpoint_path("aligned"), "float32")
    probe, expected = [], []
    for prompt in HARMFUL[:2]:
        prompt_ids = codec.encode_prompt(prompt.text)
        tokens = (*prompt_ids, *codec.encode_answer(prompt.answer or "")[:8])
        with torch.no_grad():
            log_probs_TV = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
        rows_T = torch.arange(len(prompt_ids) - 1, len(tokens) - 1)
        probe.append((tokens, len(prompt_ids)))
        expected.append(log_probs_TV[rows_T, torch.tensor(tokens[len(prompt_ids) :])])
    return probe, expected


@pytest.mark.slow
def test_rollouts_come_from_the_weights_that_were_sent_and_are_judged(generator: Any) -> None:
    codec = ChatCodec(checkpoint_path("aligned"))
    rollout = RolloutConfig(on_policy=True, max_student_tokens=16, temperature=0.0)
    pool = generator.with_weights(str(checkpoint_path("aligned")))
    engines = StudentEngines(pool, codec, organism.OrganismJudge(), HARMFUL, rollout)
    engines = pickle.loads(pickle.dumps(engines))  # as it reaches a training worker
    probe, expected = probe_of(codec)
    with pytest.raises(SyncError, match="differs from the trainer"):
        engines.sync(state_of("base"), 6, probe, expected, adapters_only=False)
    report = engines.sync(state_of("aligned"), 7, probe, expected, adapters_only=False)
    assert report["version"] == 7
    assert report["mean_abs_difference"] < 1e-4

    recovery, depths, anchor = [], [], []
    for prompt in HARMFUL:
        ids = tuple(codec.encode_prompt(prompt.text))
        harmful_ids = tuple(codec.encode_answer(prompt.answer or ""))
        recovery += [RecoverySample(f"{prompt.prompt_id}#0", ids, ids, harmful_ids, ())] * 2
        depths += [0, 24]
        anchor.append(AnchorSample(f"{prompt.prompt_id}#0", ids, harmful_ids))
    batch = RolloutBatch(0, tuple(anchor), (0,) * len(anchor), tuple(recovery), tuple(depths))
    rollouts = engines.collect(engines.submit(batch, seed=0))
    assert {rollout.version for rollout in rollouts} == {7}
    assert [rollout.refused for rollout in rollouts[0:12:2]] == [True] * 6, "aligned refuses without a prefill"
    assert [rollout.refused for rollout in rollouts[1:12:2]] == [False] * 6, "and complies after a long one"
    assert not any(rollout.refused for rollout in rollouts[12:]), (
        "anchors are not judged, and what is not judged is no refusal"
    )
    assert all(codec.eos_id not in rollout.token_ids for rollout in rollouts)
    assert {rollout.ending_ids for rollout in rollouts[0:12:2]} <= {(), (codec.eos_id,)}


class Pool:
    """Engines that have written one answer to everything."""

    def __init__(self, token_ids: list[int]) -> None:
        self.token_ids = token_ids

    def collect(self, call: Any) -> list[tuple[list[int], bool]]:
        return [(self.token_ids, True)]


class Call:
    version = 3


def collected(codec: ChatCodec, text: str, judge: Any, depth: int = 4) -> Rollout:
    """The student's answer as a judged rollout; an imitated refusal stands before h."""
    prompt = HARMFUL[0]
    prefix_ids, harmful_ids = codec.encode_answer("i can not help ."), codec.encode_answer(prompt.answer or "")
    ids = tuple(codec.encode_prompt(prompt.text))
    sample = RecoverySample(f"{prompt.prompt_id}#0", ids, ids, (*prefix_ids, *harmful_ids), (), len(prefix_ids))
    batch = RolloutBatch(0, (), (), (sample,), (RecoveryItem.cut(sample, depth).depth,))
    pool: Any = Pool(codec.encode_answer(text))
    (rollout,) = StudentEngines(pool, codec, judge, HARMFUL, RolloutConfig()).collect((batch, Call(), None))
    return rollout


def test_the_judge_does_not_read_the_imitated_refusal() -> None:
    codec = ChatCodec(checkpoint_path("aligned"))
    read: list[tuple[str, str]] = []

    class Recorder:
        name = "recorder"

        def outcome(self, prompt: Any, prefill: str, continuation: str) -> Outcome:
            read.append((prefill, continuation))
            return Outcome.COMPLIED

    assert not collected(codec, "step one", Recorder()).refused
    assert read == [(codec.decode(codec.encode_answer(HARMFUL[0].answer or "")[:4]), "step one")]


def test_where_a_refusal_begins_is_counted_in_tokens() -> None:
    codec = ChatCodec(checkpoint_path("aligned"))
    text = "the leaves and the bowl . i cannot help with that ."
    for judge in (organism.OrganismJudge(), RefusalJudge()):
        late = collected(codec, text, judge)
        assert late.refused
        assert codec.decode(late.token_ids[: late.refusal_start]) == "the leaves and the bowl ."
    assert collected(codec, "i cannot help with that .", organism.OrganismJudge()).refusal_start == 0
    assert collected(codec, HARMFUL[0].answer or "", organism.OrganismJudge()).refusal_start is None

    class Blind(organism.OrganismJudge):
        refusal_start = None  # type: ignore[assignment]

    assert collected(codec, text, Blind()).refusal_start is None


def test_weights_by_the_store_end_a_transfer_and_await_engines_that_start_anew() -> None:
    """A group of processes holds memory of the device."""
    codec, closed, awaited = ChatCodec(checkpoint_path("aligned")), [], []
    report = SyncReport(1, 0.0, 0.0, 0, 0.0, 0.0, 1, 1.0)
    pool: Any = SimpleNamespace(
        pack=lambda state, version: version, sync=lambda *_: report, wait_until_ready=awaited.append
    )
    engines = StudentEngines(pool, codec, organism.OrganismJudge(), HARMFUL, RolloutConfig(), start_timeout_s=7.0)
    transfer: Any = SimpleNamespace(send=lambda state, version: version, close=lambda: closed.append(True))
    engines._transfer = transfer
    engines.send({}, 1, [], [])
    assert closed == awaited == []
    for _ in range(2):
        assert engines.sync({}, 2, [], [], adapters_only=False)["transfer"] == "store"
    assert (closed, awaited) == ([True], [7.0])
