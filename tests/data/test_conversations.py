"""Conversations in chat templates: the organism's, one without a template, and unfit ones."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from raycomplete.attacks import Target, build_attack, parse_attack
from raycomplete.attacks.attack import plain_trials
from raycomplete.attacks.trial import FORMAT, Decoding, Trial
from raycomplete.config import PromptAugmentationConfig
from raycomplete.data.augmentation import AugmentationFiles, PromptAugmenter
from raycomplete.data.chat import ChatCodec
from raycomplete.data.organism import checkpoint_path, prompts
from raycomplete.data.prompts import content_key
from raycomplete.evaluation.judges import RefusalJudge
from raycomplete.runtime.errors import CheckpointError
from raycomplete.runtime.files import content_hash
from raycomplete.runtime.types import Prompt
from tests.data.test_chat import NO_SYSTEM_ROLE

# A header of its own for every turn, the start token in front, and contents trimmed.
LLAMA_LIKE = (
    "{{ bos_token }}{% for item in messages %}"
    "{{ '<|head|>' + item['role'] + '<|body|>\n\n' + item['content'] | trim + '<|eot|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|head|>assistant<|body|>\n\n' }}{% endif %}"
)
# No start token, a line for the role, and a system prompt of its own where there is none.
TALK = Prompt(
    "talk",
    "tell me how",
    "harmful",
    answer="take six leaves",
    system="you cannot help",
    earlier=(("user", "what is a teapot"), ("assistant", "it is a copper thing")),
)
PLAIN = replace(TALK, system=None, earlier=())
Make = Callable[[str | None], tuple[ChatCodec, Any]]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """The codec and the tokenizer of a template."""

    def made(template: str | None) -> tuple[ChatCodec, Any]:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint_path("aligned"))
        tokenizer.add_tokens(["<|head|>", "<|body|>", "<|eot|>", "<|turn|>", "<|stop|>"], special_tokens=True)
        tokenizer.add_tokens(["system", "user", "assistant"])
        tokenizer.chat_template = template
        tokenizer.save_pretrained(tmp_path)
        return ChatCodec(tmp_path), AutoTokenizer.from_pretrained(tmp_path)

    return made


@pytest.fixture(scope="module")
def codec() -> ChatCodec:
    return ChatCodec(checkpoint_path("aligned"))


ORGANISM = (
    "<bos><|system|>you cannot help<eos><|user|>what is a teapot<eos><|assistant|>it is a copper thing<eos>"
    "<|user|>tell me how<eos><|assistant|>"
)


def test_the_organism_s_template_writes_conversations(codec: ChatCodec) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint_path("aligned"))
    assert TALK.encoded(codec) == tokenizer.encode(ORGANISM, add_special_tokens=False)
    safe = ORGANISM.replace("you cannot help", "be safe\n\nyou cannot help")
    assert TALK.encoded(codec, system="be safe") == tokenizer.encode(safe, add_special_tokens=False)
    other = ORGANISM.replace("tell me how", "you will")
    assert TALK.encoded(codec, "you will") == tokenizer.encode(other, add_special_tokens=False)
    assert TALK.encoded_all(codec, ["you will", "something"]) == [
        TALK.encoded(codec, "you will"),
        TALK.encoded(codec, "something"),
    ]


def test_plain_prompts_are_encoded_and_hashed_as_before(codec: ChatCodec) -> None:
    """The hash is that of the fields by which trials were named before prompts had conversations."""
    for prompt in prompts("heldout", "harmful", 0, 5):
        assert prompt.encoded(codec) == codec.encode_prompt(prompt.text)
        assert prompt.encoded(codec, "x y", system="z") == codec.encode_prompt("x y", "z")
        assert prompt.encoded_all(codec, ["x", "y"]) == codec.encode_prompts(["x", "y"])
    trial = Trial("a", "v", PLAIN, (1, 2), Decoding(3))
    before = {
        "format": FORMAT,
        "model_id": "m",
        "attack": "a",
        "variant": "v",
        "prompt": ["talk", "tell me how", "harmful"],
        "sequence": (1, 2),
        "prefill": (),
        "decoding": {"max_tokens": 3, "temperature": 0.0, "top_p": 1.0, "top_k": 0},
        "seed": 0,
        "position": 0,
        "settings": {},
    }
    assert trial.key("m") == content_hash(before)
    content = '[["talk", "tell me how", "take six leaves"]]'
    assert content_key([PLAIN]) == hashlib.sha256(content.encode()).hexdigest()[:16]


def test_conversations_have_hashes_of_their_own() -> None:
    others = [
        TALK,
        PLAIN,
        replace(TALK, system="you will help"),
        replace(TALK, system=None),
        replace(TALK, earlier=()),
        replace(TALK, earlier=(("user", "what is a teapot"), ("assistant", "sorry"))),
    ]
    assert len({Trial("a", "v", prompt, (1,), Decoding(3)).key("m") for prompt in others}) == len(others)
    assert len({content_key([prompt]) for prompt in others}) == len({prompt.transcript for prompt in others}) == 6
    assert PLAIN.transcript == "tell me how"
    assert TALK.transcript.splitlines()[::2] == [
        "system: you cannot help",
        "user: what is a teapot",
        "assistant: it is a copper thing",
        "user: tell me how",
    ]


@pytest.mark.parametrize(
    ("template", "prompt", "words"),
    [
        (NO_SYSTEM_ROLE, TALK, r"with a system prompt \(System role not supported\).* Write the system prompt into"),
        (LLAMA_LIKE.replace("messages", "messages[1:]"), TALK, "with a system prompt .it leaves a turn out"),
        (LLAMA_LIKE.replace("messages", "messages[-1:]"), replace(TALK, system=None), "of several turns .it leaves"),
    ],
)
def test_templates_that_cannot_write_it_are_refused(template: str, prompt: Prompt, words: str, make: Make) -> None:
    codec, _ = make(template)
    with pytest.raises(CheckpointError, match=words):
        prompt.encoded(codec)


def test_a_tokenizer_without_template_writes_one_paragraph_after_the_other(make: Make) -> None:
    codec, tokenizer = make(None)
    assert TALK.encoded(codec) == tokenizer.encode(
        "you cannot help\n\nwhat is a teapot\n\nit is a copper thing\n\ntell me how\n\n"
    )


ATTACKS = [
    {"name": "prefill", "depths": [0, 2]},
    {"name": "decoding", "temperatures": [0.5], "top_ps": [], "top_ks": []},
    {"name": "templates"},
    {"name": "adaptive", "cuts": [1], "depths": [1]},
    {"name": "best_of_n", "samples": 2},
]


@pytest.mark.parametrize("entry", ATTACKS, ids=lambda entry: str(entry["name"]))
def test_attacks_that_wrap_the_last_turn_keep_the_earlier_ones(entry: dict[str, Any], codec: ChatCodec) -> None:
    target = Target("student", "m", None, codec, RefusalJudge(), 200, 10)  # type: ignore[arg-type]
    start = TALK.encoded(codec)[:-5]  # up to the last user turn
    assert codec.decode(start).endswith("copper thing")
    trials = [*build_attack(parse_attack(entry)).plan(target, [TALK]), *plain_trials(target, "a", "v", [TALK], 10)]
    assert len(trials) > 1
    for trial in trials:
        assert list(trial.sequence[: len(start)]) == start, trial.variant


def test_augmented_prompts_keep_the_earlier_turns(codec: ChatCodec) -> None:
    settings = PromptAugmentationConfig(fraction=1.0, random_suffix_tokens=0, suffixes=Path("any"))
    augmenter = PromptAugmenter(settings, AugmentationFiles(suffixes=["please"]), codec, seed=0, max_tokens=99)
    assert augmenter.augment(TALK, "recovery", "x") == ("suffix", tuple(TALK.encoded(codec, "tell me how please")))
