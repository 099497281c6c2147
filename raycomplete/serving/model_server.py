"""A model of the run behind an engine of its own, which answers prompts: what Ray Serve makes a replica of."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from raycomplete.config import RunConfig
from raycomplete.data.inputs import prepare_models
from raycomplete.data.remote import is_remote
from raycomplete.engines.cluster import uses_gpu
from raycomplete.engines.dtype import resolve_dtype
from raycomplete.engines.online_engine import OnlineEngine
from raycomplete.engines.spec import EngineSpec
from raycomplete.runtime.console import Console
from raycomplete.runtime.types import ModelRole
from raycomplete.serving.answers import Answerer, AnswerLimits
from raycomplete.serving.openai_schemas import ChatRequest, ChatView, CompletionRequest, CompletionView, NoAnswer


class ModelServer:
    """Answers with one model (implements `raycomplete.serving.openai_routes.Answers`).

    Start it in a process whose environment is that of `EngineSpec`.

    Args:
        config: Run file.
        role: The model among `models`.
    """

    def __init__(self, config: RunConfig, role: ModelRole) -> None:
        config = resolve_dtype(config, Console(quiet=True))
        local = [name for name in ("aligned", role) if not is_remote(getattr(config.models, name))]
        models = prepare_models(config, roles=list(dict.fromkeys(local)), remote=True)
        spec = EngineSpec.from_config(config, "single", models.paths[role], use_gpu=uses_gpu(config.cluster))
        eos_ids = sorted(models.codec.eos_ids)
        self._engine = OnlineEngine(spec, eos_ids, timeout_s=config.cluster.start_timeout_s)
        limits = AnswerLimits(
            max_length=config.models.max_length,
            max_tokens=config.serve.max_chat_tokens,
            max_thinking_tokens=config.evaluation.max_thinking_tokens,
            timeout_s=config.serve.chat_timeout_s,
        )
        self._answerer = Answerer(models.codec, self._engine, limits)

    async def complete(self, request: ChatRequest | CompletionRequest) -> ChatView | CompletionView | NoAnswer:
        """Returns the whole answer."""
        return await self._answerer.complete(request)

    async def stream(self, request: ChatRequest | CompletionRequest) -> AsyncIterator[dict[str, Any] | NoAnswer]:
        """Yields chunks; a refusal ends them."""
        async for chunk in self._answerer.stream(request):
            yield chunk

    def check_health(self) -> None:
        """Fails where the engine failed, which makes Serve replace the replica."""
        self._engine.check()
