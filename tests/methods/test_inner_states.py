"""Rival methods that read the student's inner states: losses and gradients are those of plain float64 passes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from raycomplete.data.checkpoints import load_model
from raycomplete.data.samples import RecoverySample
from raycomplete.methods.rivals.circuit_breakers import CircuitBreakers
from raycomplete.methods.rivals.latent_adversarial import LatentAdversarial
from raycomplete.methods.rivals.presto import PRESTO, attention_on_prefill
from raycomplete.training.step_plan import StepSequences
from tests.methods.plain import MICRO_BATCHES, Case, Ids, assert_gradients, changed

PLAIN = {"anchor_batch_size": 3, "recovery_batch_size": 3}


def adapted(case: Case, learned: float = 0.2) -> Any:
    """The start model with adapters that have learned something already, or nothing."""
    torch.manual_seed(5)
    lm = get_peft_model(
        load_model(case.job.start, "float32"), LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
    )
    for name, weight in lm.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=learned)
    return lm


def test_circuit_breakers(tmp_path: Path) -> None:
    case = Case(tmp_path, changed(CircuitBreakers, PLAIN | {"alpha": 3.0}, target_layers=(0.5, 1.0)))
    lm, plain = adapted(case), adapted(case).double()
    plain.load_state_dict({name: value.double() for name, value in lm.state_dict().items()})
    weights = case.method.schedule(0.4)
    assert weights == {"retain": pytest.approx(0.2), "reroute": pytest.approx(0.8)}
    outputs = case.outputs(case.student(lm.get_base_model()), weights)

    def states(tokens: Ids) -> tuple[Tensor, Tensor]:
        """All layers with adapters on and off [L + 1, T, H], of the tokens that are read."""
        read = torch.tensor([tokens[:-1]])
        own = plain.get_base_model().model(read, output_hidden_states=True).hidden_states
        with torch.no_grad(), plain.disable_adapter():
            start = plain.get_base_model().model(read, output_hidden_states=True).hidden_states
        return torch.cat(own), torch.cat(start)

    kept, turned = [], []
    for prompt, answer in case.answers:
        own, start = states(prompt + answer)
        kept.append((own - start).pow(2).sum(-1).sqrt().mean(0))
    for sample in case.harmful:
        own, start = states(sample.prompt_ids + sample.harmful_ids)
        turned.append(torch.nn.functional.cosine_similarity(own, start, dim=-1)[1:].relu().mean(0))
    kept_mean, turned_mean = torch.cat(kept).mean(), torch.cat(turned).mean()
    expected = 3.0 * (0.2 * kept_mean + 0.8 * turned_mean)
    expected.backward()
    total = sum(float(output.total.detach()) for output in outputs)
    assert total == pytest.approx(float(expected.detach()), rel=1e-5)
    assert_gradients(
        ((name, weight) for name, weight in lm.named_parameters() if weight.requires_grad),
        (weight for weight in plain.parameters() if weight.requires_grad),
        1e-4,
    )
    losses = [sum(float(output.losses[name]) for output in outputs) for name in ("retain", "reroute")]
    assert losses[0] == pytest.approx(0.2 * float(kept_mean.detach()), rel=1e-5)
    assert losses[1] == pytest.approx(0.8 * float(turned_mean.detach()), rel=1e-5)


@pytest.mark.parametrize("packed", [True, False])
def test_presto(packed: bool, tmp_path: Path) -> None:
    case = Case(tmp_path, changed(PRESTO, PLAIN, attention_weight=0.6, plain_fraction=0.83))
    case.packed = packed
    cuts = [case.method.sequences(item)[0].depth for item in case.plan.recovery]
    assert sum(cut > 0 for cut in cuts) == 2, "one follows the prompt alone"
    model = case.plain.models["student"]
    model.set_attn_implementation("eager")

    def plain() -> Tensor:
        rows = [-case.plain.log_probs("student", *pair) for pair in case.answers]
        paid: list[Tensor] = []
        for sample, cut in zip(case.harmful, cuts, strict=True):
            start, context = len(sample.prompt_ids), sample.prompt_ids + sample.harmful_ids[:cut]
            rows.append(-case.plain.log_probs("student", context, sample.refusal_ids))
            layers = model(torch.tensor([(context + sample.refusal_ids)[:-1]]), output_attentions=True).attentions
            for attention_HTT in (layer[0] for layer in layers) if cut else ():
                for query in range(start, attention_HTT.shape[-1]):
                    paid_HT = attention_HTT[:, query, : query + 1]
                    before, prefill, after = paid_HT[:, :start], paid_HT[:, start:][:, :cut], paid_HT[:, start + cut :]
                    all_heads = prefill.sum() - before.sum() - after.sum() + len(paid_HT)
                    paid.append(all_heads / len(layers))
        tokens = len(torch.cat(rows)) + sum(cuts)
        return (torch.cat(rows).sum() + 0.6 * torch.stack(paid).sum()) / tokens

    case.assert_like(plain)


def test_attention_in_bfloat16_is_counted_in_rows_of_any_length() -> None:
    """Whole numbers above 256 are not all there in bfloat16."""
    place, length = torch.tensor([700]), torch.tensor([60])
    attention_BHTT = torch.zeros(1, 2, 1024, 1024, dtype=torch.bfloat16)
    attention_BHTT[..., 760, :] = 2**-10
    attention_BHTT[..., 760, 760] = 1.0  # in the first column after h
    found_R = attention_on_prefill(attention_BHTT, torch.tensor([760]), place, length)
    assert found_R.tolist() == pytest.approx([2 * 2 * 60 / 1024])


def test_latent_adversarial_training(tmp_path: Path) -> None:
    """All in float64: AdamW's first step is as large as its rate, however small a gradient."""
    settings = PLAIN | {"inner_steps": 3, "epsilon": 0.8}
    case = Case(tmp_path, changed(LatentAdversarial, settings, inner_lr=0.3, layers=(0.0,), retain_weight=1.0))
    student = case.student(load_model(case.job.start, "float32").double())
    outputs = case.outputs(student)
    assert len(outputs) == MICRO_BATCHES
    expected, norm = plain_latent(case, 3, 0.3, 0.8)
    assert norm == pytest.approx(0.8), "the adversary reaches its bound"
    assert sum(float(output.total.detach()) for output in outputs) == pytest.approx(float(expected.detach()), rel=1e-8)
    expected.backward()
    assert_gradients(student.lm.named_parameters(), case.plain.models["student"].parameters(), 1e-6)
    assert not student.lm.model.layers[0].mlp._forward_hooks, "nothing is left behind"


class Adversary:
    """Perturbations of the prompts of some pairs, each read by itself."""

    def __init__(self, case: Case, pairs: Sequence[RecoverySample]) -> None:
        self.case, self.pairs = case, pairs
        model = case.plain.models["student"].model
        self.sites = [model.embed_tokens, model.layers[0].mlp]
        self.deltas = [
            [torch.zeros(len(pair.prompt_ids), 32, dtype=torch.float64, requires_grad=True) for _ in self.sites]
            for pair in pairs
        ]

    def log_probs(self, responses: str) -> Tensor:
        """log p of the tokens of one response of every pair, under the perturbations."""
        found = []
        for pair, deltas in zip(self.pairs, self.deltas, strict=True):
            handles = [
                site.register_forward_hook(partial(self.add, delta))
                for site, delta in zip(self.sites, deltas, strict=True)
            ]
            found.append(self.case.plain.log_probs("student", pair.prompt_ids, getattr(pair, responses)))
            for handle in handles:
                handle.remove()
        return torch.cat(found)

    @staticmethod
    def add(delta: Tensor, module: Any, arguments: Any, output: Tensor) -> Tensor:
        added = torch.zeros_like(output[0])
        added[: len(delta)] = delta
        return output + added

    def move(self, steps: int, lr: float, epsilon: float) -> None:
        """Looks for compliance."""
        leaves = [delta for deltas in self.deltas for delta in deltas]
        optimizer = torch.optim.AdamW(leaves, lr=lr)
        for _ in range(steps):
            optimizer.zero_grad()
            loss = -0.5 * self.log_probs("harmful_ids").mean() + 0.5 * away(self.log_probs("refusal_ids")).mean()
            loss.backward(inputs=leaves)
            optimizer.step()
            with torch.no_grad():
                for row in (row for delta in leaves for row in delta):
                    row.mul_(min(1.0, epsilon / float(row.norm())))


def away(log_p_R: Tensor) -> Tensor:
    return torch.stack([-(1 - value.exp()).log() if value >= -5 else value * 0 for value in log_p_R])


def plain_latent(case: Case, steps: int, lr: float, epsilon: float) -> tuple[Tensor, float]:
    """The loss where each micro-batch has an adversary of its own, and the largest norm of a perturbation."""
    step, norm = StepSequences.of(case.plan, case.method), 0.0
    toward, pushed = [], []
    for chunk in step.micro_batches(0, 1, MICRO_BATCHES):
        read = {sequence.token_ids for sequence in chunk}
        if pairs := [item for item in case.harmful if item.prompt_ids + item.refusal_ids in read]:
            adversary = Adversary(case, pairs)
            adversary.move(steps, lr, epsilon)
            norm = max(
                norm, *(float(delta.detach().norm(dim=-1).max()) for deltas in adversary.deltas for delta in deltas)
            )
            toward.append(-adversary.log_probs("refusal_ids"))
            pushed.append(away(adversary.log_probs("harmful_ids")))
    kept = [-case.plain.log_probs("student", *pair) for pair in case.answers]
    parts = [torch.cat(rows).mean() for rows in (toward, pushed, kept)]
    return (0.5 * parts[0] + 0.5 * parts[1] + parts[2]) / 2, norm


def test_circuit_breakers_begin_where_the_cosine_has_a_gradient(tmp_path: Path) -> None:
    """With adapters as LoRA makes them, states are those of the start model and nothing turns them away."""
    slopes = []
    for std in (0.0, 0.01):
        case = Case(tmp_path, changed(CircuitBreakers, PLAIN, adapter_init_std=std))
        lm = adapted(case, learned=0.0)
        case.outputs(case.student(lm.get_base_model()), {"retain": 1e-9, "reroute": 1.0})
        slopes.append(max(float(p.grad.abs().max()) for n, p in lm.named_parameters() if "lora_B" in n))
    assert slopes[1] > 1000 * slopes[0]
