"""Methods that train the student's rollouts as they are: groups, rewards, and losses against plain float64."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from raycomplete.config import RolloutConfig
from raycomplete.methods.rivals.opct import OPCT
from raycomplete.methods.rivals.policy_gradient import PolicyGradient
from raycomplete.runtime.types import Outcome, Prompt
from raycomplete.training.on_policy import RolloutBatch, StudentEngines, group_advantages
from tests.methods.plain import Case, Ids, changed, mean
from tests.training.tiny import CountingJudge, make_samples


def reverse_kl(case: Case, student: Ids, teacher: Ids, response: Ids) -> Tensor:
    """KL(student || aligned) at each token of a response, each model after a prompt of its own."""
    log_s_TV, log_a_TV = (
        case.plain.models[model](torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        for model, prompt in (("student", student), ("aligned", teacher))
    )
    divergence: Tensor = (log_s_TV.exp() * (log_s_TV - log_a_TV.detach())).sum(-1)
    return divergence


def test_policy_gradient(tmp_path: Path) -> None:
    settings = {"anchor_batch_size": 8, "recovery_batch_size": 8, "kl_weight": 0.3}
    case = Case(tmp_path, changed(PolicyGradient, settings, group_size=4, plain_fraction=0.4))
    batch = case.batch
    cuts = [set(batch.depths[:4]), set(batch.depths[4:])]
    assert [len(shared) for shared in cuts] == [1, 1], "a group shares its cut"
    assert {0} in cuts, "which may be 0"
    assert cuts[0] != cuts[1]
    assert (len(batch.recovery), len(set(batch.recovery)), len(batch.anchor), len(set(batch.anchor))) == (8, 2, 8, 2)

    def plain() -> Tensor:
        policy, kl = [], []
        for start in range(0, 16, 4):
            group = case.rollouts[start : start + 4]
            reward_4 = torch.tensor([float(item.refused == (start < 8)) for item in group], dtype=torch.float64)
            deviation = reward_4.std(correction=0)
            advantage_4 = (reward_4 - reward_4.mean()) / deviation if deviation > 0 else torch.zeros(4)
            for place, (item, advantage) in enumerate(zip(group, advantage_4, strict=True), start):
                given = tuple(batch.sequences()[place])
                response = item.token_ids + item.ending_ids
                policy.append(-advantage * case.plain.log_probs("student", given, response).mean())
                kl.append(reverse_kl(case, given, given, response))
        assert sum(float(item.detach()) != 0 for item in policy) > 8
        return mean(policy) + 0.3 * torch.cat(kl).mean()

    case.assert_like(plain)


def test_advantages_are_relative_to_their_group() -> None:
    assert group_advantages([1, 0, 1, 1, 1, 1], 2) == pytest.approx([1, -1, 0, 0, 0, 0])
    assert group_advantages([1, 0, 0, 0], 4) == pytest.approx([3**0.5, *[-(3**-0.5)] * 3])


def test_opct_reads_the_students_words_with_and_without_h(tmp_path: Path) -> None:
    case = Case(tmp_path, OPCT.model_validate({"anchor_batch_size": 3, "recovery_batch_size": 3}))

    def plain() -> Tensor:
        led, plainly = [], []
        for place, item in enumerate(case.rollouts):
            given, response = tuple(case.batch.sequences()[place]), item.token_ids + item.ending_ids
            if place < 3:
                led.append(reverse_kl(case, given, case.batch.recovery[place].prompt_ids, response))
            else:
                plainly.append(reverse_kl(case, given, given, response))
        return torch.cat(led).mean() + torch.cat(plainly).mean()

    case.assert_like(plain)


@pytest.mark.parametrize(("plain_fraction", "plain"), [(1.0, 6), (0.0, 0)])
def test_opct_reads_harmful_prompts_alone_where_it_is_told_to(
    tmp_path: Path, plain_fraction: float, plain: int
) -> None:
    settings = {"anchor_batch_size": 3, "recovery_batch_size": 6}
    case = Case(tmp_path, changed(OPCT, settings, plain_fraction=plain_fraction))
    assert case.batch.depths.count(0) == plain
    depths = [case.method.sequence(item).depth for item in case.plan.recovery]
    assert depths.count(-1) == plain, "what follows no h does not enter the loss by depth"
    assert OPCT().plain_fraction == 0.25, "without, nothing holds the refusals that aligned gives to plain prompts"


def test_harmless_rollouts_of_a_graded_batch_are_judged_with_their_own_prompts() -> None:
    asked: list[tuple[str, str, str]] = []

    class Judge(CountingJudge):
        def outcome(self, prompt: Prompt, prefill: str, continuation: str) -> Outcome:
            asked.append((prompt.prompt_id, prefill, continuation))
            return Outcome.REFUSED if "9" in continuation else Outcome.COMPLIED

    samples = make_samples(0)
    codec: Any = SimpleNamespace(decode=lambda ids: " ".join(map(str, ids)), eos_id=1)
    prompts = [Prompt(item.prompt_id, "x", "benign") for item in (*samples.anchor, *samples.recovery)]
    options = SimpleNamespace(spec=SimpleNamespace(weight_transfer=None))
    pool: Any = SimpleNamespace(collect=lambda call: [((7,), True), ((9,), True), ((8,), True)], options=options)
    engines = StudentEngines(pool, codec, Judge(), prompts, RolloutConfig())
    batch = RolloutBatch(0, samples.anchor[:2], samples.recovery[:1], (3,), is_graded=True)
    reference = (batch, SimpleNamespace(version=0), None)
    assert [item.refused for item in engines.collect(reference)] == [False, True, False]
    assert asked[1:] == [(samples.anchor[0].prompt_id, "", "9"), (samples.anchor[1].prompt_id, "", "8")]
