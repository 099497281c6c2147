"""A vLLM engine that continues token sequences and can take other weights of the same architecture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from raycomplete.config import Dtype
from raycomplete.data.checkpoints import TORCH_DTYPES
from raycomplete.engines.spec import engine_arguments
from raycomplete.engines.weights import WeightSource, checkpoint_folder, checkpoint_tensors, key_of, version_of
from raycomplete.runtime.errors import WorkError


class RolloutEngine:
    """Generates with one model at a time; `load` changes its weights in place.

    Args:
        path: Checkpoint to start from.
        dtype: Of the weights.
        max_length: Longest sequence, prompt and response together.
        use_gpu: False on a CPU machine.
        gpu_memory_utilization: Share of the device that the engine may fill.
        max_num_batched_tokens: Tokens of one forward pass.
        trust_remote_code: Whether the checkpoint's own code may run.
        stop_ids: End-of-response tokens.
        tensor_parallel: GPU only: devices of this node that hold the model together.
        sleeps: GPU only: the engine gives the device's memory back after each batch (vLLM's sleep level 1).
    """

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
        sleeps: bool = False,
        tensor_parallel: int = 1,
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
            tensor_parallel=tensor_parallel,
        )
        # A seeded request whose prompt is split between two batches fails on a CPU (vLLM 0.32: "CPU Generator does not
        # use offset"), so there prompts are read whole.
        self._llm: Any = LLM(
            enable_prefix_caching=True, enable_chunked_prefill=use_gpu, enable_sleep_mode=sleeps, **arguments
        )
        self._stop_ids = list(stop_ids)
        self._max_length = max_length
        self._dtype = TORCH_DTYPES[dtype]
        config = self._llm.llm_engine.model_config.hf_config
        self._tied = bool(getattr(config.get_text_config(), "tie_word_embeddings", False))
        self._held = path
        self.version: int | None = None
        self._sleeps = sleeps
        self._is_sharded = tensor_parallel > 1
        if sleeps:
            self._llm.sleep(level=1)

    @property
    def is_whole(self) -> bool:
        """False after a reload that failed half-way; vLLM cannot load over such a model."""
        return bool(self._held)

    def load(self, weights: WeightSource, *, timeout_s: float) -> bool:
        """Takes the weights of another checkpoint of the same architecture, or packed ones.

        The prefix cache holds states of the old weights, so it is emptied before the next token is made.

        Args:
            weights: What the engine should speak with.
            timeout_s: Longest wait for the object store.

        Returns:
            Whether anything was loaded; False where the engine has these weights already.
        """
        if key_of(weights) == self._held:
            return False
        with self._readable(weights, timeout_s) as arguments, self._awake():
            self._held = ""  # a reload that fails half-way leaves no model that anyone may ask again
            self._llm.collective_rpc("reload_weights", kwargs=arguments)
            self._llm.apply_model(_refresh_tied_head)
            if not self._llm.reset_prefix_cache():
                raise WorkError("The engine keeps prefixes that old weights have read, so new ones cannot be used.")
        self._held = key_of(weights)
        self.version = version_of(weights)
        return True

    def generate_finished(
        self,
        sequences: Sequence[Sequence[int]],
        max_tokens: int,
        temperature: float,
        top_p: float,
        top_k: int,
        seed: int | None,
    ) -> list[tuple[list[int], bool]]:
        """New token ids of each sequence, and whether the response ended by itself rather than by the token limit.

        Arguments are those of `raycomplete.runtime.types.Generator.generate`; the end-of-response token is left out.
        """
        from vllm import SamplingParams

        parameters = [
            SamplingParams(
                max_tokens=min(max_tokens, self._max_length - len(sequence)),
                temperature=temperature,
                top_p=top_p if temperature > 0 else 1.0,
                top_k=top_k if temperature > 0 else 0,
                seed=None if seed is None or temperature == 0 else seed + index,
                stop_token_ids=self._stop_ids,
                detokenize=False,
            )
            for index, sequence in enumerate(sequences)
        ]
        return [self._strip(output.outputs[0]) for output in self._run(sequences, parameters)]

    def log_probs(self, sequences: Sequence[tuple[Sequence[int], int]]) -> list[torch.Tensor]:
        """Log-probabilities of given responses. Meant for a few short sequences: logits of whole prompts are made.

        Args:
            sequences: (token ids, number of prompt tokens) with 1 <= prompt tokens < token ids < `max_length`.

        Returns:
            Of each sequence [response tokens] float32: log p(tokens[t] | tokens before t), nats, temperature 1.
        """
        from vllm import SamplingParams

        # One token must be generated, or vLLM refuses; the prompt's own log-probabilities are what is wanted. These
        # requests are never answered from the prefix cache.
        parameters = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
        # vLLM (seen in 0.32) ranks the tokens in a function that torch would compile at first use, for seconds, and not
        # at all on a machine without a compiler.
        with torch.compiler.set_stance("force_eager"):
            outputs = self._run([tokens for tokens, _ in sequences], parameters)
        return [
            torch.tensor([output.prompt_logprobs[t][tokens[t]].logprob for t in range(num_prompt, len(tokens))])
            for output, (tokens, num_prompt) in zip(outputs, sequences, strict=True)
        ]

    def _run(self, sequences: Sequence[Sequence[int]], parameters: Any) -> Any:
        from vllm import TokensPrompt

        inputs = [TokensPrompt(prompt_token_ids=list(sequence)) for sequence in sequences]
        with self._awake():
            return self._llm.generate(inputs, parameters, use_tqdm=False)

    @contextmanager
    def _readable(self, weights: WeightSource, timeout_s: float) -> Iterator[dict[str, Any]]:
        """How vLLM reads the weights. Shards are other processes, so packed weights reach them as a file in memory."""
        if isinstance(weights, str):
            yield {"weights_path": weights}
            return
        tensors = checkpoint_tensors(weights, self._dtype, tied=self._tied, timeout_s=timeout_s)
        if not self._is_sharded:
            yield {"weights_iterator": tensors}
            return
        with checkpoint_folder(tensors) as folder:
            yield {"weights_path": folder}

    @contextmanager
    def _awake(self) -> Iterator[None]:
        if not self._sleeps:
            yield
            return
        self._llm.wake_up()
        try:
            yield
        finally:
            self._llm.sleep(level=1)

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
