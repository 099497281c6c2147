"""The start of one vLLM engine in this process: its arguments are looked over, and engines of one GPU take turns.

At its start vLLM takes its own memory to be the device's free memory before less that after a trial pass. What another
engine on the device fills meanwhile counts as its own, and two that start side by side end without room for a cache.
"""

from __future__ import annotations

import dataclasses
import fcntl
import gc
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any, TextIO

from raycomplete.engines.spec import EngineSpec
from raycomplete.runtime.errors import SetupError, WaitTimeoutError

WAIT = "RAYCOMPLETE_WAIT_S"  # longest wait for a turn, or for a child of the doctor, which sets it for what it starts
_TURN_S = 1800.0  # some starts of large models, one after another
_POLL_S = 0.2


def start_llm(spec: EngineSpec, arguments: Mapping[str, Any]) -> Any:
    """Starts an engine in this process, alone on its GPUs; one that sleeps between its calls falls asleep there."""
    if not spec.use_gpu:
        os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # inherited from a shell, it would replace the spec's cache
    with without_collection():
        from vllm import LLM  # seconds
        from vllm.engine.arg_utils import EngineArgs

        check_arguments(arguments, {item.name for item in dataclasses.fields(EngineArgs)})
        with turn_of(spec):
            llm = LLM(**arguments)
            if spec.sleeps:
                llm.sleep(level=1)
            return llm


def turn_of(spec: EngineSpec) -> AbstractContextManager[None]:
    """Holds the GPUs of an engine of this process (`alone_on_devices`); one on a CPU has none.

    An engine falls asleep and wakes in its turn too: memory that it frees while another one measures ends that one.
    """
    return alone_on_devices(visible_devices()[: spec.tensor_parallel] if spec.use_gpu else ())


@contextmanager
def without_collection() -> Iterator[None]:
    """Disables garbage collection while importing, then freezes the imported objects.

    Collecting them again and again takes a fifth of a small engine's start.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        if was_on:
            gc.enable()


def check_arguments(arguments: Mapping[str, Any], known: set[str]) -> None:
    if dropped := sorted(arguments.keys() - known):
        raise SetupError(
            f"The installed vLLM takes no argument {', '.join(dropped)}.",
            "Install a version that raycomplete is made for: make setup, or make setup EXTRA=gpu.",
        )


def pack_experts_anew(model: Any) -> None:
    """Makes the next reload pack the weights of experts for the CPU's kernels.

    vLLM (seen in 0.32) packs them after the first load only. After a reload its kernels would read the new weights in
    an order that they do not have.
    """
    for module in model.modules():
        weight = getattr(module, "w13_weight", None)
        if weight is not None and weight.device.type == "cpu":
            module.quant_method.moe_kernel = None


def visible_devices() -> list[str]:
    """Returns the names of this process's GPUs, as Ray sets them for its actors; without Ray, the first one's."""
    return [name.strip() for name in (os.environ.get("CUDA_VISIBLE_DEVICES") or "0").split(",")]


@contextmanager
def alone_on_devices(names: Sequence[str], timeout_s: float | None = None) -> Iterator[None]:
    """Holds GPUs against other starts of this user on this machine.

    The system releases a GPU that was held by a process that died.
    """
    timeout_s = float(os.environ.get(WAIT, _TURN_S)) if timeout_s is None else timeout_s
    deadline = time.monotonic() + timeout_s
    with ExitStack() as held:
        for name in sorted(names):  # in one order everywhere: nobody waits in a circle
            path = Path(tempfile.gettempdir()) / f"raycomplete-{os.getuid()}-gpu-{name}.lock"
            file = held.enter_context(path.open("a+"))
            _lock(file, name, deadline, timeout_s)
            held.callback(fcntl.flock, file, fcntl.LOCK_UN)  # children that vLLM forked hold the file open
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
        yield


def _lock(file: TextIO, name: str, deadline: float, timeout_s: float) -> None:
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                file.seek(0)
                raise WaitTimeoutError(
                    f"GPU {name} was busy with the start of another engine (process {file.read()}) for "
                    f"{timeout_s:.0f} s, and engines of one GPU start one after another.",
                    "End that process, or look at its log.",
                ) from None
            time.sleep(_POLL_S)
