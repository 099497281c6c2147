"""A vLLM pooling engine that returns the final hidden states of response tokens, and the parity gate before its use.

The gate compares distributions rebuilt from hidden states with those of transformers before a scorer's first score. A
wrong head, a missing norm or a forgotten softcap would distil from a wrong teacher without any error. Each of them
moves log-probabilities by far more than rounding does, so a few sequences are enough to refuse to start.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from raycomplete.data.checkpoints import TORCH_DTYPES, load_model
from raycomplete.engines.score_cache import HiddenArray, ScoreRequest, to_array, to_tensor
from raycomplete.engines.spec import EngineSpec
from raycomplete.engines.vllm_start import start_llm
from raycomplete.losses.heads import Head
from raycomplete.plan.catalogue import shape_from_config
from raycomplete.runtime.errors import CheckpointError, NotFiniteError, ParityError, WorkError
from raycomplete.runtime.files import read_json
from raycomplete.runtime.machine import available_cpus

# Mean over rows of the expected |log p - log p'|, in nats; a single row may differ by ten times as much. float32:
# rounding only. bfloat16: engine and transformers round to 8 bits after different kernels in every layer; on 30 layers
# (SmolLM2-135M) it came to 0.012 to 0.017 on average and 0.12 in the worst of 77 rows. A wrong head costs whole nats.
PARITY_TOLERANCE: dict[str, float] = {"float32": 1e-5, "bfloat16": 0.06}
_WORST_ROW = 10.0


class PoolingEngine:
    """Reads sequences with one frozen model; start it in a process whose environment is `spec.environment()`."""

    def __init__(self, spec: EngineSpec) -> None:
        self.spec = spec
        self._llm = start_llm(spec, self.arguments(spec))
        self._dtype = TORCH_DTYPES[spec.dtype]

    @staticmethod
    def arguments(spec: EngineSpec) -> dict[str, Any]:
        """Returns the arguments of `vllm.LLM`."""
        from vllm.config import PoolerConfig  # seconds

        # Without use_activation=False the states come L2-normalised, and no head could rebuild logits from them.
        pooler = PoolerConfig(task="token_embed", use_activation=False)
        own = {"runner": "pooling", "convert": "embed", "pooler_config": pooler, "enable_prefix_caching": False}
        return spec.arguments() | own | ({} if spec.use_gpu else {"kv_cache_memory_bytes": cache_bytes(spec)})

    def hidden_states(self, requests: Sequence[ScoreRequest]) -> list[HiddenArray]:
        """Reads sequences and returns the hidden states from which each response token is predicted.

        Row t of a result is the state after (prompt, y<t), so `head.logits(row t)` is the distribution of y_t.
        """
        from vllm import TokensPrompt

        # The last token predicts nothing that is asked for, so the engine never reads it.
        inputs = [TokensPrompt(prompt_token_ids=list(request.token_ids[:-1])) for request in requests]
        outputs = self._llm.encode(inputs, pooling_task="token_embed", use_tqdm=False)
        arrays = []
        for request, output in zip(requests, outputs, strict=True):
            states_TH = output.outputs.data
            if states_TH.shape[0] != len(request.token_ids) - 1:
                raise WorkError(
                    f"The pooling engine returned {states_TH.shape[0]} rows for {len(request.token_ids) - 1} tokens.",
                    "Turn off prefix caching in this engine.",
                )
            # A copy: a view would keep the prompt's rows, or a whole batch, in memory for as long as it is cached.
            rows_TH = states_TH[request.num_prompt_tokens - 1 :].to(self._dtype, copy=True)
            if not bool(torch.isfinite(rows_TH).all()):
                raise NotFiniteError(
                    "The pooling engine returned hidden states that are not finite.", "Try models.dtype: float32."
                )
            arrays.append(to_array(rows_TH))
        return arrays


def cache_bytes(spec: EngineSpec) -> int:
    """Returns the bytes of a scorer's key-value cache on a CPU: for twice the tokens that it reads at a time.

    At most 1 GiB, which models without a formula in `raycomplete.plan` get whole. On SmolLM2-135M the
    whole was a third of a scorer's memory. Twice, since the last of a sequence's blocks of 128 tokens is not full; of
    sequences below 64 tokens fewer are read in a pass. 256 tokens are what vLLM starts with at any length.
    """
    bound = spec.kv_cache_gib * 2**30
    try:
        shape = shape_from_config(read_json(Path(spec.checkpoint) / "config.json") or {}, spec.checkpoint)
    except CheckpointError:
        return bound
    tokens = 2 * max(spec.max_num_batched_tokens, spec.max_length, 256)
    return min(tokens * shape.kv_bytes_per_token(spec.dtype), bound)


@dataclass(frozen=True)
class ParityReport:
    """Distance between rebuilt and transformers' own next-token distributions over all compared rows, in nats."""

    mean_expected_difference: float  # mean over rows of sum_v p(v) |log p(v) - log p'(v)|
    max_expected_difference: float  # the largest of those rows
    max_difference: float  # largest |log p - log p'| over tokens with p >= 1e-3
    mean_kl: float  # KL(p || p')
    argmax_agreement: float
    num_rows: int
    tolerance: float  # upper bound of the mean; the largest row may be ten times that


def check_parity(engine: PoolingEngine, head: Head, requests: list[ScoreRequest], *, role: str) -> ParityReport:
    """Compares engine and head with transformers on a few sequences."""
    spec = engine.spec
    tolerance = PARITY_TOLERANCE[spec.dtype]
    model = load_model(Path(spec.checkpoint), spec.dtype, trust_remote_code=spec.trust_remote_code)
    expected: list[float] = []
    largest, kl, agree, rows = 0.0, 0.0, 0, 0
    vocab_size = head.weight_VH.shape[0]
    threads = torch.get_num_threads()
    if spec.use_gpu:  # Ray gives an actor with half a CPU one OpenMP thread, and an 8B reference would take minutes
        torch.set_num_threads(available_cpus())
    for request, array in zip(requests, engine.hidden_states(requests), strict=True):
        with torch.inference_mode():
            logits_TV = model(torch.tensor([request.token_ids[:-1]])).logits[0, request.num_prompt_tokens - 1 :]
        reference_TV = torch.log_softmax(logits_TV[:, :vocab_size].double(), dim=-1)
        rebuilt_TV = torch.log_softmax(head.logits(to_tensor(array)).double(), dim=-1)
        probability_TV = reference_TV.exp()
        difference_TV = (reference_TV - rebuilt_TV).abs()
        expected += (probability_TV * difference_TV).sum(-1).tolist()
        largest = max(largest, float(difference_TV[probability_TV >= 1e-3].max()))
        kl += float((probability_TV * (reference_TV - rebuilt_TV)).sum())
        agree += int((reference_TV.argmax(-1) == rebuilt_TV.argmax(-1)).sum())
        rows += request.num_rows
    torch.set_num_threads(threads)
    mean, worst = sum(expected) / rows, max(expected)
    report = ParityReport(mean, worst, largest, kl / rows, agree / rows, rows, tolerance)
    if not (mean <= tolerance and worst <= _WORST_ROW * tolerance):  # written so that NaN fails too
        raise ParityError(
            f"The {role} scorer's rebuilt log-probabilities differ from transformers' by {mean:.3g} nats on average "
            f"and {worst:.3g} at worst (tolerance {tolerance:.3g} and {_WORST_ROW * tolerance:.3g}, {rows} rows, "
            f"argmax agrees on {agree / rows:.1%}).",
            "The engine's hidden states or the head spec do not fit this checkpoint; scores would be wrong, so "
            "training did not start.",
        )
    return report
