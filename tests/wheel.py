"""Builds the wheel, installs it with its extras in an empty environment and runs the demo there: `make wheel-test`.

Nothing of the checkout is in reach of the demo: environment, working folder and Python path lie in a temporary folder.
What the wheel asks for is resolved from its own metadata, under the versions of the lock. Standard library only, and
the exit codes of `.setup/install.py`, whose steps these are.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / ".setup"))
import install

EXTRAS = "cpu,demo,encoder"
DEMO_S = 1800  # longest demo; two cores take a few minutes


def main() -> None:
    parser = argparse.ArgumentParser(description="Installs the wheel in an empty environment and runs the demo there.")
    parser.add_argument("--against", type=Path, help="summary.json of a demo of the checkout, to compare with")
    parser.add_argument("--keep", action="store_true", help="leave the folder behind")
    arguments = parser.parse_args()
    if arguments.against and not arguments.against.is_file():
        install.stop(f"there is no {arguments.against}; run make demo first, or leave --against out", code=2)
    folder = Path(tempfile.mkdtemp(prefix="raycomplete-wheel-"))
    install.say(f"Testing the wheel in {folder}")
    try:
        install.VENV, install.LOG = folder / ".venv", folder / "setup.log"
        install.PYTHON = str(install.VENV / "bin" / "python")
        install.check_machine(install.FREE_GB["cpu"])
        install.prepare_venv()
        install_wheel(build_wheel(folder), folder)
        summary = run_demo(folder)
        show(summary, arguments.against)
    finally:
        if not arguments.keep:
            shutil.rmtree(folder, ignore_errors=True)


def build_wheel(folder: Path) -> Path:
    """Builds from a copy: a folder `build` of earlier builds would put files into the wheel that are gone."""
    source = folder / "source"
    shutil.copytree(install.ROOT / "raycomplete", source / "raycomplete", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(install.ROOT / name, source)
    pip = "-m pip wheel --no-input --no-deps --progress-bar off".split()
    install.step("wheel", [install.PYTHON, *pip, "--wheel-dir", str(folder / "dist"), str(source)])
    (wheel,) = (folder / "dist").glob("raycomplete-*.whl")
    shutil.rmtree(source)
    return wheel


def install_wheel(wheel: Path, folder: Path) -> None:
    """Installs the wheel with its extras, resolved from its own metadata."""
    pins, overrides = folder / "pins.txt", folder / "overrides.txt"
    pins.write_text("\n".join(install.lock_lines()))
    # vLLM for CPU names torch's CPU build, which not every registry holds.
    torch = [line for line in install.lock_lines() if line.startswith("torch==")]
    overrides.write_text(install.NEVER + "\n".join(torch))
    index = ["--index", install.PYTORCH_CPU_INDEX] if install.pytorch_index_answers() else []
    files = ["--constraint", str(pins), "--override", str(overrides)]
    install.uv(f"{wheel.name}[{EXTRAS}]", "install", *index, *files, f"raycomplete[{EXTRAS}] @ {wheel.as_uri()}")


def run_demo(folder: Path) -> Path:
    """Runs `raycomplete demo` outside the checkout and returns its summary.json."""
    work = folder / "work"
    work.mkdir()
    environment = install.clean() | {"PATH": f"{install.VENV}/bin:{os.environ['PATH']}", "PYTHONSAFEPATH": "1"}
    where = [install.PYTHON, "-c", "import raycomplete; print(raycomplete.__file__)"]
    found = Path(subprocess.check_output(where, text=True, env=environment, cwd=work).strip())
    if not found.is_relative_to(install.VENV):
        install.stop(f"the demo would run {found}, which is not the installed wheel")
    command = [str(install.VENV / "bin" / "raycomplete"), "demo"]
    try:
        done = subprocess.run(command, env=environment, cwd=work, timeout=DEMO_S, check=False)
    except subprocess.TimeoutExpired:
        install.stop(f"raycomplete demo did not end within {DEMO_S} s; its output is above")
    summary = work / "runs" / "demo" / "summary.json"
    if done.returncode or not summary.is_file():
        install.stop(f"raycomplete demo ended with exit code {done.returncode}; its output is above")
    return summary


def rates(node: Any, name: str = "") -> dict[str, Any]:
    """Every rate of a summary by its path."""
    if not isinstance(node, dict):
        return {}
    if "rate" in node:
        return {name: node}
    return {path: rate for key, part in node.items() for path, rate in rates(part, f"{name}/{key}").items()}


def show(summary: Path, other: Path | None) -> None:
    """Prints the rates of the wheel's demo, beside those of another one; fails where two intervals do not meet."""
    ours, theirs = (rates(json.loads(path.read_text())) if path else {} for path in (summary, other))
    apart = [] if other is None or ours.keys() == theirs.keys() else ["other rates are measured"]
    for name, rate in ours.items():
        found = [item for item in (rate, theirs.get(name)) if item]
        install.say(f"  {name:<60}" + "   ".join("{rate:.3f} [{low:.3f}, {high:.3f}]".format(**item) for item in found))
        if max(item["low"] for item in found) > min(item["high"] for item in found):
            apart.append(name)
    if apart:
        install.stop(f"the wheel's demo differs from {other}: {', '.join(apart)}")
    install.say(f"The wheel runs the demo{f', with the rates of {other} (wheel left)' if other else ''}.")


if __name__ == "__main__":
    main()
