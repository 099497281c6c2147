"""A real Ray cluster of several nodes on one machine (addresses in 127.0.0.0/8), and a run submitted to it."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from raycomplete.runtime.metrics_file import read_metrics
from raycomplete.storage import integrity
from tests.chaos.driver import family, kill
from tests.conftest import ROOT

_START_TIMEOUT_S = 400.0
_HEAD = "127.0.0.2"  # Ray replaces 127.0.0.1 by the machine's own address
_RAY = str(Path(sys.executable).with_name("ray"))


class LocalCluster:
    """Head and worker nodes, with Ray's token authentication on; everything that it started ends with it."""

    def __init__(self, *, num_cpus: int = 4, workers: int = 1) -> None:
        self._num_cpus, self._num_workers = num_cpus, workers
        self._folder = Path(tempfile.mkdtemp(prefix="rc", dir="/tmp"))  # sockets need short paths
        self._port, self._dashboard = _free_port(), _free_port()
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {
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

    def __enter__(self) -> LocalCluster:
        try:
            self._start_node(_HEAD)
            for index in range(self._num_workers):
                self.add_worker(f"127.0.0.{index + 3}")
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def add_worker(self, address: str) -> None:
        """Starts a node and returns when the head has it."""
        self._start_node(address)

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
        command = [_RAY, "job", "submit", "--address", self.jobs_address, "--", sys.executable, *arguments]
        with log.open("ab") as stream:
            return subprocess.Popen(command, cwd=ROOT, env=self.environment, stdout=stream, stderr=stream)

    def alive(self) -> int:
        """Nodes that the head believes to be alive."""
        code = (
            f"import ray; ray.init(address='{_HEAD}:{self._port}', log_to_driver=False);"
            "print('alive:', sum(node['Alive'] for node in ray.nodes()))"
        )
        command = [sys.executable, "-c", code]
        try:
            done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=80)
        except subprocess.TimeoutExpired:  # a client that came before the head was ready may wait forever
            return 0
        found = re.search(r"^alive: (\d+)$", done.stdout, re.MULTILINE)  # between what Ray itself prints
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

    def _start_node(self, address: str) -> None:
        place = [f"--address={_HEAD}:{self._port}"]
        if address == _HEAD:
            place = ["--head", f"--port={self._port}", f"--dashboard-port={self._dashboard}"]
            place += ["--dashboard-host=127.0.0.1", f"--temp-dir={self._folder}"]
            place += [f"--ray-client-server-port={_free_port()}"]
        command = [_RAY, "start", "--block", f"--node-ip-address={address}", f"--num-cpus={self._num_cpus}"]
        command += [f"--object-store-memory={2**29}", f"--dashboard-agent-listen-port={_free_port()}"]
        path = self._folder / f"{address}.log"
        with path.open("wb") as log:
            self._nodes[address] = subprocess.Popen([*command, *place], env=self.environment, stdout=log, stderr=log)
        wanted, deadline = len(self._nodes), time.monotonic() + _START_TIMEOUT_S
        while (alive := self.alive()) < wanted:
            if time.monotonic() > deadline or self._nodes[address].poll() is not None:
                raise TimeoutError(f"Of {wanted} nodes {alive} came up. {path.read_text(errors='replace')[-2000:]}")
            time.sleep(1.0)


@dataclass
class WatchedRun:
    """A training job that is submitted again whenever it ends without being done, watched through its files."""

    cluster: LocalCluster
    folder: Path
    name: str
    settings: tuple[str, ...]
    submissions: int = 0
    _process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    @property
    def run_folder(self) -> Path:
        return self.folder / self.name

    def submit(self) -> None:
        """Submits the very same command each time: `--resume` starts a run that is not there yet."""
        self.submissions += 1
        settings = (*self.settings, f"output.root={self.folder}", f"output.name={self.name}")
        command = ("jobs/train.py", "jobs/organism.yaml", "--resume", *settings)
        self._process = self.cluster.submit(*command, log=self.folder / f"{self.name}.log")

    @property
    def has_ended(self) -> bool:
        """Tells whether the submitted job is over, well or not."""
        return self._process is not None and self._process.poll() is not None

    @property
    def is_done(self) -> bool:
        return (self.run_folder / "summary.json").is_file()

    def metrics(self) -> list[dict[str, Any]]:
        return list(read_metrics(self.run_folder / "metrics.jsonl"))

    def last_step(self) -> int:
        """The last finished step; 0 before the first."""
        return max((row["step"] for row in self.metrics()), default=0)

    def last_checkpoint(self) -> int:
        """Step of the newest complete checkpoint; 0 where there is none."""
        return max(map(integrity.step_of, integrity.complete_checkpoints(self.run_folder / "checkpoints")), default=0)

    def wait_until(self, reached: Callable[[], bool], *, what: str, timeout_s: float) -> float:
        """Waits, submits again where the job has died, and returns the seconds it took."""
        started = time.monotonic()
        while not reached():
            if time.monotonic() - started > timeout_s:
                raise TimeoutError(f"{self.name}: {what} did not come within {timeout_s:.0f} s.\n{self.tail()}")
            if self.has_ended and not self.is_done:
                self.submit()
            time.sleep(0.2)
        return time.monotonic() - started

    def finish(self, timeout_s: float) -> None:
        """Waits for the summary and for the end of the job."""
        self.wait_until(lambda: self.is_done, what="its summary", timeout_s=timeout_s)
        if self._process is not None:
            self._process.wait(timeout=120)

    def tail(self) -> str:
        log = self.folder / f"{self.name}.log"
        return log.read_text(errors="replace")[-2500:] if log.is_file() else "(nothing printed)"

    def summary(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.run_folder / "summary.json").read_text())
        return found


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
