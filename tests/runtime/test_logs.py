"""Log lines: who, when, what; bounded, private, and without secrets."""

from __future__ import annotations

import json
import logging
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from raycomplete.runtime import logs, ray_calls

logger = logging.getLogger("raycomplete.test")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A run folder with logs on."""
    monkeypatch.setenv(logs.SWITCH, "json")
    monkeypatch.setenv(logs.RUN, "")  # given back afterwards
    monkeypatch.setenv(logs.FOLDER, "")
    logs.announce_run("north", tmp_path)
    yield tmp_path
    monkeypatch.delenv(logs.SWITCH)
    logs.begin("driver")  # closes the file


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for path in sorted(folder.glob("logs/*.jsonl")) for line in path.read_text().splitlines()]


def test_a_line_says_run_role_rank_and_step(folder: Path) -> None:
    logs.begin("training worker", 1)
    logs.set_step(7)
    logger.info("took %d samples", 3, extra={"fields": {"loss": 0.5, "run": "never"}})
    line = lines(folder)[-1]
    known = {name: line[name] for name in ("run", "role", "rank", "step", "level", "logger", "message", "loss")}
    assert known == {
        "run": "north",
        "role": "training worker",
        "rank": 1,
        "step": 7,
        "level": "info",
        "logger": "raycomplete.test",
        "message": "took 3 samples",
        "loss": 0.5,
    }
    (path,) = folder.glob("logs/training-worker-1-*.jsonl")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_no_secret_of_the_environment_is_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYCOMPLETE_TOKEN", "correct-horse-battery")
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/etc/ray/token")
    logs.begin("driver")
    logger.info("asked with correct-horse-battery", extra={"fields": {"header": "Bearer abcdefghijkl"}})
    try:
        raise RuntimeError("0123456789abcdef refused, hf_ABCDEFGHIJKL too, see /etc/ray/token")
    except RuntimeError as error:
        logs.log_failure(error)
    text = "".join(path.read_text() for path in folder.glob("logs/*"))
    for secret in ("correct-horse-battery", "0123456789abcdef", "abcdefghijkl", "ABCDEFGHIJKL"):
        assert secret not in text
    assert "RuntimeError" in lines(folder)[-1]["error"]
    assert "/etc/ray/token" in text  # a path is none


def test_files_are_bounded_and_others_are_heard_when_they_warn(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "_MAX_BYTES", 20_000)
    logs.begin("driver")
    logging.getLogger("elsewhere").info("chatter")
    logging.getLogger("elsewhere").warning("hear me")
    assert [line["message"] for line in lines(folder)][1:] == ["hear me"]
    for _ in range(1000):
        logger.info("x" * 100)
    files = list(folder.glob("logs/*"))
    assert len(files) == 3
    assert sum(path.stat().st_size for path in files) < 65_000


def test_nothing_is_written_unless_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(logs.SWITCH, raising=False)
    monkeypatch.setenv(logs.FOLDER, str(tmp_path))
    logs.begin("driver")
    logger.warning("nobody listens")
    assert list(tmp_path.iterdir()) == []


def test_workers_inherit_the_run_and_ray_is_given_no_name_twice(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    expected = {logs.RUN: "north", logs.FOLDER: str(folder), logs.SWITCH: "json", "OMP_WAIT_POLICY": "PASSIVE"}
    assert logs.run_environment() == expected
    # A submitted job: its own environment carries the switch.
    for job in ('{"runtime_env": {"env_vars": {"RAYCOMPLETE_LOG": "json"}}}', '{"runtime_env": null}', "{}"):
        monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", job)
        given = {logs.SWITCH} if "json" in job else set()
        assert set(logs.run_environment()) == set(expected) - given


def test_what_ray_says_goes_to_the_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    from ray._private import worker

    monkeypatch.setattr(worker, "print_to_stdstream", worker.print_to_stdstream)
    monkeypatch.setenv(logs.FOLDER, str(tmp_path / "run"))
    ray_calls.keep_off_the_screen()
    worker.print_to_stdstream({"lines": ["before there is a run"], "pid": "raylet", "is_err": False})
    (tmp_path / "run").mkdir()
    worker.print_to_stdstream({"lines": ["Task x failed: hf_0123456789abcdef"], "pid": "raylet"}, ignore_prefix=False)
    path = tmp_path / "run" / "logs" / "ray.log"
    assert path.read_text().split(" ", 1)[1] == "Task x failed: ***\n"
    assert path.stat().st_mode & 0o777 == 0o600
    assert "".join(capsys.readouterr()) == ""
