"""Turns text into token ids and back, chat template included."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import hashlib
import inspect
import json
import re
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from raycomplete.data.families import END_OF_TEXT, chat_messages, text_config, thinking_format
from raycomplete.runtime.errors import CheckpointError, ConfigError
from raycomplete.runtime.types import ResponseFrame

# Templates that write the date ask for it: with that of the day, the same prompt would have other tokens every day.
_DATE = date(2024, 7, 26)
_ASKED, _ANSWERED = "a question", "an answer"


class ChatCodec:
    """Encodes prompts and answers with one checkpoint's tokenizer (implements `raycomplete.runtime.types.Codec`)."""

    def __init__(
        self, path: Path, *, trust_remote_code: bool = False, arguments: Mapping[str, Any] | None = None
    ) -> None:
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
        self._vocabulary: dict[str, int] = self._tokenizer.get_vocab()
        self._vocab_size: int = min(max(self._vocabulary.values()) + 1, self._rows())
        self._arguments = {"strftime_now": _DATE.strftime, **(arguments or {})}
        self._suffixes = {True: "", False: ""}
        self._frame = self._find_frame()
        self._check_arguments(arguments or {})
        end = self._end_of_turn()
        self._eos_id = int(self._tokenizer.eos_token_id if end is None else end)
        added = self._tokenizer.added_tokens_decoder  # Gemma has </s> as the end of text that is struck through
        ends = {index for index, token in added.items() if token.special and str(token) in END_OF_TEXT}
        ends |= self._generation_ends()
        self._eos_ids = frozenset(ends | {self._eos_id, int(self._tokenizer.eos_token_id)})

    def _rows(self) -> int:
        """Counts the rows of the embedding, where only added tokens have none: Gemma 3 adds one for images."""
        config = _read(self._path / "config.json")
        largest, added = max(self._vocabulary.values()) + 1, self._tokenizer.added_tokens_decoder
        rows = int(text_config(config).get("vocab_size") or largest)
        return rows if all(token < rows or token in added for token in self._vocabulary.values()) else largest

    def _generation_ends(self) -> set[int]:
        """Reads the end tokens of generation_config.json: one, or a list of several."""
        named = _read(self._path / "generation_config.json").get("eos_token_id")
        return {int(token) for token in (named if isinstance(named, list) else [named]) if token is not None}

    def _end_of_turn(self) -> int | None:
        """Returns the special token that the template writes after an answer; None where it writes none."""
        special = self._tokenizer.added_tokens_decoder
        return next((token for token in self.answer_end if token in special), None)

    def _find_frame(self) -> ResponseFrame | None:
        """Asks the template where thinking stands, and how a prompt must end to leave it out."""
        thinks = bool(self._arguments.pop("enable_thinking", False))
        self._thinks = thinks
        if not self._tokenizer.chat_template:
            return None
        asked = chat_messages([_ASKED])
        turns = []
        try:
            for self._thinks in (True, False):
                whole, before = self._render(asked), self._render(asked, is_asked=False)
                turns.append(whole[len(before) :] if whole.startswith(before) else whole.rpartition(_ASKED)[2])
        except Exception:  # a template that cannot write one question is refused where a prompt is encoded
            return None
        finally:
            self._thinks = thinks
        template = self._tokenizer.chat_template
        found = thinking_format(template if isinstance(template, str) else json.dumps(template), turns)
        if found is None:
            return None
        roomy, closed = turns
        turn, opens, _ = roomy.partition(found.thought_mark)
        if found.answer_mark not in closed:
            self._suffixes[False] = found.closing if found.thought_mark in closed else found.skipping
        return ResponseFrame(
            turn=tuple(self._ids(turn)),
            opening=() if opens else tuple(self._ids(found.opening)),
            closing=tuple(self._ids(found.closing)),
            thought_mark=tuple(self._ids(found.thought_mark)),
            answer_mark=tuple(self._ids(found.answer_mark)),
            thinks=thinks,
        )

    def _check_arguments(self, arguments: Mapping[str, Any]) -> None:
        template = str(self._tokenizer.chat_template or "")
        read = set(re.findall(r"[A-Za-z_]\w*", template)) | ({"enable_thinking"} if self._frame else set())
        ours = {"messages", *inspect.signature(self._tokenizer.apply_chat_template).parameters}
        for name in arguments:
            if name in ours:
                raise ConfigError(f"models.template_arguments must not name {name}, which raycomplete passes itself.")
            if name == "enable_thinking" and arguments[name] and self._frame is None:
                raise ConfigError(
                    f"The chat template of {self._path} has no place for thinking that is known.",
                    "Leave enable_thinking out of models.template_arguments.",
                )
            if name not in read:
                nearest = difflib.get_close_matches(name, read, n=1)
                raise ConfigError(
                    f"models.template_arguments names {name}, which the chat template of {self._path} does not read.",
                    f"Did you mean {nearest[0]}?" if nearest else "Leave it out.",
                )

    @property
    def frame(self) -> ResponseFrame | None:
        """Marks of thinking, answer and end; None where the template has no place for thinking."""
        return self._frame

    @property
    def answer_end(self) -> tuple[int, ...]:
        """Tokens that the template writes after an answer, before another turn; none where it writes none."""
        if not self._tokenizer.chat_template:
            return ()
        try:
            text = self._render(chat_messages([_ASKED, _ANSWERED]), is_asked=False)
        except Exception:  # templates may refuse what they are not made for
            return ()
        _, found, after = text.rpartition(_ANSWERED)
        return tuple(self._ids(after)) if found else ()

    @property
    def answer_header(self) -> tuple[int, ...]:
        """Tokens by which the template begins an answer; none where it has no mark for that."""
        if not self._tokenizer.chat_template:
            return ()
        asked = chat_messages([_ASKED])
        whole, before = self._render(asked), self._render(asked, is_asked=False)
        return tuple(self._ids(whole[len(before) :])) if whole.startswith(before) else ()

    def with_thinking(self, thinks: bool) -> ChatCodec:
        """Returns the codec whose prompts leave room to think, or end where the answer starts; the rest is the same."""
        if self._frame is None or self._frame.thinks == thinks:
            return self
        other = copy.copy(self)
        other._thinks, other._frame = thinks, dataclasses.replace(self._frame, thinks=thinks)
        return other

    @property
    def eos_ids(self) -> frozenset[int]:
        """Token ids that end a response."""
        return self._eos_ids

    @property
    def eos_id(self) -> int:
        """Token id that training appends to a finished answer: what the template ends a turn with, else `eos_token`."""
        return self._eos_id

    @property
    def vocab_size(self) -> int:
        """Tokens that the model can read: rows of the embedding from here on are padding."""
        return self._vocab_size

    def encode_prompt(self, text: str, system: str | None = None) -> list[int]:
        """Encodes a user message in its chat template, up to the point where the response starts."""
        return self._encode([self._prompt_text(text, system)])[0]

    def encode_prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """Encodes many user messages in one call of the tokenizer, each as `encode_prompt` does."""
        return self._encode([self._prompt_text(text, None) for text in texts])

    def encode_conversation(self, turns: Sequence[str], system: str | None = None) -> list[int]:
        """Encodes turns of user and model by turns, the user's first and last, up to where the response starts."""
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
        return [self._readable(ids) for ids in encoded["input_ids"]]

    def _render(self, messages: list[dict[str, str]], *, is_asked: bool = True) -> str:
        """Renders messages; where the model is asked, up to where it may think or answers."""
        arguments = self._arguments | {"enable_thinking": self._thinks, "add_generation_prompt": is_asked}
        text = self._tokenizer.apply_chat_template(messages, tokenize=False, **arguments)
        return f"{text}{self._suffixes[self._thinks]}" if is_asked else str(text)

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def _readable(self, ids: Sequence[int]) -> list[int]:
        if max(ids, default=0) >= self._vocab_size:
            token = self._tokenizer.convert_ids_to_tokens(max(ids))
            raise CheckpointError(
                f"A text holds the token {token!r}, for which the model {self._path} has no row.",
                "Leave the token out of prompts and answers.",
            )
        return list(ids)

    def encode_answer(self, text: str) -> list[int]:
        """Encodes a response, without template and without end-of-response."""
        return self._readable(self._ids(text))

    def encode_text(self, text: str) -> list[int]:
        """Encodes a text as it is, without template, after the tokenizer's start token where it has one."""
        return self._readable(self._tokenizer.encode(text))

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
        """Returns a hash of vocabulary and chat template, whose arguments are part of token ids, and so of any key."""
        content = [sorted(self._tokenizer.get_vocab().items()), self._tokenizer.chat_template]
        return hashlib.sha256(json.dumps(content, ensure_ascii=True).encode()).hexdigest()[:16]

    def not_in(self, other: ChatCodec) -> str | None:
        """Returns a token that another tokenizer lacks or has under another id; None where it has them all."""
        return min(dict(self._vocabulary.items() - other._vocabulary.items()), default=None)

    def save(self, folder: Path) -> None:
        """Writes the tokenizer files into a checkpoint folder."""
        self._tokenizer.save_pretrained(str(folder))


def has_chat_template(path: Path) -> bool:
    """Tells whether a checkpoint folder holds a chat template."""
    in_file = (path / "chat_template.jinja").is_file() or (path / "additional_chat_templates").is_dir()
    return in_file or bool(_read(path / "tokenizer_config.json").get("chat_template"))


def _read(file: Path) -> dict[str, Any]:
    found: Any = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return found if isinstance(found, dict) else {}
