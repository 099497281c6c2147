"""Evaluation as a service: the Serve application with the real pipeline behind it.

Each evaluation runs in a process of its own, a Ray driver on the same cluster. So it needs nothing that a replica
lacks, its memory is given back when it ends, and what kills it does not kill the service.
"""

from __future__ import annotations

import asyncio
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
from ray.serve import Application

from raycomplete.config import RunConfig, load_run_file
from raycomplete.data.inputs import environment, prepare_models
from raycomplete.engines.cluster import connect
from raycomplete.engines.placement import ResourcePlan, ResourceRequest, engine_request
from raycomplete.engines.start import start_engine
from raycomplete.runtime.console import Console
from raycomplete.runtime.errors import DataError, RefusedError, WorkError
from raycomplete.runtime.types import MODEL_ROLES
from raycomplete.serving import deployment
from raycomplete.serving.backend import Cancelled, OnProgress
from raycomplete.serving.requests import run_config
from raycomplete.serving.schemas import CompletionRequest, CompletionText, EvaluationRequest
from raycomplete.serving.token import TOKEN_VARIABLE, is_loopback, read_token_digest

_CANCEL_GRACE_S = 10.0  # what a batch may take to end; finished trials are on disk already
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
        console.panel(
            [
                ("page", f"http://{_shown(settings.host)}:{settings.port}/"),
                ("interface", f"http://{_shown(settings.host)}:{settings.port}/openapi.json"),
                ("state", settings.state.resolve()),
            ]
        )
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
    """The application for `serve deploy` and `serve run`: `args` of jobs/serve.yaml.

    Args:
        arguments: `run_file`, and any `key.sub: value` that replaces a value of it.
    """
    overrides = [f"{key}={value}" for key, value in arguments.items() if key != "run_file"]
    return build(load_run_file(arguments["run_file"], overrides))


def build(config: RunConfig) -> Application:
    """The application, refused here where it could not work."""
    token = read_token_digest(config.serve)
    environment()  # which refuses a machine without vLLM
    settings = config.serve.model_copy(
        update={
            "state": config.serve.state.resolve(),  # replicas stand in another folder
            "model_roots": [root.resolve() for root in config.serve.model_roots],
            "data_roots": [root.resolve() for root in config.serve.data_roots],
        }
    )
    models = {str(role): _resolved(spec) for role in MODEL_ROLES if (spec := getattr(config.models, role)) is not None}
    trained = config.output.folder / "student"
    if (trained / "config.json").is_file():
        models["student"] = str(trained.resolve())
    served = config.model_copy(update={"serve": settings, "models": config.models.model_copy(update=models)})
    return deployment.build_application(served, token, ProcessBackend, StudentChat if settings.chat else None)


def _plan(config: RunConfig) -> ResourcePlan:
    """What the service holds when every runner is at work."""
    runners, cluster = config.serve.runners, config.cluster
    generator = engine_request(
        cluster,
        "rollout engine",
        runners * config.rollout.num_engines,
        tensor_parallel=config.rollout.tensor_parallel,
    )
    tools = engine_request(cluster, "model of attacks and judge", runners * (config.evaluation.white_boxes + _TOOLS))
    worker = ResourceRequest("training worker of the attack", runners, cluster.cpus_per_worker, cluster.gpus_per_worker)
    chat = [engine_request(cluster, "chat engine", 1)] if config.serve.chat else []
    return ResourcePlan((generator, tools, worker, *chat))


class ProcessBackend:
    """Runs each evaluation in a process of its own on the cluster of the replica that this is made in."""

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._address = ray.get_runtime_context().gcs_address

    def run(self, request: EvaluationRequest, folder: Path, on_progress: OnProgress, cancelled: Cancelled) -> None:
        """See `raycomplete.serving.backend.EvaluationBackend`."""
        config = run_config(self._config, request, folder)
        config = config.model_copy(update={"cluster": config.cluster.model_copy(update={"address": self._address})})
        folder.parent.mkdir(parents=True, exist_ok=True)
        log = folder.with_name(f"{folder.name}.log")
        with os.fdopen(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "wb") as stream:
            process = subprocess.Popen(
                [sys.executable, "-m", "raycomplete.serving.process"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stream,
                text=True,
                env=_without_token() | {"RAY_ADDRESS": self._address, "PYTHONUNBUFFERED": "1"},
            )
        try:
            _tell(process, {"config": config.model_dump(mode="json"), "roles": request.roles})
            self._follow(process, on_progress, cancelled, log)
        finally:
            process.kill()  # whatever ends this call ends the process, so that no two write into one folder
            process.wait()

    def _follow(self, process: subprocess.Popen[str], on_progress: OnProgress, cancelled: Cancelled, log: Path) -> None:
        """Passes progress on until the process says how it ended."""
        said: queue.Queue[dict[str, Any] | None] = queue.Queue()
        listener = threading.Thread(target=_listen, args=(process, said), daemon=True)
        listener.start()
        give_up_at = float("inf")
        while True:
            try:
                message = said.get(timeout=0.25)
            except queue.Empty:
                message = {} if process.poll() is None or listener.is_alive() else None
            if message is None:
                raise WorkError(f"The evaluation's process ended with code {process.wait()}.", f"See {log}.")
            if "progress" in message:
                on_progress(message["progress"])
            if "error" in message:
                kind = RefusedError if message["refused"] else WorkError
                raise kind(*message["error"])
            if "done" in message:
                return
            if cancelled() and give_up_at == float("inf"):
                give_up_at = time.monotonic() + _CANCEL_GRACE_S
                _tell(process, {"cancel": True})
            if time.monotonic() > give_up_at:
                raise WorkError("The evaluation was stopped in the middle of a batch.")


class StudentChat:
    """The student behind one engine of its own, started with the service."""

    def __init__(self, config: RunConfig) -> None:
        models = prepare_models(config, roles=("aligned", "student"))
        self._codec = models.codec
        self._config = config
        self._client = start_engine(config, models.paths["student"], models.codec)

    async def complete(self, request: CompletionRequest) -> CompletionText:
        """See `raycomplete.serving.backend.ChatBackend`."""
        return await asyncio.to_thread(self._complete, request)

    def _complete(self, request: CompletionRequest) -> CompletionText:
        sequence = self._codec.encode_prompt(request.prompt)
        longest = self._config.models.max_length
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
        return CompletionText(
            text=self._codec.decode(tokens),
            prompt_tokens=len(sequence),
            completion_tokens=len(tokens),
            finish_reason="length" if len(tokens) >= request.max_tokens else "stop",
        )


def _tell(process: subprocess.Popen[str], message: Mapping[str, Any]) -> None:
    assert process.stdin is not None
    try:
        process.stdin.write(json.dumps(message) + "\n")
        process.stdin.flush()
    except BrokenPipeError:
        return  # it has ended, and what it said last tells why


def _listen(process: subprocess.Popen[str], said: queue.Queue[dict[str, Any] | None]) -> None:
    """Queues what the process says, and None at its end whatever happens: a line may be torn where it was killed."""
    assert process.stdout is not None
    try:
        for line in process.stdout:
            try:
                message = json.loads(line)
            except ValueError:
                continue
            if isinstance(message, dict):
                said.put(message)
    finally:
        said.put(None)


def _without_token() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != TOKEN_VARIABLE}


def _resolved(spec: str) -> str:
    """A checkpoint's path as seen from any folder; names such as organism:base stay."""
    path = Path(spec).expanduser()
    return str(path.resolve()) if path.exists() else spec


def _shown(host: str) -> str:
    """An address that a browser takes."""
    if is_loopback(host):
        return "127.0.0.1"
    return f"[{host}]" if ":" in host else host
