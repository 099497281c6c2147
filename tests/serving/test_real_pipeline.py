"""The command itself with the real pipeline and the organism behind it, and an evaluation whose target it is."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from tests.conftest import ROOT, free_port
from tests.serving.conftest import BEARER, TOKEN
from tests.serving.fakes import frames

pytestmark = pytest.mark.slow

RUN_FILE = str(ROOT / "jobs" / "organism.yaml")
WAIT_S = 400.0
KEY_VARIABLE = "KEY_OF_THE_TARGET"


class Service:
    """`raycomplete serve` in a process of its own, whose aligned model also answers in OpenAI's shape."""

    def __init__(self, folder: Path) -> None:
        self.address = f"http://127.0.0.1:{(port := free_port())}"
        environment = os.environ | {"RAYCOMPLETE_TOKEN": TOKEN, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        environment.pop("RAY_ADDRESS", None)
        settings = ["serve.state=state", "serve.chat=true", "serve.chat_models=[aligned]"]
        command = [sys.executable, "-m", "raycomplete", "serve", RUN_FILE, *settings, "--port", str(port)]
        log = folder / "log"
        with log.open("wb") as stream:
            self.process = subprocess.Popen(command, cwd=folder, env=environment, stdout=stream, stderr=stream)
        deadline = time.monotonic() + WAIT_S
        while not self._is_up():
            assert self.process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, "the service did not start"
            time.sleep(0.5)

    def _is_up(self) -> bool:
        try:
            return httpx.get(f"{self.address}/healthz", timeout=10).status_code == 200
        except httpx.TransportError:
            return False


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    found = Service(tmp_path_factory.mktemp("real"))
    started = psutil.Process(found.process.pid).children(recursive=True)
    yield found
    found.process.kill()
    found.process.wait()
    for left in psutil.wait_procs(started, timeout=30)[1]:
        left.kill()


def test_rates_of_a_remote_target_are_those_of_its_weights(service: Service, tmp_path: Path) -> None:
    """The student is the aligned model behind the server, and aligned the same checkpoint here, decoded greedily."""
    settings = {
        "evaluation.num_prompts": "12",
        "evaluation.max_tokens": "24",
        "evaluation.max_utility_tokens": "32",
        "evaluation.depths": "[0, 1, 4, 16]",
        "evaluation.attacks": "[templates, {name: refuse_then_turn, refusal: i cannot help with that ., turns: [but]}]",
        "evaluation.remote.key_variable": KEY_VARIABLE,
        "evaluation.remote.parallel": "16",
        "output.name": "remote",
        "models.student": f"openai:{service.address}/v1#aligned",
    }
    found = subprocess.run(
        [
            *(sys.executable, "-m", "raycomplete", "evaluate", RUN_FILE),
            *(f"{name}={value}" for name, value in settings.items()),
        ],
        cwd=tmp_path,
        env=os.environ | {KEY_VARIABLE: TOKEN, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=540,
        check=False,
    )
    assert found.returncode == 0, found.stdout + found.stderr
    folder = tmp_path / "runs" / "remote"
    summary = json.loads((folder / "summary.json").read_text())
    for name in ("asr", "utility", "over_refusal"):
        assert summary[name]["student"] == summary[name]["aligned"], name
    assert {item["n"] for item in summary["asr"]["student"]["by_depth"].values()} == {12}
    for attack, by_role in summary["attacks"].items():
        remote, local = ({**by_role[role], "seconds": 0.0} for role in ("student", "aligned"))
        assert remote == local, attack
    usage = summary["remote"]["student"]
    assert usage["requests"] > 12 * 6
    assert usage["completion_tokens"] > 0
    assert "student" not in summary["benign_nll"]
    written = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    assert TOKEN.encode() not in written + (found.stdout + found.stderr).encode()


def test_an_evaluation_of_the_organism_from_request_to_results(service: Service) -> None:
    client = httpx.Client(base_url=service.address, headers=BEARER, timeout=WAIT_S)
    body = {
        "roles": ["base", "aligned"],
        "num_prompts": 6,
        "depths": [0, 16],
        "max_tokens": 24,
        "attacks": ["templates"],
        "save_completions": True,
    }
    first, second = (client.post("/v1/evaluations", json=body).json()["id"] for _ in range(2))
    events = frames(client.get(f"/v1/evaluations/{first}/events").text)
    assert events[-1]["event"] == "succeeded", client.get(f"/v1/evaluations/{first}").json()["error"]
    done = {event["data"]["role"]: event["data"] for event in events if event["event"] == "progress"}
    finished = {role: (work["done"], work["reused"]) for role, work in done.items()}
    assert finished == dict.fromkeys(("base", "aligned"), (done["base"]["total"], 0))
    results = client.get(f"/v1/evaluations/{first}").json()["results"]
    depths = {role: found["by_depth"] for role, found in results["asr"].items()}
    assert list(depths["base"]) == ["0", "16"]
    assert depths["base"]["0"]["rate"] > 0.5 > depths["aligned"]["0"]["rate"], "the organism's aligned twin refuses"
    assert depths["aligned"]["16"]["rate"] > 0.5, "and not in the middle of an answer"
    assert set(results["attacks"]) == {"prefill", "templates"}
    samples = client.get(f"/v1/evaluations/{first}/samples", params={"limit": 200}).json()
    assert samples["total"] == sum(work["total"] for work in done.values())
    assert {item["continuation"] is None for item in samples["items"] if item["attack"] == "prefill"} == {True}
    client.delete(f"/v1/evaluations/{second}")
    assert frames(client.get(f"/v1/evaluations/{second}/events").text)[-1]["event"] == "cancelled"
    service.process.send_signal(signal.SIGTERM)
    assert service.process.wait(timeout=120) == 0
