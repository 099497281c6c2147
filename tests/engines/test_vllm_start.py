"""The start of an engine: arguments that vLLM dropped, and engines that would measure each other's memory."""

from __future__ import annotations

import dataclasses
import fcntl
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from threading import Barrier, BrokenBarrierError
from typing import Any

import pytest

from raycomplete.data.organism import checkpoint_path
from raycomplete.engines.rollout_worker import RolloutEngine
from raycomplete.engines.scoring_engine import PoolingEngine, cache_bytes
from raycomplete.engines.spec import EngineSpec
from raycomplete.engines.vllm_start import alone_on_devices, check_arguments, start_llm
from raycomplete.runtime.errors import SetupError, WaitTimeoutError

SPEC = EngineSpec("/nowhere", "bfloat16", 64, use_gpu=True, cuda_graphs=True, sleeps=True, tensor_parallel=2)


@pytest.fixture
def lock_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the locks lie; no real engine of this machine takes turns with the tests."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def meet(*engines: Sequence[str], take_turns: bool = True, patience_s: float = 20.0) -> bool:
    """Starts engines side by side, each on these GPUs; True where two of them were at it at the same time."""
    together, two = Barrier(len(engines)), Barrier(2)

    def start(devices: Sequence[str]) -> bool:
        together.wait(60)
        with alone_on_devices(devices) if take_turns else nullcontext():
            try:
                two.wait(patience_s)
            except BrokenBarrierError:
                return False
            return True

    with ThreadPoolExecutor(len(engines)) as pool:
        return any(list(pool.map(start, engines)))


def test_engines_of_one_gpu_start_one_after_another_and_of_two_side_by_side(lock_folder: Path) -> None:
    assert meet("0", "0", take_turns=False), "they would measure each other's memory"
    assert not meet("0", "0", "0", patience_s=1.0)
    assert meet("0", "1"), "another GPU has nothing to wait for"
    assert not meet("01", "10", "1", patience_s=1.0), "a sharded engine holds all of its GPUs, and no circle waits"
    assert {path.name.rpartition("-")[2] for path in lock_folder.iterdir()} == {"0.lock", "1.lock"}


class Sleeper:
    """Stands in for `vllm.LLM`, and notes the GPUs that are held when it starts, falls asleep and wakes."""

    folder: Path
    held: list[tuple[str, set[str]]]

    def __init__(self, **_: Any) -> None:
        self.note("start")

    def note(self, what: str) -> None:
        names = {path.name.rpartition("-")[2] for path in self.folder.iterdir() if not is_free(path)}
        self.held.append((what, names))

    def sleep(self, level: int) -> None:
        self.note(f"sleep {level}")

    def wake_up(self) -> None:
        self.note("wake")


@pytest.fixture
def sleeper(lock_folder: Path, monkeypatch: pytest.MonkeyPatch) -> type[Sleeper]:
    """vLLM's engine, replaced; three GPUs are visible."""
    import vllm

    monkeypatch.setattr(Sleeper, "folder", lock_folder, raising=False)
    monkeypatch.setattr(Sleeper, "held", [], raising=False)
    monkeypatch.setattr(vllm, "LLM", Sleeper)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7,6")
    return Sleeper


def test_an_engine_takes_its_turn_on_the_gpus_that_ray_gave_it(sleeper: type[Sleeper]) -> None:
    start_llm(replace(SPEC, sleeps=False), {"model": "/nowhere"})
    start_llm(replace(SPEC, sleeps=False, use_gpu=False), {"model": "/nowhere"})
    assert sleeper.held == [("start", {"4.lock", "7.lock"}), ("start", set())]
    assert all(map(is_free, sleeper.folder.iterdir()))


def test_an_engine_frees_memory_only_while_no_other_one_measures(sleeper: type[Sleeper]) -> None:
    engine, turn = RolloutEngine.__new__(RolloutEngine), {"4.lock", "7.lock"}
    engine._spec, engine._llm = SPEC, start_llm(SPEC, {"model": "/nowhere"})
    with engine.awake():
        sleeper.note(engine._llm, "work")
    expected = [("start", turn), ("sleep 1", turn), ("wake", turn), ("work", set()), ("sleep 1", turn)]
    assert sleeper.held == expected


def is_free(path: Path) -> bool:
    with path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


@pytest.mark.usefixtures("lock_folder")
def test_a_start_that_never_ends_is_named() -> None:
    words = rf"GPU 3 was busy .*process {os.getpid()}\) for 0 s"
    with alone_on_devices(["3"]), pytest.raises(WaitTimeoutError, match=words):
        alone_on_devices(["3"], timeout_s=0.3).__enter__()
    with alone_on_devices(["3"], timeout_s=0.3):
        pass  # free again


def test_vllm_still_takes_every_argument() -> None:
    from vllm.config import KernelConfig
    from vllm.engine.arg_utils import EngineArgs

    known = {item.name for item in dataclasses.fields(EngineArgs)}
    for arguments in (RolloutEngine.arguments(SPEC), PoolingEngine.arguments(SPEC)):
        check_arguments(arguments, known)
        assert KernelConfig(**arguments["kernel_config"]).enable_flashinfer_autotune is False
        with pytest.raises(SetupError, match="no argument enforce_eager"):
            check_arguments(arguments, known - {"enforce_eager"})
    scorer = EngineSpec(str(checkpoint_path("base")), "float32", 256)
    arguments = PoolingEngine.arguments(scorer)
    check_arguments(arguments, known)
    assert arguments["kv_cache_memory_bytes"] == cache_bytes(scorer) < 2**30


class Answers:
    """Stands in for vLLM's engine: log-probabilities of decoding, then of reading."""

    def __init__(self, decoding: float, reading: float) -> None:
        self.values = [decoding, reading]

    def __call__(self, sequences: Any, parameters: Any) -> list[Any]:
        def entry(token: int, value: float) -> dict[int, Any]:
            return {token: _Record(logprob=value)}

        value, found = self.values.pop(0), []
        for tokens in sequences:
            new = [7] * 8
            one = _Record(token_ids=new, logprobs=[entry(7, value)] * 8)
            found.append(_Record(outputs=[one], prompt_logprobs=[entry(token, value) for token in tokens]))
        return found


class _Record:
    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)


def test_decoding_with_other_weights_than_reading_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = RolloutEngine.__new__(RolloutEngine)
    engine._spec = SPEC
    monkeypatch.setattr(engine, "_run", Answers(-1.0, -1.05), raising=False)
    assert engine.check_decoding() == pytest.approx(0.05, abs=1e-6)
    for stale in (-2.5, float("nan")):
        monkeypatch.setattr(engine, "_run", Answers(stale, -1.0), raising=False)
        with pytest.raises(Exception, match="its CUDA graphs use others"):
            engine.check_decoding()
