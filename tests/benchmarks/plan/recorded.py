"""Measurements that were made earlier, beside what the formulas say of them.

Constants of the formulas come from some of these (`fitted`); the others are predictions.
"""

from __future__ import annotations

from dataclasses import replace

from raycomplete.config import load_run_file
from raycomplete.plan.catalogue import Hardware, ModelShape, find_hardware, preset
from raycomplete.plan.engines import PlannedEngine
from raycomplete.plan.trainer import loss_s, train_parts
from raycomplete.plan.workload import Request, Sequences, Workload
from tests.benchmarks.environment import ROOT
from tests.benchmarks.plan.points import Point


def _request(shape: ModelShape, hardware: Hardware) -> Request:
    """Student and both frozen models of one shape in bfloat16."""
    config = load_run_file(
        ROOT / "jobs" / "plan-70b.yaml", ["train.gradient_checkpointing=false", "train.zero_stage=0"]
    )
    return Request(config, dict.fromkeys(("student", "aligned", "base"), shape), hardware)


def recorded_points() -> list[Point]:
    """Tokens a second of pooling engines (vLLM, bfloat16, eager), and the loss's matrix products."""
    # They were timed inside the engine's process.
    hardware = replace(find_hardware("h100"), object_store_bandwidth=float("inf"))
    large, small = (PlannedEngine(preset(name), hardware, "bfloat16") for name in ("llama-3.1-8b", "smollm2-135m"))
    batch, short = (Sequences(64, 1024, 1),), (Sequences(256, 512, 1),)
    alone, hidden = 64 * 1024 / large.prefill_s(batch), 64 * 1024 / large.scoring_s(batch)
    little = 256 * 512 / small.scoring_s(short)
    products_only = replace(hardware, softmax_per_s=float("inf"), memory_bandwidth=float("inf"))
    products = loss_s(_request(large.shape, products_only), 8192, 8192)
    return [
        Point("8B, 64 x 1024 tokens, prefill alone", "tok/s", alone, 42_900, fitted=True),
        Point("8B, 64 x 1024 tokens, hidden states", "tok/s", hidden, 39_600, fitted=True),
        Point("135M, 256 x 512 tokens, hidden states", "tok/s", little, 292_000),
        Point("loss, N 8192, V 128256, H 4096, products alone", "ms", products * 1e3, 52, fitted=True),
    ]


def trainer_point(one_thread: Hardware) -> Point:
    """Ray Train with DeepSpeed, the teacher read in the same process: the training benchmark's tokens a second.

    Args:
        one_thread: This machine's CPU, if it is the one of docs/speed.md.
    """
    small = preset("smollm2-135m")
    sequences = Sequences(8, 39.5, 99.5)  # the means of the benchmark's workload
    work = Workload((sequences,), {}, None, loss_rows=sequences.rows, base_rows=0, micro_batches=2)
    step = train_parts(_request(small, one_thread), 1, work)
    teacher = one_thread.busy_s(
        small.forward_flops(sequences.tokens, sequences.length / 2),
        2 * sequences.tokens * small.num_layers * small.activation_bytes_per_token("bfloat16"),
        2 * small.num_layers * one_thread.train_calls,
        one_thread.train_share,
        "bfloat16",
    )
    predicted = sequences.count * (sequences.prompt + sequences.response) / (sum(step.values()) + teacher)
    return Point("SmolLM2-135M, Ray Train + DeepSpeed with teacher, recorded", "tok/s", predicted, 86.5)
