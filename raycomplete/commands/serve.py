"""`raycomplete serve`: evaluation as a service, the Serve application with the real pipeline behind it."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import ray
from ray.serve import Application

from raycomplete.config import RunConfig, load_run_file
from raycomplete.data.remote import is_remote
from raycomplete.engines.cluster import ResourcePlan, ResourceRequest, connect, engine_request, uses_gpu
from raycomplete.engines.dtype import resolve_dtype
from raycomplete.engines.spec import EngineSpec
from raycomplete.runtime.console import Console
from raycomplete.runtime.errors import ConfigError
from raycomplete.runtime.machine import package_versions
from raycomplete.runtime.signals import stop
from raycomplete.runtime.types import MODEL_ROLES, ModelRole
from raycomplete.serving import deployment
from raycomplete.serving.answers import ModelServer
from raycomplete.serving.requests import TOKEN_VARIABLE, is_loopback, read_token_digest
from raycomplete.serving.runner import Cancelled, OnProgress, ProcessBackend

_TOOLS = 3  # engines of one evaluation beside its generators and white boxes, at most: guide, attacker, judge


def serve(config: RunConfig) -> Path:
    """Serves evaluations until it is interrupted; those at work are put back and go on at the next start."""
    config, token = admitted(config)
    os.environ.pop(TOKEN_VARIABLE, None)  # its digest is enough, and every process of the cluster inherits the rest
    settings = config.serve
    console = Console()
    with connect(config.cluster, _plan(config), console):
        with console.stage("Started Ray Serve"):
            deployment.start(build(config, token), host=settings.host, port=settings.port)
        page = f"http://{_shown(settings.host)}:{settings.port}/"
        console.panel([("page", page), ("interface", f"{page}openapi.json"), ("state", settings.state.resolve())])
        while not stop.requested:
            time.sleep(0.2)
        with console.stage("Stopped; evaluations at work are put back"):
            deployment.stop()
    return settings.state


def application(arguments: Mapping[str, str]) -> Application:
    """Builds the application from `args` of jobs/serve.yaml: `run_file`, and values of it that are replaced."""
    overrides = [f"{key}={value}" for key, value in arguments.items() if key != "run_file"]
    return build(*admitted(load_run_file(arguments["run_file"], overrides)))


def admitted(config: RunConfig) -> tuple[RunConfig, str | None]:
    """Refuses what could not work; returns the run file with absolute paths, and the digest of the token."""
    token = read_token_digest(config.serve)
    package_versions()  # which refuses a machine without vLLM
    settings = config.serve
    paths = {
        "state": settings.state.resolve(),
        "model_roots": [root.resolve() for root in settings.model_roots],
        "data_roots": [root.resolve() for root in settings.data_roots],
    }
    models = {str(role): _resolved(spec) for role in MODEL_ROLES if (spec := getattr(config.models, role)) is not None}
    trained = config.output.folder / "student"
    if (trained / "config.json").is_file():
        models["student"] = str(trained.resolve())
    changed = {"serve": settings.model_copy(update=paths), "models": config.models.model_copy(update=models)}
    config = config.model_copy(update=changed)
    for role in chat_roles(config):
        spec = getattr(config.models, role)
        if spec is None:
            words = f"serve.chat_models names the {role}, and this server has none."
            raise ConfigError(words, "Train one, or set models.student.")
        if is_remote(spec):
            words = f"serve.chat_models names the {role}, which answers at an address of its own."
            raise ConfigError(words, "Leave it out.")
    return config, token


def build(config: RunConfig, token: str | None) -> Application:
    """Builds the application of an admitted run file, on the cluster that this process is connected to."""
    chat = []
    if roles := chat_roles(config):
        use_gpu = ray.is_initialized() and uses_gpu(config.cluster)
        config = resolve_dtype(config, Console(quiet=True))
        specs = [EngineSpec.from_config(config, "single", getattr(config.models, r), use_gpu=use_gpu) for r in roles]
        chat = [deployment.ChatModel(ModelServer, r, s.resources()) for r, s in zip(roles, specs, strict=True)]
    backend = partial(ProcessBackend, evaluate=evaluate_request)
    return deployment.build_application(config, token, backend, chat)


def chat_roles(config: RunConfig) -> list[ModelRole]:
    """Lists the models that answer prompts: those that `serve.chat_models` names, else all that there are."""
    if not config.serve.chat:
        return []
    named = config.serve.chat_models
    specs = {role: getattr(config.models, role) for role in MODEL_ROLES}
    return list(dict.fromkeys(named or [role for role, spec in specs.items() if spec and not is_remote(spec)]))


def evaluate_request(config: RunConfig, roles: list[ModelRole], on_progress: OnProgress, cancelled: Cancelled) -> None:
    """Evaluates one request in the process of its own that `ProcessBackend` starts."""
    from raycomplete.commands.evaluate import evaluate  # torch, after what can be refused without it

    evaluate(config, roles=roles, on_progress=lambda progress: on_progress(progress.to_json()), cancelled=cancelled)


def _plan(config: RunConfig) -> ResourcePlan:
    """Adds up what the service holds when every runner is at work.

    GPUs are counted for what the run file evaluates: with all that a request may ask for, one GPU would never do.
    """
    from raycomplete.evaluation.attack_resources import extra_engines, training_workers

    runners, cluster, answering = config.serve.runners, config.cluster, chat_roles(config)
    count, shards = runners * config.rollout.num_engines, config.rollout.tensor_parallel
    extras, workers = extra_engines(config), training_workers(config)
    further = max(1 + _TOOLS - extras, 0)
    requests = [
        engine_request(cluster, "rollout engine", count, tensor_parallel=shards),
        engine_request(cluster, "model of attacks and judge", runners * extras),
        ResourceRequest("model that a request may add", runners * further, cluster.cpus_per_engine, 0.0),
        ResourceRequest(
            "training worker of the attack", runners, cluster.cpus_per_worker, cluster.gpus_per_worker * workers
        ),
        engine_request(cluster, "model that answers", len(answering)),
    ]
    return ResourcePlan(tuple(item for item in requests if item.replicas))


def _resolved(spec: str) -> str:
    """Makes a checkpoint's path one that holds in any folder; names such as organism:base stay."""
    path = Path(spec).expanduser()
    return str(path.resolve()) if path.exists() else spec


def _shown(host: str) -> str:
    """Returns an address that a browser takes."""
    if is_loopback(host):
        return "127.0.0.1"
    return f"[{host}]" if ":" in host else host
