"""`raycomplete submit`: what is printed, refused and warned of, and how a job is followed to its exit code."""

from __future__ import annotations

import shlex
import shutil
import threading
import zipfile
from collections.abc import AsyncIterator, Mapping
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from ray._private.runtime_env.packaging import create_package
from ray._private.runtime_env.working_dir import upload_working_dir_if_needed
from ray.dashboard.modules.job.cli import submit as ray_job_submit

from raycomplete.commands import submit
from raycomplete.commands.submit import DEFAULT_ADDRESS, Submission, connect_to, follow, prepare, uploaded_files
from raycomplete.runtime.errors import ConfigError, LostJobError, SetupError
from tests.conftest import ROOT, free_port
from tests.test_cli import main

TREE = {
    "models": {"base": "organism:base", "aligned": "organism:aligned"},
    "data": {"source": "organism"},
    "output": {"root": "/shared/runs", "name": "x"},
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a run file, outside of the sources."""
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS", "RAY_JOB_STOP_WAIT_TIME_S"):
        monkeypatch.delenv(name, raising=False)
    work = tmp_path / "work"
    work.mkdir()
    write(work, TREE)
    monkeypatch.chdir(work)
    return work


def write(work: Path, tree: Mapping[str, object]) -> None:
    (work / "run.yaml").write_text(yaml.safe_dump(tree))


def test_the_printed_line_is_one_that_ray_parses_to_the_same(folder: Path) -> None:
    overrides = ["train.steps=3", 'rollout.safety_prompt=it\'s "so"']
    submission = prepare(Path("run.yaml"), overrides, address="http://head:8265/", flags=["--resume"])
    words = shlex.split(submission.command())
    assert words[:3] == ["ray", "job", "submit"]
    parsed = ray_job_submit.make_context("submit", words[3:]).params
    assert parsed["address"] == "http://head:8265"
    assert parsed["working_dir"] == str(folder)
    assert yaml.safe_load(parsed["runtime_env_json"]) == submission.runtime_env
    assert list(parsed["entrypoint"]) == ["python", "-m", "raycomplete", "train", "run.yaml", *overrides, "--resume"]


def test_the_command_line_prints_it_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(monkeypatch, "submit", "run.yaml", "output.root=runs", "--job", "diagnose", "--dry-run") == 0
    printed, aside = capsys.readouterr()
    assert shlex.split(printed)[-4:] == ["raycomplete", "diagnose", "run.yaml", "output.root=runs"]
    assert printed.count("\n") == 1
    assert "output.root is 'runs'" in aside
    assert main(monkeypatch, "submit", "run.yaml", "--address", f"http://127.0.0.1:{free_port()}") == 2
    assert "No Ray cluster answers" in capsys.readouterr().err


def test_the_environment_of_a_job(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert prepare(Path("run.yaml")).address == DEFAULT_ADDRESS
    for name in ("RAY_AUTH_TOKEN", "RAYCOMPLETE_TOKEN"):
        monkeypatch.setenv(name, "s3cret")
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://other:8265")
    assert prepare(Path("run.yaml")).address == "http://other:8265"
    shutil.copytree(ROOT / "jobs", folder / "jobs")
    given = prepare(Path("run.yaml"), address="http://head:8265")
    assert given.address == "http://head:8265"
    assert given.command().startswith("env -u RAY_API_SERVER_ADDRESS ray job submit")
    assert "s3cret" not in given.command()
    assert given.entrypoint == ("python", "jobs/train.py", "run.yaml"), "the script of the working folder is used"
    assert int(given.runtime_env["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"]) >= 60


def test_refusals_name_what_is_wrong(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "run.yaml", tmp_path / "elsewhere.yaml")
    for run_file, options, words in (
        ("run.yaml", {"job": "trian"}, "trian"),
        ("run.yaml", {"job": "evaluate", "flags": ["--resume"]}, "--resume"),
        ("run.yaml", {"overrides": ["train.stpes=3"]}, "steps"),
        ("run.yaml", {"working_dir": Path("none")}, "none"),
        (tmp_path / "elsewhere.yaml", {}, "--working-dir"),
    ):
        with pytest.raises(ConfigError, match=words):
            prepare(Path(run_file), **options)
    (folder / ".gitignore").write_text("*.yaml\n")
    with pytest.raises(ConfigError, match="gitignore"):
        prepare(Path("run.yaml"))
    (folder / "model.safetensors").write_bytes(b"0" * 4096)
    with pytest.raises(SetupError, match=r"model\.safetensors"):
        uploaded_files(folder, limit=2048)


def test_what_counts_as_uploaded_is_what_ray_packs(folder: Path, tmp_path: Path) -> None:
    (folder / ".gitignore").write_text("*.bin\n")
    (folder / ".rayignore").write_text("big/\n")
    for name in "a.txt a.bin big/b.txt runs/c.txt sub/runs/d.txt .git/e .venv/f sub/__pycache__/g".split():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    files = uploaded_files(folder)
    packed = tmp_path / "packed.zip"

    def pack(path: str, excludes: list[str], is_file: bool = False) -> None:
        create_package(path, packed, include_gitignore=True, excludes=excludes)

    environment = {"working_dir": str(folder), **prepare(Path("run.yaml")).runtime_env}
    upload_working_dir_if_needed(environment, include_gitignore=True, upload_fn=pack)
    names = {name for name in zipfile.ZipFile(packed).namelist() if not name.endswith("/")}
    assert {path.relative_to(folder).as_posix() for path in files} == names
    assert names == {"run.yaml", "a.txt", ".gitignore", ".rayignore", "sub/runs/d.txt"}


def test_paths_that_the_cluster_will_not_see_are_named(folder: Path) -> None:
    (folder / "models" / "base").mkdir(parents=True)
    (folder / "models" / "base" / "config.json").write_text("{}")
    (folder / "runs" / "aligned").mkdir(parents=True)
    train = {"harmful": [{"path": "../outside.jsonl"}], "benign": [{"path": "here.jsonl"}]}
    (folder / "here.jsonl").write_text("{}")
    write(
        folder,
        {
            "models": {"base": "models/base", "aligned": "runs/aligned", "student": "hub:org/name"},
            "data": {"train": train},
        },
    )
    warnings = prepare(Path("run.yaml")).warnings
    assert [warning.partition(" ")[0].rstrip(":") for warning in warnings] == [
        "models.aligned",
        "data.train.harmful[0].path",
        "output.root",
    ]
    assert "is left out of the upload" in warnings[0]
    write(folder, TREE)
    assert prepare(Path("run.yaml")).warnings == ()


class Client:
    """The part of Ray's client that `follow` uses: each tail brings the whole log again, and may break."""

    def __init__(self, status: str, code: int | None, tails: list[list[str | BaseException]]) -> None:
        self.info = SimpleNamespace(status=status, driver_exit_code=code, message="why")
        self._tails = iter(tails)
        self.stopped = 0
        self.running_for = 0  # questions after its status that are answered with "running"

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        for item in next(self._tails):
            if isinstance(item, BaseException):
                raise item
            yield item

    def get_job_info(self, job: str) -> Any:
        self.running_for -= 1
        return SimpleNamespace(status="RUNNING") if self.running_for >= 0 else self.info

    @staticmethod
    def lose(_: str) -> bool:
        raise ConnectionResetError("gone")

    def stop_job(self, job: str) -> bool:
        self.stopped += 1
        return True


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        ("SUCCEEDED", 0, 0),
        ("FAILED", 1, 1),
        ("FAILED", 2, 2),
        ("FAILED", -9, 1),
        ("FAILED", None, 1),
        ("STOPPED", None, 1),
    ],
)
def test_a_job_ends_with_its_own_exit_code(status: str, code: int | None, expected: int) -> None:
    said: list[str] = []
    assert follow(Client(status, code, [["log\n"]]), "job", said.append) == expected
    assert ("why" in said) == (expected == 1 and code != 1 and status == "FAILED")


def test_a_closed_connection_is_taken_up_where_it_ended(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Proxies close connections that say nothing for a while."""
    monkeypatch.setattr(submit, "_RETRY_S", 0.0)
    client = Client("SUCCEEDED", 0, [["one\n"], ["one\n", "two\n"]])
    client.running_for = 1
    assert follow(client, "job", lambda _: None) == 0
    assert capsys.readouterr().out == "one\ntwo\n"


def test_a_lost_connection_leaves_the_job_alone() -> None:
    unasked = Client("RUNNING", None, [[KeyboardInterrupt()]])
    unasked.stop_job = Client.lose  # type: ignore[assignment]
    for client in (unasked, Client("RUNNING", None, [["one\n", RuntimeError("gone")]])):
        with pytest.raises(LostJobError, match=r"gone.*ray job logs"):
            follow(client, "job", lambda _: None)


def test_a_job_whose_answer_was_lost_is_not_submitted_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[str] = []

    def submit_job(**given: Any) -> str:
        names.append(given["submission_id"])
        raise ConnectionResetError("gone")

    monkeypatch.setattr(submit, "connect_to", lambda _: SimpleNamespace(submit_job=submit_job))
    submission = Submission("http://head:8265", Path("x"), ("python",))
    with pytest.raises(LostJobError, match="whether it began is unknown"):
        submit.submit(submission, lambda _: None)
    assert len(names) == 1


def test_a_head_that_has_just_started_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "_RETRY_S", 0.0)
    errors = iter([RuntimeError("No available agent to submit job"), RuntimeError("disk full\nat line 3")])

    def submit_job(**_: Any) -> str:
        raise next(errors)

    monkeypatch.setattr(submit, "connect_to", lambda _: SimpleNamespace(submit_job=submit_job))
    with pytest.raises(SetupError, match=r"The job server at http://head did not take the job: disk full$"):
        submit.submit(Submission("http://head", Path("x"), ("python",)), lambda _: None)


def test_ctrl_c_stops_the_job_and_a_second_one_leaves_it() -> None:
    once = Client("STOPPED", None, [["a", KeyboardInterrupt()], ["a", "saved"]])
    assert follow(once, "job", lambda _: None) == 1
    assert once.stopped == 1
    twice = Client("RUNNING", None, [[KeyboardInterrupt()], [KeyboardInterrupt()]])
    said: list[str] = []
    assert follow(twice, "job", said.append) == 1
    assert twice.stopped == 1
    assert "goes on" in said[-1]


@pytest.mark.parametrize(("status", "words"), [(401, "asks for a token"), (403, "refuses this token")])
def test_a_token_that_is_missing_or_wrong_is_explained(status: int, words: str) -> None:
    class Refuse(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(b"Unauthorized" if status == 401 else b"Forbidden")

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Refuse)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with pytest.raises(SetupError, match=rf"{words}.*RAY_AUTH_MODE=token"):
            connect_to(f"http://127.0.0.1:{server.server_port}")
    finally:
        server.shutdown()


def test_no_cluster_is_said_at_once() -> None:
    for address in ("http://head:many", f"http://127.0.0.1:{free_port()}"):
        with pytest.raises(SetupError, match=address):
            connect_to(address)
