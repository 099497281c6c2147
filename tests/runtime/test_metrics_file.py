"""The file that keeps measurements across kills and resumes, and the sinks beside it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from raycomplete.runtime.errors import SetupError
from raycomplete.runtime.metrics_file import MetricsFile, MetricsReader, open_sinks, read_metrics


def step_rows(*steps: int) -> list[dict[str, Any]]:
    return [{"step": step, "loss": step / 8} for step in steps]


def test_a_resumed_run_drops_the_rows_that_it_makes_again_and_lines_cut_off_by_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == []
    file = MetricsFile(path, keep_steps=0)
    for row in step_rows(1, 2, 3, 4, 5):
        file.append(row)
    resumed = MetricsFile(path, keep_steps=3)
    assert read_metrics(path) == step_rows(1, 2, 3)
    resumed.append({"step": 4, "loss": 9.0})
    assert read_metrics(path) == [*step_rows(1, 2, 3), {"step": 4, "loss": 9.0}]
    assert list(tmp_path.iterdir()) == [path], "no temporary file is left"
    whole = "".join(json.dumps(row) + "\n" for row in step_rows(1, 2))
    for cut in ('{"step": 3, "lo', "{", '{"step": 3, "loss": 0.37'):
        path.write_text(whole + cut)
        assert read_metrics(path) == step_rows(1, 2)
        MetricsFile(path, keep_steps=9).append({"step": 3})
        assert read_metrics(path) == [*step_rows(1, 2), {"step": 3}], "the next row stands on a line of its own"


def test_rows_hold_no_nan(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl", keep_steps=0)
    nan, infinity = float("nan"), float("inf")
    file.append({"step": 1, "loss": nan, "depth_loss": [infinity, None, 0.5], "sync": {"seconds": -infinity}})
    expected = {"step": 1, "loss": None, "depth_loss": [None, None, 0.5], "sync": {"seconds": None}}
    assert read_metrics(tmp_path / "metrics.jsonl") == [expected]


def test_a_reader_follows_the_file_and_its_replacement(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    reader, seen = MetricsReader(path), []
    assert reader.rows() == []
    file = MetricsFile(path, keep_steps=0)
    for row in step_rows(1, 2, 3, 4):
        file.append(row)
        seen.append(row)
        assert reader.rows() == seen
    with path.open("a") as stream:
        stream.write('{"step": 5')
    assert reader.rows() == seen, "half a line is not read"
    with path.open("a") as stream:
        stream.write(', "loss": 0.625}\n')
    assert reader.rows() == step_rows(1, 2, 3, 4, 5), "nor is its rest lost"
    resumed = MetricsFile(path, keep_steps=2)
    assert reader.rows() == step_rows(1, 2)
    for row in step_rows(3, 4, 5, 6):
        resumed.append(row)
    assert reader.rows() == step_rows(1, 2, 3, 4, 5, 6)
    path.unlink()
    assert reader.rows() == []


@pytest.mark.parametrize(("name", "key"), [("wandb", "id"), ("trackio", "name")])
def test_numbers_go_to_one_run_for_the_folder(
    name: str, key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[dict[str, str]] = []
    logged: list[tuple[dict[str, float], int]] = []
    run = SimpleNamespace(log=lambda numbers, *, step: logged.append((numbers, step)), finish=lambda: None)

    def init(**options: str) -> Any:
        opened.append(options)
        return run

    monkeypatch.setitem(sys.modules, name, SimpleNamespace(init=init))
    for _ in range(2):  # the second is a resumed run
        (sink,) = open_sinks([name], tmp_path)
    row = {"step": 7, "loss": 0.5, "stopped": False, "sync": {"seconds": 2}, "depth_loss": [None, 1.0], "lr": None}
    sink.write(row)
    sink.close()
    assert opened[0] == opened[1]
    assert opened[0][key].startswith(tmp_path.name)
    assert opened[0]["resume"] == "allow"
    assert logged == [({"loss": 0.5, "sync/seconds": 2.0, "depth_loss/1": 1.0}, 7)]


def test_a_sink_without_its_package_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(SetupError, match=r"train\.sinks names wandb"):
        open_sinks(["wandb"], tmp_path)
