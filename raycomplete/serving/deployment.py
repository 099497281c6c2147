"""The application on Ray Serve: replicas that answer HTTP, replicas that evaluate, and a replica for each chat model.

The first two run on the head node, since they share one SQLite file; engines go where there is room.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp

from raycomplete.config import RunConfig
from raycomplete.runtime.plugins import load_plugins
from raycomplete.runtime.types import ModelRole
from raycomplete.serving.app import Service, create_app
from raycomplete.serving.openai_schemas import ChatRequest, ChatView, CompletionRequest, CompletionView, NoAnswer
from raycomplete.serving.requests import Admission
from raycomplete.serving.runner import Backend, Runner
from raycomplete.serving.store import EvaluationStore

APP_NAME = "raycomplete"
_ON_HEAD = {"node:__internal_head__": 0.001}
logger = logging.getLogger(__name__)

# Control-plane processes: they wait more than they work, and must not take the cores that engines are placed by.
_ACTOR_OPTIONS = {"num_cpus": 0, "resources": _ON_HEAD}
_HEALTH_CHECK_S = 2.0
_MAX_ANSWERED = 2048  # requests that one model works on; its engine batches what fits and keeps the rest waiting
_FAILED = NoAnswer(500, "The model's process could not answer this request; the service's log says why.")
_GONE = NoAnswer(503, "The model's process ended while it answered. It is started again; ask again in a minute.")


@dataclass(frozen=True)
class ChatModel:
    """A model that answers prompts, in a replica of its own.

    Attributes:
        factory: Called with the run file in the replica; what it makes has the methods of
            `raycomplete.serving.openai_routes.Answers`, and `check_health`.
        options: Of its actor: what it reserves, and its environment.
    """

    factory: type
    role: ModelRole
    options: Mapping[str, Any]

    def bind(self, config: RunConfig) -> serve.Application:
        """Makes the Ray Serve deployment of this model."""
        made = serve.deployment(
            name=f"Model-{self.role}",
            max_ongoing_requests=_MAX_ANSWERED,
            ray_actor_options=dict(self.options),
            health_check_period_s=_HEALTH_CHECK_S,
        )
        return made(self.factory).bind(config, self.role)


class RemoteAnswers:
    """A model in another replica (implements `raycomplete.serving.openai_routes.Answers`)."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self._complete, self._stream = handle.complete, handle.options(stream=True).stream

    async def complete(self, request: ChatRequest | CompletionRequest) -> ChatView | CompletionView | NoAnswer:
        """Returns the whole answer."""
        answer = self._complete.remote(request)
        try:
            found: ChatView | CompletionView | NoAnswer = await answer
        except RayTaskError:
            logger.exception("A request to a model failed")
            return _FAILED
        except (RayError, RayServeException):
            return _GONE
        except asyncio.CancelledError:  # the client left
            answer.cancel()
            raise
        return found

    async def stream(self, request: ChatRequest | CompletionRequest) -> AsyncIterator[dict[str, Any] | NoAnswer]:
        """Yields chunks; a refusal ends them."""
        chunks = self._stream.remote(request)
        try:
            async for chunk in chunks:
                yield chunk
        except RayTaskError:
            logger.exception("A request to a model failed")
            yield _FAILED
        except (RayError, RayServeException):
            yield _GONE
        except (asyncio.CancelledError, GeneratorExit):
            chunks.cancel()
            raise


class EvaluationRunner:
    """Works through the queue in a thread, so that Serve's health checks are answered meanwhile."""

    def __init__(self, config: RunConfig, make_backend: Callable[[RunConfig], Backend]) -> None:
        load_plugins(config.plugins)
        state, lease_s, attempts = config.serve.state, config.serve.lease_s, config.serve.max_attempts
        store, backend = EvaluationStore(state), make_backend(config)
        self._runner = Runner(store, backend, state, lease_s=lease_s, max_attempts=attempts)
        self._thread = threading.Thread(target=self._runner.run_forever, name="evaluation-runner", daemon=True)
        self._thread.start()

    def check_health(self) -> None:
        """Fails where the thread ended, which makes Serve replace the replica."""
        if not self._thread.is_alive():
            raise RuntimeError("The evaluation runner's thread ended.")

    def __del__(self) -> None:
        self._runner.stop()
        self._thread.join(timeout=30)


@serve.ingress()
class EvaluationApi:
    """Answers HTTP. It holds the runners' handle so that Serve starts them as part of the same application."""

    def __init__(
        self,
        config: RunConfig,
        token_digest: str | None,
        runners: DeploymentHandle[Any],
        chat: Mapping[str, DeploymentHandle[Any]],
    ) -> None:
        load_plugins(config.plugins)
        self._runners = runners
        models = {role: RemoteAnswers(handle) for role, handle in chat.items()}
        self._service = Service(Admission(config), EvaluationStore(config.serve.state), token_digest, models)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return create_app(self._service)


def build_application(
    config: RunConfig,
    token_digest: str | None,
    make_backend: Callable[[RunConfig], Backend],
    chat: Sequence[ChatModel] = (),
) -> serve.Application:
    """Makes the Serve application.

    Args:
        config: Run file; what requests leave out is taken from here. `serve.state` must be absolute.
        token_digest: SHA-256 of the bearer token, or None for this machine alone.
        make_backend: Called in each runner. It must be importable by Ray's workers.
        chat: Models that answer prompts.
    """
    settings = config.serve
    common: dict[str, Any] = {"ray_actor_options": _ACTOR_OPTIONS, "health_check_period_s": _HEALTH_CHECK_S}
    # One evaluation's batch may take minutes; a runner that is asked to stop puts the evaluation back after it.
    runner_options = {"num_replicas": settings.runners, "graceful_shutdown_timeout_s": 30}
    runners = serve.deployment(**runner_options, **common)(EvaluationRunner).bind(config, make_backend)
    scaling = settings.autoscaling
    api = serve.deployment(
        max_ongoing_requests=scaling.max_ongoing_requests,
        graceful_shutdown_timeout_s=5,
        autoscaling_config=scaling.model_dump(exclude={"max_ongoing_requests"}),
        **common,
    )(EvaluationApi)
    return api.bind(config, token_digest, runners, {model.role: model.bind(config) for model in chat})


def start(application: serve.Application, *, host: str, port: int) -> None:
    """Starts Serve where it does not run yet, and the application; returns when it answers."""
    logging.getLogger("ray.serve").setLevel(logging.WARNING)  # of this process: replicas have logs of their own
    logs = {"enable_access_log": False}
    serve.start(proxy_location="HeadOnly", http_options={"host": host, "port": port}, logging_config=logs)
    serve.run(application, name=APP_NAME, route_prefix="/", logging_config=logs)


def stop() -> None:
    """Ends the application; evaluations at work are put back."""
    serve.delete(APP_NAME)
