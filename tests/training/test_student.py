"""The module that DeepSpeed wraps, without DeepSpeed: its loss and gradients are those of plain float64 PyTorch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import LlamaConfig

from raycomplete.config import TrainConfig
from raycomplete.data.checkpoints import load_model
from raycomplete.data.samples import AnchorSample, read_samples
from raycomplete.losses.base_favored import base_favored_mask, deficit, forward_kl
from raycomplete.losses.loss import LossOutput
from raycomplete.losses.settings import LossSettings, PenaltySettings
from raycomplete.methods.completion import LossWeights
from raycomplete.methods.registry import AnchorItem
from raycomplete.methods.sft import SFT
from raycomplete.runtime.errors import NotFiniteError
from raycomplete.training.batches import MicroBatch
from raycomplete.training.deepspeed_engine import spread_bad_loss
from raycomplete.training.step_plan import DepthSampler, Planner, StepPlan
from raycomplete.training.student import keeps_sequences_apart, widening_size
from raycomplete.training.validation import position_profile
from tests.training.tiny import (
    Engine,
    build_batch,
    completion,
    make_job,
    make_model,
    make_student,
    plain_loss,
    prefetcher_of,
)


def make_batch(folder: Path, alpha: float, penalty: float = 0.0) -> tuple[MicroBatch, Any, LossSettings]:
    """One step's batch on tiny models, its job and its loss settings."""
    method = completion(contrastive_alpha=alpha, weights=LossWeights(opening=0.3, penalty=penalty))
    job = make_job(folder, TrainConfig(), method)
    planner = Planner(read_samples(job.samples), anchor_batch_size=3, recovery_batch_size=3, seed=1)
    prefetcher = prefetcher_of(method, job.scorers)
    prefetcher.request(0, *planner.samples_of(0))
    plan = planner.plan(0, DepthSampler(method.depth, 1))
    return build_batch(method, plan, prefetcher.take(0)), job, replace(method.loss(), chunk_tokens=7)


@pytest.mark.parametrize(("alpha", "penalty"), [(0.0, 0.0), (0.7, 0.0), (0.0, 2.0), (0.7, 2.0)])
def test_loss_and_gradients_equal_the_float64_reference(alpha: float, penalty: float, tmp_path: Path) -> None:
    batch, job, settings = make_batch(tmp_path, alpha, penalty)
    student = make_student(job.start, settings, job.folder)
    output = LossOutput.unflatten(student(batch), settings)
    output.total.backward()

    model, expected = plain_loss(job, batch, settings)
    expected.total.backward()
    assert output.total.item() == pytest.approx(float(expected.total.detach()), rel=1e-5)
    for (name, parameter), other in zip(student.lm.named_parameters(), model.parameters(), strict=True):
        assert parameter.grad is not None
        difference = (parameter.grad.double() - other.grad).norm() / other.grad.norm()
        assert float(difference) < 1e-4, name


@pytest.mark.parametrize("whose", ["aligned", "base", "student"])
def test_nan_reaches_the_loss_and_every_gradient_in_training_and_is_refused_in_validation(
    whose: str, tmp_path: Path
) -> None:
    """The optimizer leaves such a step out, which it cannot where the forward pass of one rank raises."""
    batch, job, settings = make_batch(tmp_path, 0.7 if whose == "base" else 0.0)
    student = make_student(job.start, settings, job.folder)
    if whose == "student":
        with torch.no_grad():
            student.lm.get_input_embeddings().weight[batch.input_ids_BT[0, 0]] = torch.nan
    else:
        hidden_PH = batch.aligned_hidden_PH if whose == "aligned" else batch.base_hidden_PH
        assert hidden_PH is not None
        hidden_PH[0] = torch.nan
    output = LossOutput.unflatten(student(batch), settings)
    assert output.row_loss_N.isnan().any()
    assert whose == "student" or int(output.row_loss_N.isnan().sum()) == 1, "it stays in its row"
    spread_bad_loss(output.total).backward()
    gradients = [parameter.grad for parameter in student.lm.parameters()]
    assert all(gradient is not None and not gradient.isfinite().all() for gradient in gradients)

    student.eval()
    with torch.no_grad(), pytest.raises(NotFiniteError, match=whose):
        student(batch)


def test_sft_is_the_cross_entropy_of_the_answers(tmp_path: Path) -> None:
    method = SFT(anchor_batch_size=3)
    job = make_job(tmp_path, TrainConfig(), method)
    samples = read_samples(job.samples).anchor[:3]
    batch = build_batch(method, StepPlan(tuple(AnchorItem(sample) for sample in samples), ()), None)
    student = make_student(job.start, replace(method.loss(), chunk_tokens=7), job.folder)
    loss = student(batch)[0]
    loss.backward()
    grad_VH = student.lm.lm_head.weight.grad.clone()

    student.zero_grad()
    logits_BTV = student.lm(**batch.model_inputs()).logits
    losses_N = functional.cross_entropy(logits_BTV.flatten(0, 1)[batch.row_N], batch.token_N, reduction="none")
    expected = losses_N.mean()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(grad_VH, student.lm.lm_head.weight.grad, rtol=1e-4, atol=1e-6)


def test_profiles_are_the_formulas_of_the_loss(tmp_path: Path) -> None:
    """With settings that are all different, so that none can stand in for another."""
    _, job, settings = make_batch(tmp_path, 0.0)
    favored = PenaltySettings(tau=0.004, margin=0.02)
    weights, options = settings.weights | {"penalty": 0.0}, settings.options | {"penalty": favored}
    settings = replace(settings, weights=weights, options=options)
    student = make_student(job.start, settings, job.folder).eval()
    models = {role: load_model(job.scorers[role].path, "float32").eval() for role in ("aligned", "base")}

    def expected(policy: Any, prompt_and_answer: tuple[int, ...], cut: int) -> list[torch.Tensor]:
        ids_1T = torch.tensor([prompt_and_answer])
        with torch.no_grad():
            log_p_TV, log_b_TV = (model(ids_1T).logits[0, cut - 1 : -1].double().log_softmax(-1) for model in policy)
            log_a_1V = models["aligned"](ids_1T).logits[0, cut - 1 : cut].double().log_softmax(-1)
        kl_T = forward_kl(log_p_TV, log_b_TV)
        favored_TV = base_favored_mask(log_a_1V, log_b_TV, favored.tau, favored.margin)
        mass_T = (log_p_TV.exp() * favored_TV).sum(-1)
        return [mass_T, kl_T, deficit(kl_T, 0.5)]

    samples = read_samples(job.samples).profile
    profile = position_profile(Engine(student), samples, job.scorers, 2, packed=True)
    for who, model in {"aligned": models["aligned"], "student": student.lm}.items():
        found = profile[who]
        parts = [
            expected((model, models["base"]), item.prompt_ids + item.answer_ids, len(item.prompt_ids))
            for item in samples
        ]
        for index, name in enumerate(("unfinished_mass", "kl_to_base", "deficit")):
            for position, value in enumerate(found[name]):
                mean = torch.stack([part[index][position] for part in parts if len(part[index]) > position]).mean()
                assert value == pytest.approx(float(mean), rel=1e-3, abs=1e-6), (who, name, position)
    assert max(profile["aligned"]["unfinished_mass"]) > 0.05


PROBE = AnchorSample("a", (5, 6, 7, 8, 9, 10), (11, 12, 13, 14, 15, 16))


class Reader:
    """Does what DeepSpeed's engine does here: log-probabilities of the tokens of a batch."""

    device = torch.device("cpu")

    def __init__(self, model: Any, *, sees_neighbours: bool) -> None:
        self._model, self._sees_neighbours = model, sees_neighbours

    def eval(self) -> None:
        self._model.eval()

    def train(self) -> None:
        self._model.train()

    def __call__(self, batch: MicroBatch, mode: str) -> tuple[torch.Tensor]:
        inputs = batch.model_inputs()
        if self._sees_neighbours:  # as a model whose mask knows nothing of positions
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        log_probs_NV = self._model(**inputs).logits.flatten(0, 1)[batch.row_N].log_softmax(-1)
        return (log_probs_NV.gather(1, batch.token_N[:, None])[:, 0],)


@pytest.mark.parametrize(
    ("kind", "sees_neighbours"),
    [
        ("llama", True),
        ("llama", False),
        ("gemma2", True),
        ("gemma2", False),
        ("gemma3_text", False),
        ("mixtral", False),
    ],
)
def test_a_leak_between_sequences_of_a_row_is_seen(kind: str, sees_neighbours: bool, tmp_path: Path) -> None:
    model = load_model(make_model(tmp_path, 0, kind=kind), "float32")
    reader = Reader(model, sees_neighbours=sees_neighbours)
    assert keeps_sequences_apart(reader, PROBE, "float32") is not sees_neighbours
    assert model.training, "left as it was found"


@pytest.mark.parametrize(
    ("attention", "changes", "expected"),
    [("sdpa", {}, 64), ("eager", {}, None), ("sdpa", {"attention_chunk_size": 128}, None)],
)
def test_rows_are_widened_where_attention_allows_it(
    attention: str, changes: dict[str, int], expected: int | None
) -> None:
    config = LlamaConfig(hidden_size=64, num_attention_heads=4, attn_implementation=attention, **changes)
    assert widening_size(config) == expected
