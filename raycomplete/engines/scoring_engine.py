"""A vLLM pooling engine that returns the final hidden states of response tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from raycomplete.engines.score_cache import HiddenArray, ScoreRequest, to_array
from raycomplete.engines.spec import EngineSpec
from raycomplete.runtime.errors import NotFiniteError, WorkError


class PoolingEngine:
    """Reads sequences with one frozen model.

    Start it in a process whose environment is `spec.environment()`; importing vllm takes seconds, so it happens here
    and not when this module is imported.
    """

    def __init__(self, spec: EngineSpec) -> None:
        from vllm import LLM
        from vllm.config import PoolerConfig

        # Without use_activation=False the states come L2-normalised, and no head could rebuild logits from them.
        pooler = PoolerConfig(task="token_embed", use_activation=False)
        self.spec = spec
        self._llm: Any = LLM(
            runner="pooling", convert="embed", pooler_config=pooler, enable_prefix_caching=False, **spec.arguments()
        )
        self._dtype = torch.bfloat16 if spec.dtype == "bfloat16" else torch.float32

    def hidden_states(self, requests: Sequence[ScoreRequest]) -> list[HiddenArray]:
        """Reads sequences and returns the hidden states from which each response token is predicted.

        Row t of a result is the state after (prompt, y<t), so `head.logits(row t)` is the distribution of y_t.

        Returns:
            One [T, H] array for each request, T its response tokens.

        Raises:
            WorkError: The engine returned another number of rows than it was given tokens.
            NotFiniteError: A hidden state is NaN or infinite.
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
