"""The chat codec on the organism's tokenizer, and on tokenizers that lack something."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from raycomplete.data.chat import ChatCodec
from raycomplete.data.organism import checkpoint_path, prompts
from raycomplete.runtime.errors import CheckpointError

NO_SYSTEM_ROLE = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{{ '<|user|>' + message['content'] + eos_token }}{% endfor %}<|assistant|>"
)
Make = Callable[..., ChatCodec]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(checkpoint_path("aligned"))


@pytest.fixture(scope="module")
def codec() -> ChatCodec:
    return ChatCodec(checkpoint_path("aligned"))


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A codec of the organism's tokenizer, changed before it is saved."""

    def make_codec(change: Callable[[Any], object] = lambda _: None) -> ChatCodec:
        changed = AutoTokenizer.from_pretrained(checkpoint_path("aligned"))
        change(changed)
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        changed.save_pretrained(folder)
        return ChatCodec(folder)

    return make_codec


def test_answers_carry_no_template_and_come_back(codec: ChatCodec) -> None:
    text = prompts("heldout", "harmful", 0, 1)[0].answer or ""
    ids = codec.encode_answer(text)
    assert len(ids) == len(text.split())
    assert not codec.eos_ids & set(ids)
    assert codec.decode(ids) == text
    assert codec.decode((*ids, codec.eos_id)) == text, "special tokens are left out"


def test_every_end_of_a_text_in_the_vocabulary_ends_a_response(codec: ChatCodec, make: Make, tokenizer: Any) -> None:
    assert codec.eos_ids == {tokenizer.eos_token_id}
    other = make(lambda item: item.add_tokens(["<|endoftext|>", "</s>", "<|end|>"], special_tokens=True))
    size = codec.vocab_size
    assert other.eos_ids == {tokenizer.eos_token_id, size, size + 1}, "<|end|> is a thought's in gpt-oss"
    assert other.eos_id == tokenizer.eos_token_id
    assert other.vocab_size == size + 3
    markup = make(lambda item: item.add_tokens(["<s>", "</s>"]))
    assert markup.eos_ids == codec.eos_ids, "a tag that an answer may hold ends none"


def test_fingerprints_tell_vocabularies_and_templates_apart(codec: ChatCodec, make: Make) -> None:
    same = make()
    assert same.fingerprint() == codec.fingerprint()
    assert ChatCodec(checkpoint_path("base")).not_in(codec) is codec.not_in(same) is None
    template = make(lambda item: setattr(item, "chat_template", "other"))
    assert template.fingerprint() != codec.fingerprint()
    assert template.not_in(codec) is None
    vocabulary = make(lambda item: item.add_tokens(["unheard"]))
    assert vocabulary.not_in(codec) == "unheard"
    assert codec.not_in(vocabulary) is None, "a chat model may have tokens that base lacks"


def test_a_tokenizer_without_chat_template_gets_plain_text(make: Make, tokenizer: Any) -> None:
    plain = make(lambda item: setattr(item, "chat_template", None))
    assert plain.encode_prompt("tell me") == tokenizer.encode("tell me\n\n")
    assert plain.encode_prompt("tell me", "you refuse") == tokenizer.encode("you refuse\n\ntell me\n\n")


def test_a_template_without_system_role_reads_it_in_the_user_turn(make: Make, tokenizer: Any) -> None:
    codec = make(lambda item: setattr(item, "chat_template", NO_SYSTEM_ROLE))
    assert codec.encode_prompt("tell me", "you refuse") == tokenizer.encode(
        "<|user|>you refuse\n\ntell me<eos><|assistant|>", add_special_tokens=False
    )


def test_a_tokenizer_that_adds_its_start_token_adds_it_once(make: Make, tokenizer: Any) -> None:
    """Llama and Gemma put <bos> before any text, and their chat template writes it too."""
    bos = tokenizer.bos_token_id

    def add_start(item: Any) -> None:
        start = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", bos)])
        item.backend_tokenizer.post_processor = start

    codec = make(add_start)
    assert codec.encode_prompt("tell me").count(bos) == 1
    assert bos not in codec.encode_answer("tell me"), "an answer goes on where the prompt ended"

    def drop_template(item: Any) -> None:
        add_start(item)
        item.chat_template = None

    assert make(drop_template).encode_prompt("tell me")[0] == bos


def test_a_tokenizer_without_end_token_is_refused(make: Make) -> None:
    with pytest.raises(CheckpointError, match="names no end-of-sequence token"):
        make(lambda item: setattr(item, "eos_token", None))


def test_a_folder_without_tokenizer_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"tokenizer of {tmp_path} cannot be loaded"):
        ChatCodec(tmp_path)


def test_a_place_in_a_text_is_found_among_its_tokens(codec: ChatCodec) -> None:
    token_ids = codec.encode_answer("gather six leaves . i cannot help")
    text = codec.decode(token_ids)
    assert codec.tokens_before(token_ids, 0) == 0
    assert codec.tokens_before(token_ids, text.index("i cannot")) == 4
    assert codec.tokens_before(token_ids, text.index("cannot") + 2) == 5, "a token is never split"
    assert codec.tokens_before(token_ids, len(text)) == len(token_ids)


def test_no_place_lies_inside_of_a_character(tmp_path: Path) -> None:
    """With bytes for tokens, the parts of a character decode to something that the text does not begin with."""
    bytes_only = Tokenizer(BPE({char: index for index, char in enumerate([*ByteLevel.alphabet(), "<eos>"])}, []))
    bytes_only.pre_tokenizer, bytes_only.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    PreTrainedTokenizerFast(tokenizer_object=bytes_only, eos_token="<eos>").save_pretrained(tmp_path)
    codec = ChatCodec(tmp_path)
    token_ids = codec.encode_answer("né 🙂 I am sorry")
    assert len(token_ids) == len("né 🙂 I am sorry".encode())
    assert codec.tokens_before(token_ids, 5) == len("né 🙂 ".encode())
    assert codec.tokens_before(token_ids, 4) == len("né 🙂".encode())
