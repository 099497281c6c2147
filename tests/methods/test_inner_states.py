"""Rival methods that read the student's inner states: losses and gradients are those of plain float64 passes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from raycomplete.config import RunConfig
from raycomplete.data.checkpoints import load_model
from raycomplete.methods.circuit_breakers import CircuitBreakers
from raycomplete.methods.registry import Feedback
from tests.methods.plain import Case, Ids, assert_gradients

PLAIN = {"anchor_batch_size": 3, "recovery_batch_size": 3}


def adapted(case: Case) -> Any:
    """The start model with adapters that have learned something already."""
    torch.manual_seed(5)
    lm = get_peft_model(
        load_model(case.job.start, "float32"), LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
    )
    for name, weight in lm.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.2)
    return lm


def test_circuit_breakers(tmp_path: Path) -> None:
    case = Case(tmp_path, CircuitBreakers.model_validate(PLAIN | {"alpha": 3.0, "target_layers": [0.5, 1.0]}))
    lm, plain = adapted(case), adapted(case).double()
    plain.load_state_dict({name: value.double() for name, value in lm.state_dict().items()})
    weights = case.method.schedule(0.4)
    assert weights == {"retain": pytest.approx(0.2), "reroute": pytest.approx(0.8)}
    outputs = case.outputs(case.student(lm.get_base_model()), Feedback(weights))

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


def test_circuit_breakers_need_adapters() -> None:
    settings: dict[str, Any] = {
        "models": {"base": "organism:base", "aligned": "organism:aligned"},
        "data": {"source": "organism"},
        "method": {"name": "circuit_breakers"},
    }
    with pytest.raises(ValueError, match=r"set train\.lora_rank"):
        RunConfig.model_validate(settings)
    assert RunConfig.model_validate(settings | {"train": {"lora_rank": 16}}).method.needs_lora
