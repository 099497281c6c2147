"""The command that serves: what it refuses, and what it hands to the application."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary
from ray.serve.schema import ServeDeploySchema

from raycomplete import cli
from raycomplete.commands import serve
from raycomplete.config import ServeConfig, load_run_file
from raycomplete.runtime.errors import ConfigError
from raycomplete.serving import deployment
from tests.conftest import ROOT

RUN_FILE = ROOT / "jobs" / "organism.yaml"
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
    scaling, (fewest, most) = api["autoscaling_config"], ServeConfig().replicas
    assert api["max_ongoing_requests"] == deployment._MAX_ONGOING
    assert scaling == {"min_replicas": fewest, "max_replicas": most, **deployment._SCALING}
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
    run_file = str(RUN_FILE)
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
    config = load_run_file(RUN_FILE, ["serve.model_roots=[models]", "serve.state=here"])
    serve.build(*serve.admitted(config))
    assert bound[0].models.student is None
    student = config.output.folder / "student"
    student.mkdir(parents=True)
    (student / "config.json").write_text("{}")
    bound.clear()
    serve.build(*serve.admitted(config))
    assert bound[0].models.student == str(student.resolve())
    assert bound[0].serve.state == tmp_path / "here"
    assert bound[0].serve.model_roots == [tmp_path / "models"]


def test_every_model_that_there_is_answers_where_chat_is_on(
    bound: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    overrides = ["serve.chat=true", "serve.state=here", "models.dtype=float32"]
    config = load_run_file(RUN_FILE, overrides)
    serve.build(*serve.admitted(config))
    assert [(model.role, model.options["num_gpus"]) for model in bound[3]] == [("base", 0), ("aligned", 0)]
    assert bound[3][0].options["runtime_env"]["env_vars"]["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    named = load_run_file(RUN_FILE, [*overrides, "serve.chat_models=[student]"])
    with pytest.raises(ConfigError, match="names the student, and this server has none"):
        serve.admitted(named)


def test_one_gpu_holds_what_the_run_file_evaluates() -> None:
    config = load_run_file(RUN_FILE)
    plan = serve._plan(config)
    assert plan.gpus == pytest.approx(config.cluster.gpus_per_engine)  # the generator alone: its attacks need no more
    attacked = load_run_file(RUN_FILE, ["evaluation.attacks=[gcg, finetune]"])
    more = attacked.cluster.gpus_per_engine * 2 + attacked.cluster.gpus_per_worker
    assert serve._plan(attacked).gpus == pytest.approx(more)
    assert serve._plan(attacked).cpus == plan.cpus  # CPUs are counted for whatever a request may add
