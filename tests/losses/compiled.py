"""Triton kernels compiled for a GPU on a machine without one: `python -m tests.losses.compiled` prints the report.

A stand-in for Triton's driver names the target, and each launch of the loss on CPU tensors becomes a compilation that
is specialised as the launch would be. Registers and spills are what Triton's own ptxas says; nothing runs.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.runtime.jit import JITFunction

from raycomplete.losses import kernels
from raycomplete.losses.heads import Head
from raycomplete.losses.settings import ContrastiveSettings, DivergenceSettings
from raycomplete.losses.torch_rows import Product, RowLogits

VOCAB = 128_256
TILES = (512, 1024, 2048, 4096)


class Multiprocessor(NamedTuple):
    """The room on one multiprocessor of a GPU."""

    registers: int
    warps: int
    shared_bytes: int


MULTIPROCESSORS = {80: Multiprocessor(65536, 64, 167936), 90: Multiprocessor(65536, 64, 233472)}


@dataclass(frozen=True)
class CompiledKernel:
    """One kernel as the device would run it.

    Attributes:
        registers: Of a thread.
        spill_bytes: Stored outside of registers, and loaded again.
        stack_bytes: Of a thread's frame in memory.
        shared_bytes: Of a program.
        num_warps: Of a program.
        programs: Programs that fit on one multiprocessor at a time.
        wide_loads: Global loads of 16 bytes.
        narrow_loads: Other global loads, those of single values among them.
        instructions: Of a thread in all loops, by a token: each loop visits a token once.
    """

    registers: int
    spill_bytes: int
    stack_bytes: int
    shared_bytes: int
    num_warps: int
    programs: int
    wide_loads: int
    narrow_loads: int
    instructions: float


def rows(
    vocab_size: int = VOCAB, *, gradient: bool = True, base: bool = False, stride: int | None = None, **head: Any
) -> RowLogits:
    """Rows of bfloat16 products, padded as `chunked_pass` pads them unless told; two are enough for a launch."""
    width = stride or -(-vocab_size // 64) * 64
    own = Head(torch.zeros(vocab_size, 8, dtype=torch.bfloat16), **head)

    def product() -> Product:
        return Product(torch.zeros(2, width, dtype=torch.bfloat16)[:, :vocab_size], own)

    student = product()
    out = student.product_CV if gradient else None
    return RowLogits(student, product(), product() if base else None, torch.ones(2), out, None)


def launches() -> dict[str, Any]:
    """Launches by name: every formula, with and without gradient, teacher, bias, softcap and an odd vocabulary."""

    def divergence(name: Any, alpha: float = 0.0, **options: Any) -> Any:
        settings = DivergenceSettings(divergence=name, contrastive=ContrastiveSettings(alpha=alpha))
        return partial(kernels.divergence, rows(base=alpha > 0, **options), settings)

    capped = {"bias_V": torch.zeros(VOCAB, dtype=torch.bfloat16), "softcap": 30.0}
    return {
        "forward_kl": divergence("forward_kl"),
        "forward_kl, no gradient": divergence("forward_kl", gradient=False),
        "forward_kl, bias and softcap": divergence("forward_kl", **capped),
        "forward_kl, V = 151669": divergence("forward_kl", vocab_size=151_669),
        "reverse_kl": divergence("reverse_kl"),
        "jsd": divergence("jsd"),
        "jsd, contrastive": divergence("jsd", alpha=0.5),
    }


@contextmanager
def compile_only(arch: int, found: list[Any], **options: Any) -> Iterator[None]:
    """Makes every launch a compilation for sm_`arch`, whose result is added to `found`."""
    run = JITFunction.run

    def compile_instead(self: Any, *arguments: Any, grid: Any, warmup: bool, **named: Any) -> Any:
        kernel = run(self, *arguments, grid=grid, warmup=True, **{**named, **options})
        found.append(kernel)
        return kernel

    driver = triton.runtime.driver
    before = vars(driver).copy()
    driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: GPUTarget("cuda", arch, 32),
            get_current_device=lambda: (arch, *sorted(options.items())),  # a cache of kernels for each target
            get_current_stream=lambda _: 0,
        )
    )
    JITFunction.run = compile_instead
    try:
        yield
    finally:
        JITFunction.run = run
        vars(driver).clear()
        vars(driver).update(before)


def compile_launch(launch: Any, arch: int, **options: Any) -> CompiledKernel:
    """Compiles what a launch would run on sm_`arch`; `options` replace those of the launch."""
    found: list[Any] = []
    with compile_only(arch, found, **options):
        launch()
    (kernel,) = found
    return examine(kernel, arch)


def examine(kernel: Any, arch: int) -> CompiledKernel:
    """Asks ptxas about a compiled kernel."""
    ptx, tools = kernel.asm["ptx"], Path(get_ptxas(arch).path)
    with tempfile.TemporaryDirectory() as folder:
        source, code = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(ptx)
        # Triton's own flags, which count in registers
        flags = ["-v", "-lineinfo", "--regAllocOptLevel=2", f"--gpu-name=sm_{arch}{'a' * (arch >= 90)}"]
        command = [str(tools), *flags, str(source), "-o", str(code)]
        log = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stderr
        shown = subprocess.run(
            [str(tools.with_name("cuobjdump")), "-sass", str(code)], capture_output=True, text=True, timeout=120
        ).stdout

    def number(pattern: str) -> int:
        match = re.search(pattern, log)
        return int(match.group(1)) if match else 0

    registers, shared, warps = number(r"Used (\d+) registers"), kernel.metadata.shared, kernel.metadata.num_warps
    room = MULTIPROCESSORS[arch]
    granted = -(-registers * 32 // 256) * 256  # of a warp
    wide = len(re.findall(r"ld\.global[^;\n]*v4\.b32", ptx))
    tile = next(value for value in kernel.src.constants.values() if value in TILES)
    return CompiledKernel(
        registers=registers,
        spill_bytes=number(r"(\d+) bytes spill stores"),
        stack_bytes=number(r"(\d+) bytes stack frame"),
        shared_bytes=shared,
        num_warps=warps,
        programs=min(room.registers // granted // warps, room.warps // warps, room.shared_bytes // (shared + 1024), 32),
        wide_loads=wide,
        narrow_loads=len(re.findall(r"ld\.global", ptx)) - wide,
        instructions=_in_loops(shown) * warps * 32 / tile,
    )


def _in_loops(listing: str) -> int:
    """Counts the instructions of a listing that lie in a loop, between a backward branch and its target."""
    places = [int(found, 16) for found in re.findall(r"^\s*/\*([0-9a-f]{4,})\*/\s", listing, re.MULTILINE)]
    jumps = re.findall(r"^\s*/\*([0-9a-f]{4,})\*/[^;\n]*\bBRA\S* [^;\n]*?(0x[0-9a-f]+)", listing, re.MULTILINE)
    loops = [(int(target, 16), int(place, 16)) for place, target in jumps if int(target, 16) < int(place, 16)]
    return sum(any(first <= place <= last for first, last in loops) for place in places)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.losses.compiled", description=__doc__)
    parser.add_argument("--arch", type=int, nargs="+", choices=sorted(MULTIPROCESSORS), default=[90, 80])
    arguments = parser.parse_args()
    print(f"Triton {triton.__version__}, ptxas {get_ptxas(90).version}, V = {VOCAB}, bfloat16")
    titles = "registers spilled shared warps programs/SM wide other instructions/token"
    print(f"{'kernel':<40}{'  '.join(titles.split())}")
    for arch in arguments.arch:
        for name, launch in launches().items():
            use = compile_launch(launch, arch)
            loads = f"{use.wide_loads:>4}  {use.narrow_loads:>5}"
            print(
                f"sm_{arch} {name:<34}{use.registers:>9}  {use.spill_bytes:>7}  {use.shared_bytes:>6}  "
                f"{use.num_warps:>5}  {use.programs:>11}  {loads}  {use.instructions:>18.0f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
