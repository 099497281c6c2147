"""`raycomplete doctor`: runs the checks, each with a time limit, and shows them as a table or as JSON."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from raycomplete import __version__
from raycomplete.config import load_run_file
from raycomplete.doctor import checks as made
from raycomplete.doctor.findings import STATUSES, Context, Finding, Status, fail, tell
from raycomplete.runtime.errors import RaycompleteError, WaitTimeoutError
from raycomplete.runtime.machine import within

SCHEMA = 2  # of the JSON; raised when a key is renamed or goes
_COLORS: dict[Status, str] = {"ok": "green", "warn": "yellow", "fail": "red"}
_ALWAYS_TOLD = ("gpu", "compiler", "engine")
_CHILD_S = 15.0  # what a check takes beside the child process that it asks


class Check(NamedTuple):
    """One check; programs read its name, and it has failed after `timeout_s`."""

    name: str
    run: Callable[[Context], Finding]
    timeout_s: float = 20.0


CHECKS: tuple[Check, ...] = (
    Check("python", made.check_python),
    Check("requirements", made.check_requirements, 60.0),
    Check("tested versions", made.check_tested_set),
    Check("imports", made.check_imports, made.IMPORT_TIMEOUT_S + _CHILD_S),
    Check("processor", made.check_cpu),
    Check("gpu", made.check_gpu, made.IMPORT_TIMEOUT_S + _CHILD_S),
    Check("compiler", made.check_compiler),
    Check("memory", made.check_memory),
    Check("disk", made.check_disk),
    Check("shared memory", made.check_shared_memory),
    Check("open files", made.check_open_files),
    Check("ports", made.check_ports),
    Check("ray token", made.check_ray_token),
    Check("service token", made.check_service_token),
    Check("cluster", made.check_cluster, made.CLUSTER_TIMEOUT_S + _CHILD_S),
    Check("node versions", made.check_node_versions),
    Check("clocks", made.check_clocks),
    Check("shared storage", made.check_shared_storage),
    Check("run file", made.check_run_file),
    Check("checkpoints", made.check_checkpoints, made.INPUTS_TIMEOUT_S + _CHILD_S),
    Check("prompts", made.check_prompts),
    Check("engine", made.check_engine, made.ENGINE_TIMEOUT_S + _CHILD_S),
)


class CheckResult(NamedTuple):
    """A check's finding, and how long it took."""

    name: str
    finding: Finding
    seconds: float


def doctor(run_file: Path | None, overrides: Sequence[str], *, as_json: bool, quick: bool) -> int:
    """Examines this machine, and the cluster where one is named, for a run file or the demo; 2 where a check failed."""
    context = Context(run_file, quick=quick)
    try:
        context.config = load_run_file(run_file, overrides) if run_file else None
    except RaycompleteError as error:
        context.problem = error
    console = Console(stderr=as_json, quiet=as_json)
    with console.status("") as status:
        results = list(run_checks(context, CHECKS, on_start=lambda name: status.update(f"Checking {name} ...")))
    if as_json:
        checks = [{"name": name, **vars(finding), "seconds": round(seconds, 3)} for name, finding, seconds in results]
        found = {
            "schema": SCHEMA,
            "raycomplete": __version__,
            "status": worst(results),
            "run_file": str(run_file) if run_file else None,
            "address": context.address,
            "quick": quick,
            "checks": checks,
        }
        print(json.dumps(found, indent=1))
    else:
        _show(console, results)
    return 2 if worst(results) == "fail" else 0


def run_checks(
    context: Context, checks: Sequence[Check] = CHECKS, on_start: Callable[[str], None] = lambda _: None
) -> Iterator[CheckResult]:
    """Runs one check after another. One that raises, or takes longer than its limit, has failed."""
    for check in checks:
        on_start(check.name)
        started = time.perf_counter()
        yield CheckResult(check.name, _run(check, context), time.perf_counter() - started)


def _run(check: Check, context: Context) -> Finding:
    try:
        return within(check.timeout_s, "No answer", lambda: check.run(context))
    except WaitTimeoutError:
        remedy = "A device, a driver or a file system hangs: `dmesg | tail` and `df` may show which."
        return fail(f"No answer within {check.timeout_s:g} s.", remedy)
    except (Exception, SystemExit) as error:  # some libraries exit
        words = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        remedy = "Please report this; the other checks are not affected."
        return fail(f"The check itself failed ({words}).", remedy)


def tell_checks(*, quick: bool) -> int:
    """Reports each check as it ends, as a stage of `doctor --gpu`; returns what `doctor` does."""
    results = []
    for result in run_checks(Context(quick=quick), CHECKS):
        results.append(result)
        finding = result.finding
        if finding.status != "ok" or result.name in _ALWAYS_TOLD:
            tell({result.name: f"{finding.status}: {finding.found} {finding.remedy}".strip()})
    return 2 if worst(results) == "fail" else 0


def worst(results: Sequence[CheckResult]) -> Status:
    """Returns the worst status; "ok" of none."""
    return max((result.finding.status for result in results), key=STATUSES.index, default="ok")


def _show(console: Console, results: Sequence[CheckResult]) -> None:
    table = Table(show_header=False, box=None, pad_edge=False)
    for name in ("status", "check", "found"):
        table.add_column(name, no_wrap=name != "found")
    for name, finding, _ in results:
        words = escape(finding.found)
        if finding.remedy:
            words += f"\n[bold]-> {escape(finding.remedy)}[/bold]"
        color = _COLORS[finding.status]
        table.add_row(f"[{color}]{finding.status}[/{color}]", name, words)
    console.print(table, highlight=False)
    good, noted, failed = (sum(result.finding.status == status for result in results) for status in STATUSES)
    seconds = sum(result.seconds for result in results)
    console.print(f"\n{good} ok, {noted} to note, {failed} failed, in {seconds:.0f} s.", highlight=False)


if __name__ == "__main__":
    sys.exit(tell_checks(quick="quick" in sys.argv))
