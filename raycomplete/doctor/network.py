"""Checks of ports and tokens, and across the nodes of a cluster: reach, versions, clocks and the shared folder."""

from __future__ import annotations

import json
import os
import socket
import stat
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

from raycomplete.config import ServeConfig
from raycomplete.doctor.findings import PROBES, ChildReport, Context, Finding, ask, fail, ok, warn
from raycomplete.doctor.machine import local_folder, needs_of, student_of
from raycomplete.doctor.probes import look
from raycomplete.runtime.errors import ConfigError
from raycomplete.runtime.files import write_text

PROBE_TIMEOUT_S = 120.0
MAX_SKEW_S = 5.0
_RAY_PORTS = {6379: "Ray's head", 8265: "Ray's dashboard and jobs", 10001: "Ray's clients"}
_GENERATE = "ray get-auth-token --generate && chmod 600 ~/.ray/auth_token"
_STARTS_NODES_S = 60.0  # a run that waits this long counts on nodes that start on demand
_ALONE = "One machine and no cluster"


def check_ports(context: Context) -> Finding:
    """Checks that Ray's ports and the service's are free, or says who uses them."""
    service = _serve(context).port
    ports = {**_RAY_PORTS, service: "raycomplete serve"}
    used = {port: owner for port in ports if (owner := port_user(port)) is not None}
    values = {str(port): {"for": ports[port], "used_by": used.get(port)} for port in ports}
    if not used:
        return ok(f"Free: {', '.join(map(str, ports))}.", ports=values)
    words = "; ".join(f"{port} ({ports[port]}) is used by {owner}" for port, owner in used.items())
    remedies = [f"choose another serve.port than {service}, or end that process"] if service in used else []
    if used.keys() - {service}:
        remedies.append("a second `ray start --head` here needs other ports; a local run is not affected")
    remedy = "; ".join(remedies)
    return warn(f"{words}.", f"{remedy[:1].upper()}{remedy[1:]}.", ports=values)


def check_ray_token(context: Context) -> Finding:
    """Checks that Ray asks everyone for its token, and that only we can read it."""
    mode, shared = os.environ.get("RAY_AUTH_MODE", "").lower(), context.address is not None
    in_environment = bool(os.environ.get("RAY_AUTH_TOKEN"))  # looked up as Ray does
    file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token").expanduser()
    has_file = not in_environment and file.is_file()
    token = in_environment or has_file
    values = {"mode": mode or "default", "token": token, "file": str(file) if has_file else None}
    if mode not in ("", "token", "k8s"):
        words = f"RAY_AUTH_MODE is {mode!r}: whoever reaches Ray's ports runs code here."
        return fail(words, f"Unset RAY_AUTH_MODE, then {_GENERATE}.", **values)
    if has_file and (bits := _open_mode(file)):
        words = f"Other users may read Ray's token {file} (mode {bits})."
        return (fail if shared else warn)(words, f"chmod 600 {file}", **values, file_mode=bits)
    if token:
        where = f"in {file}, readable by its owner only" if has_file else "in RAY_AUTH_TOKEN"
        return ok(f"Token authentication is on; the token is {where}.", **values)
    if mode == "token" and shared:
        remedy = "Copy the cluster's ~/.ray/auth_token to this machine, with mode 0600."
        return fail("RAY_AUTH_MODE is 'token', and there is no token.", remedy, **values)
    if mode == "" and shared:  # Ray turns authentication on by itself where it finds a token
        words = f"A cluster is named ({context.address}), and there is neither RAY_AUTH_MODE nor a token to send to it."
        remedy = f"export RAY_AUTH_MODE=token on every node and here; a token: {_GENERATE}."
        return warn(words, remedy, **values)
    return ok("Token authentication is on; Ray makes a token when a local cluster starts.", **values)


def check_service_token(context: Context) -> Finding:
    """Checks that `raycomplete serve` would start: beyond this machine it needs a token."""
    from raycomplete.serving.requests import is_loopback, read_token_digest

    serve = _serve(context)
    values = {"host": serve.host, "port": serve.port}
    try:
        token = read_token_digest(serve)
    except ConfigError as error:
        return fail(error.problem, error.remedy, **values)
    if serve.token_file is not None and (bits := _open_mode(Path(serve.token_file).expanduser())):
        words = f"Other users may read the token file {serve.token_file} (mode {bits})."
        return fail(words, f"chmod 600 {serve.token_file}", **values)
    place = "this machine only" if is_loopback(serve.host) else "the network"
    asks = ", where it needs no token" if token is None else " and ask for the token"
    return ok(f"The service would listen on {serve.host} ({place}){asks}.", **values)


def port_user(port: int) -> str | None:
    """Names who listens on a port of this machine; None where it is free."""
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
    values = {"address": context.address, "resources": there, "nodes": nodes}
    if silent := report["alive"] - len(nodes):
        words += f"; {silent} of them ran no task ({'; '.join(report.get('errors', [])) or 'no answer in time'})."
        remedy = "See the raylet's log in /tmp/ray/session_latest/logs on that node, or remove the node."
        return fail(words, remedy, **values)
    if context.config is not None and (needed := needs_of(context.config).cpus) > there.get("CPU", 0.0):
        # The cluster of today may be the idle one of an autoscaler: then the run will ask for more and wait.
        judged = warn if context.config.cluster.wait_for_nodes_s >= _STARTS_NODES_S else fail
        remedy = "Add nodes, lower train.num_workers or cluster.cpus_per_engine, or, where nodes start on demand, set "
        remedy += "cluster.wait_for_nodes_s to minutes."
        return judged(f"{words}; the run needs {needed:g} CPU.", remedy, **values)
    return ok(f"{words}.", **values)


def check_node_versions(context: Context) -> Finding:
    """Compares Python and packages of every node with this one's."""
    nodes = _nodes(context)
    if isinstance(nodes, Finding):
        return nodes
    here: dict[str, str] = look("", "", [])["versions"]
    wrong, words = {}, []
    for node in nodes:
        there = node["versions"]
        names = [name for name in sorted(here.keys() | there.keys()) if there.get(name) != here.get(name)]
        if names:
            wrong[node["host"]] = {name: [there.get(name), here.get(name)] for name in names}
            shown = ", ".join(f"{name} {there.get(name)} (here {here.get(name)})" for name in names)
            words.append(f"{node['host']} has {shown}")
    if wrong:
        return fail(f"{'; '.join(words)}.", "Install the same versions on every node: make setup on each.", nodes=wrong)
    return ok(f"The same on {len(nodes)} nodes: {', '.join(f'{name} {value}' for name, value in here.items())}.")


def check_clocks(context: Context) -> Finding:
    """Compares the clocks of the nodes with this one: leases, timeouts and logs compare times of several machines."""
    nodes = _nodes(context)
    if isinstance(nodes, Finding):
        return nodes
    skews = {node["host"]: node["skew_s"] for node in nodes}
    host = max(skews, key=lambda name: abs(skews[name]))
    words = f"Largest difference {skews[host]:+.3f} s ({host}), measured within {max(n['rtt_s'] for n in nodes):.3f} s"
    if abs(skews[host]) > MAX_SKEW_S:
        remedy = f"Turn on time synchronisation on {host}: timedatectl set-ntp true, or chrony."
        return fail(f"{words}; at most {MAX_SKEW_S:g} s are allowed.", remedy, skew_s=skews)
    return ok(f"{words}.", skew_s=skews)


def check_shared_storage(context: Context) -> Finding:
    """Checks that every node sees the run folder, and the checkpoints, under the same path."""
    nodes = _nodes(context)
    if isinstance(nodes, Finding):
        return nodes
    report = cluster_report(context).merged
    if "probe_error" in report:
        words = f"The run folder {context.root} cannot be written to ({report['probe_error']})."
        return fail(words, "Check output.root.", **report)
    blind = [node["host"] for node in nodes if not node["sees_probe"]]
    if blind:
        words = f"{', '.join(blind)} cannot read {context.root}, into which every worker writes."
        remedy = "Put output.root on storage that is mounted at the same path on every node (NFS, EFS, Lustre)."
        return fail(words, remedy, nodes=blind)
    missing = {node["host"]: node["missing"] for node in nodes if node["missing"]}
    if missing:
        words = "; ".join(f"{host} lacks {', '.join(paths)}" for host, paths in missing.items())
        return fail(f"{words}.", "Put the checkpoints on the shared storage too, under the same path.", missing=missing)
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
        answer = ask(PROBES, "cluster", json.dumps(question), timeout_s=PROBE_TIMEOUT_S)
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


def _serve(context: Context) -> ServeConfig:
    return context.config.serve if context.config else ServeConfig()


def _open_mode(file: Path) -> str | None:
    """Returns the permissions of a file that others may read; None where only its owner can."""
    bits = stat.S_IMODE(file.stat().st_mode)
    return f"{bits:04o}" if bits & 0o077 else None
