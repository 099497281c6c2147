"""A carrier of weights for engines on a CPU: vLLM's own protocol, and files in the place of NCCL or CUDA IPC."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from raycomplete.engines import rollout_pool
from raycomplete.engines.rollout_pool import RolloutPool
from raycomplete.engines.rollout_worker import RolloutEngine, RolloutOptions, RolloutWorker
from raycomplete.engines.weight_transfer import CARRIERS, Carrier, EnginePlace, Update, metadata

WAIT_S = 60.0


def register_engine() -> None:
    """Tells vLLM of the engine's end; in here, since vLLM takes seconds to import."""
    from dataclasses import dataclass

    from vllm.distributed.weight_transfer import WeightTransferEngineFactory
    from vllm.distributed.weight_transfer.base import (
        WeightTransferEngine,
        WeightTransferInitInfo,
        WeightTransferUpdateInfo,
    )
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    @dataclass
    class Init(WeightTransferInitInfo):
        folder: str

    @dataclass
    class Info(WeightTransferUpdateInfo):
        names: list[str]
        dtype_names: list[str]
        shapes: list[list[int]]
        file: str

    class FileTransferEngine(WeightTransferEngine[Init, Info]):
        init_info_cls, update_info_cls = Init, Info
        folder: Path | None = None

        def init_transfer_engine(self, init_info: Init) -> None:
            self.folder = Path(init_info.folder)

        def start_weight_update(self) -> None:
            initialize_layerwise_reload(self.model)

        def finish_weight_update(self) -> None:
            finalize_layerwise_reload(self.model, self.model_config)

        def update_weights(self, update_info: dict[str, Any]) -> None:
            self.receive_weights(self.parse_update_info(update_info))  # and no accelerator is waited for

        def receive_weights(self, update_info: Info) -> None:
            assert self.folder is not None, "it has not joined"
            path, deadline = self.folder / update_info.file, time.monotonic() + WAIT_S
            while not path.exists() and time.monotonic() < deadline:
                time.sleep(0.01)
            tensors = load_file(path)
            assert list(update_info.names) == list(tensors)
            for (name, tensor), dtype, shape in zip(
                tensors.items(), update_info.dtype_names, update_info.shapes, strict=True
            ):
                assert (str(tensor.dtype), list(tensor.shape)) == (f"torch.{dtype}", shape), name
            self.model.load_weights(tensors.items())

        def shutdown(self) -> None:
            self.folder = None

    if "file" not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine("file", FileTransferEngine)


class FileWorker(RolloutWorker):
    """A worker whose vLLM knows the carrier."""

    def _ready_engine(self) -> RolloutEngine:
        register_engine()
        return super()._ready_engine()


class FileCarrier(Carrier):
    """Writes two files for each send; the engine waits for the first one, as for a broadcast."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder, self.sends = folder, 0
        self.is_closed = False

    def infos(self, places: Sequence[EnginePlace]) -> list[dict[str, Any]]:
        return [{"folder": str(self.folder)} for _ in places]

    def send(self, tensors: Mapping[str, Tensor], dtype: torch.dtype, update: Update) -> None:
        self.sends += 1
        names = sorted(tensors)  # load_file reads them in this order
        for part, chosen in enumerate((names[: len(names) // 2], names[len(names) // 2 :])):
            state = {name: tensors[name].detach().to(dtype).contiguous() for name in chosen}
            path = self.folder / f"{id(self)}-{self.sends}-{part}.safetensors"
            info = {**metadata(state, dtype), "file": path.name}
            write = partial(_write, state, path)
            if part:
                write()
            update(info, None if part else write)

    def close(self) -> None:
        self.is_closed = True


def _write(state: dict[str, Tensor], path: Path) -> None:
    save_file(state, path.with_suffix(".part"))
    path.with_suffix(".part").rename(path)  # whole, or not there


def register_carrier(folder: str | Path) -> None:
    """Tells this process of the trainer's end."""
    CARRIERS["file"] = partial(FileCarrier, Path(folder))


@contextmanager
def file_pool(options: RolloutOptions) -> Iterator[RolloutPool]:
    """Starts engines that know the carrier, and stops them."""
    with patch.object(rollout_pool, "RolloutWorker", FileWorker):
        pool = RolloutPool.start(options)
    try:
        pool.wait_until_ready(timeout_s=300)
        yield pool
    finally:
        pool.stop()
