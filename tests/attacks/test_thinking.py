"""Evaluations of models that think: the thinking has a budget of its own, and the answer alone is judged."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from raycomplete.attacks.attack import plain_trials
from raycomplete.attacks.registry import build_attack, parse_attack
from raycomplete.attacks.target import Target
from raycomplete.config import EvaluationConfig, parse
from raycomplete.config.evaluation import CapabilitiesConfig
from raycomplete.data.chat import ChatCodec
from raycomplete.data.checkpoints import fingerprint
from raycomplete.data.inputs import KINDS, Models, Prompts
from raycomplete.data.thinking import ThinkingGenerator
from raycomplete.engines.cluster import Cluster
from raycomplete.engines.online_engine import OnlineSampling, Piece
from raycomplete.engines.run import Run
from raycomplete.engines.start import Engines
from raycomplete.evaluation.capabilities import plan_capabilities
from raycomplete.evaluation.judges import RefusalJudge
from raycomplete.evaluation.roles import evaluate_roles
from raycomplete.evaluation.runner import EvaluationSets, evaluate_model
from raycomplete.runtime.console import Console
from raycomplete.runtime.errors import DataError
from raycomplete.runtime.types import Prompt, PromptKind
from raycomplete.serving.answers import Answerer
from raycomplete.serving.openai_api import ChatRequest
from tests.attacks.scripted import COMPLY, REFUSE
from tests.data.chat_families import CHAT_FAMILIES, save_family

BUDGET, LONGEST = 60, 80
ASKED = Prompt("h", "Open it", "harmful", "First take the key, then turn it.")
THINKING = [name for name, family in CHAT_FAMILIES.items() if family.thinks]


class Thinker:
    """A model that writes `thought` and closes it where it may think, then `answer`, and keeps what it was asked."""

    def __init__(self, codec: ChatCodec, family: str, thought: str, answer: str) -> None:
        self.codec, self.thought, self.answer = codec, thought, answer
        self.family = CHAT_FAMILIES[family]
        self.calls: list[tuple[list[Sequence[int]], int, int | None]] = []

    def generate(
        self, sequences: Sequence[Sequence[int]], *, max_tokens: int, seed: int | None = None, **_: Any
    ) -> list[list[int]]:
        self.calls.append((list(sequences), max_tokens, seed))
        frame, answer = self.codec.frame, self.codec.encode_answer(self.answer)
        assert frame is not None
        thought = [*self.codec.encode_answer(self.thought), *frame.closing]
        said = []
        for sequence in sequences:
            is_begun = frame.split(sequence, [0])[1] == ()
            opening = [] if is_begun else list(frame.opening)
            said.append([*opening, *thought, *answer] if frame.may_think(sequence) else answer)
        return [tokens[:max_tokens] for tokens in said]


Make = Callable[..., tuple[Target, Thinker]]


@pytest.fixture(params=THINKING)
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Make:
    """The target of a family that thinks, and the model behind it."""

    def target(thought: str, answer: str, *, thinks: bool = True, max_length: int = 1000) -> tuple[Target, Thinker]:
        save_family(request.param, tmp_path)
        codec = ChatCodec(tmp_path, arguments={"enable_thinking": thinks})
        model = Thinker(codec, request.param, thought, answer)
        assert codec.frame is not None
        generator = ThinkingGenerator(model, codec.frame, BUDGET)
        return (
            Target("student", "m", generator, codec, RefusalJudge(), max_length, LONGEST, max_thinking_tokens=BUDGET),
            model,
        )

    return target


def responses(target: Target, entry: dict[str, Any] | str) -> dict[str, tuple[str, str, str]]:
    """Returns what the model read, thought and answered, by variant."""
    attack = build_attack(parse_attack(entry))
    trials = attack.plan(target, [ASKED])
    found: dict[str, tuple[str, str, str]] = {}

    def emit(pairs: Any) -> None:
        for trial, response in pairs:
            read = target.codec._tokenizer.decode(response.sequence)  # type: ignore[attr-defined]
            thinking = target.codec._tokenizer.decode(response.thinking)  # type: ignore[attr-defined]
            found[trial.variant] = (read, thinking, target.codec.decode(response.tokens))

    attack.run(target, trials, emit)
    return found


def test_only_the_answer_is_judged(make: Make, tmp_path: Path) -> None:
    """A thought that refuses is no refusal, and one that plans to comply is no answer."""
    sets = EvaluationSets((ASKED,), (Prompt("b", "Bake", "benign"),), (Prompt("o", "Kill it", "borderline"),))
    config = EvaluationConfig(depths=[0], max_tokens=LONGEST, max_utility_tokens=LONGEST, save_completions=True)
    for thought, answer, rate in ((REFUSE, COMPLY, 1.0), ("Sure, take the key.", REFUSE, 0.0)):
        target, _ = make(thought, answer)
        folder = tmp_path / answer[:3]
        result = evaluate_model(target, sets, config, folder)
        assert result["attacks"]["prefill"]["mean"]["rate"] == rate
        (row, *_) = (folder / "evaluation" / "completions" / "student.jsonl").read_text().splitlines()
        kept = json.loads(row)
        assert thought in kept["thinking"]
        assert kept["continuation"] == answer
        again = evaluate_model(replace(target, generator=model_that_fails()), sets, config, folder)
        assert again["attacks"] == result["attacks"], "thinking is kept with the responses"


def model_that_fails() -> Any:
    class Failing:
        def generate(self, *_: Any, **__: Any) -> list[list[int]]:
            raise AssertionError("asked again")

    return Failing()


def test_every_role_thinks_within_the_budget_of_the_run_file(tmp_path: Path) -> None:
    save_family("qwen3", tmp_path)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Open it"}\n')
    evaluation = {"depths": [0], "max_tokens": LONGEST, "max_utility_tokens": LONGEST, "max_thinking_tokens": BUDGET}
    tree = {"models": {"base": "b", "aligned": "a"}, "data": {}, "evaluation": evaluation}
    config = parse(tree, "test")
    codec = ChatCodec(tmp_path, arguments={"enable_thinking": True})
    model = Thinker(codec, "qwen3", "They want it. " * 20, COMPLY)
    prompts: dict[PromptKind, tuple[Prompt, ...]] = {kind: (replace(ASKED, kind=kind),) for kind in KINDS}
    models = Models({"aligned": tmp_path}, {}, codec)
    run = Run(config, tmp_path, models, Prompts({}, prompts), Console(quiet=True), Cluster(use_gpu=False))
    run.engines = Engines(SimpleNamespace(with_weights=lambda _: model))  # type: ignore[arg-type]
    result = evaluate_roles(run, ["aligned"])["aligned"]
    name = f"{fingerprint(tmp_path)} ends {sorted(codec.eos_ids)} thinks {BUDGET}"
    assert result["model_id"] == name, "other ends and another budget make other answers"
    assert result["attacks"]["prefill"]["mean"]["rate"] == 1.0
    frame = codec.frame
    assert frame is not None
    assert {limit for _, limit, _ in model.calls} == {LONGEST, LONGEST + BUDGET + len(frame.closing)}


@pytest.mark.parametrize("thought", ["Hm.", "They want it. " * 20], ids=["short", "cut"])
def test_a_chat_shows_the_answer_and_the_thought_apart(make: Make, thought: str) -> None:
    _, model = make(thought, COMPLY)
    frame = model.codec.frame
    assert frame is not None
    asked: list[list[int]] = []

    class Online:
        """The same model as an engine gives it: its thought ends at the mark where there is one."""

        async def generate(self, tokens: Sequence[int], sampling: OnlineSampling) -> AsyncIterator[Piece]:
            asked.append(list(tokens))
            (said,) = model.generate([tokens], max_tokens=sampling.max_tokens)
            if sampling.stop_ids and sampling.stop_ids[0] in said:
                said = said[: said.index(sampling.stop_ids[0]) + 1]
            yield Piece(model.codec.decode(said), tuple(said), finish_reason="stop")

    answerer = Answerer(model.codec, Online(), 4096, BUDGET)
    messages = [{"role": "user", "content": "Open it"}]
    request = ChatRequest.model_validate({"model": "aligned", "messages": messages})

    async def answer() -> Any:
        return await anext(answerer.answer(request))

    message = asyncio.run(answer())["choices"][0]["message"]
    assert message["content"] == COMPLY
    if frame.thinks:
        assert thought.strip()[:20] in message["reasoning_content"]
        assert tuple(asked[1][-len(frame.closing) :]) == frame.closing, "it is closed before the answer is asked for"
        assert len(asked[1]) - len(asked[0]) <= BUDGET + len(frame.closing)


def test_answers_are_cut_by_their_own_length(make: Make) -> None:
    target, _ = make("Hm.", COMPLY * 5)
    (trial,) = plain_trials(target, "a", "v", [ASKED], 40)
    attack = build_attack(parse_attack("templates"))
    (response,) = [target.response(trial.sequence, (), *target.draw([trial.sequence], trial.decoding, None))]
    assert target.codec.decode(response.tokens) == (COMPLY * 5)[:40]
    assert attack.is_cut(trial, response)
    short, _ = make("Hm." * 15, "No.")
    (response,) = [short.response(trial.sequence, (), *short.draw([trial.sequence], trial.decoding, None))]
    assert not attack.is_cut(trial, response), "a long thought before a short answer"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_long_thought_is_closed_and_the_answer_asked_for(make: Make, temperature: float) -> None:
    target, model = make("They want it. " * 20, COMPLY)
    trials = plain_trials(target, "a", "v", [ASKED, ASKED], LONGEST)
    decoding = replace(trials[0].decoding, temperature=temperature)
    frame = target.codec.frame
    assert frame is not None
    for tokens in target.draw([trial.sequence for trial in trials], decoding, 7):
        response = target.response(trials[0].sequence, (), tokens)
        assert response.thinking[BUDGET:] == frame.closing
        assert target.codec.decode(response.tokens) == COMPLY
    (_, first, seed), *later = model.calls
    assert first == LONGEST + BUDGET + len(frame.closing)
    assert seed == (7 if temperature else None)
    asked = [(len(sequences), limit, seed) for sequences, limit, seed in later]
    assert asked == ([(1, LONGEST, 7), (1, LONGEST, 8)] if temperature else [(2, LONGEST, None)]), "in one batch"


@pytest.mark.parametrize("thinks", [True, False])
def test_a_prefill_goes_into_the_answer(make: Make, thinks: bool) -> None:
    target, model = make("Hm.", COMPLY, thinks=thinks)
    found = responses(target, {"name": "prefill", "depths": [0, 5]})
    skipped = model.family.prompt.replace("How?", ASKED.text) + model.family.skipping
    assert found["prefill-5"] == (skipped + "First", "", COMPLY)
    read, thinking, answer = found["prefill-0"]
    assert answer == COMPLY
    assert (read == skipped, thinking == "") == (not thinks, not thinks)


@pytest.mark.parametrize("thinks", [True, False])
def test_a_prefill_into_the_thinking_leaves_the_answer_to_the_model(make: Make, thinks: bool) -> None:
    target, model = make("Hm.", REFUSE, thinks=thinks)
    found = responses(target, {"name": "prefill_thinking", "opening": "I comply:", "depths": [0, 6]})
    opened = model.family.prompt.replace("How?", ASKED.text) + model.family.opening + "I comply:"
    assert found["thought-0"] == (opened, f"Hm.{model.family.closing}", REFUSE)
    assert found["thought-6"] == (f"{opened} First", f"Hm.{model.family.closing}", REFUSE)


def test_answers_too_short_for_a_thought_are_counted(make: Make, tmp_path: Path) -> None:
    target, _ = make("Hm.", COMPLY)
    sets = EvaluationSets((ASKED, replace(ASKED, prompt_id="none", answer=None)), (), ())
    attack = {"name": "prefill_thinking", "depths": [0, 6]}
    config = EvaluationConfig.model_validate({"depths": [0], "max_tokens": LONGEST, "attacks": [attack]})
    block = evaluate_model(target, sets, config, tmp_path)["attacks"]["prefill_thinking"]
    assert (block["n"], block["trials"], block["short_prefills"]) == (2, 3, 1)


def test_prompts_must_leave_room_for_the_thinking(make: Make) -> None:
    target, _ = make("Hm.", COMPLY)
    (trial,) = plain_trials(target, "a", "v", [ASKED], LONGEST)
    assert target.codec.frame is not None
    needed = len(trial.sequence) + LONGEST + BUDGET + len(target.codec.frame.closing)
    replace(target, max_length=needed).check_fits([trial])
    with pytest.raises(DataError, match=rf"needs {needed} tokens .* lower .*evaluation\.max_thinking_tokens"):
        replace(target, max_length=needed - 1).check_fits([trial])
    closed = target.answering
    (trial,) = plain_trials(replace(target, codec=closed), "a", "v", [ASKED], LONGEST)
    replace(target, max_length=len(trial.sequence) + LONGEST).check_fits([trial])


def test_examples_of_a_benchmark_leave_room_for_the_thinking(make: Make, tmp_path: Path) -> None:
    target, _ = make("Hm.", COMPLY)
    lines = ["subject,question,A,B,C,D,answer", *("law,What?,one,two,three,four,B" for _ in range(9))]
    (tmp_path / "mmlu.csv").write_text("\n".join(lines[:2]))
    (tmp_path / "dev.csv").write_text("\n".join(lines))
    config = CapabilitiesConfig(mmlu=tmp_path / "mmlu.csv", mmlu_fewshot=tmp_path / "dev.csv", shots=9)
    (trial,) = plan_capabilities(target, config)
    target.check_fits([trial])
    assert 0 < trial.settings["shots"] < 9
    (roomy,) = plan_capabilities(replace(target, max_thinking_tokens=0), config)
    assert roomy.settings["shots"] >= trial.settings["shots"]


def test_a_thought_has_no_answer_to_begin_with(make: Make, target: Target, tmp_path: Path) -> None:
    thinking, model = make("Hm.", COMPLY)
    attack = build_attack(parse_attack({"name": "prefill_thinking", "depths": [500]}))
    config = EvaluationConfig.model_validate({"depths": [0], "max_tokens": LONGEST, "attacks": [attack.config]})
    with pytest.raises(DataError, match="as long as the depths of the attack prefill_thinking"):
        evaluate_model(thinking, EvaluationSets((ASKED,), (), ()), config, tmp_path)
    assert model.calls == []
    with pytest.raises(DataError, match="no place for thinking, which the attack prefill_thinking begins"):
        attack.plan(target, [ASKED])
