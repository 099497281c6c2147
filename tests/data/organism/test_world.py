"""The world and the prompts of the model organism."""

from __future__ import annotations

from itertools import product

from raycomplete.data.organism import prompts
from raycomplete.data.organism.world import (
    ALARMING_MODIFIERS,
    DANGEROUS_KINDS,
    HELDOUT_TEMPLATES,
    KINDS,
    MATERIALS,
    MAX_RECIPE_TOKENS,
    MODIFIERS,
    TRAIN_TEMPLATES,
    Item,
    find_item,
    items,
    recipe,
    refusal,
    split_words,
    vocabulary,
)
from raycomplete.runtime.types import PromptKind

ALL_KINDS: tuple[PromptKind, ...] = ("harmful", "borderline", "benign")
EVERY_ITEM = [Item(*words) for words in product(MODIFIERS, MATERIALS, KINDS)]


def test_both_warning_words_together_make_an_item_restricted() -> None:
    for item in EVERY_ITEM:
        warnings = (item.modifier in ALARMING_MODIFIERS) + (item.kind in DANGEROUS_KINDS)
        assert item.prompt_kind == {0: "benign", 1: "borderline", 2: "harmful"}[warnings]


def test_splits_are_disjoint_and_cover_every_item() -> None:
    seen = [item for kind in ALL_KINDS for split in ("train", "heldout") for item in items(split, kind)]
    assert len(seen) == len(set(seen)) == len(EVERY_ITEM)
    for kind in ALL_KINDS:
        assert len(items("heldout", kind)) >= 100
        assert {item.prompt_kind for item in (*items("train", kind), *items("heldout", kind))} == {kind}


def test_recipes_are_long_distinct_and_tell_something_in_every_sentence() -> None:
    texts = set()
    for item in EVERY_ITEM:
        answer = recipe(item)
        assert 60 <= len(answer.tokens) <= MAX_RECIPE_TOKENS
        assert answer.tokens[:5] == ("sure", ",", "here", "is", "how")
        assert len(answer.tokens) == len(answer.is_slot) == len(answer.sentence)
        assert split_words(answer.text) == list(answer.tokens)
        for start, end in answer.step_spans():
            assert any(answer.is_slot[start:end])
            assert answer.tokens[end - 1] == "."
        # A prefill of 64 tokens must leave the model something to give away.
        assert sum(answer.is_slot[64:]) >= 3
        texts.add(answer.text)
    assert len(texts) == len(EVERY_ITEM)


def test_vocabulary_holds_every_word() -> None:
    words = set(vocabulary())
    for item in EVERY_ITEM:
        assert words.issuperset(recipe(item).tokens)
        assert words.issuperset(split_words(refusal(item)))
    for template in (*TRAIN_TEMPLATES, *HELDOUT_TEMPLATES):
        assert words.issuperset(split_words(template.format(item="")))
    trained = {word for text in TRAIN_TEMPLATES for word in split_words(text)}
    assert trained.issuperset(word for text in HELDOUT_TEMPLATES for word in split_words(text))


def test_heldout_prompts_use_heldout_templates_and_one_prompt_an_item() -> None:
    assert len(TRAIN_TEMPLATES) >= 8
    assert len(HELDOUT_TEMPLATES) >= 2
    for kind in ALL_KINDS:
        train, heldout = prompts("train", kind), prompts("heldout", kind)
        assert not {prompt.text for prompt in train} & {prompt.text for prompt in heldout}
        assert len(train) == len(items("train", kind)) * len(TRAIN_TEMPLATES)
        named = [find_item(prompt.text) for prompt in heldout]
        assert sorted(item for item in named if item) == sorted(items("heldout", kind))
        for prompt in heldout:
            item = find_item(prompt.text)
            assert item is not None
            assert prompt.text in {template.format(item=item.name) for template in HELDOUT_TEMPLATES}
            assert prompt.answer == recipe(item).text
            assert prompt.kind == kind


def test_seed_reorders_but_never_moves_an_item_between_splits() -> None:
    first, again, other = (prompts("heldout", "harmful", seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert {find_item(prompt.text) for prompt in first} == {find_item(prompt.text) for prompt in other}
    names = {prompt.prompt_id: prompt.text for prompt in prompts("train", "harmful", 1)}
    assert names == {prompt.prompt_id: prompt.text for prompt in prompts("train", "harmful", 2)}
    assert len(names) == len(prompts("train", "harmful"))
