"""Contrastive decoding, the remedy at inference time, as a baseline: base and aligned side by side, token after token.

Each next token comes from q ~ p_a (p_a / p_b)^alpha among the tokens that aligned finds plausible
(`raycomplete.losses.divergences.contrastive_log_probs`), so no weight changes. The remedy is the idea of arXiv
2511.12155 (known by secondary reports); this form of it is ours. Around a student, and under every attack, it is
`evaluation.defence`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from raycomplete.attacks.target import Target
from raycomplete.config.evaluation import CapabilitiesConfig
from raycomplete.data.checkpoints import fingerprint
from raycomplete.data.inputs import prepare_prompts
from raycomplete.engines.run import Run
from raycomplete.evaluation.defences.start import TwoModelClient, start_pair
from raycomplete.evaluation.defences.two_models import Rule
from raycomplete.evaluation.model_judges import start_judge
from raycomplete.evaluation.roles import evaluate_roles, evaluate_target, held_out_sets
from raycomplete.runtime.files import read_json, write_json

_COST_PROMPTS, _COST_TOKENS = 8, 32


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
    settings_ = run.config.diagnose.contrastive
    rule = Rule("contrastive", settings_.alpha, settings_.plausibility)
    paths = run.models.paths["aligned"], run.models.paths["base"]
    decoder = TwoModelClient(start_pair(run, rule, settings_.batch), paths, run.config.rollout.timeout_s)
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


def _evaluate(run: Run, decoder: TwoModelClient) -> dict[str, Any]:
    """Evaluates contrastive decoding by the same trials as every model, into evaluation/contrastive.json."""
    config, settings, codec = run.config, run.config.diagnose.contrastive, run.models.codec
    ids = "+".join(fingerprint(run.models.paths[role]) for role in ("aligned", "base"))
    model_id = f"{ids} alpha={settings.alpha:g} plausibility={settings.plausibility:g}"
    limits = (config.models.max_length, config.evaluation.max_tokens)
    with start_judge(config, run.judge, run.console) as judge:
        target = Target("contrastive", model_id, decoder, codec, judge, *limits, cancelled=run.is_stopping)
        return evaluate_target(run, target)
