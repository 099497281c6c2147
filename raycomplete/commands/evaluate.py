"""`raycomplete evaluate`: the evaluation of the three models, the summary and the report."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from raycomplete.attacks.trial import Progress
from raycomplete.commands.stored import stored
from raycomplete.config import RunConfig
from raycomplete.data.inputs import prepare_models, prepare_prompts
from raycomplete.engines.cluster import ResourcePlan, plan_run
from raycomplete.engines.run import OutputFolder, Run, open_run
from raycomplete.evaluation.attack_resources import check_evaluation, evaluation_inputs, extra_engines, training_workers
from raycomplete.evaluation.benign_nll import measure_benign_nll
from raycomplete.evaluation.defences.start import check_defence
from raycomplete.evaluation.remote_target import open_remote, usage_line
from raycomplete.evaluation.roles import evaluate_roles, held_out_sets
from raycomplete.evaluation.summary import (
    closing_table,
    difference_table,
    rate_text,
    reductions,
    summarize,
    trap_lines,
)
from raycomplete.report.html import write_report
from raycomplete.report.model_card import write_model_card
from raycomplete.runtime.console import Console
from raycomplete.runtime.files import read_json, write_json
from raycomplete.runtime.types import MODEL_ROLES, ModelRole

SAME = ("models", "data")  # sections that an evaluation shares with the run that it adds to
# Long templates need more room than training, which stands in the key of whatever it may change. Arguments of the chat
# template show in the tokens that responses are kept under.
FREE = ("models.max_length", "models.template_arguments")

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
    """Evaluates models without training, the student of the run folder among them; finished trials are reused."""
    console = console or Console()
    started = time.perf_counter()
    trained = config.output.folder / "student"
    if (trained / "config.json").is_file():
        tested = config.model_copy(update={"models": config.models.model_copy(update={"student": str(trained)})})
    else:
        tested = config
        if config.models.student is None and config.evaluation.defence is None:  # a copy of aligned is no student
            roles = [role for role in roles if role != "student"]
    with console.stage("Checked checkpoints, tokenizers and prompts"):
        models = prepare_models(tested, roles=tuple(dict.fromkeys(("base", *roles))), remote=True)
        defence = config.evaluation.defence
        prompts = prepare_prompts(config, models.codec, training=defence is not None and defence.needs_training)
        check_evaluation(config)
        check_defence(config, models)
        remote = open_remote(config, models.remote, models.codec)
    folder = OutputFolder(config, same=SAME, free=FREE, resume=True, keep_config=True)
    folder.check()
    plan = resources(config)
    with (
        open_run(folder, models, prompts, plan, console, on_progress=on_progress, cancelled=cancelled) as run,
        run.start_engines(),
    ):
        run.remote = remote
        for role, model in remote.items():
            model.keep_in(run.folder / "evaluation" / "remote" / f"{role}.jsonl")
        run.prompts = held_out_sets(run)
        results = evaluate_roles(run, roles)
        nll = measure_benign_nll(run, roles)
        for role, model in remote.items():
            run.remote_usage[role] = dict(model.usage.counts)
    summary = write_summary(run, results, nll, time.perf_counter() - started)
    print_result(summary, run.folder, console)
    return run.folder


def resources(config: RunConfig) -> ResourcePlan:
    """Plans what an evaluation places on the cluster."""
    return plan_run(config, extras=extra_engines(config), attack_workers=training_workers(config))


def write_summary(
    run: Run, results: Mapping[str, Mapping[str, Any]], nll: Mapping[str, Any], seconds: float
) -> dict[str, Any]:
    """Writes summary.json, report.html and the student's model card; `nll` is the result of `measure_benign_nll`."""
    config, folder = run.config, run.folder
    for name, usage in run.remote_usage.items():
        if usage["requests"]:
            run.console.note(usage_line(name, usage))
    prefills = read_json(folder / "evaluation" / "prefills.json") or {}
    summary = {
        "name": config.output.name,
        **summarize(results),
        "benign_nll": dict(nll),
        "prefills": prefills.get("outcomes"),
        "remote": dict(run.remote_usage),
        "evaluation": config.evaluation.model_dump(mode="json"),
        "evaluation_inputs": evaluation_inputs(config, run.prompts),
        "train": read_json(folder / "training.json") or {},
        "seconds": seconds,
        "versions": read_json(folder / "environment.json"),
    }
    write_json(folder / "summary.json", summary)
    write_report(folder)
    write_model_card(folder)
    return summary


def print_result(summary: Mapping[str, Any], folder: Path, console: Console) -> None:
    """Prints the closing table."""
    console.table("Attack success rate by prefill depth (95 % interval)", closing_table(summary))
    if comparisons := summary["comparisons"]:
        title = "Differences in percentage points, same prompts (95 % interval, paired bootstrap)"
        console.table(title, difference_table(comparisons))
    lines: list[tuple[str, Any]] = []
    if summary["asr_reduction"] is not None:
        reduction = f"{summary['asr_reduction']:.1%}"
        if found := summary["asr_reduction_interval"]:
            reduction += f" [{found['low']:.1%}, {found['high']:.1%}]"
        lines.append(("attack success reduced by", f"{reduction} (mean over depths, student against aligned)"))
    for name in ("utility", "over_refusal"):
        rates = ", ".join(f"{role} {rate_text(rate)}" for role, rate in summary[name].items())
        lines.append((name.replace("_", "-"), rates))
    if change := summary.get("benign_nll", {}).get("student_to_aligned"):
        ratio = f"{change['ratio']:.3f} times aligned's [{change['low']:.3f}, {change['high']:.3f}]"
        # A ratio says little where aligned is nearly certain of every token, as on the organism.
        text = f"{ratio}, {change['difference']:+.3f} nats a token, n = {change['n']}"
        lines.append(("benign NLL of the student", text))
    lines += [(f"judge: {name}", text) for name, text in trap_lines(summary.get("judge_measured"))]
    lines += [("reduced", f"{name}: {reasons}") for name, reasons in reductions(summary)]
    lines += [("safety regression", sentence) for sentence in summary.get("safety_regressions", [])]
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
