"""The needs of a run on one machine, from its run file and the headers of its checkpoints, and this machine's GPUs."""

from __future__ import annotations

import subprocess
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raycomplete.config import RunConfig
from raycomplete.data.organisms import ORGANISMS
from raycomplete.engines.spec import OBJECT_STORE_BYTES
from raycomplete.plan.catalogue import ENGINE_GIB, GIB, WORKER_GIB
from raycomplete.plan.estimate import states_bytes
from raycomplete.runtime.errors import CheckpointError
from raycomplete.runtime.machine import bfloat16_units, choose_dtype
from raycomplete.runtime.section import Dtype
from raycomplete.training.checkpoints import checkpoint_bytes, count_parameters

_GPU_QUERY = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader,nounits"]
_SCORERS = 2
_DRIVER_GIB = 1.2  # the driver and Ray's own processes


@dataclass(frozen=True)
class Needs:
    """All that one run holds at the same time where it runs on one machine."""

    host_bytes: int  # engines, training workers, driver and object store, without a GPU
    reserved_bytes: int  # of them, what is filled only with use: caches of rollout engines and the object store
    disk_bytes: int = 0  # checkpoints that are kept, and the student
    gpu_bytes: int = 0  # of one device that trainer and engines share: weights, gradients and optimizer of the trainer
    gpu_share: float = 0.0  # of the same device: the fraction that the engines reserve
    cpus: float = 0.0  # logical ones, that a cluster must offer


_DEMO_RESERVED = GIB + OBJECT_STORE_BYTES
DEMO = Needs(int((3 * ENGINE_GIB + WORKER_GIB + _DRIVER_GIB) * GIB) + _DEMO_RESERVED, _DEMO_RESERVED)


def needs_of(config: RunConfig) -> Needs:
    """Adds up a run. Checkpoints that are not on this machine count as nothing."""
    models, train, cluster, teacher, rollout = (
        config.models,
        config.train,
        config.cluster,
        config.teacher,
        config.rollout,
    )
    dtype = weight_dtype(config)
    size = 4 if dtype == "float32" else 2
    base, aligned, student = (num_params(spec) or 0 for spec in (models.base, models.aligned, student_of(config)))
    scorers = _SCORERS * teacher.replicas
    engines = scorers + rollout.num_engines
    devices = scorers * teacher.tensor_parallel + rollout.num_engines * rollout.tensor_parallel
    weights = ((base + aligned) * teacher.replicas + base * rollout.num_engines) * size
    # Weights, gradients and optimizer of all workers; of adapters, which are small, the frozen weights alone.
    trainable = 0 if train.lora_rank else student
    states = states_bytes(student, dtype, train.zero_stage, train.num_workers, trainable)
    trained = int(sum(states.values())) * train.num_workers
    reserved = rollout.num_engines * cluster.kv_cache_gib * GIB + OBJECT_STORE_BYTES
    fixed = int((engines * ENGINE_GIB + train.num_workers * WORKER_GIB + _DRIVER_GIB) * GIB)
    return Needs(
        host_bytes=fixed + reserved + weights + trained,
        reserved_bytes=reserved,
        # One more than is kept: the oldest goes only once the newest is whole.
        disk_bytes=checkpoint_bytes(student, dtype, train) * (train.keep_checkpoints + 1) + student * size,
        gpu_bytes=trained,
        gpu_share=scorers * teacher.gpu_memory_utilization + rollout.num_engines * rollout.gpu_memory_utilization,
        cpus=devices * cluster.cpus_per_engine + train.num_workers * cluster.cpus_per_worker,
    )


def student_of(config: RunConfig) -> str:
    """Returns the checkpoint that the student starts from."""
    return config.models.student or config.models.aligned


def num_params(spec: str) -> int | None:
    """Counts the parameters of a checkpoint folder or of an organism; None where that is not possible from here."""
    folder = local_folder(spec)
    return None if folder is None else count_parameters(folder) or None


def local_folder(spec: str) -> Path | None:
    """Finds the folder of a checkpoint that needs no conversion and no download; None for any other."""
    scheme, _, rest = spec.partition(":")
    if scheme in ORGANISMS and rest:
        with suppress(CheckpointError):  # which the check of the checkpoint itself reports
            return ORGANISMS[scheme].find_checkpoint(rest)
        return None
    path = Path(spec).expanduser()
    return path if path.is_dir() else None


def weight_dtype(config: RunConfig) -> Dtype:
    return auto_dtype(config)[0] if config.models.dtype == "auto" else config.models.dtype


def auto_dtype(config: RunConfig) -> tuple[Dtype, str]:
    """Returns what `models.dtype: auto` takes on this machine, and why."""
    return choose_dtype(use_gpu=config.cluster.use_gpu != "never" and bool(gpus()), units=bfloat16_units())


def gpus() -> list[dict[str, Any]]:
    """Lists the GPUs that the NVIDIA driver reports; none where there is no driver."""
    try:
        done = subprocess.run(_GPU_QUERY, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [[part.strip() for part in line.split(",")] for line in done.stdout.splitlines()]
    return [
        # The total is "[N/A]" on devices that share memory.
        {"name": name, "driver": driver, "total_bytes": int(total) * 2**20 if total.isdigit() else 0}
        for name, driver, total in (row for row in rows if len(row) == 3)
    ]
