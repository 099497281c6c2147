"""The list of checks, and how they are run: each with a time limit, none able to end the others."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from raycomplete.doctor import device, engine_smoke, network, nodes, resources, run_file, versions
from raycomplete.doctor.findings import Check, Context, Finding, fail

_CHILD_S = 15.0  # what a check takes beside the child process that it asks

CHECKS: tuple[Check, ...] = (
    Check("python", versions.check_python),
    Check("requirements", versions.check_requirements, 60.0),
    Check("tested versions", versions.check_tested_set),
    Check("imports", versions.check_imports, versions.IMPORT_TIMEOUT_S + _CHILD_S),
    Check("processor", device.check_cpu),
    Check("gpu", device.check_gpu, versions.IMPORT_TIMEOUT_S + _CHILD_S),
    Check("memory", resources.check_memory),
    Check("disk", resources.check_disk),
    Check("shared memory", resources.check_shared_memory),
    Check("open files", resources.check_open_files),
    Check("ports", network.check_ports),
    Check("ray token", network.check_ray_token),
    Check("service token", network.check_service_token),
    Check("cluster", nodes.check_cluster, nodes.PROBE_TIMEOUT_S + _CHILD_S),
    Check("node versions", nodes.check_node_versions),
    Check("clocks", nodes.check_clocks),
    Check("shared storage", nodes.check_shared_storage),
    Check("run file", run_file.check_run_file),
    Check("checkpoints", run_file.check_checkpoints, run_file.TIMEOUT_S + _CHILD_S),
    Check("prompts", run_file.check_prompts),
    Check("engine", engine_smoke.check_engine, engine_smoke.TIMEOUT_S + _CHILD_S),
)


class Outcome(NamedTuple):
    """A check with what it found, and how long that took."""

    name: str
    finding: Finding
    seconds: float


def run_checks(
    context: Context, checks: Sequence[Check] = CHECKS, on_start: Callable[[str], None] = lambda _: None
) -> Iterator[Outcome]:
    """Runs one check after another.

    Args:
        context: What they look at.
        checks: Which, in order.
        on_start: Told the name of each before it runs.

    Yields:
        What each found. One that raises, or takes longer than its limit, has failed.
    """
    for check in checks:
        on_start(check.name)
        started = time.perf_counter()
        yield Outcome(check.name, _run(check, context), time.perf_counter() - started)


def _run(check: Check, context: Context) -> Finding:
    found: queue.Queue[Finding] = queue.Queue()

    def work() -> None:
        try:
            found.put(check.run(context))
        except BaseException as error:  # whatever it is, it must not pass for "no answer in time"
            found.put(
                fail(
                    f"The check itself failed ({type(error).__name__}: {' '.join(str(error).split())[:300]}).",
                    "Please report this; the other checks are not affected.",
                )
            )

    threading.Thread(target=work, name=check.name, daemon=True).start()  # a hung one does not hold up the exit
    try:
        return found.get(timeout=check.timeout_s)
    except queue.Empty:
        return fail(
            f"No answer within {check.timeout_s:g} s.",
            "A device, a driver or a file system hangs: `dmesg | tail` and `df` may show which.",
        )
