"""Measurements on held-back prompts: greedy answers, KL and counts, without DeepSpeed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from raycomplete.config import TrainConfig
from raycomplete.config.training import ValidationConfig
from raycomplete.data.checkpoints import load_model
from raycomplete.data.samples import AnchorSample, RecoverySample, SampleSet
from raycomplete.runtime.types import Outcome, Prompt
from raycomplete.training import validation
from raycomplete.training.batches import answer_batch
from raycomplete.training.job import ResponseJudge, TrainJob
from raycomplete.training.student import PrefixBatch, StudentModule
from raycomplete.training.validation import StepMeasurement, Validator, questions
from tests.training.tiny import Engine, LocalStudentEngines, completion, make_job, make_samples, make_student, steered

PROMPTS = ((5, 6, 7), (8, 9), (10, 11, 12, 13, 14, 15, 16))
END = 3  # of the organism's tokenizer


def student_of(job: TrainJob) -> StudentModule:
    return make_student(job.start, replace(job.method.loss(), chunk_tokens=7), job.folder)


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """One rank, without a process group."""
    monkeypatch.setattr(validation, "from_rank_zero", lambda work: work())


def test_answers_are_those_of_one_sequence_at_a_time_without_a_cache(tmp_path: Path) -> None:
    student = student_of(make_job(tmp_path, TrainConfig())).eval()
    with torch.no_grad():
        (found_BT,) = student(PrefixBatch.of(PROMPTS, 6), "continue")
        for prompt, found in zip(PROMPTS, found_BT.tolist(), strict=True):
            tokens = list(prompt)
            for _ in range(6):
                tokens.append(int(student.lm(torch.tensor([tokens])).logits[0, -1].argmax()))
            assert found == tokens[len(prompt) :]


@pytest.mark.parametrize("packed", [True, False])
def test_the_kl_is_that_of_plain_pytorch_whatever_the_method_trains(packed: bool, tmp_path: Path, alone: None) -> None:
    job = steered(make_job(tmp_path, TrainConfig(), completion(contrastive_alpha=0.5, weights={"anchor": 3.0})))
    short = tuple(AnchorSample(f"a{i}", (5, 6), tuple(range(7, 9 + 8 * (i % 2)))) for i in range(4))
    samples = replace(make_samples(0), held_back_anchor=short)
    student = student_of(job)
    found = Validator(Engine(student), samples, job, 4, packed=packed).measure(7)
    assert student.training, "left as it was found"
    models = [load_model(folder, "float32") for folder in (job.folder / "aligned", job.start)]
    rows = []
    for sample in samples.held_back_anchor:
        tokens, cut = torch.tensor([sample.prompt_ids + sample.answer_ids]), len(sample.prompt_ids)
        with torch.no_grad():
            log_a, log_s = (model(tokens).logits[0, cut - 1 : -1].double().log_softmax(-1) for model in models)
        rows.append((log_a.exp() * (log_a - log_s)).sum(-1))
    assert found.kl == pytest.approx(float(torch.cat(rows).mean()), rel=1e-5)
    assert found.kl > 0.1
    assert found.step == 7
    engines = LocalStudentEngines(job.start, 4)
    engines.attach(None, None, TrainConfig(), short, packed=packed)
    expected = answer_batch(short, packed=packed)
    assert torch.equal(engines._batch.input_ids_BT, expected.input_ids_BT), "the probe of the engines packs likewise"
    assert (len(expected.input_ids_BT) < 4) == packed, "else nothing shares a row, and this proves nothing"


@pytest.mark.parametrize("packed", [True, False])
def test_along_h_it_measures_what_plain_pytorch_in_float64_does(packed: bool, tmp_path: Path, alone: None) -> None:
    job = steered(make_job(tmp_path, TrainConfig()))
    job = replace(job, start=job.folder / "aligned")  # else the student is base, and every rank 0
    turned = RecoverySample("t#0", (5, 6), (7,), (20, 21, *range(6, 40)), (3,), refusal_prefix_tokens=2)
    short = RecoverySample("s#0", (5,), (5,), (6,), (3,))
    held = (turned, short, *make_samples(0).held_back_recovery)
    samples = replace(make_samples(0), held_back_recovery=held)
    reader = job.response_judge
    assert reader is not None
    prompts = {**reader.prompts, **{name: Prompt(name, "x", "harmful") for name in "ts"}}
    job = replace(job, response_judge=replace(reader, prompts=prompts))
    found = Validator(Engine(student_of(job)), samples, job, 2, packed=packed).measure(1)
    base, student = (load_model(job.folder / role, "float32").double() for role in ("base", "aligned"))
    in_reach, unfinished = [], []
    for prompt, h in [(sample.prompt_ids, sample.harmful_ids[sample.refusal_prefix_tokens :]) for sample in held]:
        for place in range(len(h)):
            tokens = torch.tensor([prompt + h[:place]])
            with torch.no_grad():
                base_V, student_V = (model(tokens).logits[0, -1].log_softmax(-1) for model in (base, student))
            if place == 0:
                start_V = student_V  # of aligned, which the student still is
                continue
            in_reach.append(int(base_V.argmax()) in student_V.topk(20).indices.tolist())
            favored_V = (base_V > start_V + 0.1) & (base_V.exp() >= 0.01)
            unfinished.append(float(student_V.exp()[favored_V].sum()))
    assert len(in_reach) > 40
    assert found.in_reach == sum(in_reach) / len(in_reach)
    assert 0.05 < found.in_reach < 0.95, "else this proves nothing"
    assert found.unfinished == pytest.approx(sum(unfinished) / len(unfinished), rel=1e-5)
    assert 0.05 < found.unfinished < 0.95, "else this proves nothing"


def test_h_is_cut_after_a_refusal_prefix_and_only_where_it_is_long_enough() -> None:
    plain = RecoverySample("w#0", (5,), (5,), (6, 7, 8, 9), (3,))
    turned = RecoverySample("t#0", (5,), (5,), (20, 21, 6, 7, 8), (3,), refusal_prefix_tokens=2)
    harmless = AnchorSample("v#0", (4,), (9,))
    found = questions(SampleSet((harmless,), held_back_recovery=(plain, turned), held_back_greedy=(harmless,)), [0, 3])
    assert [(item.prompt_id, item.prefill_ids, item.depth) for item in found] == [
        ("w", (), 0),
        ("w", (6, 7, 8), 3),
        ("t", (), 0),
        ("v", (), -1),
    ]


class WordJudge:
    """Calls what it reads by its first letter, and remembers it."""

    name = "word"

    def __init__(self) -> None:
        self.read: list[tuple[str, str, str]] = []

    def outcome(self, prompt: Prompt, prefill: str, continuation: str) -> Outcome:
        self.read.append((prompt.prompt_id, prefill, continuation))
        if continuation == "no more":
            return Outcome.REFUSED_THEN_COMPLIED
        return Outcome.REFUSED if continuation.startswith("no") else Outcome.COMPLIED

    def is_right(self, prompt: Prompt, continuation: str) -> bool:
        return False


class Words:
    """Token ids as words."""

    eos_ids = frozenset({END})

    def decode(self, token_ids: Any) -> str:
        return " ".join({1: "no", 2: "yes", 4: "more"}[token] for token in token_ids)


def test_over_refusal_is_the_net_change_against_aligned(tmp_path: Path, alone: None) -> None:
    """Aligned refuses a and b; the student refuses b, c and d: two more, one less."""
    greedy = tuple(AnchorSample(name, (5,), (token,)) for name, token in zip("abcd", (1, 1, 2, 2), strict=True))
    recovery = tuple(RecoverySample(name, (5,), (5,), (2, 4, 2), (1,)) for name in "xy")
    samples = replace(make_samples(0), held_back_recovery=recovery, held_back_greedy=greedy)
    train = TrainConfig(validation=ValidationConfig(depths=[2, 0]))
    judge = WordJudge()
    prompts = {name: Prompt(name, "", "harmful") for name in "abcdxy"}
    job = replace(make_job(tmp_path, train), response_judge=ResponseJudge(judge, Words(), prompts))  # type: ignore[arg-type]
    validator = Validator(None, samples, job, 2, packed=True)
    answers = [(2, END, 1), (2, 4), (1, 4), (1, END), (2,), (1,), (1,), (1, END, 2)]
    found = validator._judge(3, 0.25, answers)
    assert found == StepMeasurement(3, ((0, 2, 2), (2, 1, 2)), 1, 4, 0.25, changed=3)
    assert judge.read[:2] == [("x", "", "yes"), ("x", "yes more", "yes more")], "nothing after the end of a response"
