"""Checks across the nodes of a cluster: reach, versions, clocks and the shared folder."""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Any

from raycomplete.doctor.findings import PROBES, ChildReport, Context, Finding, ask, fail, ok, warn
from raycomplete.doctor.machine import local_folder, needs_of, student_of
from raycomplete.doctor.probes import look
from raycomplete.runtime.files import write_text

PROBE_TIMEOUT_S = 120.0
MAX_SKEW_S = 5.0
_STARTS_NODES_S = 60.0  # a run that waits this long counts on nodes that start on demand
_ALONE = "One machine and no cluster"


def check_cluster(context: Context) -> Finding:
    """Checks that the cluster answers, how large it is, and that the run fits."""
    if context.address is None:
        return ok(f"{_ALONE}: a run starts Ray here and ends it again.")
    answer = cluster_report(context)
    report = answer.merged
    if "resources" not in report:
        return fail(
            f"No Ray cluster answers at {context.address} ({answer.ending(PROBE_TIMEOUT_S)}).",
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
        remedy = "Install the same versions on every node: make setup on each."
        return fail(f"{'; '.join(words)}.", remedy, nodes=wrong)
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
    folder, report = _shared_folder(context), cluster_report(context).merged
    if "probe_error" in report:
        words = f"The run folder {folder} cannot be written to ({report['probe_error']})."
        return fail(words, "Check output.root.", **report)
    blind = [node["host"] for node in nodes if not node["sees_probe"]]
    if blind:
        remedy = "Put output.root on storage that is mounted at the same path on every node (NFS, EFS, Lustre)."
        return fail(f"{', '.join(blind)} cannot read {folder}, into which every worker writes.", remedy, nodes=blind)
    missing = {node["host"]: node["missing"] for node in nodes if node["missing"]}
    if missing:
        words = "; ".join(f"{host} lacks {', '.join(paths)}" for host, paths in missing.items())
        return fail(f"{words}.", "Put the checkpoints on the shared storage too, under the same path.", missing=missing)
    return ok(f"A file written here into {folder} was read on all {len(nodes)} nodes.")


def cluster_report(context: Context) -> ChildReport:
    """Runs a task on every node, in a child process, once."""
    return context.once("cluster", lambda: _ask(context))


def _ask(context: Context) -> ChildReport:
    folder, secret, problem = _shared_folder(context), uuid.uuid4().hex, {}
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
    return ChildReport([*answer.messages, problem], answer.code, answer.last_words)


def _nodes(context: Context) -> list[dict[str, Any]] | Finding:
    """Returns the nodes that answered, or a finding where there is no cluster or none did."""
    if context.address is None:
        return ok(f"{_ALONE}: nothing to compare.")
    nodes: list[dict[str, Any]] = cluster_report(context).merged.get("nodes", [])
    return nodes or warn("No node answered, so there is nothing to compare.", "See the check of the cluster.")


def _shared_folder(context: Context) -> Path:
    return (context.config.output.root if context.config else Path("runs")).absolute()
