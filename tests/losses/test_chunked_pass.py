"""How rows are cut into chunks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raycomplete.losses.chunked_pass import _buffer, even_chunks, rows_per_chunk, wants_triton
from raycomplete.losses.gradients import adds_in_float32
from raycomplete.losses.heads import Head
from raycomplete.losses.settings import LossSettings
from raycomplete.runtime.errors import SetupError

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


@pytest.mark.parametrize("vocab_size", [128_256, 151_669, 63])
def test_padded_rows_start_where_loads_of_sixteen_bytes_may(vocab_size):
    head = Head(torch.empty(vocab_size, 1, dtype=torch.bfloat16))
    padded = _buffer(torch.empty(0), 3, head, pad=True)
    assert padded.shape == (3, vocab_size)
    assert (padded.stride(0) * padded.itemsize) % 128 == 0
    assert 0 <= padded.stride(0) - vocab_size < 64
    assert _buffer(torch.empty(0), 3, head, pad=False).is_contiguous()


class OnCuda:
    """A head that says it lies on a CUDA device."""

    def __init__(self):
        self.weight_VH, self.logits_dtype = type("Weight", (), {"is_cuda": True, "device": CUDA}), torch.float32


def test_without_a_compiler_auto_takes_pytorch_and_triton_is_refused(monkeypatch, tmp_path):
    settings = {name: LossSettings(weights={"anchor": 1.0}, backend=name) for name in ("auto", "triton")}
    monkeypatch.setattr("raycomplete.losses.chunked_pass.compiler_problem", lambda: "")
    assert wants_triton(OnCuda(), settings["auto"])
    assert wants_triton(OnCuda(), settings["triton"])
    monkeypatch.undo()
    monkeypatch.setenv("CC", str(tmp_path / "cc"))
    assert not wants_triton(OnCuda(), settings["auto"])
    with pytest.raises(SetupError, match="there is no C compiler at CC="):
        wants_triton(OnCuda(), settings["triton"])
    assert not wants_triton(Head(torch.zeros(4, 2)), settings["auto"])


def test_products_are_added_in_place_only_where_that_is_right(monkeypatch):
    """The overload with another dtype of the sum is for devices; here it is tried with stand-ins for them."""
    assert "out_dtype" in str(torch.ops.aten.addmm.dtype_out._schema), "this torch has the overload"

    def right(total, first, second, *, out_dtype, out):
        return out.copy_(total + first.to(out_dtype) @ second.to(out_dtype))

    def rounded(total, first, second, *, out_dtype, out):
        return out.copy_((total.to(first.dtype) + first @ second).to(out_dtype))

    def without_the_sum(total, first, second, *, out_dtype, out):
        return out.copy_(first.to(out_dtype) @ second.to(out_dtype))

    def unknown(*_, **__):
        raise RuntimeError("not implemented for 'BFloat16'")

    for product, expected in ((right, True), (rounded, False), (without_the_sum, False), (unknown, False)):
        monkeypatch.setattr(torch, "addmm", product)
        assert adds_in_float32.__wrapped__(CPU, torch.bfloat16) is expected, product.__name__
    monkeypatch.undo()
    assert not adds_in_float32.__wrapped__(CPU, torch.bfloat16), "on a CPU sums go by slabs, as before"
