"""Models behind an OpenAI-compatible address: how they are asked, and what was asked."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from functools import cached_property
from pathlib import Path
from threading import Event, Lock
from typing import TYPE_CHECKING, Any, Literal

from raycomplete.attacks.attack import Attack
from raycomplete.attacks.registry import build_attack
from raycomplete.attacks.trial import FILTERED, Said
from raycomplete.config import RemoteConfig, RunConfig
from raycomplete.data.remote import Messages, RememberingCodec, RemoteSpec, TextCodec
from raycomplete.runtime.errors import ConfigError, SetupError, WorkError
from raycomplete.runtime.files import PRIVATE, RowStore, content_hash, read_json, write_json
from raycomplete.runtime.logs import conceal
from raycomplete.runtime.signals import stop
from raycomplete.runtime.types import ModelRole

if TYPE_CHECKING:
    from openai import OpenAI

RETRIES = 6  # further attempts of the client after 408, 409, 429, 5xx, or a lost connection, with growing pauses
_OF_WEIGHTS = frozenset({"white_boxes", "fine_tune"})
_WITH_PREFILLS = frozenset({"adaptive", "prefill_mid_answer", "prefill_thinking", "refuse_then_turn"})
_GO_ON = {"continue_final_message": True, "add_generation_prompt": False}
_LENGTH_KEYS = ("max_tokens", "max_completion_tokens")  # some hosted models take the second only
_POLL_S = 0.5  # between two looks for a request to stop

Prefill = Literal["flags", "prefix", "assistant", "none"]


class RemoteUsage:
    """Counts of what one target was asked; `filtered` are questions that the server kept from its model."""

    def __init__(self) -> None:
        self.counts = dict.fromkeys(("requests", "retries", "prompt_tokens", "completion_tokens", "filtered"), 0)
        self._lock = Lock()
        self._file: Path | None = None

    def keep_in(self, file: Path) -> None:
        """Adds what earlier starts have counted in a file, and counts there from now on."""
        self.add(**(read_json(file) or {}))
        self._file = file

    def add(self, **counts: int) -> None:
        """Adds counts by name."""
        with self._lock:
            self.counts |= {name: self.counts[name] + count for name, count in counts.items()}
            if self._file is not None:
                write_json(self._file, self.counts)


class _LeftOff(WorkError):
    """A request that was not sent because another one had failed."""


class RemoteModel:
    """A model that is asked by messages (implements `raycomplete.runtime.types.Generator`).

    The client of OpenAI's package repeats what failed for a while, after growing pauses or when the server says. The
    key stands in no message, log or result. SetupError is raised where the environment variable of the key is not set,
    or holds no key."""

    def __init__(
        self,
        spec: RemoteSpec,
        settings: RemoteConfig,
        codec: RememberingCodec | TextCodec,
        setting: str = "evaluation.remote",
    ) -> None:
        self.spec, self.usage = spec, RemoteUsage()
        self._settings, self._codec = settings, codec
        self._key, self._setting = _read_key(settings.key_variable, setting), setting
        self._length_key = _LENGTH_KEYS[0]
        self._next, self._pace, self._leaving = 0.0, Lock(), Event()
        self._store: RowStore | None = None

    def keep_in(self, path: Path) -> None:
        """Keeps every answer in a file from now on, and its usage beside it, and asks nothing again that is there.

        Trials are stored many at a time, and answers here may be slow and paid for. Sampled answers without a seed are
        not kept: they would all be the same one.
        """
        self._store = RowStore(path, mode=PRIVATE)
        self.usage.keep_in(path.with_suffix(".json"))

    @cached_property
    def _client(self) -> OpenAI:
        from openai import OpenAI  # imported here because it takes about 1 s

        client = OpenAI(
            base_url=self.spec.address,
            api_key=self._key or "none",
            timeout=self._settings.timeout_s,
            max_retries=RETRIES,
        )
        # The environment's are for OpenAI's own address, and may hold another key.
        client.organization = client.project = None
        client._custom_headers = {}
        return client

    @cached_property
    def prefill(self) -> Prefill:
        """The way to tell the server to continue an answer, asked once where `evaluation.remote.prefill` is auto.

        A server that knows vLLM's two flags refuses them where they contradict each other; one that ignores what it
        does not know answers, and would take the beginning of an answer for a whole one.
        """
        if self._settings.prefill != "auto":
            return self._settings.prefill
        from openai import BadRequestError, UnprocessableEntityError

        begun: Messages = [{"role": "user", "content": "Say hello."}, {"role": "assistant", "content": "Hel"}]

        def takes(flags: dict[str, bool]) -> bool:
            try:
                self._said(begun, {"max_tokens": 1, "temperature": 0.0, "extra_body": flags})
            except SetupError as error:
                if isinstance(error.__cause__, (BadRequestError, UnprocessableEntityError)):
                    return False
                raise
            return True

        return "flags" if takes(_GO_ON) and not takes(_GO_ON | {"add_generation_prompt": True}) else "none"

    def generate(
        self,
        sequences: Sequence[Sequence[int]],
        *,
        max_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int | None = None,
    ) -> list[list[int]]:
        """Continues sequences, several at once; new tokens are those of the codec, `max_tokens` those of the server.

        Raises SetupError where the server refuses the request, and WorkError where it did not answer, or a sequence is
        no prompt with the beginning of an answer.
        """
        common: dict[str, Any] = {"max_tokens": max_tokens, "temperature": temperature}
        if temperature > 0:
            common |= {"top_p": top_p} | ({"extra_body": {"top_k": top_k}} if top_k else {})

        def say(index: int) -> list[int]:
            try:
                return self._answer(sequences[index], common, None if seed is None else seed + index)
            except BaseException:
                self._leaving.set()  # here, before the same thread takes the next question
                raise

        self._leaving.clear()
        with ThreadPoolExecutor(self._settings.parallel) as pool:
            tasks = [pool.submit(say, index) for index in range(len(sequences))]
            try:
                done: set[Future[list[int]]] = set()
                while len(done) < len(tasks) and not any(task.exception() for task in done):
                    stop.check()  # a signal interrupts nothing while work is polled
                    done = wait(tasks, timeout=_POLL_S, return_when=FIRST_EXCEPTION).done
                if errors := [error for task in done if (error := task.exception()) is not None]:
                    # One that was left off failed only because another did, which is the one to name.
                    raise min(errors, key=lambda error: isinstance(error, _LeftOff))
                return [task.result() for task in tasks]
            except BaseException:
                # The pool waits for its threads: none may wait for an answer that nobody reads.
                self._leaving.set()
                pool.shutdown(wait=False, cancel_futures=True)
                if (client := self.__dict__.pop("_client", None)) is not None:
                    client.close()
                raise

    def _answer(self, sequence: Sequence[int], common: dict[str, Any], seed: int | None) -> list[int]:
        """Continues one sequence."""
        if not sequence:
            return []
        asked = dict(common)
        messages, begun = self._codec.messages(sequence)
        if begun:
            messages.append({"role": "assistant", "content": begun})
            if self.prefill == "prefix":
                messages[-1]["prefix"] = True  # type: ignore[assignment]  # JSON, which the client passes on
            elif self.prefill == "flags":
                asked["extra_body"] = asked.get("extra_body", {}) | _GO_ON
            elif self.prefill == "none":
                raise _no_prefill(self.spec)
        if seed is not None and asked["temperature"] > 0:
            asked["seed"] = seed
        text, ended = self._kept(messages, asked)
        if begun and self.prefill in ("prefix", "assistant"):
            text = text.removeprefix(begun)  # some servers repeat it before what their model adds
        return Said(self._codec.encode_answer(text), ended)

    def _kept(self, messages: Messages, asked: dict[str, Any]) -> tuple[str, str | None]:
        if self._store is None or (asked["temperature"] > 0 and "seed" not in asked):
            return self._said(messages, asked)
        key = content_hash([self.spec.model_id, messages, asked])
        if key not in self._store:
            text, ended = self._said(messages, asked)
            if not text:  # filtered, or all of it thinking: another start asks again
                return text, ended
            with self._pace:
                self._store.add([{"key": key, "text": text, "ended": ended}])
        return str(self._store[key]["text"]), self._store[key].get("ended")

    def _said(self, messages: Messages, asked: dict[str, Any]) -> tuple[str, str | None]:
        """Asks once, and returns the answer with its finish reason; errors become ours."""
        import openai

        where = f"The model {self.spec.model!r} at {self.spec.address}"
        again = "Start the same command again when it is up: finished trials are kept."
        length_key = self._length_key
        try:
            return self._ask(messages, {length_key if key == "max_tokens" else key: asked[key] for key in asked})
        except openai.APITimeoutError as error:
            words = f"{where} did not answer within {self._settings.timeout_s:g} s, in {RETRIES + 1} attempts."
            raise WorkError(words, f"Raise evaluation.remote.timeout_s if it was working. {again}") from error
        except openai.APIConnectionError as error:
            raise WorkError(f"{where} cannot be reached, in {RETRIES + 1} attempts.", again) from error
        except openai.APIStatusError as error:
            status = error.status_code
            if error.code == FILTERED:  # a hosted service that refuses in its model's place
                self.usage.add(filtered=1)
                return "", FILTERED
            if status == 400 and length_key == _LENGTH_KEYS[0] and _LENGTH_KEYS[1] in str(error):
                self._length_key = _LENGTH_KEYS[1]
                return self._said(messages, asked)
            if status in (408, 409, 429) or status >= 500:
                words = f"{where} was busy or failed in {RETRIES + 1} attempts (last: status {status})."
                raise WorkError(words, f"Lower evaluation.remote.parallel. {again}") from error
            remedy = (
                "Check address, name and context length, which must hold the longest responses; an attacker must take "
                "seed and top_p, too."
            )
            if status in (401, 403):
                remedy = f"Check the key in the environment variable that {self._setting}.key_variable names."
            raise SetupError(f"{where} refuses the request (status {status}).", remedy) from error

    def _ask(self, messages: Messages, asked: dict[str, Any]) -> tuple[str, str | None]:
        self._wait_for_turn()
        if self._leaving.is_set():
            raise _LeftOff("Another request failed first.")
        create: Any = self._client.chat.completions.with_raw_response.create
        raw = create(model=self.spec.model, messages=messages, **asked)
        try:
            found = raw.parse()
            choice = found.choices[0]
            text, ended = choice.message.content, getattr(choice, "finish_reason", None)
        except (ValueError, LookupError, AttributeError, TypeError) as error:
            raise SetupError(
                f"{self.spec.address} gives no answer of the OpenAI kind (choices[0].message.content).",
                "Check that the address ends as its maker says, often in /v1.",
            ) from error
        # Servers may leave the usage out.
        tokens = {name: getattr(found.usage, name, 0) or 0 for name in ("prompt_tokens", "completion_tokens")}
        self.usage.add(requests=1, retries=raw.retries_taken, **tokens)
        return str(text or ""), ended

    def _wait_for_turn(self) -> None:
        """Spreads the starts of requests evenly over a minute."""
        if self._settings.requests_per_minute is None:
            return
        with self._pace:
            now = time.monotonic()
            turn = max(self._next, now)
            self._next = turn + 60.0 / self._settings.requests_per_minute
        self._leaving.wait(turn - now)


def _read_key(variable: str | None, setting: str) -> str:
    """Returns the key in the environment variable that `setting` names; "" where it names none."""
    if not variable:
        return ""
    key = os.environ.get(variable, "").strip()
    if not key:
        problem = f"The environment variable {variable} holds no key, which {setting}.key_variable asks for."
        raise SetupError(problem, f"Set it, or leave {setting}.key_variable out.")
    if not (key.isascii() and key.isprintable()):
        problem = f"The key in the environment variable {variable} holds what no header can."
        raise SetupError(problem, "Copy the key again: a quotation mark or a line break may have come along.")
    conceal(key)
    return key


def _no_prefill(spec: RemoteSpec) -> SetupError:
    return SetupError(
        f"The server at {spec.address} does not continue an answer that is begun for it.",
        "Set evaluation.depths to [0] and leave out attacks that begin the answer, or say in evaluation.remote.prefill "
        "how it is told to.",
    )


def usage_line(role: str, usage: Mapping[str, Any]) -> str:
    """Returns what a target was asked as a sentence."""
    words = (
        f"{role} was asked {usage['requests']} times at its address ({usage['retries']} repeated): "
        f"{usage['prompt_tokens']} tokens of prompts, {usage['completion_tokens']} of answers"
    )
    return words + (f", {usage['filtered']} filtered" if usage["filtered"] else "")


def open_remote(config: RunConfig, remote: Mapping[ModelRole, RemoteSpec], codec: Any) -> dict[ModelRole, RemoteModel]:
    """Makes the models behind addresses, by role, and refuses what they cannot be asked, before anything is started.

    `codec` is the codec of the run, a `RememberingCodec` where there are such models.
    """
    attacks: list[Attack[Any]] = [build_attack(settings) for settings in config.evaluation.attacks]
    for role in remote:
        for attack in attacks:
            if attack.needs & _OF_WEIGHTS:
                raise ConfigError(
                    f"The attack {attack.name} needs the weights of models.{role}, which is behind an address.",
                    "Leave the attack out, or name a checkpoint.",
                )
    if "base" in remote and (bare := [a.name for a in attacks if "attacker" in a.needs and not a.checkpoints]):
        raise ConfigError(
            f"The attack {bare[0]} rewrites prompts by models.base, which is behind an address.",
            "Name a checkpoint or another address under its attacker.",
        )
    begins = any(depth > 0 for depth in config.evaluation.depths)
    begins |= any(attack.name in _WITH_PREFILLS for attack in attacks)
    models = {role: RemoteModel(spec, config.evaluation.remote, codec) for role, spec in remote.items()}
    for model in models.values():
        if begins and model.prefill == "none":
            raise _no_prefill(model.spec)
    return models
