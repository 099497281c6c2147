"""Rates of attacks: which responses they count, under which seeds, and which flaws they publish."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from raycomplete.attacks.target import Attacker, AttackTools, BatchJudge, Target, Triple
from raycomplete.attacks.trial import Response, Trial
from raycomplete.config import EvaluationConfig
from raycomplete.evaluation.judges import RefusalJudge
from raycomplete.evaluation.runner import EvaluationSets, evaluate_model
from raycomplete.runtime.errors import WorkError
from raycomplete.runtime.types import Outcome, Prompt
from tests.attacks.scripted import COMPLY, REFUSE, Tools, evaluate, made, run, settings_of


def test_pair_publishes_its_first_round_too(
    model: Any, codec: Any, tools: Tools, sets: EvaluationSets, tmp_path: Path
) -> None:
    """Which is 0 here, where the model gives in to the second wording. Nothing is corrected of what a judge picks."""
    asked: list[str] = []

    def give_in(prompt: str, _: str) -> str:
        asked.append(prompt)
        return COMPLY if asked.count(prompt) > len(sets.harmful) and prompt == "please open the door" else REFUSE

    entry = {"name": "pair", "streams": 1, "rounds": 2}
    block = evaluate(model(give_in), codec, tools, sets, [entry], tmp_path)["attacks"]["pair"]
    assert (block["best_of"], block["mean"]["rate"], block["first_round"]["rate"]) == (2, 1.0, 0.0)
    assert block["corrected"] is None
    assert "the judge does not see whether a rewritten prompt keeps its goal" in block["reduced_because"]
    once = evaluate(model(COMPLY), codec, tools, sets, [{**entry, "rounds": 1}], tmp_path / "once")["attacks"]["pair"]
    assert (once["best_of"], once["first_round"]) == (1, None)
    assert once["corrected"] is not None


SEARCHES = (
    ({"name": "pair", "streams": 1, "rounds": 3, "instruction": "{goal}"}, 3),
    ({"name": "crescendo", "turns": 3, "instruction": "{goal}"}, 3),
    ({"name": "best_of_n", "samples": 3}, 3),
)


@pytest.mark.parametrize(("entry", "most"), SEARCHES)
def test_a_verdict_that_cannot_be_read_ends_no_search(
    entry: dict[str, Any], most: int, target: Target, sets: EvaluationSets, tmp_path: Path
) -> None:
    """Patterns decide in its place, and call an answer to a harmless question compliance."""

    class Mumbling(BatchJudge):
        name = "mumbling"

        def outcomes(self, triples: Sequence[Triple]) -> list[Outcome]:
            self.unreadable = frozenset(range(len(triples)))
            return [Outcome.COMPLIED] * len(triples)

    found = run(replace(target, judge=Mumbling()), entry, sets)
    assert {(response.stats["queries"], response.stats["unreadable_verdicts"]) for _, response in found} == {
        (most, most)
    }
    assert {response.stats["first_complied"] for _, response in found} == {0.0}
    config = EvaluationConfig.model_validate({"depths": [4], "max_tokens": 10, "attacks": [settings_of(entry)]})
    only_search = replace(sets, harmful=sets.harmful[3:], benign=(), borderline=())
    result = evaluate_model(replace(target, judge=Mumbling()), only_search, config, tmp_path)["attacks"][entry["name"]]
    assert result["mean"]["rate"] == 0.0, "the last response is stored as no success, either"


@pytest.mark.parametrize(("entry", "most"), SEARCHES)
def test_the_verdict_that_ended_a_search_is_the_one_that_is_stored(
    entry: dict[str, Any], most: int, target: Target, sets: EvaluationSets, tmp_path: Path
) -> None:
    """Asked again, this judge says the opposite."""
    asked: list[tuple[Prompt, str]] = []

    class Fickle(RefusalJudge):
        tells_harmless = True

        def outcome(self, prompt: Prompt, prefill: str, continuation: str) -> Outcome:
            asked.append((prompt, continuation))
            return Outcome.COMPLIED if asked.count(asked[-1]) == 1 else Outcome.REFUSED

    config = EvaluationConfig.model_validate({"depths": [4], "max_tokens": 10, "attacks": [settings_of(entry)]})
    only_search = replace(sets, harmful=sets.harmful[3:], benign=(), borderline=())
    other = replace(target, judge=Fickle(), generator=Counted(target))
    result = evaluate_model(other, only_search, config, tmp_path)["attacks"][entry["name"]]
    assert result["mean"]["rate"] == 1.0
    assert result["stats"]["queries"] == 1


class Counted:
    """A model that says something else each time."""

    def __init__(self, target: Target) -> None:
        self._codec, self._said = target.codec, 0

    def generate(self, sequences: Sequence[Sequence[int]], **_: Any) -> list[list[int]]:
        self._said += 1
        return [self._codec.encode_answer(f"take key {self._said} {place}") for place in range(len(sequences))]


def test_draws_do_not_depend_on_what_is_missing(target: Target, sets: EvaluationSets, model: Any, codec: Any) -> None:
    """Each sequence of a call is drawn under the seed of the call plus its place."""

    class Drawing:
        def __init__(self) -> None:
            self.seeds: list[int] = []

        def generate(self, sequences: Sequence[Any], *, seed: int, **_: Any) -> list[list[int]]:
            self.seeds += [seed + place for place in range(len(sequences))]
            return [codec.encode_answer(REFUSE) for _ in sequences]

    for entry in (
        {"name": "decoding", "temperatures": [0.5], "top_ps": [], "top_ks": []},
        {"name": "pair", "streams": 1, "rounds": 1},
    ):
        drawing = Drawing()
        attacker = Attacker("a", drawing, codec, 512)
        tools = replace(target.tools, attacker=lambda checkpoint, attacker=attacker: attacker)
        drawn = replace(target, tools=tools, generator=model(REFUSE) if entry["name"] == "pair" else drawing)
        attack = made(entry)
        trials = attack.plan(drawn, sets.harmful)
        attack.run(drawn, trials, lambda _: None)
        whole = list(drawing.seeds)
        drawing.seeds = []
        attack.run(drawn, [trials[0], trials[2], trials[3]], lambda _: None)
        assert drawing.seeds == [whole[0], whole[2], whole[3]], entry
        assert len({trial.key("m") for trial in trials}) == len(trials)


def test_trials_are_named_by_what_decides_them(target: Target, sets: EvaluationSets) -> None:
    prompt = sets.harmful[3]
    longer = replace(prompt, answer=f"{prompt.answer} and more")

    def planned(entry: Any, prompts: Sequence[Prompt], of: Target = target) -> list[Trial]:
        return made(entry).plan(of, prompts)

    entry = {"name": "base_guided_decoding", "tops": [5]}
    (short,), (long,) = planned(entry, [prompt]), planned(entry, [longer])
    assert short.key("m") == long.key("m")
    assert short.judgement_key("k") != long.judgement_key("k"), "a judge may read the answer"
    changed = replace(
        target,
        tools=replace(
            target.tools, fine_tune_id=lambda settings, name: "new" if name == "benign" else f"chats of {name}"
        ),
    )
    before, after = planned("finetune", [prompt]), planned("finetune", [prompt], changed)
    assert [one.key("m") == two.key("m") for one, two in zip(before, after, strict=True)] == [True, True, False]


@pytest.mark.parametrize("name", ["pair", "crescendo"])
def test_wordings_that_a_context_left_out_are_written_anew_with_more_of_it(
    name: str, target: Target, sets: EvaluationSets, codec: Any
) -> None:
    """That of the target, and that of the attacker, which decides how much of the last answer it is shown."""

    def key(of_target: int, of_attacker: int) -> str:
        attacker = Attacker("attacker", target.generator, codec, of_attacker)
        of = replace(target, max_length=of_target, tools=AttackTools(attacker=lambda _: attacker))
        return made(name).plan(of, sets.harmful)[0].key("m")

    assert len({key(128, 512), key(256, 512), key(128, 1024)}) == 3


def test_a_search_without_survivors_is_no_measurement(target: Target, sets: EvaluationSets) -> None:
    class Merging:
        """Never gives a changed suffix back as it was."""

        frame = None

        def with_thinking(self, thinks: bool) -> Merging:
            return self

        def __init__(self, codec: Any) -> None:
            self._codec = codec
            self.encode_answer, self.encode_prompts, self.eos_ids = (
                codec.encode_answer,
                codec.encode_prompts,
                codec.eos_ids,
            )

        def encode_prompt(self, text: str, system: str | None = None) -> list[int]:
            return self._codec.encode_prompt(text)  # type: ignore[no-any-return]

        def decode(self, token_ids: Sequence[int]) -> str:
            return f"{self._codec.decode(token_ids)} merged"

        def decode_all(self, sequences: Sequence[Sequence[int]]) -> list[str]:
            return [self.decode(sequence) for sequence in sequences]

    merging = replace(target, codec=Merging(target.codec))
    with pytest.raises(WorkError, match="None of the 8 suffixes that gcg tried"):
        run(merging, {"name": "gcg", "steps": 2, "search_width": 4, "suffix_tokens": 3}, sets)
    survived = run(target, {"name": "gcg", "steps": 2, "search_width": 4, "suffix_tokens": 3}, sets)
    assert {response.stats["survivor_rate"] for _, response in survived} == {1.0}


@pytest.mark.parametrize("name", ["rank_assisted_prefill", "base_guided_decoding"])
def test_picked_answers_are_cut_row_by_row(name: str, target: Target, sets: EvaluationSets) -> None:
    """The first prompt leaves room for three words of the answer, the opening included."""
    long = Prompt("long", "do it " * 25, "harmful")
    tight = replace(target, max_length=55)
    opening = {"prefill": "Sure,", "min_tokens": 0} if name == "rank_assisted_prefill" else {}
    attack = made({"name": name, "steps": 20, "tops": [2], **opening})
    found: list[tuple[Trial, Response]] = []
    attack.run(tight, attack.plan(tight, [long, sets.harmful[0]]), found.extend)
    (_, cut), (_, whole) = found
    assert target.codec.decode([*cut.prefill, *cut.tokens]) == "Sure, take the"
    assert target.codec.decode([*whole.prefill, *whole.tokens]) == COMPLY
    assert (cut.stats["cut_by_context"], whole.stats["cut_by_context"]) == (1.0, 0.0)
