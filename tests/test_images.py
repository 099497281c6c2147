"""The Dockerfiles, read instruction by instruction; hadolint looks at them too where it is installed."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from raycomplete import __version__

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "jobs" / "deploy"
DOCKERFILES = sorted(DEPLOY.glob("Dockerfile*"), key=str)
KNOWN = {"FROM", "RUN", "USER", "WORKDIR", "COPY", "ENV", "ENTRYPOINT", "CMD"}


def instructions(path: Path) -> list[tuple[str, str]]:
    """Instructions with their arguments, comments left out and continued lines joined."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in joined.splitlines() if line)]


def test_there_is_one_image_for_gpus_and_one_for_cpus() -> None:
    extras = [re.findall(r"EXTRA=(\w+)", path.read_text(encoding="utf-8")) for path in DOCKERFILES]
    assert [path.name for path in DOCKERFILES] == ["Dockerfile", "Dockerfile.cpu"]
    assert extras == [["gpu"], ["cpu"]]


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_every_instruction_is_one_of_docker(path: Path) -> None:
    found = instructions(path)
    assert found[0][0] == "FROM"
    assert {word for word, _ in found} <= KNOWN
    assert ":" in found[0][1]  # never `latest`
    for word, rest in found:
        if word == "RUN":
            assert shlex.split(rest)
            subprocess.run(["sh", "-n", "-c", rest], check=True)


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_the_set_up_runs_as_a_user_without_rights_in_a_folder_of_its_own(path: Path) -> None:
    found = instructions(path)
    place = next(index for index, (word, rest) in enumerate(found) if word == "RUN" and "make setup" in rest)
    assert ("USER", "1000:1000") in found[:place]
    assert ("WORKDIR", "/opt/raycomplete") in found[:place]
    assert ("COPY", "--chown=1000:1000 . .") in found[:place]
    assert all(word != "USER" for word, _ in found[place:])
    assert any(word == "ENV" and "/opt/raycomplete/.venv/bin:$PATH" in rest for word, rest in found[place:])


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_the_build_line_names_the_file_and_this_version(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert f"docker build -f {path.relative_to(ROOT)} " in text
    assert re.search(rf"raycomplete:{re.escape(__version__)}-", text)


def test_nothing_of_this_machine_is_copied_into_an_image() -> None:
    left_out = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    assert {".git", ".venv", "runs"} <= set(left_out)


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="hadolint is not installed")
@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_hadolint_finds_nothing(path: Path) -> None:
    done = subprocess.run(["hadolint", str(path)], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout
