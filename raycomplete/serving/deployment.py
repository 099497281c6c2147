"""The application on Ray Serve: replicas that answer HTTP, replicas that evaluate, and a replica for each chat model.

The first two run on the head node, since they share one SQLite file; engines go where there is room.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
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
from raycomplete.serving.openai_api import Asked, NoAnswer
from raycomplete.serving.requests import Admission
from raycomplete.serving.runner import Backend, Runner
from raycomplete.serving.store import EvaluationStore

APP_NAME = "raycomplete"
_ON_HEAD = {"node:__internal_head__": 0.001}
logger = logging.getLogger(__name__)

# Control-plane processes: they wait more than they work, and must not take the cores that engines are placed by.
_ACTOR_OPTIONS = {"num_cpus": 0, "resources": _ON_HEAD}
_HEALTH_CHECK_S = 2.0
# Of a replica that answers HTTP. A stream of events counts as one ongoing request for as long as it is open.
_MAX_ONGOING = 512
_SCALING = {"target_ongoing_requests": 64.0, "upscale_delay_s": 10.0, "downscale_delay_s": 300.0}
_MAX_ANSWERED = 2048  # requests that one model works on; its engine batches what fits and keeps the rest waiting


@dataclass(frozen=True)
class ChatModel:
    """A model that answers prompts, in a replica of its own."""

    factory: Callable[[RunConfig, ModelRole], Any]  # called in the replica; makes `answer` and `check_health`
    role: ModelRole
    options: Mapping[str, Any]  # what its actor reserves, and its environment

    def bind(self, config: RunConfig) -> serve.Application:
        made = serve.deployment(
            name=f"Model-{self.role}",
            max_ongoing_requests=_MAX_ANSWERED,
            ray_actor_options=dict(self.options),
            health_check_period_s=_HEALTH_CHECK_S,
        )
        return made(self.factory).bind(config, self.role)


async def _remote_answers(handle: DeploymentHandle[Any], request: Asked) -> AsyncIterator[dict[str, Any] | NoAnswer]:
    """Asks a model in another replica (an `openai_api.Answers`)."""
    items = handle.answer.remote(request)
    try:
        async for item in items:
            yield item
    except RayTaskError:
        logger.exception("A request to a model failed")
        yield NoAnswer(500, "The model's process could not answer this request; the service's log says why.")
    except (RayError, RayServeException):
        words = "The model's process ended while it answered. It is started again; ask again in a minute."
        yield NoAnswer(503, words)
    except (asyncio.CancelledError, GeneratorExit):  # the client left
        items.cancel()
        raise


class EvaluationRunner:
    """Works through the queue in a thread, so that Serve's health checks are answered meanwhile."""

    def __init__(self, config: RunConfig, make_backend: Callable[[RunConfig], Backend]) -> None:
        load_plugins(config.plugins)
        state = config.serve.state
        self._runner = Runner(EvaluationStore(state), make_backend(config), state)
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
        models = {role: partial(_remote_answers, handle.options(stream=True)) for role, handle in chat.items()}
        self._service = Service(Admission(config), EvaluationStore(config.serve.state), token_digest, models)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return create_app(self._service)


def build_application(
    config: RunConfig,
    token_digest: str | None,
    make_backend: Callable[[RunConfig], Backend],
    chat: Sequence[ChatModel] = (),
) -> serve.Application:
    """Makes the Serve application of a run file whose `serve.state` is absolute.

    `make_backend` is called in each runner, so Ray's workers must be able to import it.
    """
    settings = config.serve
    common: dict[str, Any] = {"ray_actor_options": _ACTOR_OPTIONS, "health_check_period_s": _HEALTH_CHECK_S}
    # One evaluation's batch may take minutes; a runner that is asked to stop puts the evaluation back after it.
    runner_options = {"num_replicas": settings.runners, "graceful_shutdown_timeout_s": 30}
    runners = serve.deployment(**runner_options, **common)(EvaluationRunner).bind(config, make_backend)
    fewest, most = settings.replicas
    api = serve.deployment(
        max_ongoing_requests=_MAX_ONGOING,
        graceful_shutdown_timeout_s=5,
        autoscaling_config={"min_replicas": fewest, "max_replicas": most, **_SCALING},
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
