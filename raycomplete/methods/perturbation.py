"""Outputs of modules of the student that an adversary moves at some positions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from raycomplete.runtime.errors import SetupError

if TYPE_CHECKING:
    from torch import Tensor, nn


@contextmanager
def perturbed(
    sites: Sequence[nn.Module], deltas: Sequence[Tensor], position_P: Tensor, place_P: Tensor | None = None
) -> Iterator[None]:
    """Adds rows of each site's perturbation to its output [B, T, H].

    Args:
        sites: Modules of the student.
        deltas: The perturbation of each [D, H].
        position_P: Flat positions b * T + t that are moved.
        place_P: The row that each of them takes; None where D = P and they take one each, in order.
    """

    def hook_of(delta_DH: Tensor) -> Any:
        def hook(module: nn.Module, arguments: Any, output_BTH: Tensor) -> Tensor:
            flat_NH = output_BTH.flatten(0, 1)
            taken_PH = delta_DH if place_P is None else delta_DH[place_P]
            return flat_NH.index_add(0, position_P, taken_PH.to(flat_NH.dtype)).view_as(output_BTH)

        return hook

    handles = [site.register_forward_hook(hook_of(delta)) for site, delta in zip(sites, deltas, strict=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def refuse_sharded(embedding: nn.Module, name: str) -> None:
    """Refuses a student whose weights are sharded.

    Raises:
        SetupError: It is trained under ZeRO-3.
    """
    if hasattr(embedding.weight, "ds_id"):
        raise SetupError(
            f"{name} reads a batch several times before one backward pass, which ZeRO-3 cannot.",
            "Set train.zero_stage to 2.",
        )
