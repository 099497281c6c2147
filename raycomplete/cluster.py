"""Connecting to Ray, and making sure that what a run asks for is there before anything starts."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import ray

from raycomplete.config import ClusterConfig
from raycomplete.engine_options import available_cpus
from raycomplete.errors import SetupError
from raycomplete.files import PRIVATE


@dataclass(frozen=True)
class Demand:
    """Logical resources that a run holds at the same time."""

    engines: int
    workers: int

    def cpus(self, config: ClusterConfig) -> float:
        """CPUs of all engines and training workers, and one for Ray Train's controller."""
        return self.engines * config.cpus_per_engine + self.workers * config.cpus_per_worker + 1

    def gpus(self, config: ClusterConfig) -> float:
        """GPUs of all engines and training workers."""
        return self.engines * config.gpus_per_engine + self.workers * config.gpus_per_worker


@dataclass(frozen=True)
class Cluster:
    """The cluster that a run is connected to."""

    use_gpu: bool


@contextmanager
def connect(config: ClusterConfig, demand: Demand) -> Iterator[Cluster]:
    """Connects to a cluster, or starts one on this machine, and leaves it as it was found.

    A local cluster counts CPUs generously: on a laptop with 2 cores several engines share them, which is slow but
    works. On a cluster that was there before, missing resources are an error.

    Raises:
        SetupError: The cluster cannot be reached, or is smaller than the run needs.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    local = config.address is None and "RAY_ADDRESS" not in os.environ
    if config.address == "local":
        local = True
    cores = max(float(available_cpus()), demand.cpus(config))
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
            ray.init(address=config.address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError, RuntimeError) as error:
        place = config.address or os.environ.get("RAY_ADDRESS", "this machine")
        raise SetupError(
            f"No Ray cluster answers at {place} ({str(error).splitlines()[0]}).",
            "Check cluster.address, or leave it out to start one on this machine.",
        ) from error
    _close_token()
    try:
        yield _check(config, demand)
    finally:
        ray.shutdown()


def _close_token() -> None:
    """Takes Ray's token from the eyes of other users: Ray writes it with the permissions of any file."""
    token = Path.home() / ".ray" / "auth_token"
    with suppress(OSError):  # there is none, or it is another user's
        if token.stat().st_mode & 0o077:
            token.chmod(PRIVATE)


def _check(config: ClusterConfig, demand: Demand) -> Cluster:
    there = ray.cluster_resources()
    num_cpus, num_gpus = there.get("CPU", 0.0), there.get("GPU", 0.0)
    if config.use_gpu == "always" and num_gpus == 0:
        raise SetupError("cluster.use_gpu is 'always' and the cluster has no GPU.", "Set it to 'auto' or 'never'.")
    use_gpu = config.use_gpu != "never" and num_gpus > 0
    if use_gpu and demand.workers > 1 and config.gpus_per_worker <= 0.5:
        raise SetupError(
            f"{demand.workers} training workers with {config.gpus_per_worker:g} GPU each could share one GPU, and NCCL "
            "refuses that.",
            "Set cluster.gpus_per_worker to 1.",
        )
    needed = {"CPU": demand.cpus(config), "GPU": demand.gpus(config) if use_gpu else 0.0}
    for name, there_is in (("CPU", num_cpus), ("GPU", num_gpus)):
        if needed[name] > there_is + 1e-6:
            raise SetupError(
                f"The run needs {needed[name]:g} {name} ({demand.engines} engines, {demand.workers} training workers) "
                f"and the cluster has {there_is:g}.",
                f"Add nodes, lower train.num_workers, or lower cluster.{name.lower()}s_per_engine and "
                f"cluster.{name.lower()}s_per_worker.",
            )
    return Cluster(use_gpu=use_gpu)
