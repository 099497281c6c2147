"""A judge model behind an OpenAI-compatible address."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from raycomplete.attacks.target import Triple
from raycomplete.config.evaluation import JudgeConfig, RemoteConfig
from raycomplete.data.remote import RemoteSpec, TextCodec
from raycomplete.evaluation.remote_target import RemoteModel
from raycomplete.evaluation.rubrics import Rubric, RubricJudge


class EndpointJudge(RubricJudge):
    """Asks a model behind an address of the OpenAI kind, several questions at once.

    Prompts and responses leave this machine where the address is elsewhere. It is asked as a target behind an address
    is: again where it is busy, and with a key that stands in no message, log or result.

    Raises:
        SetupError: The environment variable of the key is not set, or holds what is no key.
    """

    def __init__(self, settings: JudgeConfig, rubric: Rubric) -> None:
        super().__init__(rubric)
        self._spec = RemoteSpec((settings.address or "").rstrip("/"), settings.model or "")
        asked = RemoteConfig(
            key_variable=settings.key_variable,
            parallel=settings.parallel,
            retries=settings.retries,
            timeout_s=settings.timeout_s,
        )
        self._codec = TextCodec()
        self._model = RemoteModel(self._spec, asked, self._codec, setting="evaluation.judge")

    @property
    def name(self) -> str:
        address = hashlib.sha256(f"{self._spec.address}/chat/completions".encode()).hexdigest()[:8]
        return f"endpoint-{self._spec.model}-{address}-{self.rubric.fingerprint}"

    def _replies(self, triples: Sequence[Triple]) -> list[str]:
        questions = [self.rubric.question(prompt.transcript, prefill, text) for prompt, prefill, text in triples]
        requests = [self._codec.encode_prompt(question) for question in questions]
        replies = self._model.generate(requests, max_tokens=self.rubric.max_reply_tokens)
        said = [self._codec.decode(reply) for reply in replies]
        self._codec.clear()
        return said
