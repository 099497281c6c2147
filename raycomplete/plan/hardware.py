"""What a device can do: published peaks, or an entry that `raycomplete plan --measure` wrote."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from raycomplete.config import Dtype
from raycomplete.runtime.errors import ConfigError
from raycomplete.runtime.files import read_json

GIB = 2**30
DEFAULT_MEASURED = Path("runs") / "hardware.json"


@dataclass(frozen=True)
class Hardware:
    """One device and its node.

    Attributes:
        name: As it is chosen.
        label: In words.
        is_gpu: A CPU has no launches to hide and no host to copy to.
        memory_bytes: Of one device.
        bfloat16_flops: Dense matrix products, peak of one device.
        float32_flops: The same without TF32.
        memory_bandwidth: Of one device.
        link_bandwidth: Between two devices of a node, one direction.
        fabric_bandwidth: Of collectives between nodes, for each device.
        copy_bandwidth: Between a device and its host.
        call_s: Launch of one kernel, or one call of a small operation on a CPU.
        softmax_per_s: Elements a second that a softmax and its gradient pass through; 0: from bandwidth.
        product_share: Share of the peak that products of a model reach.
        example_price: Of one device and hour, an example.
        source: Where the numbers come from.
    """

    name: str
    label: str
    is_gpu: bool
    memory_bytes: float
    bfloat16_flops: float
    float32_flops: float
    memory_bandwidth: float
    link_bandwidth: float
    fabric_bandwidth: float
    copy_bandwidth: float
    call_s: float
    softmax_per_s: float
    product_share: float
    example_price: float
    source: str

    def flops(self, dtype: Dtype) -> float:
        """Peak of dense matrix products."""
        return self.bfloat16_flops if dtype == "bfloat16" else self.float32_flops

    @property
    def elements_per_s(self) -> float:
        """Of a softmax and its gradient; on a GPU three passes over two bytes."""
        return self.softmax_per_s or self.memory_bandwidth / 6


# From H100, 8B shape, 64 x 1024 tokens, prefill alone: 42.9 k tokens/s; see tests/benchmarks/plan.
_GPU_PRODUCT_SHARE = 0.695


# Name, label, GiB, dense TFLOP/s in bfloat16 and float32, then GB/s of memory, of a link between devices, of the fabric
# between nodes and of the copy to the host, and an example price of an hour.
_GPU_TABLE = (
    ("h100", "NVIDIA H100 SXM 80 GB", 79, 989, 67, 3350, 450, 50, 25, 2.5),
    ("h200", "NVIDIA H200 SXM 141 GB", 139, 989, 67, 4800, 450, 50, 25, 3.5),
    ("b200", "NVIDIA B200 180 GB", 178, 2250, 75, 7700, 900, 50, 25, 5.0),
    ("a100", "NVIDIA A100 SXM 80 GB", 79, 312, 19.5, 2039, 300, 25, 12, 1.5),
    ("a100-40gb", "NVIDIA A100 SXM 40 GB", 39, 312, 19.5, 1555, 300, 25, 12, 1.2),
    ("l40s", "NVIDIA L40S 48 GB", 44, 362, 91.6, 864, 25, 12.5, 12, 1.0),
    ("l4", "NVIDIA L4 24 GB", 22, 121, 30.3, 300, 12, 3, 12, 0.6),
)


def _gpu(name: str, label: str, *numbers: float) -> Hardware:
    memory_gib, tflops, tflops_float32, memory, link, fabric, copy, price = numbers
    return Hardware(
        name=name,
        label=label,
        is_gpu=True,
        memory_bytes=memory_gib * GIB,
        bfloat16_flops=tflops * 1e12,
        float32_flops=tflops_float32 * 1e12,
        memory_bandwidth=memory * 1e9,
        link_bandwidth=link * 1e9,
        fabric_bandwidth=fabric * 1e9,
        copy_bandwidth=copy * 1e9,
        call_s=5e-6,
        softmax_per_s=0.0,
        product_share=_GPU_PRODUCT_SHARE,
        example_price=price,
        source="the maker's data sheet (dense peaks, one direction of a link)",
    )


_CPU = Hardware(
    name="cpu",
    label="two cores of a server CPU with AVX-512",
    is_gpu=False,
    memory_bytes=24 * GIB,
    bfloat16_flops=3.0e11,
    float32_flops=1.5e11,
    memory_bandwidth=1.5e10,
    link_bandwidth=5e9,
    fabric_bandwidth=1.25e9,
    copy_bandwidth=1.5e10,
    call_s=5e-6,
    softmax_per_s=1.5e8,
    product_share=1.0,
    example_price=0.1,
    source="an example; `raycomplete plan --measure` writes this machine's own numbers",
)
_CATALOGUE = {item.name: item for item in (*(_gpu(*row) for row in _GPU_TABLE), _CPU)}


def find_hardware(name: str, measured: Path = DEFAULT_MEASURED) -> Hardware:
    """Hardware by name, or the measured entry of a JSON file. "cpu" prefers this machine's own, where it was measured.

    Raises:
        ConfigError: Unknown, with the nearest known name; or a file that is no hardware entry.
    """
    if name.endswith(".json"):
        return read_hardware(Path(name))
    key = name.lower()
    if key == "cpu" and measured.is_file():
        return read_hardware(measured)
    if key in _CATALOGUE:
        return _CATALOGUE[key]
    nearest = difflib.get_close_matches(key, _CATALOGUE, n=1, cutoff=0.0)
    raise ConfigError(
        f"There is no hardware {name!r}.",
        f"Did you mean {nearest[0]!r}? Known: {', '.join(_CATALOGUE)}, or a file that --measure wrote.",
    )


def read_hardware(path: Path) -> Hardware:
    """An entry that `plan --measure` wrote."""
    content: dict[str, Any] | None = read_json(path)
    names = {field.name for field in fields(Hardware)}
    if content is None or set(content) != names:
        raise ConfigError(f"{path} holds no hardware entry.", "Write one with `raycomplete plan --measure`.")
    return Hardware(**content)
