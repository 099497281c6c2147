"""How rows are cut into chunks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raycomplete.losses.chunked_pass import even_chunks, rows_per_chunk

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@given(num_rows=st.integers(0, 5000), limit=st.integers(1, 700))
def test_chunks_partition_the_rows_in_as_few_as_the_limit_allows(num_rows, limit):
    chunks = even_chunks(num_rows, limit)
    assert [row for chunk in chunks for row in range(chunk.start, chunk.stop)] == list(range(num_rows))
    assert all(chunk.stop - chunk.start <= limit for chunk in chunks)
    assert len(chunks) == -(-num_rows // limit)


@pytest.mark.parametrize(("vocab_size", "device"), [(49_152, CPU), (128_256, CPU), (128_256, CUDA), (3_000_000, CPU)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_auto_keeps_the_logits_of_a_chunk_within_a_budget(vocab_size, device, dtype):
    rows = rows_per_chunk("auto", vocab_size, dtype, device)
    row_bytes = vocab_size * dtype.itemsize
    budget = 512 * 2**20 if device.type == "cuda" else 48 * 2**20
    assert budget / 2 < rows * row_bytes <= budget or rows == 1
    assert rows % 64 == 0 or rows < 64
    assert rows_per_chunk("auto", vocab_size, dtype, device, copies=4) <= max(1, budget // (4 * row_bytes))


def test_a_number_is_taken_as_it_is():
    assert rows_per_chunk(7, 49_152, torch.float32, CPU, copies=4) == 7
    with pytest.raises(ValueError, match="at least 1"):
        rows_per_chunk(0, 49_152, torch.float32, CPU)
