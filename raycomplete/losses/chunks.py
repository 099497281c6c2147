"""How many token rows have their logits in memory at a time."""

from __future__ import annotations

from typing import Literal

import torch

ChunkTokens = int | Literal["auto"]

# Memory of one model's logits. On a CPU matrix products run at their full rate from about 256 rows on (measured at
# V 49152, H 576), so larger chunks buy nothing. On CUDA a chunk's products are so fast that reading and writing the
# whole [V, H] weight gradient once a chunk counts, so fewer are better.
_BUDGET_BYTES = {"cpu": 48 * 2**20, "cuda": 512 * 2**20}
_MULTIPLE = 64  # of rows; tiles of matrix products stay full


def rows_per_chunk(
    chunk_tokens: ChunkTokens, vocab_size: int, logits_dtype: torch.dtype, device: torch.device, copies: int = 1
) -> int:
    """Resolves "auto" to as many rows as a fixed memory budget holds.

    Args:
        chunk_tokens: Rows, at least 1, or "auto".
        vocab_size: V.
        logits_dtype: Of the logits that are kept.
        device: Where they are kept; sets the budget.
        copies: How many tensors as large as the logits a caller makes per model.

    Returns:
        Rows of one chunk, at least 1.

    Raises:
        ValueError: `chunk_tokens` is below 1.
    """
    if chunk_tokens != "auto":
        if chunk_tokens < 1:
            raise ValueError(f'chunk_tokens must be at least 1, or "auto", got {chunk_tokens}.')
        return chunk_tokens
    budget = _BUDGET_BYTES.get(device.type, _BUDGET_BYTES["cpu"])
    rows = budget // (vocab_size * logits_dtype.itemsize * copies)
    return max(rows // _MULTIPLE * _MULTIPLE, min(rows, _MULTIPLE), 1)


def even_chunks(num_rows: int, limit: int) -> list[slice]:
    """Cuts rows into as few chunks of at most `limit` as possible, of nearly equal size.

    A short last chunk would pay for a whole pass over the head and its gradient.
    """
    if num_rows == 0:
        return []
    size = -(-num_rows // -(-num_rows // limit))
    size = min(limit, -(-size // _MULTIPLE) * _MULTIPLE)
    return [slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size)]
