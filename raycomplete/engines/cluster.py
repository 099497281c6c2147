"""Connects to Ray, and checks that the resources of a run are there before anything starts."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import ray
from ray.autoscaler.sdk import request_resources
from ray.exceptions import AuthenticationError

from raycomplete.config import ClusterConfig
from raycomplete.engines.placement import ResourcePlan, nodes_of
from raycomplete.runtime.console import Console
from raycomplete.runtime.errors import SetupError
from raycomplete.runtime.files import PRIVATE
from raycomplete.runtime.logs import run_environment
from raycomplete.runtime.machine import available_cpus

_POLL_S = 1.0


@dataclass(frozen=True)
class Cluster:
    """The cluster that a run is connected to, and the resources that the run asked for."""

    use_gpu: bool
    plan: ResourcePlan = field(default_factory=ResourcePlan)

    def table(self) -> str:
        """Returns needed against what is there now, for messages."""
        return self.plan.text(nodes_of(ray.nodes()), use_gpu=self.use_gpu)


@contextmanager
def connect(config: ClusterConfig, plan: ResourcePlan, console: Console | None = None) -> Iterator[Cluster]:
    """Connects to a cluster, or starts one on this machine, and leaves it as it was found.

    A local cluster counts CPUs generously: on a laptop with 2 cores several engines share them, which is slow but
    works. On a cluster that was there before, missing resources are an error, once `wait_for_nodes_s` is over.

    Raises:
        SetupError: The cluster cannot be reached, or is smaller than the run needs.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    local = config.address is None and "RAY_ADDRESS" not in os.environ
    if config.address == "local":
        local = True
    cores = max(float(available_cpus()), plan.cpus)
    try:
        if local:
            ray.init(
                address="local",  # a cluster of our own, whatever else runs on this machine
                num_cpus=int(-(-cores // 1)),
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                object_store_memory=2 * 2**30,
            )
        else:
            named = {"env_vars": run_environment()}  # a local cluster inherits it anyway
            ray.init(address=config.address, runtime_env=named, log_to_driver=False, logging_level=logging.ERROR)
    except (AuthenticationError, ConnectionError, ValueError, RuntimeError) as error:
        raise _refusal(error, config.address or os.environ.get("RAY_ADDRESS", "this machine")) from error
    _close_token()
    try:
        yield _check(config, plan, console or Console(quiet=True), wait_s=0.0 if local else config.wait_for_nodes_s)
    finally:
        ray.shutdown()


def uses_gpu(config: ClusterConfig) -> bool:
    """Tells whether actors on the cluster that this process is connected to may use GPUs."""
    return config.use_gpu != "never" and ray.cluster_resources().get("GPU", 0) > 0


def _refusal(error: Exception, place: str) -> SetupError:
    """Says why there is no connection, and what to do."""
    if isinstance(error, AuthenticationError):
        return SetupError(
            f"The Ray cluster at {place} asks for a token, and this process has none that fits.",
            "Put the cluster's token into RAY_AUTH_TOKEN, into a file that RAY_AUTH_TOKEN_PATH names, or into "
            "~/.ray/auth_token; on the head, `ray get-auth-token` prints it.",
        )
    first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return SetupError(
        f"No Ray cluster answers at {place} ({first}).",
        "Check cluster.address, or leave it out to start one on this machine.",
    )


def _close_token() -> None:
    """Hides Ray's token from other users: Ray writes it with the permissions of any file."""
    token = Path.home() / ".ray" / "auth_token"
    with suppress(OSError):  # there is none, or it is another user's
        if token.stat().st_mode & 0o077:
            token.chmod(PRIVATE)


def _check(config: ClusterConfig, plan: ResourcePlan, console: Console, *, wait_s: float) -> Cluster:
    use_gpu, problem = _wait_for_nodes(config, plan, wait_s)
    nodes = nodes_of(ray.nodes())
    if problem:
        raise SetupError(
            f"{problem}\n{plan.text(nodes, use_gpu=use_gpu)}\n",
            "Add nodes, lower train.num_workers or the numbers of engines, or lower cluster.cpus_per_engine, "
            "cpus_per_worker, gpus_per_engine and gpus_per_worker. Where nodes start on demand, raise "
            "cluster.wait_for_nodes_s.",
        )
    sharded = next((item for item in plan.requests if item.devices > 1), None)
    if sharded is not None and not use_gpu:
        raise SetupError(
            f"Tensor parallelism cuts the {sharded.role} over {sharded.devices} GPUs, and this run uses none.",
            "Set teacher.tensor_parallel and rollout.tensor_parallel to 1.",
        )
    workers = sum(item.replicas for item in plan.requests if item.role == "training worker")
    if use_gpu and workers > 1 and config.gpus_per_worker <= 0.5:
        raise SetupError(
            f"{workers} training workers with {config.gpus_per_worker:g} GPU each could share one GPU, and NCCL "
            "refuses that.",
            "Set cluster.gpus_per_worker to 1.",
        )
    console.table("Needed and available", plan.table(nodes, use_gpu=use_gpu))
    return Cluster(use_gpu=use_gpu, plan=plan)


def _wait_for_nodes(config: ClusterConfig, plan: ResourcePlan, wait_s: float) -> tuple[bool, str]:
    """Waits for the nodes of a plan and tells an autoscaler what is needed.

    Returns:
        True if the run uses GPUs, and what is missing when the wait is over.
    """
    deadline = time.monotonic() + wait_s
    asked: list[dict[str, float]] = []
    try:
        while True:
            nodes = nodes_of(ray.nodes())
            has_gpu = any(node.gpus > 0 for node in nodes)
            use_gpu = config.use_gpu == "always" or (config.use_gpu == "auto" and has_gpu)
            problem = plan.problem(nodes, use_gpu=use_gpu)
            if use_gpu and not has_gpu:
                problem = "cluster.use_gpu is 'always' and the cluster has no GPU."
            if not problem or time.monotonic() >= deadline:
                return use_gpu, problem
            bundles = [item.bundle(use_gpu=use_gpu) for item in plan.requests for _ in range(item.replicas)]
            if bundles != asked:  # the first node with a GPU makes it a run that needs more of them
                _ask_autoscaler(bundles)
                asked = bundles
            time.sleep(min(_POLL_S, wait_s))
    finally:
        if asked:  # Ray keeps such a request after its job: from here on actors and groups say what is needed
            _ask_autoscaler([])


def _ask_autoscaler(bundles: list[dict[str, float]]) -> None:
    """Asks the autoscaler, where there is one, for room for these bundles."""
    with suppress(Exception):  # there may be no autoscaler
        request_resources(bundles=[bundle for bundle in bundles if any(bundle.values())])
