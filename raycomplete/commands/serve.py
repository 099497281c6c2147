"""`raycomplete serve`: evaluation as a service, the Serve application with the real pipeline behind it."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Literal

from ray.serve import Application

from raycomplete.config import RunConfig, load_run_file
from raycomplete.data.inputs import prepare_models, thinking_room
from raycomplete.data.prompts import read_conversation
from raycomplete.data.thinking import thinking
from raycomplete.engines.cluster import ResourcePlan, ResourceRequest, connect, engine_request
from raycomplete.engines.dtype import resolve_dtype
from raycomplete.engines.start import start_engine
from raycomplete.runtime.console import Console
from raycomplete.runtime.errors import DataError
from raycomplete.runtime.machine import package_versions
from raycomplete.runtime.types import MODEL_ROLES, ModelRole, Prompt
from raycomplete.serving import deployment
from raycomplete.serving.process import ProcessBackend
from raycomplete.serving.requests import TOKEN_VARIABLE, is_loopback, read_token_digest
from raycomplete.serving.runner import Cancelled, OnProgress
from raycomplete.serving.schemas import CompletionRequest, CompletionView

_TOOLS = 3  # engines of one evaluation beside its generators and white boxes, at most: guide, attacker, judge


def serve(config: RunConfig) -> Path:
    """Serves evaluations until it is interrupted; those at work are put back and go on at the next start.

    Args:
        config: Run file; `serve` says where and how, and requests take from the rest what they leave out.

    Returns:
        The state folder.

    Raises:
        ConfigError: The token is missing or weak.
        SetupError: vLLM is not installed, or the cluster cannot be reached or is too small.
    """
    application = build(config)
    os.environ.pop(TOKEN_VARIABLE, None)  # its digest is enough, and every process of the cluster inherits the rest
    settings = config.serve
    console = Console()
    ended = threading.Event()
    with connect(config.cluster, _plan(config), console):
        with console.stage("Started Ray Serve"):
            deployment.start(application, host=settings.host, port=settings.port)
        page = f"http://{_shown(settings.host)}:{settings.port}/"
        console.panel([("page", page), ("interface", f"{page}openapi.json"), ("state", settings.state.resolve())])
        before = {number: signal.signal(number, lambda *_: ended.set()) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            ended.wait()
            with console.stage("Stopped; evaluations at work are put back"):
                deployment.stop()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    return settings.state


def application(arguments: Mapping[str, str]) -> Application:
    """Builds the application for `serve deploy` and `serve run` from `args` of jobs/serve.yaml.

    Args:
        arguments: `run_file`, and any `key.sub: value` that replaces a value of it.
    """
    overrides = [f"{key}={value}" for key, value in arguments.items() if key != "run_file"]
    return build(load_run_file(arguments["run_file"], overrides))


def build(config: RunConfig) -> Application:
    """Builds the application, and refuses here what could not work."""
    token = read_token_digest(config.serve)
    package_versions()  # which refuses a machine without vLLM
    settings = config.serve
    paths = {
        "state": settings.state.resolve(),  # replicas stand in another folder
        "model_roots": [root.resolve() for root in settings.model_roots],
        "data_roots": [root.resolve() for root in settings.data_roots],
    }
    models = {str(role): _resolved(spec) for role in MODEL_ROLES if (spec := getattr(config.models, role)) is not None}
    trained = config.output.folder / "student"
    if (trained / "config.json").is_file():
        models["student"] = str(trained.resolve())
    changed = {"serve": settings.model_copy(update=paths), "models": config.models.model_copy(update=models)}
    backend, chat = partial(ProcessBackend, evaluate=evaluate_request), StudentChat if settings.chat else None
    return deployment.build_application(config.model_copy(update=changed), token, backend, chat)


def evaluate_request(config: RunConfig, roles: list[ModelRole], on_progress: OnProgress, cancelled: Cancelled) -> None:
    """Evaluates one request in the process of its own that `ProcessBackend` starts."""
    from raycomplete.commands.evaluate import evaluate  # torch, after what can be refused without it

    evaluate(config, roles=roles, on_progress=lambda progress: on_progress(progress.to_json()), cancelled=cancelled)


def _plan(config: RunConfig) -> ResourcePlan:
    """Adds up what the service holds when every runner is at work."""
    runners, cluster = config.serve.runners, config.cluster
    count, shards = runners * config.rollout.num_engines, config.rollout.tensor_parallel
    generator = engine_request(cluster, "rollout engine", count, tensor_parallel=shards)
    tools = engine_request(cluster, "model of attacks and judge", runners * (config.evaluation.white_boxes + _TOOLS))
    worker = ResourceRequest("training worker of the attack", runners, cluster.cpus_per_worker, cluster.gpus_per_worker)
    chat = [engine_request(cluster, "chat engine", 1)] if config.serve.chat else []
    return ResourcePlan((generator, tools, worker, *chat))


class StudentChat:
    """The student behind one engine of its own, started with the service."""

    def __init__(self, config: RunConfig) -> None:
        config = resolve_dtype(config, Console(quiet=True))
        models = prepare_models(config, roles=("aligned", "student"))
        self._codec = models.codec
        self._config = config
        engine = start_engine(config, models.paths["student"], models.codec)
        self._thought = thinking_room(config, models.codec)
        self._client = thinking(engine, models.codec, config.evaluation.max_thinking_tokens)

    async def complete(self, request: CompletionRequest) -> CompletionView:
        """Continues a prompt, greedily or sampled."""
        return await asyncio.to_thread(self._complete, request)

    def _complete(self, request: CompletionRequest) -> CompletionView:
        sequence = asked(request).encoded(self._codec)
        longest = self._config.models.max_length - self._thought
        if len(sequence) + request.max_tokens > longest:
            raise DataError(
                f"The prompt has {len(sequence)} tokens, max_tokens is {request.max_tokens}, and the student reads "
                f"{longest}.",
                "Shorten the prompt or lower max_tokens.",
            )
        tokens = self._client.generate(
            [sequence],
            max_tokens=request.max_tokens,
            temperature=request.temperature,
            top_p=request.top_p,
            seed=request.seed,
        )[0]
        frame = self._codec.frame
        answer = tuple(tokens) if frame is None else frame.split(sequence, tokens)[1]
        reason: Literal["length", "stop"] = "length" if len(answer) >= request.max_tokens else "stop"
        return CompletionView.of(self._codec.decode(answer), reason, len(sequence), len(answer))


def asked(request: CompletionRequest) -> Prompt:
    """Returns the prompt of a request, with the conversation that it ends.

    Raises:
        DataError: The conversation does not alternate between user and assistant.
    """
    if not request.earlier:
        return Prompt("", request.prompt, "benign")
    messages = [*(turn.model_dump() for turn in request.earlier), {"role": "user", "content": request.prompt}]
    system, earlier, text = read_conversation(messages, "the request")
    return Prompt("", text, "benign", system=system, earlier=earlier)


def _resolved(spec: str) -> str:
    """Makes a checkpoint's path one that holds in any folder; names such as organism:base stay."""
    path = Path(spec).expanduser()
    return str(path.resolve()) if path.exists() else spec


def _shown(host: str) -> str:
    """Returns an address that a browser takes."""
    if is_loopback(host):
        return "127.0.0.1"
    return f"[{host}]" if ":" in host else host
