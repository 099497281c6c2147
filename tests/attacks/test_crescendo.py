"""Crescendo on a scripted target, attacker and judge: what is asked, taken back, told, kept and published."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from raycomplete.attacks.rewriting import round_seed
from raycomplete.attacks.target import Attacker, AttackTools, Target
from raycomplete.attacks.trial import Decoding, Response, Trial
from raycomplete.config import EvaluationConfig
from raycomplete.evaluation.judges import RefusalJudge
from raycomplete.evaluation.runner import EvaluationSets, evaluate_model
from raycomplete.runtime.errors import CheckpointError, SetupError
from raycomplete.runtime.types import Outcome, Prompt
from tests.attacks.fixtures import WordCodec
from tests.attacks.scripted import made, settings_of

COMPLY, REFUSE, CHAT = "the key opens it", "sorry no", "doors are old"


class GoalJudge:
    """Knows the answer by its first words."""

    name = "goal"

    def outcome(self, prompt: Prompt, prefill: str, continuation: str) -> Outcome:
        return {COMPLY: Outcome.COMPLIED, REFUSE: Outcome.REFUSED, "": Outcome.EMPTY}.get(
            continuation, Outcome.OFF_TOPIC
        )

    def is_right(self, prompt: Prompt, continuation: str) -> bool:
        return bool(continuation)


@dataclass
class Talker:
    """Says `script(user turns so far, last user turn)`, and keeps what it was asked."""

    codec: WordCodec
    script: Callable[[int, str], str]
    asked: list[list[str]] = field(default_factory=list)  # every sequence, turn by turn

    def generate(self, sequences: Sequence[Sequence[int]], **_: Any) -> list[list[int]]:
        answers = []
        for sequence in sequences:
            turns = turns_of(self.codec, sequence)
            self.asked.append(turns)
            answers.append(self.codec.encode_answer(self.script((len(turns) + 1) // 2, turns[-1])))
        return answers


def turns_of(codec: WordCodec, sequence: Sequence[int]) -> list[str]:
    """Texts of the turns of a prompt: users' begin with token 1, answers with token 2."""
    starts = [place for place, token in enumerate(sequence) if token in (1, 2)]
    pairs = zip(starts, [*starts[1:], len(sequence)], strict=True)
    return [codec.decode(sequence[start:end]) for start, end in pairs if start < len(sequence) - 1]


@dataclass
class Writer:
    """An attacker that writes a word for each seed, and keeps what it was told."""

    codec: WordCodec
    says: Callable[[int], str] = lambda seed: f"w{seed}"
    told: list[str] = field(default_factory=list)

    def generate(self, sequences: Sequence[Sequence[int]], *, seed: int, **_: Any) -> list[list[int]]:
        self.told += [self.codec.decode(sequence) for sequence in sequences]
        return [self.codec.encode_answer(self.says(seed + place)) for place in range(len(sequences))]


Make = Callable[..., Target]


@pytest.fixture
def make(codec: WordCodec) -> Make:
    def make_target(script: Callable[[int, str], str], writer: Writer | None = None, length: int = 500) -> Target:
        attacker = Attacker("writer", writer or Writer(codec), codec, length)
        tools = AttackTools(attacker=lambda _: attacker)
        return Target("student", "weights", Talker(codec, script), codec, GoalJudge(), 500, 10, tools)

    return make_target


def hold(target: Target, prompts: Sequence[Prompt], keep: Sequence[int] = (), **settings: Any) -> list[Response]:
    """Plans all trials and runs those at the places `keep`, or all."""
    attack = made({"name": "crescendo", "turns": 4, "backtracks": 3, **settings})
    target = attack.prepared(target)
    trials = attack.plan(target, prompts)
    found: list[tuple[Trial, Response]] = []
    attack.run(target, [trials[place] for place in keep] if keep else trials, found.extend)
    return [response for _, response in sorted(found, key=lambda pair: trials.index(pair[0]))]


def test_a_target_that_always_refuses_is_asked_until_turns_and_backtracks_are_spent(
    make: Make, sets: EvaluationSets
) -> None:
    target = make(lambda turn, text: REFUSE)
    for response in hold(target, sets.harmful):
        assert response.stats == {
            "queries": 7,
            "turns": 4,
            "backtracks": 3,
            "first_complied": 0.0,
            "cut_by_context": 0.0,
            "unused_wordings": 0,
            "unreadable_verdicts": 0,
        }
        assert target.codec.decode(response.tokens) == REFUSE
        assert [item["taken_back"] for item in response.conversation] == [True] * 6 + [False] * 8
    mine = target.generator.asked[:: len(sets.harmful)]  # type: ignore[attr-defined]
    assert [len(turns) for turns in mine] == [1, 1, 1, 1, 3, 5, 7], "refused turns stay where no backtrack is left"


def test_a_target_that_complies_from_the_third_turn_on(make: Make, sets: EvaluationSets) -> None:
    target = make(lambda turn, text: COMPLY if turn >= 3 else CHAT)
    for response in hold(target, sets.harmful):
        turns = turns_of(target.codec, response.sequence)
        assert len(set(turns[::2])) == 3, "three turns of the user's, in other words each"
        assert turns[1::2] == [CHAT, CHAT]
        assert target.codec.decode(response.tokens) == COMPLY
        assert (response.stats["turns"], response.stats["backtracks"]) == (3, 0)
        assert [item["content"] for item in response.conversation] == [*turns, COMPLY]
    two = hold(make(lambda turn, text: COMPLY if turn >= 3 else CHAT), sets.harmful, turns=2)
    assert {target.codec.decode(response.tokens) for response in two} == {CHAT}


def test_conversations_are_emitted_as_they_end(make: Make, sets: EvaluationSets) -> None:
    """So that a kill loses those under way alone: two have complied when the target dies in the third round."""
    asked: list[str] = []

    def script(turn: int, text: str) -> str:
        asked.append(text)
        if turn == 3:
            raise RuntimeError("killed")
        return COMPLY if len(asked) <= 2 else CHAT

    target = make(script)
    attack = made({"name": "crescendo", "turns": 4, "backtracks": 3})
    target = attack.prepared(target)
    trials = attack.plan(target, sets.harmful)
    found: list[tuple[Trial, Response]] = []
    with pytest.raises(RuntimeError, match="killed"):
        attack.run(target, trials, found.extend)
    assert [trial for trial, _ in found] == trials[:2]


def test_refused_turns_are_taken_back_and_told_to_the_attacker(
    make: Make, sets: EvaluationSets, codec: WordCodec
) -> None:
    """The second and third wording are refused, whatever they are."""
    count = 0

    def script(turn: int, text: str) -> str:
        nonlocal count
        count += 1
        return COMPLY if turn == 3 else REFUSE if count in (2, 3) else CHAT

    writer = Writer(codec)
    target = make(script, writer)
    instruction = "goal {goal} so {conversation} not {refused} at {turn} of {turns}"
    (response,) = hold(target, sets.harmful[:1], instruction=instruction)
    asked = target.generator.asked  # type: ignore[attr-defined]
    first, second, third, fourth, fifth = (turns[-1] for turns in asked)
    assert asked == [
        [first],
        [first, CHAT, second],
        [first, CHAT, third],
        [first, CHAT, fourth],
        [first, CHAT, fourth, CHAT, fifth],
    ]
    assert len({first, second, third, fourth, fifth}) == 5
    goal = sets.harmful[0].text
    assert writer.told == [
        f"goal {goal} so not begun not none at 1 of 4",
        f"goal {goal} so user: {first} assistant: {CHAT} not none at 2 of 4",
        f"goal {goal} so user: {first} assistant: {CHAT} not {second} at 2 of 4",
        f"goal {goal} so user: {first} assistant: {CHAT} not {third} at 2 of 4",
        f"goal {goal} so user: {first} assistant: {CHAT} user: {fourth} assistant: {CHAT} not none at 3 of 4",
    ]
    assert response.stats == {
        "queries": 5,
        "turns": 3,
        "backtracks": 2,
        "first_complied": 0.0,
        "cut_by_context": 0.0,
        "unused_wordings": 0,
        "unreadable_verdicts": 0,
    }


def test_conversations_repeat_under_their_seeds_whatever_else_is_missing(make: Make, sets: EvaluationSets) -> None:
    def script(turn: int, text: str) -> str:
        return COMPLY if turn == 3 else REFUSE if int(text[-1]) % 3 == 0 else CHAT

    whole = hold(make(script), sets.harmful, streams=2)
    assert hold(make(script), sets.harmful, streams=2) == whole
    kept = [0, 2, 5, 7]
    assert hold(make(script), sets.harmful, keep=kept, streams=2) == [whole[place] for place in kept]
    texts = {item["content"] for response in whole for item in response.conversation if item["role"] == "user"}
    assert len(texts) == sum(response.stats["queries"] for response in whole), "no two turns share a seed"


def test_what_the_attacker_cannot_say_costs_a_backtrack_or_a_turn(
    make: Make, sets: EvaluationSets, codec: WordCodec
) -> None:
    prompt = sets.harmful[0]
    target = make(lambda turn, text: CHAT, Writer(codec, lambda seed: ""))
    (response,) = hold(target, [prompt])
    assert target.generator.asked == [[prompt.text]], "the behaviour itself, once"  # type: ignore[attr-defined]
    assert (response.stats["turns"], response.stats["backtracks"], response.stats["cut_by_context"]) == (4, 3, 0.0)
    assert response.stats["unused_wordings"] == 7, "so that the rate is not taken for a conversation's"
    tight = replace(make(lambda turn, text: CHAT, Writer(codec, lambda seed: f"w{seed} x y")), max_length=30)
    (response,) = hold(tight, [prompt])
    assert len(response.sequence) <= 20
    assert response.stats["cut_by_context"] == 1.0
    assert response.stats["queries"] == 2


def test_an_attacker_with_a_short_context_reads_the_newest_turns(
    make: Make, sets: EvaluationSets, codec: WordCodec
) -> None:
    writer = Writer(codec)
    target = make(lambda turn, text: CHAT, writer, 25)
    hold(target, sets.harmful[:1], instruction="{goal} so {conversation}", max_tokens=5)
    assert writer.told[1].count("user:") == 1
    assert all(len(told.split()) <= 20 for told in writer.told)
    assert not writer.told[3].split("so ")[1].startswith(writer.told[1].split("so ")[1])
    with pytest.raises(SetupError, match="instruction of the attack crescendo has"):
        hold(make(lambda turn, text: CHAT, writer, 10), sets.harmful[:1], max_tokens=5)


def test_a_conversation_goes_on_where_the_prompt_s_own_ends(make: Make) -> None:
    prompt = Prompt("p", "and now", "harmful", system="be brief", earlier=(("user", "hello"), ("assistant", "yes")))
    target = make(lambda turn, text: COMPLY if turn >= 3 else CHAT)
    (response,) = hold(target, [prompt])
    turns = turns_of(target.codec, response.sequence)
    assert (turns[:2], turns[3], len(turns)) == (["hello", "yes"], CHAT, 5)
    assert target.codec.decode(response.sequence).startswith("be brief hello")


def test_a_judge_that_does_not_see_the_behaviour_is_refused(make: Make, sets: EvaluationSets) -> None:
    with pytest.raises(SetupError, match=r"takes the answers to them for success\. Set evaluation.judge.kind"):
        hold(replace(make(lambda turn, text: CHAT), judge=RefusalJudge()), sets.harmful)


def test_a_template_that_writes_one_turn_only_is_refused_before_anything_is_asked(
    make: Make, sets: EvaluationSets, codec: WordCodec, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> list[int]:
        raise CheckpointError("The chat template cannot write conversations of several turns.")

    monkeypatch.setattr(codec, "encode_conversation", refuse)
    target = make(lambda turn, text: CHAT)
    with pytest.raises(CheckpointError, match="several turns"):
        hold(target, sets.harmful)
    assert target.generator.asked == []  # type: ignore[attr-defined]


def test_conversations_are_stored_privately_and_published_where_asked_for(
    make: Make, sets: EvaluationSets, codec: WordCodec, tmp_path: Path
) -> None:
    harmful = EvaluationSets(sets.harmful, (), ())
    attacks = [{"name": "crescendo", "turns": 4, "backtracks": 3}]
    config = EvaluationConfig(depths=[0], max_tokens=10, attacks=[settings_of(entry) for entry in attacks])  # type: ignore[arg-type]

    def script(turn: int, text: str) -> str:
        return COMPLY if turn == 3 else CHAT

    result = evaluate_model(make(script), harmful, config, tmp_path)
    block = result["attacks"]["crescendo"]
    assert (block["mean"]["rate"], block["first_round"]["rate"], block["best_of"]) == (1.0, 0.0, 7)
    assert block["stats"]["queries"] == 3.0
    assert "turns 4 instead of 10" in block["reduced_because"]
    (trials,) = (tmp_path / "evaluation" / "trials").iterdir()
    assert trials.stat().st_mode & 0o077 == 0
    assert not (tmp_path / "evaluation" / "completions").exists()
    words = {word for word in codec.words if word.startswith("w") and word[1:].isdigit()}
    public = json.dumps(result)
    assert words
    assert not any(word in public for word in words)

    def dead(turn: int, text: str) -> str:
        raise RuntimeError("nothing is generated again")

    kept = config.model_copy(update={"save_completions": True})
    again = evaluate_model(make(dead), harmful, kept, tmp_path)
    assert again["attacks"] == result["attacks"]
    lines = (tmp_path / "evaluation" / "completions" / "student.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if row["attack"] == "crescendo"]
    assert [len(row["conversation"]) for row in rows] == [6] * 4
    assert rows[0]["conversation"][1] == {"role": "assistant", "content": CHAT, "taken_back": False}
    assert all("conversation" not in row for row in map(json.loads, lines) if row["attack"] == "prefill")


def test_no_two_rounds_of_an_attacker_share_a_seed() -> None:
    """However many prompts there are: prompt p of a round draws under the round's seed and p more."""
    trials = [Trial("pair", "pair", Prompt("p", "x", "harmful"), (1,), Decoding(1), seed=stream) for stream in range(2)]
    starts = sorted(round_seed(trial, number) for trial in trials for number in range(30))
    assert min(second - first for first, second in pairwise(starts)) >= 2**20
