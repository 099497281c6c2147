"""Models behind an OpenAI-compatible address (`openai:http://host:port/v1#name`), and the prompts that they are asked.

They read messages and not token ids. So the codec of an evaluation remembers which messages each prompt was encoded
from: a sequence of ids is turned back into those messages, and what follows them into the beginning of an answer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any
from urllib.parse import urlsplit

from raycomplete.data.chat import ChatCodec
from raycomplete.data.families import chat_messages
from raycomplete.runtime.errors import ConfigError, DataError, WorkError

SCHEME = "openai"
_PADDING = -1
Messages = list[dict[str, str]]


def is_remote(spec: str | None) -> bool:
    """Tells whether a checkpoint's name means a model behind an address."""
    return spec is not None and spec.partition(":")[0] == SCHEME


@dataclass(frozen=True)
class RemoteSpec:
    """A model behind an address."""

    address: str  # as a client's base URL: often it ends in /v1
    model: str

    @property
    def host(self) -> str:
        """The host of the address."""
        return urlsplit(self.address).hostname or ""

    @property
    def model_id(self) -> str:
        """A name for results to be stored under."""
        digest = hashlib.sha256(f"{self.address}#{self.model}".encode()).hexdigest()[:16]
        return f"remote-{digest}"

    @classmethod
    def parse(cls, spec: str, *, setting: str) -> RemoteSpec:
        """Reads `openai:ADDRESS#NAME`."""
        address, _, model = spec.removeprefix(f"{SCHEME}:").rpartition("#")
        try:
            parts = urlsplit(address)
            is_port = parts.port is None or parts.port > 0
        except ValueError:  # brackets that do not close, a port that is none
            parts, is_port = urlsplit(""), False
        if not is_port or parts.scheme not in ("http", "https") or not parts.hostname or not model:
            raise ConfigError(f"{setting} names no model behind an address.", "Write openai:http://HOST:PORT/v1#NAME.")
        if parts.username or parts.password or parts.query:
            raise ConfigError(
                f"{setting} must hold no key.", "Name the environment variable in evaluation.remote.key_variable."
            )
        return cls(address.rstrip("/"), model)


class RememberingCodec(ChatCodec):
    """A codec that knows the messages of the prompts that it encoded."""

    def __init__(self, codec: ChatCodec) -> None:
        self.__dict__.update(codec.__dict__)
        self._known: dict[tuple[int, ...], Messages] = {}
        self._lengths: set[int] = set()

    def encode_prompt(self, text: str, system: str | None = None) -> list[int]:
        """Encodes a user message, and remembers it."""
        return self._remember(super().encode_prompt(text, system), [text], system)

    def encode_prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """Encodes user messages, and remembers them."""
        encoded = super().encode_prompts(texts)
        return [self._remember(ids, [text], None) for ids, text in zip(encoded, texts, strict=True)]

    def encode_conversation(self, turns: Sequence[str], system: str | None = None) -> list[int]:
        """Encodes a conversation, and remembers it."""
        return self._remember(super().encode_conversation(turns, system), turns, system)

    def _remember(self, ids: list[int], turns: Sequence[str], system: str | None) -> list[int]:
        messages = chat_messages(turns, system)
        known = self._known.setdefault(tuple(ids), messages)
        if known != messages and _stripped(known) != _stripped(messages):
            raise DataError(
                f"Two prompts are the same {len(ids)} tokens to the local tokenizer, one of them {turns[-1][:60]!r}: "
                "which of them a model behind an address is to be asked cannot be told.",
                "Name a checkpoint with the model's own tokenizer, or another that knows all words.",
            )
        self._lengths.add(len(ids))
        return ids

    def messages(self, sequence: Sequence[int]) -> tuple[Messages, str]:
        """Returns the messages of a sequence, and the beginning of the answer that follows them; "" for none."""
        for length in sorted((length for length in self._lengths if length <= len(sequence)), reverse=True):
            if (found := self._known.get(tuple(sequence[:length]))) is not None:
                return list(found), self.decode(sequence[length:])
        raise WorkError(
            "An attack asks in token ids, and models behind an address read messages.",
            "Leave it out, or name a checkpoint as the target.",
        )


class TextCodec:
    """A codec to which every text is one token, for a model behind an address that writes and that nothing scores."""

    def __init__(self) -> None:
        self._texts: list[str] = []
        self._lock = Lock()  # answers come side by side

    def encode_prompt(self, text: str, system: str | None = None) -> list[int]:
        """Keeps a user message."""
        text = text if system is None else f"{system}\n\n{text}"
        return self.encode_answer(text) + [_PADDING] * (len(text) // 3)

    def encode_answer(self, text: str) -> list[int]:
        """Keeps an answer."""
        with self._lock:
            self._texts.append(text)
            return [len(self._texts) - 1]

    def decode(self, token_ids: Sequence[int]) -> str:
        """Gives texts back."""
        return "".join(self._texts[token] for token in token_ids if token != _PADDING)

    def clear(self) -> None:
        """Forgets all texts, whose tokens mean nothing any more."""
        with self._lock:
            self._texts.clear()

    def messages(self, sequence: Sequence[int]) -> tuple[Messages, str]:
        """Returns the user message of a sequence, and "" for an answer that was not begun."""
        return [{"role": "user", "content": self.decode(sequence)}], ""


def _stripped(messages: Messages) -> list[tuple[str, str]]:
    return [(message["role"], message["content"].strip()) for message in messages]


def refuse_remote(models: Any) -> None:
    """Refuses models behind an address where weights are needed."""
    for role in ("base", "aligned", "student"):
        if is_remote(getattr(models, role)):
            raise ConfigError(
                f"models.{role} is behind an address, and such a model can be evaluated and nothing else.",
                "Name a checkpoint, or use raycomplete evaluate.",
            )
