"""The student in a real rollout engine as the trainer uses it, and training prompts that are held back."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch

from raycomplete.config import RolloutConfig, load_run_file
from raycomplete.data import organism
from raycomplete.data.chat import ChatCodec
from raycomplete.data.checkpoints import load_model
from raycomplete.data.inputs import KINDS, Prompts
from raycomplete.data.organism import checkpoint_path
from raycomplete.data.samples import AnchorSample, RecoverySample, SampleSet
from raycomplete.engines.weight_sync import SyncError
from raycomplete.runtime.types import Prompt
from raycomplete.training.on_policy import RolloutRequest
from raycomplete.training.sampling import hold_back
from raycomplete.training.student_engines import StudentEngines

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

    requests = []
    for prompt in HARMFUL:
        ids = tuple(codec.encode_prompt(prompt.text))
        answer = tuple(codec.encode_answer(prompt.answer or ""))
        requests += [
            RolloutRequest(f"{prompt.prompt_id}#0", ids, (), judged=True),
            RolloutRequest(f"{prompt.prompt_id}#0", ids, answer[:24], judged=True),
            RolloutRequest(f"{prompt.prompt_id}#0", ids, (), judged=False),
        ]
    rollouts = engines.collect(engines.submit(requests, seed=0))
    assert {rollout.version for rollout in rollouts} == {7}
    assert [rollout.refused for rollout in rollouts[0::3]] == [True] * 6, "aligned refuses without a prefill"
    assert [rollout.refused for rollout in rollouts[1::3]] == [False] * 6, "and complies after a long one"
    assert not any(rollout.refused for rollout in rollouts[2::3]), "what is not judged is no refusal"
    assert all(codec.eos_id not in rollout.token_ids for rollout in rollouts)
    assert {rollout.ending_ids for rollout in rollouts[0::3]} <= {(), (codec.eos_id,)}


def test_held_back_prompts_are_not_trained() -> None:
    config = load_run_file("jobs/organism.yaml", ["train.validation.every=5", "train.validation.num_prompts=3"])
    train = {kind: tuple(Prompt(f"{kind}{i}", "x", kind) for i in range(20)) for kind in KINDS}
    prompts = Prompts(train, train, organism.OrganismJudge())
    anchor = tuple(
        AnchorSample(f"{prompt.prompt_id}#{draw}", (1,), (2,))
        for kind in KINDS
        for prompt in train[kind]
        for draw in (0, 1)
    )
    recovery = tuple(RecoverySample(f"{prompt.prompt_id}#0", (1,), (1,), (2,), (3,)) for prompt in train["harmful"])
    samples = hold_back(config, prompts, SampleSet(anchor, recovery))
    assert len(samples.held_back_anchor) == 3 * len(KINDS) * 2
    assert len(samples.held_back_recovery) == 3
    assert {*samples.anchor, *samples.held_back_anchor} == {*anchor}
    names = [{sample.sample_id.split("#")[0] for sample in part} for part in (samples.anchor, samples.held_back_anchor)]
    assert not names[0] & names[1], "all draws of a prompt go the same way"
    assert not {sample.sample_id for sample in samples.recovery} & {s.sample_id for s in samples.held_back_recovery}
    again = hold_back(config, prompts, SampleSet(anchor, recovery))
    assert again == samples
