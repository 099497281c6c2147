"""A vLLM engine that continues token sequences and can take other weights of the same architecture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from raycomplete.config import Dtype
from raycomplete.engine_options import engine_arguments


class RolloutEngine:
    """Generates with one model at a time; `load` changes its weights in place."""

    def __init__(
        self,
        path: str,
        *,
        dtype: Dtype,
        max_length: int,
        use_gpu: bool,
        gpu_memory_utilization: float = 0.25,
        max_num_batched_tokens: int = 8192,
        trust_remote_code: bool = False,
        stop_ids: Sequence[int] = (),
    ) -> None:
        from vllm import LLM

        arguments = engine_arguments(
            path,
            dtype=dtype,
            max_length=max_length,
            use_gpu=use_gpu,
            gpu_memory_utilization=gpu_memory_utilization,
            max_num_batched_tokens=max_num_batched_tokens,
            trust_remote_code=trust_remote_code,
        )
        # A seeded request whose prompt is split between two batches fails on a CPU (vLLM 0.32: "CPU Generator does not
        # use offset"), so there prompts are read whole.
        self._llm: Any = LLM(enable_prefix_caching=True, enable_chunked_prefill=use_gpu, **arguments)
        self._stop_ids = list(stop_ids)
        self._max_length = max_length
        self.path = path

    def load(self, path: str) -> None:
        """Takes the weights of another checkpoint of the same architecture.

        The prefix cache holds states of the old weights, so it is emptied before the next token is made.
        """
        if path == self.path:
            return
        self.path = ""  # a reload that fails half-way leaves no model that anyone may ask again
        self._llm.collective_rpc("reload_weights", kwargs={"weights_path": path})
        self._llm.apply_model(_refresh_tied_head)
        self._llm.reset_prefix_cache()
        self.path = path

    def generate_finished(
        self,
        sequences: Sequence[Sequence[int]],
        max_tokens: int,
        temperature: float,
        top_p: float,
        seed: int | None,
    ) -> list[tuple[list[int], bool]]:
        """New token ids of each sequence, and whether the response ended by itself rather than by the token limit.

        Arguments are those of `raycomplete.types.Generator.generate`; the end-of-response token is left out.
        """
        from vllm import SamplingParams, TokensPrompt

        parameters = [
            SamplingParams(
                max_tokens=min(max_tokens, self._max_length - len(sequence)),
                temperature=temperature,
                top_p=top_p if temperature > 0 else 1.0,
                seed=None if seed is None or temperature == 0 else seed + index,
                stop_token_ids=self._stop_ids,
                detokenize=False,
            )
            for index, sequence in enumerate(sequences)
        ]
        inputs = [TokensPrompt(prompt_token_ids=list(sequence)) for sequence in sequences]
        outputs = self._llm.generate(inputs, parameters, use_tqdm=False)
        return [self._strip(output.outputs[0]) for output in outputs]

    def _strip(self, completion: Any) -> tuple[list[int], bool]:
        tokens = list(completion.token_ids)
        finished = completion.finish_reason == "stop"
        if tokens and (tokens[-1] in self._stop_ids or finished):
            tokens = tokens[:-1]  # vLLM keeps the end-of-response token in token_ids
        return tokens, finished


def _refresh_tied_head(model: Any) -> None:
    """Points a tied output head at the embedding again and packs it anew.

    On a CPU, vLLM (seen in 0.32) packs linear weights for its kernels after loading. A checkpoint with tied weights has
    no tensor for the head, so a reload leaves the head packed from the old embedding: the new model then speaks with
    the old model's head, without a word of warning.
    """
    head = getattr(model, "lm_head", None)
    embedding = getattr(getattr(model, "model", None), "embed_tokens", None)
    tied = bool(getattr(getattr(model, "config", None), "tie_word_embeddings", False))
    if tied and head is not None and embedding is not None:
        head.weight = embedding.weight
        head.quant_method.process_weights_after_loading(head)
