"""Contrastive decoding as a baseline: attacked like the other models, and its cost measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from raycomplete.commands.evaluate import evaluate_roles, held_out_sets
from raycomplete.commands.judge import start_judge
from raycomplete.config import RunConfig
from raycomplete.config.evaluation import CapabilitiesConfig
from raycomplete.data.checkpoints import fingerprint
from raycomplete.data.inputs import Models, Prompts, prepare_prompts
from raycomplete.diagnosis.contrastive import ContrastiveClient
from raycomplete.engines.cluster import Cluster
from raycomplete.engines.run import Run
from raycomplete.engines.spec import EngineSpec
from raycomplete.engines.start import Engines
from raycomplete.evaluation import EvaluationSets, evaluate_model
from raycomplete.runtime.console import Console
from raycomplete.runtime.files import read_json, write_json
from raycomplete.runtime.types import ModelRole

CONTRASTIVE = cast("ModelRole", "contrastive")  # a row of results beside the three models, not a checkpoint
_COST_PROMPTS, _COST_TOKENS = 8, 32


def contrastive_baseline(
    config: RunConfig, cluster: Cluster, models: Models, engines: Engines, folder: Path, console: Console
) -> dict[str, Any]:
    """Evaluates the aligned model plainly and under contrastive decoding on the held-out prompts of the run file.

    Returns:
        Both results by name, and the cost of contrastive decoding relative to plain decoding in the same loop.

    Raises:
        DataError: The run file names no held-out prompts of some kind.
    """
    # The depth curve and the harmless prompts: a baseline is compared by these, and searches would take hours with it.
    settings = config.evaluation.model_copy(
        update={"attacks": [config.evaluation.prefill()], "capabilities": CapabilitiesConfig()}
    )
    config = config.model_copy(update={"evaluation": settings})
    prompts = prepare_prompts(config, models.codec, training=False)
    run = Run(config, folder, models, prompts, console, cluster)
    run.engines = engines
    run.prompts = prompts = held_out_sets(run)
    plain = evaluate_roles(run, ("aligned",))
    engines.stop_scorers()  # their memory is needed for two more models
    decoder = start_contrastive(config, cluster, models)
    try:
        result = evaluate_contrastive(config, models, decoder, prompts, folder, console)
        cost = read_json(folder / "contrastive_cost.json")
        if cost is None:
            benign = prompts.evaluation["benign"][:_COST_PROMPTS]
            with console.stage("Cost of contrastive decoding"):
                cost = decoder.cost([models.codec.encode_prompt(prompt.text) for prompt in benign], _COST_TOKENS)
            write_json(folder / "contrastive_cost.json", cost)
    finally:
        decoder.stop()
    return {"results": {**plain, "contrastive": result}, "cost": cost}


def start_contrastive(config: RunConfig, cluster: Cluster, models: Models) -> ContrastiveClient:
    """The decoder as a Ray actor."""
    return ContrastiveClient.start(
        {role: models.paths[role] for role in ("aligned", "base")},
        dtype=config.models.dtype,
        trust_remote_code=config.models.trust_remote_code,
        timeout_s=config.rollout.timeout_s,
        num_cpus=config.cluster.cpus_per_engine,
        num_gpus=config.cluster.gpus_per_engine if cluster.use_gpu else 0.0,
        environment=EngineSpec.from_config(
            config, "single", models.paths["aligned"], use_gpu=cluster.use_gpu
        ).environment(),
        vocab_size=models.codec.vocab_size,
        stop_ids=tuple(sorted(models.codec.eos_ids)),
        settings=config.diagnose.contrastive,
        max_length=config.models.max_length,
    )


def evaluate_contrastive(
    config: RunConfig, models: Models, decoder: ContrastiveClient, prompts: Prompts, folder: Path, console: Console
) -> dict[str, Any]:
    """evaluation/contrastive.json, by the same cells as every other model."""
    settings = config.diagnose.contrastive
    ids = "+".join(fingerprint(models.paths[role]) for role in ("aligned", "base"))
    sets = EvaluationSets(**{str(kind): found for kind, found in prompts.evaluation.items()})
    with (
        start_judge(config, prompts.judge, console) as judge,
        console.progress("Evaluation of contrastive decoding", len(config.evaluation.depths) + 2) as advance,
    ):
        return evaluate_model(
            CONTRASTIVE,
            decoder,
            models.codec,
            judge,
            sets,
            config.evaluation,
            folder,
            model_id=f"{ids} alpha={settings.alpha:g} plausibility={settings.plausibility:g}",
            max_length=config.models.max_length,
            on_progress=lambda name, done, total: advance(done, name),
        )
