"""The application on Ray Serve: replicas that answer, and replicas that evaluate.

Both run on the head node, since they share one SQLite file; the engines of an evaluation go where there is room.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp

from raycomplete.config import RunConfig
from raycomplete.runtime.plugins import load_plugins
from raycomplete.serving.app import Service, create_app
from raycomplete.serving.requests import Admission
from raycomplete.serving.runner import Backend, Runner
from raycomplete.serving.store import EvaluationStore

APP_NAME = "raycomplete"
_ON_HEAD = {"node:__internal_head__": 0.001}
# Control-plane processes: they wait more than they work, and must not take the cores that engines are placed by.
_ACTOR_OPTIONS = {"num_cpus": 0, "resources": _ON_HEAD}
_HEALTH_CHECK_S = 2.0


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
        chat: DeploymentHandle[Any] | None,
    ) -> None:
        load_plugins(config.plugins)
        self._runners = runners
        complete = chat.complete.remote if chat is not None else None
        self._service = Service(Admission(config), EvaluationStore(config.serve.state), token_digest, complete)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return create_app(self._service)


def build_application(
    config: RunConfig,
    token_digest: str | None,
    make_backend: Callable[[RunConfig], Backend],
    chat_class: type | None = None,
) -> serve.Application:
    """Makes the Serve application.

    Args:
        config: Run file; what requests leave out is taken from here. `serve.state` must be absolute.
        token_digest: SHA-256 of the bearer token, or None for this machine alone.
        make_backend: Called in each runner. It must be importable by Ray's workers.
        chat_class: Made of the run file in a replica of its own, which holds an engine; its coroutine
            `complete(CompletionRequest) -> CompletionView` answers single prompts. None serves no chat.
    """
    settings = config.serve
    common: dict[str, Any] = {"ray_actor_options": _ACTOR_OPTIONS, "health_check_period_s": _HEALTH_CHECK_S}
    # One evaluation's batch may take minutes; a runner that is asked to stop puts the evaluation back after it.
    runner_options = {"num_replicas": settings.runners, "graceful_shutdown_timeout_s": 30}
    runners = serve.deployment(**runner_options, **common)(EvaluationRunner).bind(config, make_backend)
    chat = None
    if chat_class is not None:
        chat = serve.deployment(name="Chat", max_ongoing_requests=16, **common)(chat_class).bind(config)
    scaling = settings.autoscaling
    api = serve.deployment(
        max_ongoing_requests=scaling.max_ongoing_requests,
        graceful_shutdown_timeout_s=5,
        autoscaling_config=scaling.model_dump(exclude={"max_ongoing_requests"}),
        **common,
    )(EvaluationApi)
    return api.bind(config, token_digest, runners, chat)


def start(application: serve.Application, *, host: str, port: int) -> None:
    """Starts Serve where it does not run yet, and the application; returns when it answers."""
    logging.getLogger("ray.serve").setLevel(logging.WARNING)  # of this process: replicas have logs of their own
    logs = {"enable_access_log": False}
    serve.start(proxy_location="HeadOnly", http_options={"host": host, "port": port}, logging_config=logs)
    serve.run(application, name=APP_NAME, route_prefix="/", logging_config=logs)


def stop() -> None:
    """Ends the application; evaluations at work are put back."""
    serve.delete(APP_NAME)
