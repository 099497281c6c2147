"""A judge model behind an OpenAI-compatible address."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from threading import Event
from typing import Any

import httpx

from raycomplete.attacks.target import Triple
from raycomplete.config.evaluation import JudgeConfig
from raycomplete.evaluation.rubrics import Rubric, RubricJudge
from raycomplete.runtime.errors import SetupError, WorkError
from raycomplete.runtime.logs import conceal

_BUSY = frozenset({408, 409, 425, 429, 500, 502, 503, 504})  # the same question may be answered later
_LONGEST_WAIT_S = 60.0


class EndpointJudge(RubricJudge):
    """Asks a model behind an address of the OpenAI kind (`POST <address>/chat/completions`), several questions at once.

    Prompts and responses leave this machine where the address is elsewhere. A server that is busy, or does not answer
    in time, is asked again after 1, 2, 4 ... seconds, or when it says. The key comes from an environment variable and
    stands in no message, log or result.

    Raises:
        SetupError: The environment variable of the key is not set, or holds what is no key.
    """

    def __init__(self, settings: JudgeConfig, rubric: Rubric, *, first_wait_s: float = 1.0) -> None:
        super().__init__(rubric)
        self._settings, self._first_wait_s = settings, first_wait_s
        self._url = f"{(settings.address or '').rstrip('/')}/chat/completions"
        self._headers = {}
        of, setting = "the judge's address", "evaluation.judge.key_variable"
        if key := read_key(settings.key_variable, of=of, setting=setting):
            self._headers["Authorization"] = f"Bearer {key}"

    @property
    def name(self) -> str:
        address = hashlib.sha256(self._url.encode()).hexdigest()[:8]
        return f"endpoint-{self._settings.model}-{address}-{self.rubric.fingerprint}"

    def _replies(self, triples: Sequence[Triple]) -> list[str]:
        questions = [self.rubric.question(prompt.transcript, prefill, text) for prompt, prefill, text in triples]
        client, leaving = httpx.Client(headers=self._headers, timeout=self._settings.timeout_s), Event()
        with client, ThreadPoolExecutor(self._settings.parallel) as pool:
            answers = [pool.submit(self._ask, client, question, leaving) for question in questions]
            try:
                for answer in wait(answers, return_when=FIRST_EXCEPTION).done:
                    answer.result()  # raises what failed first, whatever the ones before it wait for
                return [answer.result() for answer in answers]
            except BaseException:
                leaving.set()  # the pool waits for its threads, and pauses may take minutes
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _ask(self, client: httpx.Client, question: str, leaving: Event) -> str:
        body = {
            "model": self._settings.model,
            "messages": [{"role": "user", "content": question}],
            "max_tokens": self.rubric.max_reply_tokens,
            "temperature": 0,
        }
        wait_s, problem = self._first_wait_s, ""
        for attempt in range(self._settings.retries + 1):
            try:
                response = client.post(self._url, json=body)
            except httpx.RequestError as error:  # no message of it: it may hold the address with what is in it
                problem, asked_s = f"{type(error).__name__}", 0.0
            else:
                if response.is_success:
                    return _content(response)
                if response.status_code not in _BUSY:
                    raise SetupError(
                        f"The judge's address refuses the request (status {response.status_code}).",
                        "Check evaluation.judge.address, model and key_variable.",
                    )
                problem, asked_s = f"status {response.status_code}", _seconds(response.headers.get("retry-after"))
            if attempt == self._settings.retries or leaving.wait(min(max(wait_s, asked_s), _LONGEST_WAIT_S)):
                break
            wait_s *= 2
        raise WorkError(
            f"The judge's address did not answer in {self._settings.retries + 1} attempts (last: {problem}).",
            "Start the same command again when it is up: finished trials and judgements are kept.",
        )


def read_key(variable: str | None, *, of: str, setting: str) -> str:
    """Returns the key in an environment variable; "" where none is named.

    Args:
        of: Those whose key it is, for messages.
        setting: The key of the run file that names the variable.

    Raises:
        SetupError: The variable is not set, or holds what is no key.
    """
    if not variable:
        return ""
    key = os.environ.get(variable, "").strip()
    if not key:
        problem = f"The environment variable {variable} holds no key for {of}."
        raise SetupError(problem, f"Set it, or leave {setting} out.")
    if not (key.isascii() and key.isprintable()):
        problem = f"The key in the environment variable {variable} holds what no header can."
        raise SetupError(problem, "Copy the key again: a quotation mark or a line break may have come along.")
    conceal(key)
    return key


def _content(response: httpx.Response) -> str:
    try:
        found: Any = response.json()["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError) as error:
        raise SetupError(
            "The judge's address gives no answer of the OpenAI kind (choices[0].message.content).",
            "Check that evaluation.judge.address ends as its maker says, often in /v1.",
        ) from error
    return str(found or "")


def _seconds(header: str | None) -> float:
    """Seconds of a Retry-After header; 0 where it holds a date or nothing."""
    try:
        return max(float(header or 0.0), 0.0)
    except ValueError:
        return 0.0
