"""Memory, disk, limits, devices, ports and tokens, against a run file."""

from __future__ import annotations

import resource
import shutil
import sysconfig
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from raycomplete.config import load_run_file
from raycomplete.doctor import machine
from raycomplete.doctor.findings import ChildReport, Context
from raycomplete.doctor.machine import GIB, needs_of, num_params
from raycomplete.runtime import machine as runtime_machine
from tests.conftest import ROOT

RUN_FILE = ROOT / "jobs" / "organism.yaml"


def context(*overrides: str, devices: list[dict[str, Any]] | None = None, cuda: str | None = None) -> Context:
    found = Context(RUN_FILE, load_run_file(RUN_FILE, overrides))
    found.once("imports", lambda: ChildReport([{"torch": {"devices": devices or [], "cuda_build": cuda}}]))
    return found


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAYCOMPLETE_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)


def test_the_limit_of_a_container_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    group = Path("/sys/fs/cgroup/job")
    files = {
        Path("/proc/self/cgroup"): ["0::/job"],
        group / "memory.max": [str(3 * GIB)],
        group / "memory.current": [str(2 * GIB)],
        group / "memory.stat": [f"inactive_file {GIB // 2}"],
        Path("/sys/fs/cgroup/memory.max"): ["max"],
    }
    monkeypatch.setattr(machine, "_lines", lambda file: files.get(file, []))
    free, total, limited = machine.free_memory()
    assert (total, limited) == (3 * GIB, True)
    assert free <= int(1.5 * GIB)
    finding = machine.check_memory(context())
    assert finding.status == "fail"
    assert "(the container's limit)" in finding.found
    assert finding.remedy


def test_a_small_laptop_is_warned_and_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "free_memory", lambda: (6 * GIB, 8 * GIB, False))
    for asked in (context(), Context()):
        finding = machine.check_memory(asked)
        assert (finding.status, "once its caches are full (3.0 of it)" in finding.found) == ("warn", True)
    monkeypatch.setattr(machine, "free_memory", lambda: (4 * GIB, 4 * GIB, False))
    assert machine.check_memory(Context()).status == "fail"


def test_a_disk_that_is_too_small_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage(NamedTuple):
        total: int
        used: int
        free: int

    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(100 * GIB, 99 * GIB, GIB // 2))
    finding = machine.check_disk(context())
    assert finding.status == "fail"
    assert "run folder" in finding.found
    assert "output.root" in finding.remedy
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(100 * GIB, 97 * GIB, 3 * GIB))
    assert "97% full, and Ray stops at 95 %" in machine.check_disk(context()).found
    assert machine.check_shared_memory(context()).status == "ok"
    monkeypatch.setattr(machine, "num_params", lambda _: 10**9)
    on_policy = ("rollout.on_policy=true", "models.dtype=bfloat16")
    finding = machine.check_shared_memory(context(*on_policy))
    assert (finding.status, "object store takes 7.59 GiB" in finding.found) == ("warn", True)
    assert "--shm-size=9g" in finding.remedy
    assert machine.check_shared_memory(context(*on_policy, "train.lora_rank=8")).status == "ok"


def test_few_open_files_are_noted_and_more_are_wanted_on_a_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (20000, 20000))
    assert machine.check_open_files(context()).status == "ok"
    finding = machine.check_open_files(context("cluster.address=head:6379"))
    assert finding.status == "warn"
    assert finding.remedy.startswith("ulimit -n 65536, after raising nofile (20000)")


def test_an_old_driver_and_a_missing_compiler_are_named_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(machine, "gpus", lambda: [{"name": "H100", "driver": "570.86", "total_bytes": 80 * GIB}])
    finding = machine.check_gpu(context(cuda="13.0"))
    assert finding.status == "fail"
    assert "needs driver 580 or newer" in finding.found
    monkeypatch.setattr(machine, "compiler_problem", lambda: "there is no C compiler")
    assert machine.check_compiler(context()).status == "fail"
    assert "apt install gcc" in machine.check_compiler(context()).remedy
    assert machine.check_compiler(context("cluster.use_gpu=never")).status == "ok"
    monkeypatch.setattr(machine, "gpus", list)
    assert machine.check_compiler(context()).status == "ok"
    monkeypatch.undo()
    assert runtime_machine.compiler_problem() in ("", f"the Python headers are missing ({header()})")
    monkeypatch.setenv("CC", str(tmp_path / "cc"))
    assert runtime_machine.compiler_problem() == f"there is no C compiler at CC={tmp_path / 'cc'}"


def header() -> Path:
    return Path(sysconfig.get_paths()["include"]) / "Python.h"


GPU = {"name": "H100", "capability": [9, 0], "free_bytes": 70 * GIB, "total_bytes": 80 * GIB}


@pytest.mark.parametrize(
    ("overrides", "driver", "devices", "cuda", "status", "words"),
    [
        ([], [], [], None, "ok", "None; everything runs on the processor."),
        (["cluster.use_gpu=always"], [], [], None, "fail", "cluster.use_gpu is 'always'"),
        ([], ["H100"], [], None, "warn", "this torch is a CPU build"),
        ([], ["H100"], [], "13.0", "fail", "torch for CUDA 13.0 cannot use it"),
        ([], ["H100"], [GPU], "13.0", "ok", "1 x H100, 80 GiB (70 free), driver 595.1, CUDA 13.0"),
        (["teacher.gpu_memory_utilization=0.4"], ["H100"], [GPU], "13.0", "fail", "engines reserve 105% of it"),
        ([], ["T4"], [GPU | {"capability": [7, 0]}], "13.0", "fail", "driver"),
        (["cluster.use_gpu=never"], ["H100"], [GPU], "13.0", "ok", "cluster.use_gpu is 'never'"),
    ],
)
def test_driver_torch_and_run_file_are_compared(
    overrides: list[str],
    driver: list[str],
    devices: list[dict[str, Any]],
    cuda: str | None,
    status: str,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        machine, "gpus", lambda: [{"name": name, "driver": "595.1", "total_bytes": 80 * GIB} for name in driver]
    )
    finding = machine.check_gpu(context(*overrides, devices=devices, cuda=cuda))
    assert finding.status == status
    assert words in finding.found
    assert bool(finding.remedy) is (status != "ok")


def test_needs_follow_the_model_and_the_settings() -> None:
    from safetensors import safe_open

    folder = ROOT / "raycomplete" / "data" / "organism" / "checkpoints" / "base"
    with safe_open(str(folder / "model.safetensors"), framework="np") as tensors:
        counted = sum(tensors.get_tensor(name).size for name in tensors.keys())  # noqa: SIM118
    assert num_params("organism:base") == num_params(str(folder)) == counted
    assert num_params("hub:org/name") is None
    one, two = (needs_of(context(f"train.num_workers={count}").config) for count in (1, 2))  # type: ignore[arg-type]
    assert two.host_bytes > one.host_bytes
    assert (one.cpus, two.cpus) == (2.0, 2.5)
    assert one.disk_bytes == counted * (12 * 3 + 4), "two kept, one being written, and the student"


def test_needs_count_every_replica() -> None:
    one, more = (needs_of(context(f"teacher.replicas={count}").config) for count in (1, 3))  # type: ignore[arg-type]
    assert more.cpus - one.cpus == 4 * 0.5
    assert more.host_bytes - one.host_bytes > 3.5 * GIB
    assert more.gpu_share == pytest.approx(one.gpu_share + 4 * 0.25)


def test_the_number_format_that_auto_takes_is_said_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime_machine, "_CPU_INFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(machine, "available_cpus", lambda: 2)
    monkeypatch.setattr(machine, "gpus", list)
    (tmp_path / "cpuinfo").write_text("flags : avx2 avx_ne_convert\n")
    finding = machine.check_cpu(context("models.dtype=auto"))
    assert (finding.status, finding.values["dtype"]) == ("ok", "float32")
    assert "auto takes float32 here, since the processor has no units for bfloat16." in finding.found
    finding = machine.check_cpu(context("models.dtype=bfloat16"))
    assert (finding.status, finding.values["dtype"]) == ("warn", "bfloat16")
    assert finding.remedy == "models.dtype is bfloat16, and the processor has no units for bfloat16: set it to auto."
    needs = [needs_of(load_run_file(RUN_FILE, [f"models.dtype={name}"])) for name in ("auto", "float32", "bfloat16")]
    assert needs[0] == needs[1] != needs[2]
    (tmp_path / "cpuinfo").write_text("flags : avx2 avx512_bf16\n")
    finding = machine.check_cpu(context("models.dtype=auto"))
    assert "auto takes bfloat16 here, since the processor has units for it (avx512_bf16)." in finding.found
