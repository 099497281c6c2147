"""`models.dtype: auto`: what it takes, on which processors, and that nothing is named by settings before."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from raycomplete.commands.stored import stored
from raycomplete.config import RunConfig, load_run_file
from raycomplete.engines import dtype as dtype_module
from raycomplete.engines.dtype import resolve_dtype
from raycomplete.engines.spec import EngineSpec
from raycomplete.runtime import machine
from raycomplete.runtime.console import Console
from tests.conftest import ROOT

OLD, X86, ARM = "flags\t\t: fpu avx2 fma avx_ne_convert", "flags : avx512_bf16 amx_bf16", "Features\t: asimd bf16 i8mm"


class Notes(Console):
    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)


def processor(flags: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets this machine look like one of another processor, without a GPU or a cluster of other tests."""
    monkeypatch.setattr(dtype_module.ray, "is_initialized", lambda: False)
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{flags}\n")
    monkeypatch.setattr(machine, "_CPU_INFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.mark.parametrize(
    ("flags", "dtype"), [(OLD, "float32"), (X86, "bfloat16"), (ARM, "bfloat16")], ids=["avx2", "x86", "arm"]
)
def test_the_run_file_of_smollm2_takes_what_the_processor_can(
    flags: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor(flags, tmp_path, monkeypatch)
    monkeypatch.chdir(tmp_path)
    console, seen = Notes(), []

    @stored()
    def command(config: RunConfig, *, console: Console | None = None) -> Path:
        seen.append(config)
        return Path()

    command(load_run_file(ROOT / "jobs" / "smollm2.yaml"), console=console)
    (config,) = seen
    assert config.models.dtype == dtype, "what is written to config.yaml, and compared by a resumption"
    assert EngineSpec.from_config(config, "scorer", "/model", use_gpu=False).dtype == dtype, "what names stored scores"
    assert resolve_dtype(config, console) == config
    assert console.said == [], "a refusal that follows is the only thing said"


def test_a_gpu_decides_where_the_run_may_use_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    processor(OLD, tmp_path, monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for use_gpu, dtype in (("auto", "bfloat16"), ("never", "float32")):
        config = load_run_file(ROOT / "jobs" / "smollm2.yaml", [f"cluster.use_gpu={use_gpu}"])
        assert resolve_dtype(config, Notes()).models.dtype == dtype


def test_a_slow_type_is_taken_as_asked_and_warned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    processor(OLD, tmp_path, monkeypatch)
    console = Notes()
    config = load_run_file(ROOT / "jobs" / "smollm2.yaml", ["models.dtype=bfloat16"])
    assert resolve_dtype(config, console) == config
    (sentence,) = console.said
    assert "bfloat16 and the processor has no units for bfloat16" in sentence

    processor(X86, tmp_path, monkeypatch)
    assert resolve_dtype(config, console) == config
    assert console.said == [sentence], "units are no reason for a warning"
    same = load_run_file(ROOT / "jobs" / "organism.yaml")
    assert resolve_dtype(same, console) == same
    assert same.models.dtype == "float32"
