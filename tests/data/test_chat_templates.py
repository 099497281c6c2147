"""Where prompt, thinking, answer and end stand, token by token, in templates built like those of eight families."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from transformers.utils import chat_template_utils

from raycomplete.data.chat import ChatCodec
from raycomplete.runtime.errors import CheckpointError, ConfigError
from raycomplete.runtime.types import Prompt
from tests.data.chat_families import CHAT_FAMILIES, save_family

ANSWER, THOUGHT = "Like so: one\n\ntwo.", "They ask how.\n\nSay it."
THINKING = [name for name, family in CHAT_FAMILIES.items() if family.thinks]
Made = tuple[ChatCodec, Callable[[str], tuple[int, ...]]]


@pytest.fixture(params=CHAT_FAMILIES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def made(name: str, folder: Path, **arguments: Any) -> Made:
    """The codec of a family, and what turns text with special tokens into ids."""
    tokenizer = save_family(name, folder)
    return ChatCodec(folder, arguments=arguments), lambda text: tuple(tokenizer.encode(text, add_special_tokens=False))


def test_prompts_end_where_the_answer_starts(name: str, tmp_path: Path) -> None:
    """A prefill goes into the answer, so that Qwen 3's or gpt-oss's must not land where a thought belongs."""
    codec, ids = made(name, tmp_path)
    family = CHAT_FAMILIES[name]
    assert tuple(codec.encode_prompt("How?")) == ids(family.prompt + family.skipping)


def test_a_whole_conversation_is_prompt_answer_and_end(name: str, tmp_path: Path) -> None:
    codec, ids = made(name, tmp_path)
    family = CHAT_FAMILIES[name]
    said = [{"role": "user", "content": "How?"}, {"role": "assistant", "content": ANSWER}]
    fixed = {"strftime_now": lambda form: datetime(2024, 7, 26).strftime(form)}
    whole = ids(codec._tokenizer.apply_chat_template(said, tokenize=False, **fixed))
    parts = (*codec.encode_prompt("How?"), *ids(family.space), *codec.encode_answer(ANSWER), codec.eos_id)
    assert whole[: len(parts)] == parts, "trained answers end as the template ends a turn, not in any <eos>"
    assert whole[len(parts) :] in ((), ids("\n"))
    assert parts[-1:] == ids(family.end)
    assert codec.answer_end == whole[len(parts) - 1 :]


def test_what_ends_a_response(name: str, tmp_path: Path) -> None:
    codec, ids = made(name, tmp_path)
    family = CHAT_FAMILIES[name]
    ends = {token for text in (family.eos, *family.ends, family.end) for token in ids(text)}
    assert codec.eos_ids == ends
    assert not codec.eos_ids & set(ids("<|end|><|channel|><|im_start|></think>")), "a thought's end is not the answer's"


@pytest.mark.parametrize("name", ["llama-3.2", "gpt-oss"])
def test_the_date_is_the_same_every_day(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    codec, _ = made(name, tmp_path)
    before = codec.encode_prompt("How?")

    class Tomorrow(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Tomorrow:
            return cls(2031, 1, 1)

    monkeypatch.setattr(chat_template_utils, "datetime", Tomorrow)
    assert codec.encode_prompt("How?") == before
    assert pickle.loads(pickle.dumps(codec)).encode_prompt("How?") == before, "in other processes as well"


@pytest.mark.parametrize("name", THINKING)
def test_thinking_stands_apart_from_the_answer(name: str, tmp_path: Path) -> None:
    codec, ids = made(name, tmp_path, enable_thinking=True)
    family, frame = CHAT_FAMILIES[name], codec.frame
    assert frame is not None
    assert frame.thinks
    prompt = tuple(codec.encode_prompt("How?"))
    assert prompt == ids(family.prompt)
    assert (frame.opening, frame.closing) == (ids(family.opening), ids(family.closing))
    thinking, answer = ids(family.opening + THOUGHT + family.closing), ids(ANSWER)
    assert frame.split(prompt, (*thinking, *answer)) == (thinking, answer)
    assert frame.split(prompt, thinking) == (thinking, ())
    again = (*answer, *frame.closing, *answer)
    assert frame.split(prompt, (*thinking, *again)) == (thinking, again), "an answer cannot be hidden as a thought"
    for cut in range(len(ids(family.opening)), len(thinking) - len(ids(family.closing)) + 1):
        opened, rest = (*prompt, *thinking[:cut]), thinking[cut:]
        assert frame.may_think(opened)
        assert frame.split(opened, (*rest, *answer)) == (rest, answer), "a thought that was begun for the model"
    assert not frame.may_think((*prompt, *thinking))
    assert frame.split((*prompt, *thinking), answer) == ((), answer)
    unfinished = ids(family.opening + THOUGHT)
    assert frame.split(prompt, unfinished) == (unfinished, ()), "a thought is no answer"


@pytest.mark.parametrize("name", THINKING)
def test_thinking_can_be_left_out_and_allowed(name: str, tmp_path: Path) -> None:
    codec, ids = made(name, tmp_path)
    family = CHAT_FAMILIES[name]
    closed = codec.encode_prompt("How?")
    assert codec.frame is not None
    assert not codec.frame.thinks
    assert not codec.frame.may_think(closed)
    assert codec.frame.split(closed, ids(ANSWER)) == ((), ids(ANSWER))
    allowed = codec.with_thinking(True)
    assert tuple(allowed.encode_prompt("How?")) == ids(family.prompt)
    assert allowed.with_thinking(False).encode_prompt("How?") == closed
    assert codec.encode_prompt("How?") == closed, "which is another codec"
    talk = Prompt("talk", "How?", "harmful", earlier=(("user", "Hi"), ("assistant", "Hello")))
    whole = tuple(talk.encoded(codec))
    assert whole[-len(ids(family.skipping)) :] == ids(family.skipping)
    assert not codec.frame.may_think(whole)
    assert codec.frame.may_think(talk.encoded(allowed)), "an earlier answer is not the one that is asked for"


@pytest.mark.parametrize("name", [name for name in CHAT_FAMILIES if name not in THINKING])
def test_other_templates_have_no_place_for_thinking(name: str, tmp_path: Path) -> None:
    codec, _ = made(name, tmp_path)
    assert codec.frame is None
    assert codec.with_thinking(True) is codec
    with pytest.raises(ConfigError, match=r"no place for thinking that is known\. Leave enable_thinking out"):
        ChatCodec(tmp_path, arguments={"enable_thinking": True})


def test_arguments_reach_the_template(tmp_path: Path) -> None:
    folder = tmp_path / "llama"
    codec, ids = made("llama-3.2", folder, date_string="01 Jan 2020")
    text = CHAT_FAMILIES["llama-3.2"].prompt.replace("26 Jul 2024", "01 Jan 2020")
    assert tuple(codec.encode_prompt("How?")) == ids(text)
    assert codec.encode_prompts(["How?", "Why?"])[0] == codec.encode_prompt("How?")
    other, ids = made("gpt-oss", tmp_path / "gpt-oss", reasoning_effort="low")
    text = CHAT_FAMILIES["gpt-oss"].prompt.replace("medium", "low") + CHAT_FAMILIES["gpt-oss"].skipping
    assert tuple(other.encode_prompt("How?")) == ids(text)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            {"date_strng": "x"},
            "names date_strng, which the chat template of .* does not read. Did you mean date_string",
        ),
        ({"tokenize": True}, "must not name tokenize, which raycomplete passes itself"),
        ({"messages": "x"}, "must not name messages"),
    ],
)
def test_arguments_without_effect_are_refused(arguments: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        made("llama-3.1", tmp_path, **arguments)


def test_padding_rows_are_no_tokens(name: str, tmp_path: Path) -> None:
    tokenizer = save_family(name, tmp_path)
    assert ChatCodec(tmp_path).vocab_size == len(tokenizer)
    save_family(name, tmp_path, rows=len(tokenizer))
    assert ChatCodec(tmp_path).vocab_size == len(tokenizer)


def test_a_token_without_a_row_is_accepted_until_a_text_holds_it(tmp_path: Path) -> None:
    """Gemma 3 of 270M and 1B parameters has one token more than rows, for images."""
    tokenizer = save_family("gemma-3", tmp_path)
    rows = len(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image_soft_token>"]})
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(f'{{"model_type": "gemma3_text", "vocab_size": {rows}}}')
    codec = ChatCodec(tmp_path)
    assert codec.vocab_size == rows
    assert max(codec.encode_prompt("How?")) < rows
    for encode in (codec.encode_prompt, codec.encode_answer):
        with pytest.raises(CheckpointError, match=r"'<image_soft_token>', for which the model .* has no row"):
            encode("look: <image_soft_token>")
    (tmp_path / "config.json").write_text(f'{{"model_type": "gemma3_text", "vocab_size": {rows - 20}}}')
    assert ChatCodec(tmp_path).vocab_size == rows + 1, "the tokenizer of another model, which its head is refused with"
