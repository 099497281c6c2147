"""What stands between the service and the pipeline: the Serve application, and the process of one evaluation."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary
from ray.serve.schema import ServeDeploySchema

from raycomplete import cli
from raycomplete.commands import serve
from raycomplete.config import AutoscalingConfig, load_run_file
from raycomplete.runtime.errors import ConfigError, RefusedError, WaitTimeoutError, WorkError
from raycomplete.serving import deployment
from raycomplete.serving import process as serve_process
from tests.serving.conftest import make_config
from tests.serving.fakes import make_fake_backend

ROOT = Path(__file__).resolve().parents[2]
CONFIG_FILE = ROOT / "jobs" / "serve.yaml"


@pytest.fixture(autouse=True)
def no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAYCOMPLETE_TOKEN", raising=False)


@pytest.fixture
def bound(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Arguments with which the application is made."""
    found: list[Any] = []
    monkeypatch.setattr(deployment, "build_application", lambda *arguments: found.extend(arguments))
    return found


def test_the_serve_config_file_is_valid_and_says_what_the_run_file_would(monkeypatch: pytest.MonkeyPatch) -> None:
    tree = yaml.safe_load(CONFIG_FILE.read_text())
    schema = ServeDeploySchema.model_validate(tree)
    (application,) = tree["applications"]
    module, _, name = application["import_path"].partition(":")
    assert getattr(import_module(module), name) is serve.application
    api = next(found for found in application["deployments"] if found["name"] == "EvaluationApi")
    scaling = AutoscalingConfig().model_dump()
    assert {"max_ongoing_requests": api["max_ongoing_requests"], **api["autoscaling_config"]} == scaling
    assert schema.http_options.host == "127.0.0.1"
    monkeypatch.chdir(ROOT)
    names = {found["name"] for found in application["deployments"]}
    assert names <= {deployment.EvaluationApi.__name__, deployment.EvaluationRunner.__name__}
    built = call_user_app_builder_with_args_if_necessary(serve.application, application["args"])  # as Serve does
    assert built._bound_deployment.name == deployment.EvaluationApi.__name__


def test_listening_elsewhere_without_a_token_is_refused_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    run_file = str(ROOT / "jobs" / "organism.yaml")
    with pytest.raises(ConfigError, match="there is no token"):
        serve.application({"run_file": run_file, "serve.host": "0.0.0.0"})
    monkeypatch.setattr(sys, "argv", ["raycomplete", "serve", run_file, "--host", "0.0.0.0"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
    assert list(tmp_path.iterdir()) == []


def test_the_trained_student_of_the_run_folder_is_what_is_evaluated(
    bound: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_run_file(ROOT / "jobs" / "organism.yaml", ["serve.model_roots=[models]", "serve.state=here"])
    serve.build(config)
    assert bound[0].models.student is None
    student = config.output.folder / "student"
    student.mkdir(parents=True)
    (student / "config.json").write_text("{}")
    bound.clear()
    serve.build(config)
    assert bound[0].models.student == str(student.resolve())
    assert bound[0].serve.state == tmp_path / "here"
    assert bound[0].serve.model_roots == [tmp_path / "models"]


def follow(script: str, tmp_path: Path, cancelled: Callable[[], bool] = lambda: False) -> list[Any]:
    """What a process that speaks as the script does makes of an evaluation."""
    told: list[Any] = []
    process = subprocess.Popen(
        [sys.executable, "-c", "import sys, json, time\n" + script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        serve.ProcessBackend._follow(None, process, told.append, cancelled, tmp_path / "log")  # type: ignore[arg-type]
    finally:
        process.kill()
        process.wait()
    return told


def test_progress_comes_through_the_pipe(tmp_path: Path) -> None:
    script = 'print(json.dumps({"progress": {"done": 1}}), flush=True); print(json.dumps({"done": True}), flush=True)'
    assert follow(script, tmp_path) == [{"done": 1}]


@pytest.mark.parametrize(("refused", "kind"), [(True, RefusedError), (False, WorkError)])
def test_errors_come_through_the_pipe(refused: bool, kind: type[Exception], tmp_path: Path) -> None:
    message = {"error": ["It is wrong.", "Mend it."], "refused": refused}
    with pytest.raises(kind, match=r"It is wrong\. Mend it\."):
        follow(f"print(json.dumps({message!r}), flush=True)", tmp_path)


def test_a_process_that_dies_is_told_with_its_log(tmp_path: Path) -> None:
    with pytest.raises(WorkError, match=r"ended with code 9\. See .*log"):
        follow("sys.exit(9)", tmp_path)


def test_cancelling_is_told_and_then_enforced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    polite = 'line = json.loads(sys.stdin.readline()); print(json.dumps({"error": [str(line), ""], "refused": False}))'
    with pytest.raises(WorkError, match="'cancel': True"):
        follow(polite, tmp_path, cancelled=lambda: True)
    monkeypatch.setattr(serve, "_CANCEL_GRACE_S", 0.3)
    with pytest.raises(WorkError, match="in the middle of a batch"):
        follow("time.sleep(600)", tmp_path, cancelled=lambda: True)


def test_only_one_process_writes_into_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve_process, "_LOCK_TIMEOUT_S", 0.3)
    folder = tmp_path / "evaluations" / "x"
    with (
        serve_process.only_writer(folder),
        pytest.raises(WaitTimeoutError, match="still writes into"),
        serve_process.only_writer(folder),
    ):
        pass
    with serve_process.only_writer(folder):
        assert not folder.exists(), "the lock lies beside the folder, which the pipeline wants empty"


def test_the_process_ends_with_its_runner() -> None:
    script = "import threading, time; from raycomplete.serving.process import _obey; _obey(threading.Event())"
    process = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE)
    assert process.stdin is not None
    process.stdin.write(b'{"cancel": true}\n')
    process.stdin.close()
    assert process.wait(timeout=120) == 3


def test_a_request_that_cannot_be_run_is_said_on_the_pipe() -> None:
    asked = '{"config": {"models": {}}, "roles": ["base"]}\n'
    process = subprocess.Popen(
        [sys.executable, "-m", "raycomplete.serving.process"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(asked)
    process.stdin.flush()
    said = yaml.safe_load(process.stdout.readline())
    assert said["refused"]
    assert "the key 'models.base' is missing" in said["error"][0]
    process.stdin.close()
    process.wait(timeout=60)


def test_a_runner_whose_thread_ended_is_unhealthy(tmp_path: Path) -> None:
    runner = deployment.EvaluationRunner(make_config(tmp_path), make_fake_backend)
    runner.check_health()
    runner._runner.stop()
    runner._thread.join(timeout=30)
    with pytest.raises(RuntimeError, match="thread ended"):
        runner.check_health()
