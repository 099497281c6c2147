"""vLLM's weight transfer: new weights go from the trainer's device to the engines', by NCCL or by CUDA IPC.

Nobody but the engines keeps such weights (`SentWeights`). Ray's object store (`raycomplete.engines.weights`) serves
runs that this cannot serve, and those whose transfer fails.
"""

from __future__ import annotations

import socket
import threading
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from functools import partial
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import ray
import torch
from torch import Tensor

from raycomplete.config import RunConfig
from raycomplete.config.engines import SYNC_TIMEOUT_S
from raycomplete.data.checkpoints import TORCH_DTYPES
from raycomplete.engines.weights import SentWeights
from raycomplete.runtime.errors import WaitTimeoutError, WorkError
from raycomplete.runtime.ray_calls import wait_for

if TYPE_CHECKING:  # which imports this module
    from raycomplete.engines.rollout_pool import RolloutPool

TransferStep = Literal["connect", "begin_update", "receive", "end_update"]

_VERSION = "0.32."  # of vLLM, whose transfer this was written for
_CHUNK_BYTES = 256 * 2**20  # staged at a time, on a device that is full but for what its users left free
_BUFFERS = 2  # chunks of NCCL on their way at a time
_PROOF_BYTES = 64
_POLL_S = 0.02


def choose_backend(config: RunConfig, *, num_gpus: float, vllm_version: str) -> tuple[str | None, str]:
    """Chooses how the engines of a run get the student's weights, before it is known where Ray places the trainer."""
    rollout, cluster = config.rollout, config.cluster
    whole = rollout.tensor_parallel > 1 or cluster.gpus_per_engine + cluster.gpus_per_worker > 1
    for applies, why in (
        (not rollout.on_policy, "the student does not roll out"),
        (num_gpus == 0, "there is no GPU"),
        (config.train.lora_rank > 0, "adapters are small, and engines merge them"),
        (not vllm_version.startswith(_VERSION), f"its transfer is known for vLLM {_VERSION}*, not {vllm_version}"),
    ):
        if applies:
            return None, why
    if num_gpus > 1 and whole and not rollout.colocated:
        return "nccl", ""
    if rollout.num_engines > 1 or rollout.tensor_parallel > 1:
        return None, "engines may share the trainer's GPU, and CUDA IPC serves one engine on one GPU"
    return "ipc", ""


class EnginePlace(NamedTuple):
    """The process of an engine and its devices, which `device_name` names."""

    incarnation: str
    devices: tuple[str, ...]


def device_name(device: torch.device) -> str:
    """Returns a GPU's UUID, which is the same in every process, or "cpu"."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else device.type


def placement_problem(backend: str, trainer: str, places: Sequence[EnginePlace]) -> str:
    """Says why a carrier cannot serve these devices, `trainer` being the sender's; empty where it can."""
    devices = [device for place in places for device in place.devices]
    if backend == "nccl" and len({trainer, *devices}) <= len(devices):
        return "NCCL joins processes on different GPUs, and two of the trainer and the engines share one"
    if backend == "ipc" and devices != [trainer]:
        return "CUDA IPC serves one engine on the GPU of the trainer's first worker, and it is on another"
    return ""


class Carrier(ABC):
    """The trainer's end of one of vLLM's ways to transfer weights; `device` names this process's present device."""

    def __init__(self) -> None:
        self._gpu = torch.cuda.current_device() if torch.cuda.is_available() else 0
        self.device = device_name(torch.device("cuda", self._gpu) if torch.cuda.is_available() else torch.device("cpu"))

    @abstractmethod
    def infos(self, places: Sequence[EnginePlace]) -> list[dict[str, Any]]:
        """Returns for each engine what its vLLM needs to join."""

    def join(self) -> None:  # noqa: B027 - nothing to do where nobody has to be met
        """Joins, while the engines do the same."""

    @abstractmethod
    def send(self, tensors: Mapping[str, Tensor], dtype: torch.dtype, update: Update) -> None:
        """Sends tensors to all engines, those of floating point as `dtype`."""

    def end(self) -> None:  # noqa: B027
        """Frees what a send has held, of which engines have let go."""

    def close(self) -> None:  # noqa: B027
        """Leaves, also in the middle of something."""


# Hands info to vLLM's `update_weights` of each engine, does the other work beside it, and returns when all are done.
Update = Callable[[dict[str, Any], Callable[[], None] | None], None]


class NcclCarrier(Carrier):
    """Broadcasts chunks of packed tensors from the present GPU, rank 0 of a group with one rank a GPU of an engine."""

    def __init__(self) -> None:
        super().__init__()
        self._group: Any = None
        self._address: dict[str, Any] = {}
        self._is_closed = False

    def infos(self, places: Sequence[EnginePlace]) -> list[dict[str, Any]]:
        import vllm  # noqa: F401 - for seconds, in which somebody else might take the port

        with socket.socket() as free:
            free.bind(("", 0))
            port = int(free.getsockname()[1])
        counts = [len(place.devices) for place in places]
        host = ray.util.get_node_ip_address()
        self._address = {"master_address": host, "master_port": port, "world_size": 1 + sum(counts)}
        chunks = {"packed": True, "packed_buffer_size_bytes": _CHUNK_BYTES, "packed_num_buffers": _BUFFERS}
        return [{**self._address, **chunks, "rank_offset": 1 + sum(counts[:engine])} for engine in range(len(counts))]

    def join(self) -> None:
        from vllm.distributed.weight_transfer.nccl_common import trainer_init

        self._group = trainer_init(self._address)
        if self._is_closed:  # while this waited for the others
            self.close()

    def send(self, tensors: Mapping[str, Tensor], dtype: torch.dtype, update: Update) -> None:
        from vllm.distributed.weight_transfer.packed_tensor import packed_nccl_broadcast_producer

        torch.cuda.synchronize(self._gpu)  # the producer's streams wait for no other
        info = metadata(tensors, dtype)
        sent = _on_device(tensors, dtype, self._gpu), self._group, 0, itemgetter(1), _CHUNK_BYTES, _BUFFERS
        update(info, partial(packed_nccl_broadcast_producer, *sent))

    def end(self) -> None:
        torch.cuda.empty_cache()  # chunks that the allocator keeps for the producer's streams

    def close(self) -> None:
        self._is_closed = True
        if self._group is not None:
            self._group.destroy()  # aborts: a broadcast that waits for a dead engine ends


class IpcCarrier(Carrier):
    """Shows one engine on the present GPU a buffer that holds chunk after chunk of packed tensors."""

    _shown: Any = None  # holds the buffer of the proof

    def infos(self, places: Sequence[EnginePlace]) -> list[dict[str, Any]]:
        from vllm.distributed.weight_transfer.packed_tensor import packed_ipc_producer

        proof = _on_device({"proof": torch.arange(_PROOF_BYTES, dtype=torch.uint8)}, torch.uint8, self._gpu)
        self._shown = packed_ipc_producer(proof, self.device, itemgetter(1), _PROOF_BYTES)
        return [{"packed": True, "proof": _chunk_info(next(self._shown))} for _ in places]

    def send(self, tensors: Mapping[str, Tensor], dtype: torch.dtype, update: Update) -> None:
        from vllm.distributed.weight_transfer.packed_tensor import packed_ipc_producer

        # vLLM's own sender gathers handles from all ranks of the trainer; here only the first one sends.
        room = max([_CHUNK_BYTES, *(_num_bytes(tensor, dtype) for tensor in tensors.values())])
        sent = _on_device(tensors, dtype, self._gpu)
        for chunk in packed_ipc_producer(sent, self.device, itemgetter(1), room):
            info = _chunk_info(chunk)
            update({**info, "ipc_handles": info.pop("ipc_handle")}, None)

    def end(self) -> None:
        torch.cuda.ipc_collect()
        torch.cuda.empty_cache()  # on a device that an engine fills when it wakes

    def close(self) -> None:
        self._shown = None
        self.end()


def _chunk_info(chunk: Any) -> dict[str, Any]:
    """Returns vLLM's description of a packed chunk by the names of the arguments of its consumer."""
    names = ("ipc_handle", "names", "shapes", "dtype_names", "tensor_sizes")
    return {name: getattr(chunk, name) for name in names}


def check_shown(proof: dict[str, Any]) -> None:
    """Reads what `IpcCarrier` shows before an engine gives up the weights that it has."""
    from vllm.distributed.weight_transfer.packed_tensor import packed_ipc_consumer

    ((_, found_N),) = packed_ipc_consumer(**proof, device_index=torch.cuda.current_device())
    if found_N.tolist() != list(range(_PROOF_BYTES)):
        raise WorkError("CUDA IPC shows this engine other bytes than the trainer has.")


CARRIERS: dict[str, Callable[[], Carrier]] = {"nccl": NcclCarrier, "ipc": IpcCarrier}


def metadata(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Any]:
    """Returns names, types and shapes of tensors as an engine's vLLM is told them; floating ones arrive as `dtype`."""
    return {
        "names": list(tensors),
        "dtype_names": [str(_dtype(tensor, dtype)).removeprefix("torch.") for tensor in tensors.values()],
        "shapes": [list(tensor.shape) for tensor in tensors.values()],
    }


def widest_first(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Orders tensors so that each number stands where its width divides: vLLM views packed bytes as numbers."""
    return dict(sorted(tensors.items(), key=lambda item: -_dtype(item[1], dtype).itemsize))


def _dtype(tensor: Tensor, dtype: torch.dtype) -> torch.dtype:
    return dtype if tensor.is_floating_point() else tensor.dtype


def _num_bytes(tensor: Tensor, dtype: torch.dtype) -> int:
    return tensor.numel() * _dtype(tensor, dtype).itemsize


def _on_device(tensors: Mapping[str, Tensor], dtype: torch.dtype, device: int) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors.items():
        yield name, tensor.detach().to(torch.device("cuda", device), _dtype(tensor, dtype))


def _in_thread(work: Callable[[], None]) -> Future[None]:
    """Does work in a daemon thread: one that waits for a dead engine may never end."""
    done: Future[None] = Future()
    gpu = torch.cuda.current_device() if torch.cuda.is_available() else -1  # each thread has one of its own

    def run() -> None:
        try:
            with torch.cuda.device(gpu):
                work()
            done.set_result(None)
        except Exception as error:
            done.set_exception(error)

    threading.Thread(target=run, name="weight-transfer", daemon=True).start()
    return done


class WeightTransfer:
    """Sends weights from this process to every engine of a pool.

    After an error it is of no use any more; engines that failed or hang start anew.
    """

    def __init__(self, pool: RolloutPool) -> None:
        self._pool, self.backend = pool, str(pool.options.spec.weight_transfer)
        self._carrier = CARRIERS[self.backend]()
        self._places: list[EnginePlace] = self._gather(pool.call("place"), "told their devices")
        if problem := placement_problem(self.backend, self._carrier.device, self._places):
            raise WorkError(f"{problem}.", "Give workers and engines whole GPUs, or all of them one GPU together.")
        infos = [(info,) for info in self._carrier.infos(self._places)]
        self._step_everywhere("connect", infos, "joined the transfer of weights", self._carrier.join)

    def send(self, state: Mapping[str, Tensor], version: int) -> SentWeights:
        """Sends weights as `pack` takes them, on any device, and returns when every engine holds them."""
        dtype, done = TORCH_DTYPES[self._pool.options.spec.dtype], f"the weights of version {version}"
        state = widest_first(state, dtype)
        num_bytes = sum(_num_bytes(tensor, dtype) for tensor in state.values())
        sent = SentWeights(version, self._pool.path, self.backend, uuid.uuid4().hex, num_bytes)
        everyone = len(self._places)

        def update(info: dict[str, Any], beside: Callable[[], None] | None) -> None:
            self._step_everywhere("receive", [(info,)] * everyone, f"received {done}", beside)

        self._step_everywhere("begin_update", [(sent, list(state))] * everyone, f"got ready for {done}")
        self._carrier.send(state, dtype, update)
        self._step_everywhere("end_update", [(sent,)] * everyone, f"put to use {done}")
        self._carrier.end()
        return sent

    def close(self) -> None:
        """Ends the trainer's part; engines stay as they are."""
        self._carrier.close()

    def _step_everywhere(
        self, step: TransferStep, given: Sequence[Any], done: str, beside: Callable[[], None] | None = None
    ) -> None:
        asked = [(place.incarnation, step, *items) for place, items in zip(self._places, given, strict=True)]
        self._gather(self._pool.call("take_step", asked), done, beside)

    def _gather(self, references: list[Any], done: str, beside: Callable[[], None] | None = None) -> list[Any]:
        """Returns the answers of all engines after work of this process beside them; the first error ends the wait."""
        timeout_s, pending = SYNC_TIMEOUT_S, list(references)
        deadline, own = time.monotonic() + timeout_s, _in_thread(beside or (lambda: None))
        try:
            while pending or not own.done():
                if time.monotonic() > deadline:
                    late = [self._pool.name(references.index(item)) for item in pending] or ["the trainer itself"]
                    raise WaitTimeoutError(
                        f"After {timeout_s:.0f} s these have not {done}: {', '.join(late)}.",
                        "They may be unable to reach each other. Training sends weights through the object store now.",
                    )
                if pending:
                    ready, pending = ray.wait(pending, timeout=_POLL_S)
                    for item in ready:
                        wait_for(item, who=self._pool.name(references.index(item)), what=done, timeout_s=60.0)
                else:
                    wait([own], _POLL_S)
                if own.done():
                    own.result()  # or its error
            own.result()
        except BaseException:
            self.close()
            self._pool.restart([references.index(item) for item in pending])  # they may wait for somebody for ever
            raise
        answers: list[Any] = ray.get(references)
        return answers
