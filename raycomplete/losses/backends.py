"""Which backend computes row losses: PyTorch anywhere, Triton on CUDA."""

from __future__ import annotations

from importlib.util import find_spec

import torch

from raycomplete.losses.heads import Head
from raycomplete.losses.loss_types import LossSettings
from raycomplete.losses.torch_rows import RowLosses, TorchRows
from raycomplete.runtime.errors import SetupError


def choose_backend(student: Head, aligned: Head, base: Head | None, settings: LossSettings, max_rows: int) -> RowLosses:
    """The backend that the settings ask for.

    Args:
        student: Head of the student.
        aligned: Head of the aligned model.
        base: Head of base, or None where no row needs it.
        settings: Decide by their `backend`; "auto" never fails.
        max_rows: Most rows of one call.

    Raises:
        SetupError: Triton is asked for where it does not run.
    """
    auto = student.weight_VH.is_cuda and _obstacle_to_triton(student) is None
    if settings.backend == "torch" or (settings.backend == "auto" and not auto):
        return TorchRows(student, aligned, base, settings, max_rows)
    obstacle = _obstacle_to_triton(student)
    if obstacle is not None:
        raise SetupError(f'train.loss_backend is "triton", but {obstacle}.', 'Use "auto" or "torch".')
    from raycomplete.losses.kernels import TritonRows

    return TritonRows(student, aligned, base, settings)


def _obstacle_to_triton(student: Head) -> str | None:
    if student.logits_dtype == torch.float64:
        return "the student's head is float64, and the kernels sum in float32"
    if find_spec("triton") is None:
        return "triton is not installed"
    if student.weight_VH.is_cuda:
        return None
    from raycomplete.losses.kernels import INTERPRETED

    return None if INTERPRETED else f"the student is on {student.weight_VH.device.type}, not on a CUDA device"
