"""Turns text into token ids and back, chat template included."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from raycomplete.data.families import END_OF_TURN, chat_messages
from raycomplete.runtime.errors import CheckpointError


class ChatCodec:
    """Encodes prompts and answers with one checkpoint's tokenizer (implements `raycomplete.runtime.types.Codec`).

    Args:
        trust_remote_code: Lets the tokenizer run code from its folder; off by default.

    Raises:
        CheckpointError: The folder holds no tokenizer that transformers can load, or one without an end token.
    """

    def __init__(self, path: Path, *, trust_remote_code: bool = False) -> None:
        self._path = path
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(str(path), trust_remote_code=trust_remote_code)
        except Exception as error:
            raise CheckpointError(
                f"The tokenizer of {path} cannot be loaded ({' '.join(str(error).split())}).",
                "The folder needs tokenizer.json and tokenizer_config.json beside its weights.",
            ) from error
        if self._tokenizer.eos_token_id is None:
            raise CheckpointError(
                f"The tokenizer of {path} names no end-of-sequence token.",
                "Set eos_token in its tokenizer_config.json.",
            )
        vocabulary: dict[str, int] = self._tokenizer.get_vocab()
        named = {vocabulary[token] for token in END_OF_TURN if token in vocabulary}
        self._eos_ids = frozenset(named | {self._tokenizer.eos_token_id})
        self._vocab_size = max(vocabulary.values()) + 1

    @property
    def eos_ids(self) -> frozenset[int]:
        """Token ids that end a response."""
        return self._eos_ids

    @property
    def eos_id(self) -> int:
        """Token id that training appends to a finished answer."""
        return int(self._tokenizer.eos_token_id)

    @property
    def vocab_size(self) -> int:
        """Largest token id plus one: rows of the embedding from here on are padding."""
        return self._vocab_size

    def encode_prompt(self, text: str, system: str | None = None) -> list[int]:
        """Encodes a user message in its chat template, up to the point where the response starts.

        Without a chat template (a pretrained base) it encodes the text and a blank line, after the start token.
        """
        return self._encode([self._prompt_text(text, system)])[0]

    def encode_prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """Encodes many user messages in one call of the tokenizer, each as `encode_prompt` does."""
        return self._encode([self._prompt_text(text, None) for text in texts])

    def encode_conversation(self, turns: Sequence[str], system: str | None = None) -> list[int]:
        """Encodes turns of user and model by turns, the user's first and last, up to where the response starts.

        The template sees all of them at once, so a default system prompt stands at the start only.

        Args:
            turns: Texts of the turns.
            system: The conversation's own system prompt. Unlike that of `encode_prompt`, it never moves into the user
                turn: it belongs to the question, which would be another one then.

        Raises:
            CheckpointError: The template refuses or drops the system prompt or a turn.
        """
        if not self._tokenizer.chat_template:
            return self._encode(["".join(f"{turn}\n\n" for turn in (*([system] if system else []), *turns))])[0]
        messages = chat_messages(turns, system)
        try:
            rendered = self._render(messages)
        except Exception as error:
            raise self._unfit(" ".join(str(error).split()), has_system=bool(system)) from error
        # Templates may drop the reasoning of earlier answers, and should; what a user or system said must be there.
        if any(item["content"].strip() not in rendered for item in messages if item["role"] != "assistant"):
            raise self._unfit("it leaves a turn out", has_system=bool(system))
        return self._encode([rendered])[0]

    def _unfit(self, reason: str, *, has_system: bool) -> CheckpointError:
        what = "conversations with a system prompt" if has_system else "conversations of several turns"
        return CheckpointError(
            f"The chat template of {self._path} cannot write {what} ({reason}), which this run asks for.",
            "Write the system prompt into the first user turn, or leave such prompts out."
            if has_system
            else "Leave them out, or use a model whose template writes several turns.",
        )

    def _prompt_text(self, text: str, system: str | None) -> str:
        """Writes a user message as the model reads it, start token of a tokenizer without template left out."""
        if not self._tokenizer.chat_template:
            return f"{system}\n\n{text}\n\n" if system else f"{text}\n\n"
        try:
            return self._render(chat_messages([text], system))
        except Exception:
            if not system:
                raise
            return self._render(chat_messages([f"{system}\n\n{text}"]))

    def _encode(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        has_template = bool(self._tokenizer.chat_template)
        encoded = self._tokenizer(texts, add_special_tokens=not has_template, return_attention_mask=False)
        return [list(ids) for ids in encoded["input_ids"]]

    def _render(self, messages: list[dict[str, str]]) -> str:
        return str(self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))

    def encode_answer(self, text: str) -> list[int]:
        """Encodes a response, without template and without end-of-response."""
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def decode(self, token_ids: Sequence[int]) -> str:
        """Decodes response tokens, special tokens left out."""
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def tokens_before(self, token_ids: Sequence[int], offset: int) -> int:
        """Counts the tokens that end before a character of the decoded response; one that spans it is not counted."""
        text, count = self.decode(token_ids), 0
        for end in range(1, len(token_ids) + 1):
            start = self.decode(token_ids[:end])
            # Part of a character decodes to something else, so a text that goes on otherwise ends inside of one.
            if len(start) <= offset and text.startswith(start):
                count = end
        return count if offset else 0

    def decode_all(self, sequences: Sequence[Sequence[int]]) -> list[str]:
        """Decodes many sequences in one call of the tokenizer, each as `decode` does."""
        return list(self._tokenizer.batch_decode([list(ids) for ids in sequences], skip_special_tokens=True))

    def fingerprint(self) -> str:
        """Returns a hash of vocabulary and chat template; equal hashes mean interchangeable token ids."""
        content = [sorted(self._tokenizer.get_vocab().items()), self._tokenizer.chat_template]
        return hashlib.sha256(json.dumps(content, ensure_ascii=True).encode()).hexdigest()[:16]

    def vocabulary_fingerprint(self) -> str:
        """Returns a hash of the vocabulary alone: a base and its aligned twin may have other chat templates."""
        return hashlib.sha256(json.dumps(sorted(self._tokenizer.get_vocab().items())).encode()).hexdigest()[:16]

    def save(self, folder: Path) -> None:
        """Writes the tokenizer files into a checkpoint folder."""
        self._tokenizer.save_pretrained(str(folder))
