"""The Python API: what `import raycomplete` gives, and what it does not load or set."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import raycomplete as rc
from tests.test_rooms import LINES, PACKAGE

ROOT = Path(__file__).resolve().parent.parent
HEAVY = {"torch", "ray", "transformers", "vllm", "numpy", "pydantic", "rich"}


def in_a_new_process(code: str, **changes: str) -> Any:
    """Runs a program and parses the JSON that it prints; OMP_WAIT_POLICY is not set unless `changes` sets it."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment | {"PYTHONPATH": str(ROOT)} | changes,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return json.loads(done.stdout.splitlines()[-1])


def test_the_import_loads_nothing_and_sets_nothing() -> None:
    """The number of modules stands for the time: 0.03 s for these few."""
    names, changed = in_a_new_process(
        "import json, os, sys; before, variables = set(sys.modules), dict(os.environ); import raycomplete; "
        "print(json.dumps([sorted(set(sys.modules) - before), dict(os.environ) != variables]))"
    )
    assert changed is False
    assert len(names) < 40
    assert not HEAVY & {name.partition(".")[0] for name in names}


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["version"]])
def test_help_loads_little(arguments: list[str]) -> None:
    """The number of modules stands for the time: 0.4 s of one core for 610 of them."""
    names = in_a_new_process(
        f"import json, sys; sys.argv = ['raycomplete', *{arguments}]\nfrom raycomplete.cli import main\n"
        "try: main()\nexcept SystemExit as ended: assert not ended.code\nprint(json.dumps(sorted(sys.modules)))"
    )
    assert len(names) < 900
    assert not {"torch", "ray", "transformers", "vllm"} & set(names)


@pytest.mark.parametrize(("given", "expected"), [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")])
@pytest.mark.parametrize(
    "start",
    [
        "import raycomplete; raycomplete.train",
        "import sys; sys.argv = ['raycomplete', 'version']\nfrom raycomplete.cli import guarded, main\nguarded(main)",
    ],
    ids=["api", "command line"],
)
def test_idle_threads_sleep_unless_the_user_says_otherwise(start: str, given: dict[str, str], expected: str) -> None:
    """Torch reads the setting once, when it is loaded."""
    code = (
        "import json, os, sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'torch': seen.append(os.environ.get('OMP_WAIT_POLICY'))\n"
        "seen = []; sys.meta_path.insert(0, Finder())\n"
        "try:\n"
        f"    exec({start!r})\n"
        "except SystemExit: pass\n"
        "print(json.dumps([*seen, os.environ['OMP_WAIT_POLICY']]))"
    )
    assert set(in_a_new_process(code, **given)) == {expected}


def test_every_public_name_is_there() -> None:
    for name in rc.__all__:
        assert getattr(rc, name).__doc__, name
        assert name in dir(rc)
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        rc.trian  # type: ignore[attr-defined]  # noqa: B018


def test_a_run_file_and_its_overrides_reach_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr("raycomplete.commands.train.train", lambda config, **options: seen.append((config, options)))
    run = rc.load_run_file(ROOT / "jobs" / "organism.yaml", ["train.steps=60"])
    rc.train(run, overwrite=True)
    assert seen == [(run, {"overwrite": True})]
    assert run.train.steps == 60


def test_the_map_names_every_room_from_lower_to_upper() -> None:
    """The map of rooms in the package's docstring is that of tests/test_rooms.py."""
    assert rc.__doc__ is not None
    groups = [
        frozenset(re.findall(r"^    (\w+) {2,}", group, re.MULTILINE))
        for group in re.split(r"\n\n", rc.__doc__.partition("above it in this list:\n")[2])
    ]
    assert [group for group in groups if group] == [line - {"cli"} for line in LINES]
    assert {path.parent.name for path in PACKAGE.glob("*/__init__.py")} <= frozenset().union(*groups)
