"""Triton kernels compiled for A100 and H100 on a machine without either: registers, spills, shared memory, loads."""

from __future__ import annotations

import os
from functools import partial

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from raycomplete.losses import kernels
from raycomplete.losses.settings import DivergenceSettings
from tests.losses.compiled import CompiledKernel, compile_launch, launches, rows

pytestmark = pytest.mark.slow

MAX_REGISTERS = 128  # of a thread
MAX_SHARED_BYTES = 4096  # nothing but sums over lanes, once a row
MIN_WARPS = 16  # of a multiprocessor, that hide the wait for memory from each other


def faults(use: CompiledKernel) -> list[str]:
    """Says in words what is wrong with a kernel."""
    return [
        words
        for words, is_wrong in {
            f"spills {use.spill_bytes} bytes": use.spill_bytes > 0,
            f"keeps {use.stack_bytes} bytes on a stack": use.stack_bytes > 0,
            f"takes {use.registers} registers": use.registers > MAX_REGISTERS,
            f"takes {use.shared_bytes} bytes of shared memory": use.shared_bytes > MAX_SHARED_BYTES,
            f"{use.programs * use.num_warps} warps share a multiprocessor": use.programs * use.num_warps < MIN_WARPS,
            "loads products piece by piece": use.wide_loads < 2,
        }.items()
        if is_wrong
    ]


@pytest.mark.parametrize("arch", [pytest.param(80, marks=pytest.mark.exhaustive), 90])
@pytest.mark.parametrize("name", list(launches()))
def test_kernel_compiles_within_bounds(name: str, arch: int) -> None:
    use = compile_launch(launches()[name], arch)
    assert faults(use) == [], use
    if "bias" not in name:  # a bias ends with the vocabulary, and is read by that mask
        assert use.narrow_loads <= 1, f"{use}: the weight of a row is the one value that is loaded alone"


def test_a_kernel_that_spills_is_found() -> None:
    use = compile_launch(launches()["jsd, contrastive"], 90, maxnreg=24)
    assert any("spills" in words for words in faults(use)), use


def test_rows_without_padding_are_found_to_be_loaded_piece_by_piece() -> None:
    packed = rows(vocab_size=151_669, stride=151_669)
    use = compile_launch(partial(kernels.divergence, packed, DivergenceSettings()), 90)
    assert "loads products piece by piece" in faults(use), use
