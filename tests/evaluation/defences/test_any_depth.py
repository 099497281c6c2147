"""Any-depth defences: where an answer is looked at, what replaces it, and the probe against a float64 Newton fit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from raycomplete.attacks.white_box import TorchModel
from raycomplete.data.chat import ChatCodec
from raycomplete.data.checkpoints import load_model
from raycomplete.data.organism import checkpoint_path
from raycomplete.evaluation.defences.any_depth import AnyDepthGenerator, Passes, fit_probe, re_asking

END, HEADER = (80,), (90, 91)


class Scripted:
    """Answers every sequence with the same tokens; of a context that ends with a header, what `anew` says of it."""

    def __init__(self, answer: Sequence[int], anew: dict[int, list[int]] | None = None) -> None:
        self._answer, self._anew = list(answer), anew or {}
        self.asked: list[list[int]] = []

    def generate(self, sequences: Sequence[Sequence[int]], *, max_tokens: int, **_: Any) -> list[list[int]]:
        self.asked += [list(sequence) for sequence in sequences]
        first = sequences[0] if sequences else ()
        if tuple(first[-2:]) == HEADER and len(first) > 3:
            return [self._anew.get(len(sequence) - 6, [1])[:max_tokens] for sequence in sequences]
        return [self._answer[:max_tokens] for _ in sequences]


def around(generator: Scripted, check: Any, passes: Passes, max_length: int = 100) -> AnyDepthGenerator:
    return AnyDepthGenerator(generator, END, HEADER, 2, check, max_length=max_length, spare=3, passes=passes)


def test_an_answer_is_looked_at_every_few_tokens_from_its_header_on() -> None:
    looks = around(Scripted([]), lambda contexts: [None] * len(contexts), Passes())
    prompt = [5, 90, 91]
    assert looks.contexts([*prompt, 7], [8, 9, 10]) == [
        [*prompt, 7, 8, *END, *HEADER],
        [*prompt, 7, 8, 9, 10, *END, *HEADER],
    ]
    assert looks.contexts([5, 6], [8, 9]) == [[5, 6, 8, 9, *END, *HEADER]]  # no header: what the model itself says
    short = around(Scripted([]), None, Passes(), max_length=11)
    assert short.contexts([*prompt, 7], [8, 9, 10]) == [[*prompt, 7, 8, *END, *HEADER]]  # deeper ones would not fit


def test_re_asking_replaces_the_answer_by_the_first_refusal() -> None:
    model, passes = Scripted([21, 22, 23, 24, 25], {4: [60, 61], 2: [1]}), Passes()
    check = re_asking(model, str, lambda text: "60" in text, 20, passes)
    assert around(model, check, passes).generate([[5, 90, 91]], max_tokens=5) == [[60, 61]]
    # 5 tokens of the answer, 1 and 2 that were said anew at depths 2 and 4, and 2 contexts that were read.
    assert (passes.passes, passes.tokens) == (5 + 3 + 2, 2)


def test_an_answer_that_nothing_refuses_stays() -> None:
    model, passes = Scripted([21, 22, 23]), Passes()
    check = re_asking(model, str, lambda text: False, 20, passes)
    assert around(model, check, passes).generate([[5, 90, 91]] * 2, max_tokens=5) == [[21, 22, 23]] * 2
    assert passes.tokens == 6


def newton(x_NH: np.ndarray, y_N: np.ndarray, c: float) -> np.ndarray:
    """The minimum of the same loss by Newton's method: weights and bias."""
    design = np.column_stack([x_NH, np.ones(len(x_NH))])
    counts = {side: (y_N == side).sum() for side in (1, -1)}
    weight_N = np.asarray([c * len(y_N) / (2 * counts[y]) for y in y_N])
    ridge = np.diag([1.0] * x_NH.shape[1] + [0.0])
    theta = np.zeros(design.shape[1])
    for _ in range(50):
        p_N = 1 / (1 + np.exp(-y_N * (design @ theta)))
        gradient = ridge @ theta - design.T @ (weight_N * y_N * (1 - p_N))
        hessian = ridge + design.T @ (design * (weight_N * p_N * (1 - p_N))[:, None])
        theta -= np.linalg.solve(hessian, gradient)
    return theta


def test_the_probe_is_the_balanced_regularised_minimum() -> None:
    rng = np.random.default_rng(0)
    harmful_N = np.arange(60) % 4 == 0  # unbalanced
    x_NH = rng.normal(size=(60, 5)) + np.where(harmful_N, 0.8, -0.3)[:, None]
    probe = fit_probe(x_NH, list(harmful_N), c=0.7)
    expected = newton(x_NH, np.where(harmful_N, 1, -1), 0.7)
    assert np.allclose([*probe.weight_H, probe.bias], expected, atol=1e-4)
    logit_N = x_NH @ expected[:-1] + expected[-1]
    assert np.allclose(probe.probability(x_NH), 1 / (1 + np.exp(-logit_N)), atol=1e-4)
    with pytest.raises(ValueError, match="harmful and of harmless"):
        fit_probe(x_NH, [True] * 60)


@torch.inference_mode()
def test_states_are_what_a_layer_reads_at_the_last_token() -> None:
    model = load_model(checkpoint_path("aligned"), "float32")
    codec = ChatCodec(checkpoint_path("aligned"))
    rows = [codec.encode_prompt("tell me how to make soup ."), codec.encode_prompt("hello")]
    found_NH = TorchModel(model).hidden_states(rows, 2)
    for found_H, row in zip(found_NH, rows, strict=True):
        read_H = model(torch.tensor([row]), output_hidden_states=True).hidden_states[2][0, -1]
        assert np.allclose(found_H, model.model.layers[2].input_layernorm(read_H).numpy(), atol=1e-5)
