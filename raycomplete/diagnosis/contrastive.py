"""Contrastive decoding, the remedy at inference time, as a baseline: base and aligned side by side, token after token.

Each next token comes from q ~ p_a (p_a / p_b)^alpha among the tokens that aligned finds plausible
(`raycomplete.losses.divergences.contrastive_log_probs`), so no weight changes. Two models have to agree on every token,
which a generating engine cannot do; both are therefore read by transformers with key-value caches, in batches, inside a
Ray actor. The remedy is the idea of arXiv 2511.12155 (known by secondary reports); this form of it is ours.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import ray
import torch
from torch import Tensor

from raycomplete.attacks.target import Target
from raycomplete.config import ContrastiveDecodingConfig, Dtype
from raycomplete.config.evaluation import CapabilitiesConfig
from raycomplete.data.checkpoints import fingerprint, load_model
from raycomplete.data.inputs import prepare_prompts
from raycomplete.engines.run import Run
from raycomplete.engines.spec import EngineSpec
from raycomplete.evaluation.model_judges import start_judge
from raycomplete.evaluation.roles import evaluate_roles, evaluate_target, held_out_sets
from raycomplete.losses.divergences import contrastive_log_probs
from raycomplete.runtime.files import read_json, write_json
from raycomplete.runtime.ray_calls import wait_for

_COST_PROMPTS, _COST_TOKENS, _COST_ROUNDS = 8, 32, 3


def contrastive_baseline(run: Run) -> dict[str, Any]:
    """Evaluates the aligned model plainly and under contrastive decoding on the held-out prompts of the run file.

    Returns:
        Settings, rates by decoder, and the cost of contrastive decoding relative to plain decoding in the same loop.

    Raises:
        DataError: The run file names no held-out prompts of some kind.
    """
    # The depth curve and the harmless prompts: a baseline is compared by these, and searches would take hours with it.
    changes = {"attacks": [run.config.evaluation.prefill()], "capabilities": CapabilitiesConfig()}
    settings = run.config.evaluation.model_copy(update=changes)
    engines, codec = run.engines, run.models.codec
    run = replace(run, config=run.config.model_copy(update={"evaluation": settings}))
    run.engines, run.prompts = engines, prepare_prompts(run.config, codec, training=False)
    run.prompts = held_out_sets(run)
    results = evaluate_roles(run, ("aligned",))
    engines.stop_scorers()  # their memory is needed for two more models
    decoder = ContrastiveClient(run)
    try:
        results["contrastive"] = _evaluate(run, decoder)
        cost = read_json(run.folder / "contrastive_cost.json")
        if cost is None:
            benign = run.prompts.evaluation["benign"][:_COST_PROMPTS]
            with run.console.stage("Cost of contrastive decoding"):
                cost = decoder.cost([prompt.encoded(codec) for prompt in benign], _COST_TOKENS)
            write_json(run.folder / "contrastive_cost.json", cost)
    finally:
        decoder.stop()
    rates = {role: {"asr": result["asr"], "utility": result["utility"]} for role, result in results.items()}
    return {"settings": run.config.diagnose.contrastive.model_dump(mode="json"), "cost": cost, "rates": rates}


def _evaluate(run: Run, decoder: ContrastiveClient) -> dict[str, Any]:
    """Evaluates contrastive decoding by the same trials as every model, into evaluation/contrastive.json."""
    config, settings, codec = run.config, run.config.diagnose.contrastive, run.models.codec
    ids = "+".join(fingerprint(run.models.paths[role]) for role in ("aligned", "base"))
    model_id = f"{ids} alpha={settings.alpha:g} plausibility={settings.plausibility:g}"
    limits = (config.models.max_length, config.evaluation.max_tokens)
    with start_judge(config, run.judge, run.console) as judge:
        target = Target("contrastive", model_id, decoder, codec, judge, *limits, cancelled=run.is_stopping)
        return evaluate_target(run, target)


@dataclass(frozen=True)
class ContrastiveDecoder:
    """Continues sequences greedily with two models (implements `raycomplete.runtime.types.Generator`).

    Attributes:
        base: None decodes plainly from aligned.
        vocab_size: True tokens; logits from here on belong to padding.
        stop_ids: Tokens that end a response.
        max_length: Longest sequence in tokens, new ones included.
    """

    aligned: Any
    base: Any | None
    vocab_size: int
    stop_ids: tuple[int, ...]
    settings: ContrastiveDecodingConfig
    max_length: int

    def generate(
        self, sequences: Sequence[Sequence[int]], *, max_tokens: int, temperature: float = 0.0, **_: Any
    ) -> list[list[int]]:
        """Continues each sequence greedily.

        Raises:
            ValueError: Sampling is asked for.
        """
        if temperature != 0:
            raise ValueError("Contrastive decoding is greedy.")
        size = self.settings.batch
        batches = [[list(ids) for ids in sequences[start : start + size]] for start in range(0, len(sequences), size)]
        return [answer for batch in batches for answer in self._continue(batch, max_tokens)]

    @torch.inference_mode()
    def _continue(self, sequences: list[list[int]], max_tokens: int) -> list[list[int]]:
        width = max(map(len, sequences))
        room = [min(max_tokens, self.max_length - len(sequence)) for sequence in sequences]
        # Padded on the left, so that the last column of every row is its last token.
        mask_BT = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in sequences])
        next_BT = torch.tensor([[0] * (width - len(row)) + row for row in sequences])
        models = [model for model in (self.aligned, self.base) if model is not None]
        caches: list[Any] = [None] * len(models)
        new: list[list[int]] = [[] for _ in sequences]
        open_rows = {index for index, tokens in enumerate(room) if tokens > 0}
        while open_rows:
            read = [self._read(model, next_BT, mask_BT, cache) for model, cache in zip(models, caches, strict=True)]
            caches = [cache for _, cache in read]
            log_q_BV = read[0][0]
            if self.base is not None:
                log_q_BV = contrastive_log_probs(log_q_BV, read[1][0], self.settings.alpha, self.settings.plausibility)
            chosen = log_q_BV.argmax(dim=-1)
            for index in list(open_rows):
                token = int(chosen[index])
                if token not in self.stop_ids:
                    new[index].append(token)
                if token in self.stop_ids or len(new[index]) >= room[index]:
                    open_rows.discard(index)
            next_BT = chosen[:, None]
            mask_BT = torch.cat([mask_BT, torch.ones_like(next_BT)], dim=1)
        return new

    def _read(self, model: Any, tokens_BT: Tensor, mask_BT: Tensor, cache: Any) -> tuple[Tensor, Any]:
        """Log-probabilities of the next token [B, V] on the CPU, and the grown cache."""
        place_BT = (mask_BT.cumsum(dim=1) - 1).clamp(min=0)[:, -tokens_BT.shape[1] :]
        output = model(
            input_ids=tokens_BT.to(model.device),
            attention_mask=mask_BT.to(model.device),
            position_ids=place_BT.to(model.device),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        log_BV = output.logits[:, -1, : self.vocab_size].float().log_softmax(dim=-1)
        return log_BV.cpu(), output.past_key_values


class ContrastiveWorker:
    """A decoder with its models, run by `ContrastiveClient` as a Ray actor; the models are read at the first call."""

    def __init__(self, paths: dict[str, Path], dtype: Dtype, trust_remote_code: bool, options: dict[str, Any]) -> None:
        self._paths, self._dtype, self._remote, self._options = paths, dtype, trust_remote_code, options

    def generate(self, *arguments: Any, **options: Any) -> list[list[int]]:
        """Continues sequences; see `ContrastiveDecoder.generate`."""
        return self._decoder.generate(*arguments, **options)

    def cost(self, sequences: list[list[int]], max_tokens: int) -> dict[str, float]:
        """Tokens per second of plain and of contrastive decoding in one process, taken in turns, and their ratio."""
        decoders = {"contrastive": self._decoder, "plain": replace(self._decoder, base=None)}
        seconds, tokens = dict.fromkeys(decoders, 0.0), dict.fromkeys(decoders, 0)
        for turn in range(_COST_ROUNDS + 1):
            for name, decoder in decoders.items():
                started = time.perf_counter()
                answers = decoder.generate(sequences, max_tokens=max_tokens)
                if turn > 0:  # the first turn warms up
                    seconds[name] += time.perf_counter() - started
                    tokens[name] += sum(map(len, answers))
        plain, contrastive = (tokens[name] / seconds[name] for name in ("plain", "contrastive"))
        ratio = plain / contrastive
        return {"plain_tokens_per_s": plain, "contrastive_tokens_per_s": contrastive, "cost_ratio": ratio}

    @cached_property
    def _decoder(self) -> ContrastiveDecoder:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        models = (
            load_model(self._paths[role], self._dtype, trust_remote_code=self._remote).to(device)
            for role in ("aligned", "base")
        )
        return ContrastiveDecoder(*models, **self._options)


class ContrastiveClient:
    """A contrastive decoder in a Ray actor (implements `raycomplete.runtime.types.Generator`)."""

    def __init__(self, run: Run) -> None:
        config, models, use_gpu = run.config, run.models, run.cluster.use_gpu
        options = {
            "vocab_size": models.codec.vocab_size,
            "stop_ids": tuple(sorted(models.codec.eos_ids)),
            "settings": config.diagnose.contrastive,
            "max_length": config.models.max_length,
        }
        spec = EngineSpec.from_config(config, "single", models.paths["aligned"], use_gpu=use_gpu)
        placed = ray.remote(ContrastiveWorker).options(
            num_cpus=config.cluster.cpus_per_engine,
            num_gpus=config.cluster.gpus_per_engine if use_gpu else 0.0,
            runtime_env={"env_vars": spec.environment()},
            max_restarts=1,
        )
        paths = {role: models.paths[role] for role in ("aligned", "base")}
        self._actor = placed.remote(paths, config.models.weight_dtype, config.models.trust_remote_code, options)
        self._timeout_s = config.rollout.timeout_s

    def generate(self, sequences: Sequence[Sequence[int]], **options: Any) -> list[list[int]]:
        """Continues sequences; see `ContrastiveDecoder.generate`."""
        reference = self._actor.generate.remote([list(sequence) for sequence in sequences], **options)
        answers: list[list[int]] = self._get(reference, f"{len(sequences)} responses")
        return answers

    def cost(self, sequences: Sequence[Sequence[int]], max_tokens: int) -> dict[str, float]:
        """Measures what contrastive decoding costs; see `ContrastiveWorker.cost`."""
        reference = self._actor.cost.remote([list(sequence) for sequence in sequences], max_tokens)
        cost: dict[str, float] = self._get(reference, "its cost")
        return cost

    def stop(self) -> None:
        """Ends the actor and frees its memory."""
        ray.kill(self._actor)

    def _get(self, reference: Any, what: str) -> Any:
        return wait_for(reference, who="contrastive decoder", what=what, timeout_s=self._timeout_s)
