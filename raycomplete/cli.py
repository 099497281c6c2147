"""The `raycomplete` command: options, exit codes, and one sentence for each failure.

Packages are imported inside commands, and run files are read before that, so that `--help` and refusals are quick.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from importlib.resources import as_file, files
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

import raycomplete as rc
from raycomplete.commands.submit import JOBS
from raycomplete.config import load_run_file
from raycomplete.data import organisms
from raycomplete.data.organism import families
from raycomplete.runtime.errors import ConfigError, LostJobError, ProcessDiedError, RaycompleteError, StoppedError
from raycomplete.runtime.logs import log_failure
from raycomplete.runtime.machine import let_idle_threads_sleep
from raycomplete.runtime.signals import KEPT, handled, stop

app = typer.Typer(
    name="raycomplete",
    help="Finish the safety alignment of a language model: measure where it stopped, train the rest, prove it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
organism_app = typer.Typer(help="The model organisms.", no_args_is_help=True)
app.add_typer(organism_app, name="organism")
judge_app = typer.Typer(help="Judges of responses.", no_args_is_help=True)
app.add_typer(judge_app, name="judge")

RunFile = Annotated[Path, typer.Argument(help="Run file (YAML).", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Values that replace those of the run file: train.steps=50", show_default=False),
]
_INTERRUPTED = 130  # typer's own code for KeyboardInterrupt, which it does not let through

Resume = Annotated[bool, typer.Option("--resume", help="Continue an interrupted run.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run of the same name.")]


@app.command()
def demo(overrides: Overrides = None, resume: Resume = False) -> None:
    """Runs the main job on the embedded model organism, on this machine: a few minutes on 2 cores."""
    with as_file(files("raycomplete").joinpath("data", "organism", "organism.yaml")) as path:
        config = load_run_file(path, ["output.name=demo", *(overrides or [])])
    # Only the demo's own folder is replaced unasked.
    rc.train(config, resume=resume, overwrite=config.output.name == "demo")


@app.command()
def doctor(
    run_file: Annotated[
        Path | None, typer.Argument(help="Run file to examine this machine for; the demo without.", show_default=False)
    ] = None,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Start no engine.")] = False,
    gpu: Annotated[bool, typer.Option("--gpu", help="Prove this machine's GPUs in at most 10 minutes.")] = False,
    rehearse: Annotated[bool, typer.Option("--rehearse", help="With --gpu: on the CPU, with tiny sizes.")] = False,
    out: Annotated[Path, typer.Option(help="With --gpu: folder of the report.")] = Path("runs/gpu"),
    stages: Annotated[str, typer.Option(help="With --gpu: stages to run, with commas; all without.")] = "",
) -> None:
    """Examines packages, devices, space, ports, tokens and the cluster, and names the remedy of what is wrong."""
    if gpu:
        from raycomplete.doctor.gpu import prove_gpu

        only = [name.strip() for name in stages.split(",") if name.strip()]
        raise typer.Exit(prove_gpu(out, Console(), rehearsal=rehearse, only=only))
    from raycomplete.doctor.command import doctor as run_doctor

    raise typer.Exit(run_doctor(run_file, overrides or [], as_json=as_json, quick=quick))


@app.command()
def train(run_file: RunFile, overrides: Overrides = None, resume: Resume = False, overwrite: Overwrite = False) -> None:
    """Completes a safety-aligned model: sample, score, train, evaluate, report."""
    rc.train(load_run_file(run_file, overrides or []), resume=resume, overwrite=overwrite)


@app.command()
def align(run_file: RunFile, overrides: Overrides = None, resume: Resume = False, overwrite: Overwrite = False) -> None:
    """Makes an aligned twin of a base model by safety SFT on your data."""
    rc.align(load_run_file(run_file, overrides or []), resume=resume, overwrite=overwrite)


@app.command()
def evaluate(run_file: RunFile, overrides: Overrides = None) -> None:
    """Measures attack success by prefill depth, utility and over-refusal of base, aligned and student."""
    rc.evaluate(load_run_file(run_file, overrides or []))


@app.command()
def diagnose(
    run_file: RunFile,
    overrides: Overrides = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    show_harmful: Annotated[bool, typer.Option("--show-harmful", help="Show harmful text in the report.")] = False,
) -> None:
    """Shows where alignment stopped, by position: needs a base and an aligned checkpoint, and trains nothing."""
    shown = ["diagnose.show_harmful=true"] if show_harmful else []
    config = load_run_file(run_file, [*(overrides or []), *shown])
    rc.diagnose(config, resume=resume, overwrite=overwrite)


@app.command()
def serve(
    run_file: RunFile,
    overrides: Overrides = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on; others than 127.0.0.1 need a token.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on.")] = None,
) -> None:
    """Serves evaluations over HTTP, with a web page, until it is interrupted."""
    chosen = [f"serve.{key}={value}" for key, value in (("host", host), ("port", port)) if value is not None]
    config = load_run_file(run_file, [*(overrides or []), *chosen])
    rc.serve(config)


@app.command()
def plan(
    run_file: RunFile,
    overrides: Overrides = None,
    hardware: Annotated[str, typer.Option(help="h100, h200, b200, a100, l40s, l4 or cpu.")] = "h100",
    nodes: Annotated[int, typer.Option(help="Machines.")] = 1,
    gpus_per_node: Annotated[int, typer.Option(help="Devices of each.")] = 1,
    student: Annotated[str | None, typer.Option(help="Shape in place of the student's: 8B, or a folder.")] = None,
    teacher: Annotated[str | None, typer.Option(help="Shape in place of both frozen models'.")] = None,
    price_per_gpu_hour: Annotated[float | None, typer.Option(help="Of one device, in any currency.")] = None,
    prompt_tokens: Annotated[float, typer.Option(help="Mean tokens of a prompt with its template.")] = 64.0,
    network_gbit: Annotated[float, typer.Option(help="Of one node, for Ray's objects.")] = 50.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Says on paper what a run needs: memory, speed, waiting, cost and bottleneck. Starts nothing."""
    config = load_run_file(run_file, overrides or [])
    from raycomplete.commands.plan import plan as run_plan

    run_plan(
        config,
        hardware=hardware,
        student=student,
        teacher=teacher,
        as_json=as_json,
        nodes=nodes,
        devices_per_node=gpus_per_node,
        price=price_per_gpu_hour,
        prompt_tokens=prompt_tokens,
        network_gbit=network_gbit,
    )


@app.command()
def study(
    study_file: Annotated[Path, typer.Argument(help="Study file (YAML).", show_default=False)],
    overrides: Overrides = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
) -> None:
    """Trains and evaluates several methods under several seeds, and puts them into one table."""
    from raycomplete.config.study import load_study

    found = load_study(study_file, overrides or [])
    from raycomplete.commands.study import study as run_study

    run_study(found, resume=resume, overwrite=overwrite)


@app.command()
def submit(
    run_file: RunFile,
    overrides: Overrides = None,
    address: Annotated[str | None, typer.Option(help="Of the cluster's job server.", show_default=False)] = None,
    job: Annotated[str, typer.Option(help="train, align, diagnose, evaluate or serve.")] = "train",
    working_dir: Annotated[Path, typer.Option(help="Folder that is uploaded.")] = Path("."),
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Do not follow the job.")] = False,
    resume: Resume = False,
    overwrite: Overwrite = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the command and send nothing.")] = False,
) -> int:
    """Runs a job on a cluster by `ray job submit`: prints the command, follows its log, ends with its exit code."""
    from raycomplete.commands import submit as submitting

    flags = [flag for flag, is_set in (("--resume", resume), ("--overwrite", overwrite)) if is_set]
    submission = submitting.prepare(
        run_file, overrides or [], job=job, address=address, working_dir=working_dir, flags=flags
    )
    console = Console(stderr=True)
    for warning in submission.warnings:
        console.print(f"[yellow]Note:[/yellow] {escape(warning)}", highlight=False, soft_wrap=True)
    print(submission.command(), flush=True)

    def say(text: str) -> None:
        console.print(escape(text), style="dim", soft_wrap=True)

    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the job goes on
    signal.signal(signal.SIGINT, signal.default_int_handler)  # asks the job to stop, and waits for it
    return 0 if dry_run else submitting.submit(submission, say, wait=not no_wait)


@app.command()
def report(
    run_folders: Annotated[list[Path], typer.Argument(help="Folders of finished runs.", show_default=False)],
    kind: Annotated[str, typer.Option("--format", help="html, csv, json, or inspect for logs of Inspect.")] = "html",
    output: Annotated[Path | None, typer.Option(help="Where csv, json, inspect or the rates of several go.")] = None,
    allow_differences: Annotated[
        bool, typer.Option("--allow-differences", help="Several runs: take those that differ in more than the seed.")
    ] = False,
    show_harmful: Annotated[
        bool, typer.Option("--show-harmful", help="inspect: with what models said after harmful prompts.")
    ] = False,
) -> None:
    """Writes report.html of a run folder anew, or its rates for other tools; of several, means and spread of rates."""
    from raycomplete.commands.report import report as run_report

    options: dict[str, Any] = {"kind": kind, "output": output, "show_harmful": show_harmful}
    run_report(run_folders, allow_differences=allow_differences, **options)


@app.command()
def push(
    run_folder: Annotated[Path, typer.Argument(help="Folder of a finished run.", show_default=False)],
    repository: Annotated[str, typer.Argument(help="org/name on the hub.", show_default=False)],
    yes: Annotated[bool, typer.Option("--yes", help="Upload; without it everything is only listed.")] = False,
    public: Annotated[bool, typer.Option("--public", help="For everybody; private without it.")] = False,
) -> None:
    """Uploads the student of a run with its model card to the hub; without --yes it only says what would go there."""
    from raycomplete.commands.push import push as run_push

    run_push(run_folder, repository, yes=yes, public=public)


@organism_app.command("build")
def organism_build(
    target: Annotated[
        str | None,
        typer.Argument(
            metavar="[large|FOLDER]", help="The large organism, or a folder for the toy.", show_default=False
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Argument(help="Folder for the large one; the cache folder without.", show_default=False)
    ] = None,
    family: Annotated[
        str | None,
        typer.Option(help=f"Of the toy: {', '.join(families.FAMILIES)}. Without a folder, into the cache folder."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of weights and data.")] = 0,
) -> None:
    """Trains an organism's base and aligned checkpoints from scratch."""
    if target == "large" and family is None:
        organism, folder = organisms.large(seed), output
    elif target == "large" or output or not (target or family):
        raise ConfigError(
            "This names no organism.", "Give `large`, or one folder for the toy, or --family, or a folder and --family."
        )
    else:
        organism, folder = organisms.toy(family or "llama", seed), Path(target) if target else None
    from raycomplete.data.organism.build import build, build_into_cache

    if folder is not None:
        build(organism, folder)
    Console().print(f"{build_into_cache(organism) if folder is None else folder}", soft_wrap=True)


@judge_app.command("calibrate")
def judge_calibrate(
    file: Annotated[Path, typer.Argument(help="Human-labelled completions (CSV or JSONL).", show_default=False)],
    kind: Annotated[str, typer.Option(help="patterns, model or endpoint.")] = "patterns",
    checkpoint: Annotated[str | None, typer.Option(help="The judge model.")] = None,
    address: Annotated[str | None, typer.Option(help="OpenAI-compatible address of a judge.")] = None,
    model: Annotated[str | None, typer.Option(help="The model behind the address.")] = None,
    key_variable: Annotated[str | None, typer.Option(help="Environment variable that holds its key.")] = None,
    rubric: Annotated[str, typer.Option(help="Its rubric: refusal, or a YAML file.")] = "refusal",
    max_length: Annotated[int, typer.Option(help="Of a judge model: models.max_length of the run.")] = 1024,
    output: Annotated[Path, typer.Option(help="Where its error rates go.")] = Path("judge-calibration.json"),
) -> None:
    """Measures how often a judge errs, for rates that are corrected for it."""
    from raycomplete.attacks.registry import checked
    from raycomplete.config.evaluation import JudgeConfig

    asked = {"address": address, "model": model, "key_variable": key_variable}
    settings = checked(JudgeConfig, {"kind": kind, "checkpoint": checkpoint, "rubric": rubric, **asked}, "judge")
    from raycomplete.commands.judge import calibrate_judge

    calibrate_judge(file, settings, output, max_length=max_length)


@app.command()
def version() -> None:
    """Prints the version."""
    Console().print(rc.__version__)


def main() -> None:
    """Runs the command line and leaves with its exit code."""
    let_idle_threads_sleep()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # which are in force again when `guarded` is done; see __main__
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(guarded(lambda: app(standalone_mode=False)))


def run_job(job: str, arguments: list[str]) -> int:
    """Runs a command for a script of jobs/, with arguments RUNFILE [--resume] [--overwrite] [key=value ...]."""
    flags = {"--resume": "resume", "--overwrite": "overwrite"} if JOBS[job] else {}
    options = {flags[argument]: True for argument in arguments if argument in flags}
    rest = [argument for argument in arguments if argument not in flags]
    if not rest or any(argument.startswith("-") for argument in rest):
        print(" ".join(["Usage: RUNFILE", *(f"[{flag}]" for flag in flags), "[key=value ...]"]), file=sys.stderr)
        return 2

    def work() -> Any:
        config = load_run_file(rest[0], rest[1:])
        return getattr(rc, job)(config, **options)

    return guarded(work)


def guarded(work: Callable[[], Any]) -> int:
    """Does something and turns its failure, and a signal to stop, into one sentence and an exit code.

    It is 0 when done, 1 for a failure at work or a stop (finished work is kept), 2 for a refusal before the start.
    """
    with handled():
        return _exit_code(work)


def _exit_code(work: Callable[[], Any]) -> int:
    console = Console(stderr=True)
    try:
        result = work()
        if result == _INTERRUPTED:
            raise KeyboardInterrupt
    except RaycompleteError as error:
        if os.environ.get("RAYCOMPLETE_TRACEBACK"):
            raise
        if isinstance(error, StoppedError):
            console.print(str(error), highlight=False, markup=False, soft_wrap=True)
            return error.exit_code
        log_failure(error)
        kind = "Refused" if error.exit_code == 2 else "Failed"
        sentence = escape(error.problem if isinstance(error, ProcessDiedError) else str(error))
        console.print(f"[bold red]{kind}:[/bold red] {sentence}", highlight=False, soft_wrap=True)
        if isinstance(error, ProcessDiedError):
            from raycomplete.runtime.console import print_details

            print_details(console, error.details())
        elif error.exit_code == 1 and not isinstance(error, LostJobError):
            console.print(KEPT, style="dim")
        return error.exit_code
    except (typer.Abort, KeyboardInterrupt, SystemExit) as ended:
        # Where no work has taken the signal, Ray's own handler of SIGTERM leaves by sys.exit(15), without a word.
        if isinstance(ended, SystemExit) and ended.code != signal.SIGTERM:
            raise
        console.print(f"Stopped. {KEPT}", style="dim", soft_wrap=True)
        return 1
    except Exception as error:
        if stop.requested:  # an interrupted import may fail in any way
            log_failure(error)
            console.print(f"Stopped. {KEPT}", style="dim", soft_wrap=True)
            return 1
        show = getattr(error, "show", None)  # usage errors of typer know how to print themselves
        if show is None:
            log_failure(error)
            raise
        show()
        return 2
    return result if isinstance(result, int) else 0  # --help and typer.Exit return their code
