"""Contrastive decoding as a baseline: attacked like the other models, and its cost measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from raycomplete.attacks.target import Target
from raycomplete.config import RunConfig
from raycomplete.config.evaluation import CapabilitiesConfig
from raycomplete.data.checkpoints import fingerprint
from raycomplete.data.inputs import Models, prepare_prompts
from raycomplete.diagnosis.contrastive import ContrastiveClient
from raycomplete.engines.cluster import Cluster
from raycomplete.engines.run import Run
from raycomplete.engines.spec import EngineSpec
from raycomplete.engines.start import Engines
from raycomplete.evaluation.model_judges import start_judge
from raycomplete.evaluation.roles import evaluate_roles, evaluate_target, held_out_sets
from raycomplete.runtime.console import Console
from raycomplete.runtime.files import read_json, write_json

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
    run.prompts = held_out_sets(run)
    plain = evaluate_roles(run, ("aligned",))
    engines.stop_scorers()  # their memory is needed for two more models
    decoder = start_contrastive(config, cluster, models)
    try:
        result = evaluate_contrastive(run, decoder)
        cost = read_json(folder / "contrastive_cost.json")
        if cost is None:
            benign = run.prompts.evaluation["benign"][:_COST_PROMPTS]
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


def evaluate_contrastive(run: Run, decoder: ContrastiveClient) -> dict[str, Any]:
    """Evaluates contrastive decoding by the same trials as every model, into evaluation/contrastive.json."""
    config, models, settings = run.config, run.models, run.config.diagnose.contrastive
    ids = "+".join(fingerprint(models.paths[role]) for role in ("aligned", "base"))
    with start_judge(config, run.judge, run.console) as judge:
        target = Target(
            "contrastive",
            f"{ids} alpha={settings.alpha:g} plausibility={settings.plausibility:g}",
            decoder,
            models.codec,
            judge,
            config.models.max_length,
            config.evaluation.max_tokens,
            cancelled=run.is_stopping,
        )
        return evaluate_target(run, target)
