"""Every number of a plan that neither the run file nor the command line gave, in sentences."""

from __future__ import annotations

from raycomplete.plan.hardware import GIB
from raycomplete.plan.layout import WAITING_GOAL
from raycomplete.plan.memory import MAX_SEQUENCES, RESERVED_SHARE, chunk_rows
from raycomplete.plan.request import Request
from raycomplete.plan.speed import loss_share, train_share


def assumptions(request: Request, *, shared: bool) -> list[str]:
    """The list that is printed below a plan.

    Args:
        request: What is planned.
        shared: Whether all roles take turns on the same devices.
    """
    return [*_of_hardware(request), *_of_work(request), *_of_layout(request, shared=shared)]


def _of_hardware(request: Request) -> list[str]:
    hardware, factors, dtype = request.hardware, request.factors, request.config.models.dtype
    return [
        f"Hardware: {hardware.label}, {hardware.memory_bytes / GIB:.0f} GiB, {hardware.flops(dtype) / 1e12:.3g} "
        f"TFLOP/s in {dtype}, {hardware.memory_bandwidth / 1e9:.3g} GB/s of memory; from {hardware.source}.",
        f"{RESERVED_SHARE:.0%} of each device stays free for context, fragmentation and communication buffers.",
        f"Products reach {hardware.product_share:.0%} of the peak in engines, {train_share(hardware, factors):.0%} in "
        f"training and {loss_share(hardware, factors):.0%} in the loss; reading weights and caches reaches "
        f"{factors.bandwidth_share:.0%} of bandwidth, collectives {factors.link_share:.0%} of their link.",
        f"Links: {hardware.link_bandwidth / 1e9:.3g} GB/s between devices of a node, "
        f"{hardware.fabric_bandwidth / 1e9:.3g} GB/s a device between nodes, {request.network.bandwidth / 1e9:.3g} "
        f"GB/s a node for Ray's objects, {hardware.copy_bandwidth / 1e9:.3g} GB/s to the host, "
        f"{factors.object_store_bandwidth / 1e9:.3g} GB/s into the object store.",
        f"An engine spends {factors.request_s * 1e3:.2f} ms of host time on each scored sequence and "
        f"{factors.decode_call_s * 1e3:.0f} ms on each decoding step; a launch takes {hardware.call_s * 1e6:.0f} us, "
        f"{factors.engine_calls} a layer in engines, {factors.train_calls} in training.",
    ]


def _of_work(request: Request) -> list[str]:
    config, dtype = request.config, request.config.models.dtype
    vocab_size = request.shapes["student"].vocab_size
    rows = chunk_rows(config.train, vocab_size, dtype, is_gpu=request.hardware.is_gpu)
    lines = [
        f"Prompts have {request.prompt_tokens:.0f} tokens on average (--prompt-tokens); responses are as long as the "
        "run file allows; depths average the middle of their range.",
        "Every sequence is read anew: no hits in the score cache (off-policy runs have them from the second epoch on).",
        f"The loss keeps {rows} rows of logits at a time.",
        "Full attention without sliding windows; ZeRO's collectives are not hidden behind the backward pass.",
        f"Engines run at most {MAX_SEQUENCES} sequences and {config.teacher.max_num_batched_tokens} tokens a pass.",
        "Not counted: start of engines, sampling before training, evaluation, checkpoints, validation.",
    ]
    if config.rollout.on_policy:
        lines.append(
            "Weights are sent from one host to each node with rollout engines in turn; the judge's time is not counted."
        )
    return lines


def _of_layout(request: Request, *, shared: bool) -> list[str]:
    given = request.price is not None
    price = request.price if request.price is not None else request.hardware.example_price
    words = "as given" if given else "an example and no offer; give --price-per-gpu-hour"
    return [
        f"Price: {price:.2f} per device and hour, {words}. All rented devices are paid for, used or not.",
        "All roles take turns on the same devices: their times add up."
        if shared
        else "Each role has devices of its own, and batches split evenly over its engines (several engines of a role "
        f"and tensor parallelism are part of the plan). Little waiting means at most {WAITING_GOAL:.0%} of a step.",
    ]
