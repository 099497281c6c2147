"""Checks as the doctor runs them: none can end the others, and each that is not content names a remedy."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from raycomplete import cli
from raycomplete.doctor import command
from raycomplete.doctor.command import CHECKS, Check, run_checks
from raycomplete.doctor.findings import MARK, Context, Finding, fail, ok, warn
from raycomplete.doctor.gpu import STAGES, Plan
from tests.conftest import ROOT


def crash(_: Context) -> Finding:
    raise SystemExit("broken driver")  # not even an Exception


def hang(_: Context) -> Finding:
    time.sleep(30)
    return ok("late")


QUICK = Plan(Path("/nowhere"), rehearsal=True)
CONTENT = Check("content", lambda _: ok("fine"))
DOUBT = Check("doubt", lambda _: warn("hm", "look [again]"))
BROKEN = Check("broken", lambda _: fail("no disk", "buy one"))


def test_a_crash_and_a_hang_fail_their_own_check_only() -> None:
    checks = [Check("crash", crash), Check("hang", hang, 0.2), CONTENT]
    crashed, hung, content = run_checks(Context(), checks)
    assert crashed.finding.status == "fail"
    assert "SystemExit: broken driver" in crashed.finding.found
    assert (hung.finding.status, hung.finding.found) == ("fail", "No answer within 0.2 s.")
    assert content.finding.status == "ok"
    assert all(outcome.finding.remedy for outcome in (crashed, hung))


def test_what_a_check_found_is_told_before_the_next_one_begins(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told: list[str] = []

    def look(_: Context) -> Finding:
        told.append(capsys.readouterr().out)
        return ok("it answers")

    monkeypatch.setattr(command, "CHECKS", [BROKEN, CONTENT, Check("engine", look)])
    assert command.tell_checks(quick=True) == 2
    told.append(capsys.readouterr().out)
    assert told == [f'{MARK}{{"broken": "fail: no disk buy one"}}\n', f'{MARK}{{"engine": "ok: it answers"}}\n']


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
def test_the_stage_of_the_report_on_a_gpu_runs_every_check(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("raycomplete.runtime.machine.within", lambda *_: ok("fine"))
    monkeypatch.setattr(sys, "argv", next(stage for stage in STAGES if stage.name == "devices").command(QUICK)[2:])
    with pytest.raises(SystemExit) as caught:
        runpy.run_module(sys.argv[0], run_name="__main__")
    assert caught.value.code == 0
    told = [json.loads(line.removeprefix(MARK)) for line in capsys.readouterr().out.splitlines()]
    assert told == [{"gpu": "ok: fine"}, {"compiler": "ok: fine"}, {"engine": "ok: fine"}]


def run(monkeypatch: pytest.MonkeyPatch, checks: Sequence[Check], *arguments: str) -> int:
    monkeypatch.setattr(command, "CHECKS", checks)
    monkeypatch.setattr(sys, "argv", ["raycomplete", "doctor", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return int(caught.value.code or 0)


@pytest.mark.parametrize(
    ("checks", "code", "status"),
    [([CONTENT], 0, "ok"), ([CONTENT, DOUBT], 0, "warn"), ([CONTENT, BROKEN, DOUBT], 2, "fail")],
)
def test_the_exit_code_and_the_json_say_the_worst(
    checks: list[Check], code: int, status: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, checks, "--json") == code
    said = capsys.readouterr()
    tree: dict[str, Any] = json.loads(said.out)  # one object and nothing else
    assert said.err == ""
    assert set(tree) == {"schema", "raycomplete", "status", "run_file", "address", "quick", "checks"}
    assert (tree["schema"], tree["status"]) == (2, status)
    assert [entry["name"] for entry in tree["checks"]] == [check.name for check in checks]
    assert set(tree["checks"][0]) == {"name", "status", "found", "remedy", "seconds"}


def test_the_screen_shows_what_was_found_and_the_remedy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, [CONTENT, DOUBT, BROKEN]) == 2
    said = capsys.readouterr().out
    assert "-> look [again]" in said, "brackets are no markup"
    assert "-> buy one" in said
    assert "1 ok, 1 to note, 1 failed" in said


def test_a_bad_run_file_is_a_finding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.yaml").write_text("models: {bsae: x}\n")
    checks = [check for check in CHECKS if check.name in ("open files", "run file", "checkpoints")]
    assert run(monkeypatch, checks, str(tmp_path / "run.yaml"), "--json") == 2
    files, run_file, _ = json.loads(capsys.readouterr().out)["checks"]
    assert "did you mean 'base'?" in run_file["found"]
    assert files["status"] == "ok", "the others go on"


def test_the_doctor_itself_imports_nothing_that_may_be_broken() -> None:
    """The checks that need no child run here with libraries that end whoever imports them."""
    code = (
        "import sys\n"
        "class Trap:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name.split('.')[0] in ('torch', 'ray', 'vllm', 'transformers', 'deepspeed', 'numpy'):\n"
        "            raise SystemExit(f'{name} was imported')\n"
        "sys.meta_path.insert(0, Trap())\n"
        "from raycomplete.doctor.command import CHECKS, run_checks\n"
        "from raycomplete.doctor.findings import Context\n"
        "left = ('imports', 'gpu', 'checkpoints', 'prompts')\n"
        "for outcome in run_checks(Context(quick=True), [check for check in CHECKS if check.name not in left]):\n"
        "    assert 'check itself failed' not in outcome.finding.found, outcome\n"
        "    assert outcome.finding.status == 'ok' or outcome.finding.remedy, outcome\n"
        "print('done')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.stdout.strip(), done.returncode) == ("done", 0), done.stderr[-2000:]
