"""The files of the repository, which tests of the whole tree judge; whatever else lies in a checkout is not judged."""

from __future__ import annotations

import subprocess
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@cache
def tracked_files() -> tuple[Path, ...]:
    """Every file that git tracks; without git the test is skipped."""
    done = subprocess.run(["git", "-C", str(ROOT), "ls-files"], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("not a git checkout")
    return tuple(path for line in done.stdout.splitlines() if (path := ROOT / line).is_file())


def tracked_python(*folders: str) -> list[Path]:
    """The Python files below these folders of the repository, sorted."""
    parents = {ROOT / folder for folder in folders}
    return sorted(path for path in tracked_files() if path.suffix == ".py" and parents & {*path.parents})
