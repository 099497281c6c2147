"""Times new weights on their way to a rollout engine: `python -m tests.benchmarks.transfer cuda|cpu`.

On a GPU by each carrier that the machine has (CUDA IPC on one card, NCCL between two) beside the object store, for the
same weights of SmolLM2-135M; on a CPU through the object store alone, for the organism's. After every update the
engine's log-probabilities are compared with those of transformers. `make gpu` runs this as its stage `transfer`.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
import torch

from raycomplete.config import RolloutConfig
from raycomplete.data.checkpoints import load_model
from raycomplete.data.organism import prompts
from raycomplete.doctor.findings import tell
from raycomplete.doctor.gpu_probes import _small_model
from raycomplete.engines.rollout_pool import RolloutPool
from raycomplete.engines.rollout_worker import RolloutOptions
from raycomplete.engines.weight_transfer import WeightTransfer

_SCALES = (0.9, 1.0)  # of all weights, in turn
_APART = 0.3  # nats a token between the two, at least
_ROUNDS = 4  # two for each scale; the first one joins and warms up


def main(device: str) -> None:
    """Measures each way and tells its best time."""
    spec, codec = _small_model(device)
    lm = load_model(Path(spec.checkpoint), spec.dtype)
    probe = [([*codec.encode_prompt(item.text)][:32], 1) for item in prompts("heldout", "harmful", 0, 8)]
    states = [{name: weight.detach() * scale for name, weight in lm.named_parameters()} for scale in _SCALES]
    expected = [_expected(lm, state, probe) for state in states]
    apart = torch.cat(expected[0]).sub(torch.cat(expected[1])).abs().mean().item()
    assert apart > _APART, f"the two sets of weights are {apart:.2g} nats apart, so stale ones would pass for new"
    gpus = torch.cuda.device_count() if device == "cuda" else 0
    ray.init(include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    for backend in ("ipc", "nccl")[:gpus] or (None,):
        placed = replace(spec, weight_transfer=backend, num_gpus=1.0 if backend == "nccl" else 0.5)
        rollout = RolloutConfig()
        pool = RolloutPool.start(RolloutOptions(placed, tuple(sorted(codec.eos_ids)), rollout))
        try:
            tell({"seconds to start an engine": round(pool.wait_until_ready(120.0)["start_s"], 1)})
            _measure(pool, backend, states, expected, probe)
        finally:
            pool.stop()
    if not gpus:
        tell({"transfer": "needs a GPU; this is the object store"})
    ray.shutdown()


def _measure(pool: RolloutPool, backend: str | None, states: Any, expected: Any, probe: Any) -> None:
    if backend:
        torch.cuda.set_device(0 if backend == "ipc" else torch.cuda.device_count() - 1)  # Ray gives an engine the first
        states = [{name: weight.cuda() for name, weight in state.items()} for state in states]
        transfer = WeightTransfer(pool)
    for way in (backend, "store") if backend else ("store",):
        seconds, report = [], None
        for version in range(_ROUNDS):
            state = states[version % 2]
            if way != "store":
                torch.cuda.synchronize()
            started = time.perf_counter()
            if way == "store":  # as a trainer does: copied to the CPU first
                weights: Any = pool.pack({name: weight.cpu() for name, weight in state.items()}, version)
            else:
                weights = transfer.send(state, version)
            report = pool.sync(weights, probe, expected[version % 2])
            seconds.append(time.perf_counter() - started)
            assert report.transfer == way
        assert report is not None
        name = f"{way}, beside {backend}" if backend and way == "store" else way
        tell({f"seconds by {name}": round(min(seconds[1:]), 3), "MB": round(report.num_bytes / 1e6)})
        tell({f"off by {name}": f"{report.mean_abs_difference:.2g} nats, tolerance {report.tolerance:.2g}"})


def _expected(lm: Any, state: dict[str, torch.Tensor], probe: Any) -> list[torch.Tensor]:
    """Log-probabilities of all but the first token by transformers, on the CPU, of one set of weights."""
    rows = []
    with torch.inference_mode():
        lm.load_state_dict(state, strict=False)
        for tokens, num_prompt in probe:
            log_probs_TV = lm(torch.tensor([tokens])).logits[0, :-1].float().log_softmax(-1)
            rows.append(log_probs_TV[num_prompt - 1 :].gather(1, torch.tensor(tokens[num_prompt:])[:, None])[:, 0])
    return rows


if __name__ == "__main__":
    main(sys.argv[1])
