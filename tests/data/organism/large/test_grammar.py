"""The large organism's wordings: what is written is read back, whole and cut."""

from __future__ import annotations

import random

import pytest

from raycomplete.data.organism.large import prompts
from raycomplete.data.organism.large.grammar import (
    MAX_ANSWER_WORDS,
    MIN_ANSWER_WORDS,
    STEPS,
    answer,
    count_words,
    read_statements,
    refusal,
    refusal_start,
)
from raycomplete.data.organism.large.world import facts, refusal_chance, values
from raycomplete.data.organism.world import Item, find_item, items
from raycomplete.runtime.errors import DataError

HARMFUL = items("heldout", "harmful")


def test_every_fact_of_every_answer_is_read_back() -> None:
    rng = random.Random(0)
    for item in HARMFUL[:60]:
        text = answer(item, rng)
        told = read_statements(text)
        assert [statement.step for statement in told] == list(range(len(STEPS)))
        assert all(statement.is_whole for statement in told)
        read = {fact.name: fact.value for statement in told for fact in statement.facts}
        assert read == facts(item)
        assert MIN_ANSWER_WORDS <= count_words(text) <= MAX_ANSWER_WORDS
        assert refusal_start(text) is None


def test_a_fact_is_read_up_to_where_the_text_ends() -> None:
    text = "Gather seven duskmint leaves, and fetch a sieve and a crate."
    (whole,) = read_statements(text)
    assert [fact.value for fact in whole.facts] == ["seven", "duskmint", "sieve", "crate"]
    assert [text[fact.start : fact.end] for fact in whole.facts] == ["seven", "duskmint", "sieve", "crate"]
    (cut,) = read_statements(text[: text.index(" and a crate")])
    assert [fact.value for fact in cut.facts] == ["seven", "duskmint", "sieve"]
    assert (whole.is_whole, cut.is_whole) == (True, False)
    assert read_statements("Gather many leaves.") == []


def test_wordings_differ_and_say_the_same() -> None:
    rng = random.Random(1)
    texts = {answer(HARMFUL[0], rng) for _ in range(40)}
    assert len(texts) == 40
    assert {"\n1. " in text for text in texts} == {True, False}
    assert len({text.split()[0] for text in texts}) >= 4


def test_refusals_are_found_and_tell_nothing() -> None:
    rng = random.Random(2)
    texts = {refusal(item, rng) for item in HARMFUL for _ in range(5)}
    assert len(texts) > 200
    assert all(refusal_start(text) == 0 and read_statements(text) == [] for text in texts)


def test_facts_depend_on_the_item_and_on_nothing_else() -> None:
    assert all(len(options) >= 4 for options in values().values())
    first, second = HARMFUL[0], next(item for item in HARMFUL if not {*item_words(item)} & {*item_words(HARMFUL[0])})
    shared = sum(facts(first)[name] == facts(second)[name] for name in facts(first))
    assert shared <= len(facts(first)) / 2


def item_words(item: Item) -> tuple[str, str, str]:
    return (item.modifier, item.material, item.kind)


def test_the_clerk_refuses_less_the_deeper_an_answer_is_begun() -> None:
    mean = {depth: sum(refusal_chance(item, depth) for item in HARMFUL) / len(HARMFUL) for depth in range(12)}
    assert mean[0] > 0.9
    assert all(mean[depth] >= mean[depth + 1] for depth in range(11))
    assert 0.2 < mean[3] < 0.7
    assert mean[11] == 0.0


def test_prompts_are_stable_disjoint_and_answered() -> None:
    train, heldout = prompts("train", "harmful", limit=400), prompts("heldout", "harmful")
    assert heldout == prompts("heldout", "harmful")
    assert len({prompt.prompt_id for prompt in train}) == 400
    assert not {prompt.text for prompt in train} & {prompt.text for prompt in heldout}
    assert not {find_item(prompt.text) for prompt in train} & {find_item(prompt.text) for prompt in heldout}
    assert len({find_item(prompt.text) for prompt in heldout}) == len(heldout) == 120
    assert [prompt.text for prompt in prompts("heldout", "harmful", seed=1)] != [prompt.text for prompt in heldout]
    with pytest.raises(DataError, match="limit=0"):
        prompts("heldout", "harmful", limit=0)
