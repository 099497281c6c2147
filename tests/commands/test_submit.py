"""`raycomplete submit` up to the moment when something is sent: what is printed, refused and warned of."""

from __future__ import annotations

import shlex
import shutil
import zipfile
from pathlib import Path

import pytest
import yaml
from ray._private.runtime_env.packaging import create_package
from ray._private.runtime_env.working_dir import upload_working_dir_if_needed
from ray.dashboard.modules.job.cli import submit as ray_job_submit

from raycomplete.commands.submit import DEFAULT_ADDRESS, prepare, uploaded_files
from raycomplete.runtime.errors import ConfigError, SetupError
from tests.commands.test_job_client import free_port
from tests.test_cli import main

ROOT = Path(__file__).resolve().parents[2]
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


def write(work: Path, tree: dict[str, object]) -> None:
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


def test_a_job_script_of_the_working_folder_is_used(folder: Path) -> None:
    shutil.copytree(ROOT / "jobs", folder / "jobs")
    assert prepare(Path("run.yaml")).entrypoint == ("python", "jobs/train.py", "run.yaml")


def test_the_address_given_wins_over_the_environment(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert prepare(Path("run.yaml")).address == DEFAULT_ADDRESS
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://other:8265")
    assert prepare(Path("run.yaml")).address == "http://other:8265"
    given = prepare(Path("run.yaml"), address="http://head:8265")
    assert given.address == "http://head:8265"
    assert given.command().startswith("env -u RAY_API_SERVER_ADDRESS ray job submit")


def test_no_secret_travels_and_a_stop_has_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "s3cret")
    monkeypatch.setenv("RAYCOMPLETE_TOKEN", "s3cret")
    submission = prepare(Path("run.yaml"))
    assert "s3cret" not in submission.command()
    assert int(submission.environment["RAY_JOB_STOP_WAIT_TIME_S"]) >= 60


def test_refusals_name_the_remedy(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no job 'trian'.*train, align"):
        prepare(Path("run.yaml"), job="trian")
    with pytest.raises(ConfigError, match="--resume is not for --job evaluate"):
        prepare(Path("run.yaml"), job="evaluate", flags=["--resume"])
    with pytest.raises(ConfigError, match="did you mean 'steps'"):
        prepare(Path("run.yaml"), ["train.stpes=3"])
    shutil.copy(folder / "run.yaml", tmp_path / "elsewhere.yaml")
    with pytest.raises(ConfigError, match="outside the working folder"):
        prepare(tmp_path / "elsewhere.yaml")
    (folder / ".gitignore").write_text("*.yaml\n")
    with pytest.raises(ConfigError, match="is not uploaded"):
        prepare(Path("run.yaml"))


def test_what_counts_as_uploaded_is_what_ray_packs(folder: Path, tmp_path: Path) -> None:
    (folder / ".gitignore").write_text("*.bin\n")
    (folder / ".rayignore").write_text("big/\n")
    for name in (
        "a.txt",
        "a.bin",
        "big/b.txt",
        "runs/c.txt",
        "sub/runs/d.txt",
        ".git/e",
        ".venv/f",
        "sub/__pycache__/g",
    ):
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


def test_a_folder_too_large_for_ray_is_refused_with_its_largest_files(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"0" * 4096)
    with pytest.raises(SetupError, match=r"largest so far: model.safetensors.*\.rayignore"):
        uploaded_files(folder, limit=2048)


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
