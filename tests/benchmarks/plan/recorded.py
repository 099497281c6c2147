"""Measurements that were made earlier, beside what the formulas say of them.

Constants of the formulas come from some of these (`fitted`); the others are predictions.
"""

from __future__ import annotations

from dataclasses import replace

from raycomplete.config import TrainConfig
from raycomplete.plan.hardware import Hardware, find_hardware
from raycomplete.plan.shapes import preset
from raycomplete.plan.speed import Factors, device_s, loss_s, prefill_s, scoring_s, train_s, train_share
from raycomplete.plan.workload import Sequences, Workload
from tests.benchmarks.plan.points import Point

_IN_ENGINE = replace(Factors(), object_store_bandwidth=float("inf"))  # they were timed inside the engine's process


def recorded_points() -> list[Point]:
    """Tokens a second of pooling engines (vLLM, bfloat16, eager), and the loss's matrix products."""
    hardware, large, small = find_hardware("h100"), preset("llama-3.1-8b"), preset("smollm2-135m")
    batch, short = (Sequences(64, 1024, 1),), (Sequences(256, 512, 1),)
    alone = 64 * 1024 / prefill_s(large, hardware, _IN_ENGINE, batch, dtype="bfloat16")
    hidden = 64 * 1024 / scoring_s(large, hardware, _IN_ENGINE, batch, dtype="bfloat16")
    little = 256 * 512 / scoring_s(small, hardware, _IN_ENGINE, short, dtype="bfloat16")
    models = dict.fromkeys(("student", "aligned", "base"), large)
    products_only = replace(hardware, softmax_per_s=float("inf"), memory_bandwidth=float("inf"))
    products = loss_s(TrainConfig(), products_only, Factors(), 8192, 8192, models, "bfloat16")
    return [
        Point("8B, 64 x 1024 tokens, prefill alone", "tok/s", alone, 42_900, fitted=True),
        Point("8B, 64 x 1024 tokens, hidden states", "tok/s", hidden, 39_600, fitted=True),
        Point("135M, 256 x 512 tokens, hidden states", "tok/s", little, 292_000),
        Point("loss, N 8192, V 128256, H 4096, products alone", "ms", products * 1e3, 52, fitted=True),
    ]


def trainer_point(one_thread: Hardware) -> Point:
    """Ray Train with DeepSpeed, the teacher read in the same process: the training benchmark's tokens a second.

    Args:
        one_thread: This machine's CPU, if it is the one of RESULTS.md.
    """
    small, factors = preset("smollm2-135m"), Factors()
    sequences = Sequences(8, 39.5, 99.5)  # the means of the benchmark's workload
    work = Workload((sequences,), {}, None, loss_rows=sequences.rows, base_rows=0, micro_batches=2)
    models = dict.fromkeys(("student", "aligned", "base"), small)
    train = TrainConfig(anchor_batch=8, per_device_batch_size=4)
    step = train_s(train, one_thread, factors, work, models, dtype="bfloat16", workers=1, gpus_per_node=1)
    teacher = device_s(
        one_thread,
        small.forward_flops(sequences.tokens, sequences.length / 2),
        2 * sequences.tokens * small.num_layers * small.activation_bytes_per_token("bfloat16"),
        2 * small.num_layers * factors.train_calls,
        train_share(one_thread, factors),
        "bfloat16",
    )
    predicted = sequences.count * (sequences.prompt + sequences.response) / (sum(step.values()) + teacher)
    return Point("SmolLM2-135M, Ray Train + DeepSpeed with teacher, recorded", "tok/s", predicted, 86.5)
