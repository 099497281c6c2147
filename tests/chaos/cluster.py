"""A real Ray cluster of several nodes on one machine: raylets with addresses of their own in 127.0.0.0/8."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from tests.benchmarks.environment import ROOT
from tests.chaos.processes import family, kill

_START_TIMEOUT_S = 400.0
_ANSWER_TIMEOUT_S = 80.0
_HEAD = "127.0.0.2"  # Ray replaces 127.0.0.1 by the machine's own address
_RAY = str(Path(sys.executable).with_name("ray"))


class LocalCluster:
    """Head and worker nodes, with Ray's token authentication on; everything that it started ends with it.

    Args:
        num_cpus: Logical CPUs of each node.
        workers: Nodes beside the head.
    """

    def __init__(self, *, num_cpus: int = 4, workers: int = 1) -> None:
        self._num_cpus, self._num_workers = num_cpus, workers
        self._folder = Path(tempfile.mkdtemp(prefix="rc", dir="/tmp"))  # sockets need short paths
        self._port, self._dashboard = _free_port(), _free_port()
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": uuid.uuid4().hex + uuid.uuid4().hex,
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_JOB_STOP_WAIT_TIME_S": "60",  # time for a checkpoint
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",
            "COLUMNS": "150",
        }
        self._nodes: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def jobs_address(self) -> str:
        """For `ray job submit --address`."""
        return f"http://127.0.0.1:{self._dashboard}"

    @property
    def node_names(self) -> list[str]:
        """Addresses of the nodes that run, the head first."""
        return list(self._nodes)

    def __enter__(self) -> LocalCluster:
        try:
            self._start_node(_HEAD, head=True)
            for index in range(self._num_workers):
                self.add_worker(f"127.0.0.{index + 3}")
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def add_worker(self, address: str) -> None:
        """Starts a node and returns when the head has it."""
        self._start_node(address, head=False)

    def kill_node(self, address: str) -> int:
        """SIGKILL to the raylet of a node, its agents and its workers; returns how many processes that were."""
        root = self._nodes.pop(address)
        killed = kill(list(family([root.pid])))
        root.wait(timeout=30)
        return killed

    def roots(self) -> list[int]:
        """Process ids under which everything of this cluster runs."""
        return [process.pid for process in self._nodes.values()]

    def submit(self, *arguments: str, log: Path) -> subprocess.Popen[bytes]:
        """`ray job submit` of a job, its output in a file; it ends with the job, and with the job's success."""
        command = [
            _RAY, "job", "submit", "--address", self.jobs_address, "--", sys.executable, *arguments,
        ]  # fmt: skip
        with log.open("ab") as stream:
            return subprocess.Popen(command, cwd=ROOT, env=self.environment, stdout=stream, stderr=stream)

    def alive(self) -> int:
        """Nodes that the head believes to be alive."""
        code = "import ray; ray.init(address=%r, log_to_driver=False); "
        code += "print('alive:', sum(node['Alive'] for node in ray.nodes()))"
        try:
            result = subprocess.run(
                [sys.executable, "-c", code % f"{_HEAD}:{self._port}"],
                env=self.environment,
                capture_output=True,
                text=True,
                timeout=_ANSWER_TIMEOUT_S,
                check=False,
            )
        except subprocess.TimeoutExpired:  # a client that came before the head was ready may wait forever
            return 0
        found = re.search(r"^alive: (\d+)$", result.stdout, re.MULTILINE)  # between what Ray itself prints
        return int(found.group(1)) if found else 0

    def close(self) -> None:
        """Ends every process of the cluster and waits for them, then removes its files."""
        everything = list(family(self.roots()))
        for process in everything:
            try:
                process.terminate()
            except psutil.NoSuchProcess:
                continue
        _, left = psutil.wait_procs(everything, timeout=20)
        kill(left)
        psutil.wait_procs(left, timeout=20)
        self._nodes.clear()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _start_node(self, address: str, *, head: bool) -> None:
        place = (
            ["--head", f"--port={self._port}", f"--dashboard-port={self._dashboard}", "--dashboard-host=127.0.0.1",
             f"--temp-dir={self._folder}", f"--ray-client-server-port={_free_port()}"]
            if head
            else [f"--address={_HEAD}:{self._port}"]
        )  # fmt: skip
        log = (self._folder / f"{address}.log").open("wb")
        with log:
            self._nodes[address] = subprocess.Popen(
                [_RAY, "start", "--block", f"--node-ip-address={address}", f"--num-cpus={self._num_cpus}",
                 f"--object-store-memory={2**29}", f"--dashboard-agent-listen-port={_free_port()}", *place],
                env=self.environment,
                stdout=log,
                stderr=log,
            )  # fmt: skip
        wanted, deadline = len(self._nodes), time.monotonic() + _START_TIMEOUT_S
        while self.alive() < wanted:
            if time.monotonic() > deadline or self._nodes[address].poll() is not None:
                said = Path(log.name).read_text(errors="replace")[-2000:]
                raise TimeoutError(f"Of {wanted} nodes {self.alive()} came up within {_START_TIMEOUT_S:.0f} s. {said}")
            time.sleep(1.0)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: Any = probe.getsockname()[1]
        return int(port)
