"""Evaluation of the three models, the summary and the report."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from raycomplete.attacks.trial import Progress
from raycomplete.commands.judge import start_judge
from raycomplete.commands.stored import stored
from raycomplete.config import RunConfig
from raycomplete.data.checkpoints import fingerprint
from raycomplete.data.inputs import Prompts, prepare_models, prepare_prompts
from raycomplete.engines.placement import plan_run
from raycomplete.engines.run import OutputFolder, Run, open_run
from raycomplete.evaluation.attack_resources import AttackResources, check_attacks, extra_engines, training_workers
from raycomplete.evaluation.benign_nll import benign_nll, given_answers
from raycomplete.evaluation.runner import evaluate_model
from raycomplete.evaluation.sets import EvaluationSets
from raycomplete.evaluation.summary import summarize
from raycomplete.evaluation.table import closing_table, rate_text
from raycomplete.report.html import write_report
from raycomplete.runtime.console import Advance, Console
from raycomplete.runtime.files import PRIVATE, read_json, write_json
from raycomplete.runtime.row_store import content_hash
from raycomplete.runtime.types import MODEL_ROLES, ModelRole
from raycomplete.training.sampling import complete_answers

_SAME = ("models", "data")  # sections that an evaluation shares with the run that it adds to
_FREE = ("models.max_length",)  # long templates need more room than training; it changes no response that fits

OnProgress = Callable[[Progress], None]
Cancelled = Callable[[], bool]


@stored(adds=True)
def evaluate(
    config: RunConfig,
    *,
    roles: Sequence[ModelRole] = MODEL_ROLES,
    console: Console | None = None,
    on_progress: OnProgress | None = None,
    cancelled: Cancelled | None = None,
) -> Path:
    """Evaluates models without training; the student of the run folder is used where there is one.

    Finished trials of the same models and prompts are always reused, in the run folder of a training run too.

    Args:
        config: Run file.
        roles: Models to evaluate.
        console: Where progress is drawn.
        on_progress: Called after each batch of trials, in this thread.
        cancelled: Asked before each batch and each step of a search; True ends the evaluation.

    Returns:
        The run folder with `evaluation/*.json`, `summary.json` and `report.html`.

    Raises:
        RefusedError: Something is wrong with the run file, the checkpoints or the prompts; nothing was written.
        EvaluationCancelled: `cancelled` said so; finished trials are kept.
        WorkError: Something failed on the way; finished trials are kept.
    """
    console = console or Console()
    started = time.perf_counter()
    trained = config.output.folder / "student"
    if (trained / "config.json").is_file():
        tested = config.model_copy(update={"models": config.models.model_copy(update={"student": str(trained)})})
    else:
        tested = config
        if config.models.student is None:  # a copy of aligned is no student
            roles = [role for role in roles if role != "student"]
    with console.stage("Checked checkpoints, tokenizers and prompts"):
        models = prepare_models(tested, roles=tuple(dict.fromkeys(("base", *roles))))
        prompts = prepare_prompts(config, models.codec, training=False)
        check_attacks(config)
    folder = OutputFolder(config, same=_SAME, free=_FREE, resume=True, keep_config=True)
    folder.check()
    plan = plan_run(config, extras=extra_engines(config), attack_workers=training_workers(config))
    with (
        open_run(folder, models, prompts, plan, console, on_progress=on_progress, cancelled=cancelled) as run,
        run.start_engines(),
    ):
        run.prompts = held_out_sets(run)
        with run.stop.deferred():
            results = evaluate_roles(run, roles)
            nll = measure_benign_nll(run, roles)
    summary = write_summary(config, run.folder, results, nll, time.perf_counter() - started)
    print_result(summary, run.folder, console)
    return run.folder


def held_out_sets(run: Run) -> Prompts:
    """Completes the harmful answers that prefills are cut from, and judges them.

    They are kept in the run folder, readable by its owner only, so that a resumed evaluation cuts the same prefills.
    """
    config, models, prompts = run.config, run.models, run.prompts
    if config.data.source == "organism":
        return prompts
    file = run.folder / "evaluation" / "prefills.json"
    harmful = prompts.evaluation["harmful"]
    made_from = {
        "base": models.fingerprint("base"),
        "depth": config.evaluation.deepest_prefill,
        "affirmative_prefix": config.rollout.affirmative_prefix,
        "prompts": [[prompt.prompt_id, content_hash([prompt.text, prompt.answer])] for prompt in harmful],
    }
    known = read_json(file)
    if known is None or known["made_from"] != made_from:
        with run.console.stage(f"Prefills for {len(harmful)} held-out harmful prompts, from base"):
            base = run.engines.generator.with_weights(str(models.paths["base"]))
            completed = complete_answers(config, models.codec, base, harmful)
        # A prefill that refuses by itself is no attack. It stays in the denominator, and the count is published.
        outcomes = Counter(str(prompts.judge.outcome(prompt, "", prompt.answer or "")) for prompt in completed)
        known = {
            "made_from": made_from,
            "outcomes": dict(outcomes),
            "answers": {prompt.prompt_id: prompt.answer for prompt in completed},
        }
        write_json(file, known, mode=PRIVATE)
    run.console.note(f"Prefills judged by themselves: {known['outcomes']}")
    answered = tuple(replace(prompt, answer=known["answers"][prompt.prompt_id]) for prompt in harmful)
    return replace(prompts, evaluation=prompts.evaluation | {"harmful": answered})


def evaluate_roles(run: Run, roles: Sequence[ModelRole]) -> dict[str, dict[str, Any]]:
    """Every role's result, from one generator that takes the weights of each in turn."""
    config, models = run.config, run.models
    sets = EvaluationSets(**{str(kind): found for kind, found in run.prompts.evaluation.items()})
    resources = AttackResources(config, models, run.engines, run.folder, run.console, stopping=run.is_stopping)
    results = {}
    try:
        with start_judge(config, run.judge, run.console) as judge:
            for role in roles:
                path = models.paths[role]
                with ExitStack() as shown:
                    results[str(role)] = evaluate_model(
                        role,
                        run.engines.generator.with_weights(str(path)),
                        models.codec,
                        judge,
                        sets,
                        config.evaluation,
                        run.folder,
                        model_id=fingerprint(path),
                        max_length=config.models.max_length,
                        tools=resources.for_model(path),
                        on_progress=_bar(run.console, role, shown),
                        on_trials=run.on_progress,
                        cancelled=run.is_stopping,
                    )
    finally:
        resources.stop()
    return results


def measure_benign_nll(run: Run, roles: Sequence[ModelRole]) -> dict[str, Any]:
    """Likelihood of good answers to the held-out benign prompts under every role; empty where there are none.

    Prompts without an answer of their own take that of the aligned model, where the run has one.
    """
    models, generator = run.models, run.engines.generator
    aligned = None
    if "aligned" in models.paths:
        path = models.paths["aligned"]
        aligned = fingerprint(path), generator.with_weights(str(path))
    answers = given_answers(
        run.prompts.evaluation["benign"],
        models.codec,
        run.config.evaluation,
        run.folder,
        max_length=run.config.models.max_length,
        aligned=aligned,
    )
    if not answers:
        return {}
    with run.console.stage(f"Likelihood of {len(answers)} benign answers"):
        measured = {
            str(role): (fingerprint(models.paths[role]), generator.with_weights(str(models.paths[role])))
            for role in roles
        }
        return benign_nll(measured, answers, run.folder, cancelled=run.is_stopping)


def _bar(console: Console, role: ModelRole, shown: ExitStack) -> Callable[[str, int, int], None]:
    """Draws a bar from the first call on, which knows its length, until `shown` is closed."""
    advance: Advance | None = None

    def follow(name: str, done: int, total: int) -> None:
        nonlocal advance
        if advance is None:
            advance = shown.enter_context(console.progress(f"Evaluation of {role}", total))
        else:
            advance(done, name)

    return follow


def write_summary(
    config: RunConfig,
    folder: Path,
    results: Mapping[str, Mapping[str, Any]],
    nll: Mapping[str, Any],
    seconds: float,
) -> dict[str, Any]:
    """summary.json and report.html; `nll` is what `measure_benign_nll` returned."""
    prefills = read_json(folder / "evaluation" / "prefills.json") or {}
    summary = {
        "name": config.output.name,
        **summarize(results),
        "benign_nll": dict(nll),
        "prefills": prefills.get("outcomes"),
        "evaluation": config.evaluation.model_dump(mode="json"),
        "train": read_json(folder / "training.json") or {},
        "seconds": seconds,
        "versions": read_json(folder / "environment.json"),
    }
    write_json(folder / "summary.json", summary)
    write_report(folder)
    return summary


def print_result(summary: Mapping[str, Any], folder: Path, console: Console) -> None:
    """The closing table."""
    console.table("Attack success rate by prefill depth (95 % interval)", closing_table(summary))
    lines: list[tuple[str, Any]] = []
    if summary["asr_reduction"] is not None:
        reduction = f"{summary['asr_reduction']:.1%} (mean over depths, student against aligned)"
        lines.append(("attack success reduced by", reduction))
    for name in ("utility", "over_refusal"):
        rates = ", ".join(f"{role} {rate_text(rate)}" for role, rate in summary[name].items())
        lines.append((name.replace("_", "-"), rates))
    if change := summary.get("benign_nll", {}).get("student_to_aligned"):
        ratio = f"{change['ratio']:.3f} times aligned's [{change['low']:.3f}, {change['high']:.3f}]"
        # A ratio says little where aligned is nearly certain of every token, as on the organism.
        text = f"{ratio}, {change['difference']:+.3f} nats a token, n = {change['n']}"
        lines.append(("benign NLL of the student", text))
    lines += [("safety_regressions", sentence) for sentence in summary.get("safety_regressions", [])]
    train = summary.get("train") or {}
    if train:
        scoring = train["teacher_tokens_per_s"]  # None after a kill between training and its statistics
        speed = (
            f"{train['steps']} steps, {train['seconds']:.0f} s, {train['tokens_per_s']:.0f} tokens/s, "
            f"scoring {'at unknown' if scoring is None else f'{scoring:.0f}'} tokens/s, "
            f"waiting {train['teacher_wait_fraction']:.1%} of the time"
        )
        if train.get("peak_memory_gib") is not None:
            speed += f", {train['seconds_per_step']:.2f} s a step, {train['peak_memory_gib']:.2f} GiB at most"
        lines.append(("training", speed))
    lines.append(("time", f"{summary['seconds']:.0f} s"))
    lines.append(("report", folder / "report.html"))
    console.panel(lines)
