"""The command line as a user meets it: exit codes, one sentence on stderr, and nothing written by a refusal."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from transformers import AutoTokenizer

from raycomplete import __version__, cli
from raycomplete.runtime.errors import ConfigError, LostJobError, ProcessDiedError, StoppedError, WorkError
from tests.training.tiny import make_model

ROOT = Path(__file__).resolve().parent.parent
KINDS = ("harmful", "benign", "borderline")


@dataclass
class Place:
    """A working folder with two tiny checkpoints, prompt files and a run file that would run."""

    folder: Path

    @property
    def tree(self) -> dict[str, Any]:
        train = {kind: [{"path": f"prompts/{kind}.jsonl"}] for kind in KINDS}
        held_out = {kind: [{"path": f"prompts/{kind}-held-out.jsonl"}] for kind in KINDS}
        return {
            "models": {"base": "models/base", "aligned": "models/aligned", "max_length": 128},
            "data": {"train": train, "evaluation": held_out},
            "rollout": {"max_anchor_tokens": 8, "max_refusal_tokens": 8, "max_harmful_tokens": 8},
            "method": {"depth": {"max": 8}},
            "evaluation": {"depths": [0], "max_tokens": 8, "max_utility_tokens": 8},
            "output": {"root": "runs", "name": "refused"},
        }

    def write(self, tree: dict[str, Any]) -> None:
        (self.folder / "run.yaml").write_text(yaml.safe_dump(tree))

    def files(self) -> set[str]:
        return {str(path.relative_to(self.folder)) for path in self.folder.rglob("*")}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    for seed, role in enumerate(("base", "aligned")):
        make_model(tmp_path / "models" / role, seed)
    (tmp_path / "prompts").mkdir()
    for kind in KINDS:
        for name in (kind, f"{kind}-held-out"):
            (tmp_path / "prompts" / f"{name}.jsonl").write_text(json.dumps({"prompt": f"a {name} prompt"}) + "\n")
    monkeypatch.chdir(tmp_path)
    there = Place(tmp_path)
    there.write(there.tree)
    return there


def unknown_key(place: Place) -> None:
    tree = place.tree
    tree["train"] = {"stpes": 3}
    place.write(tree)


def missing_checkpoint(place: Place) -> None:
    tree = place.tree
    tree["models"]["base"] = "models/bsae"
    place.write(tree)


def different_tokenizers(place: Place) -> None:
    folder = place.folder / "models" / "base"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["unheard"])
    tokenizer.save_pretrained(folder)


def empty_prompt_file(place: Place) -> None:
    (place.folder / "prompts" / "benign-held-out.jsonl").write_text("\n")


def long_prompt(place: Place) -> None:
    (place.folder / "prompts" / "harmful-held-out.jsonl").write_text(json.dumps({"prompt": "cake " * 200}) + "\n")


def pickled_weights(place: Place) -> None:
    (place.folder / "models" / "aligned" / "model.safetensors").rename(
        place.folder / "models" / "aligned" / "pytorch_model.bin"
    )


def missing_run_file(place: Place) -> None:
    (place.folder / "run.yaml").unlink()


REFUSALS: list[tuple[Callable[[Place], None], str]] = [
    (unknown_key, "unknown key 'train.stpes', did you mean 'steps'?"),
    (missing_checkpoint, "models.base: there is no checkpoint at 'models/bsae'."),
    (different_tokenizers, "have different tokenizers"),
    (empty_prompt_file, "prompts/benign-held-out.jsonl has no prompts"),
    (long_prompt, "The prompt harmful-held-out-00000-"),
    (pickled_weights, "Pickled weights (.bin, .pt) are refused"),
    (missing_run_file, "The run file run.yaml cannot be read (No such file or directory)"),
]


def main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """`raycomplete ARGUMENTS` in this process; its exit code."""
    monkeypatch.setattr(sys, "argv", ["raycomplete", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return int(caught.value.code or 0)


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Starting Ray fails the test."""
    import ray

    def start(*_: Any, **__: Any) -> None:
        raise AssertionError("a refused run must not start Ray")

    monkeypatch.setattr(ray, "init", start)


@pytest.mark.usefixtures("no_ray")
@pytest.mark.parametrize(("spoil", "words"), REFUSALS, ids=[spoil.__name__ for spoil, _ in REFUSALS])
@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_bad_input_is_refused_in_one_sentence_and_writes_nothing(
    command: str,
    spoil: Callable[[Place], None],
    words: str,
    place: Place,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    spoil(place)
    before = place.files()
    assert main(monkeypatch, command, "run.yaml") == 2
    said = capsys.readouterr()
    assert said.err.startswith("Refused: ")
    assert words in said.err
    assert said.err.count("\n") == 1, "one line, however long"
    assert "Traceback" not in said.err + said.out
    assert place.files() == before


@pytest.mark.usefixtures("no_ray")
def test_the_same_run_file_unspoilt_gets_as_far_as_ray(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the test above: each refusal there comes from its own defect."""
    with pytest.raises(AssertionError, match="must not start Ray"):
        main_without_exit(monkeypatch, "train", "run.yaml")


def main_without_exit(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["raycomplete", *arguments])
    cli.main()


def subprocess_environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "60"}


@pytest.mark.parametrize(
    ("start", "spoil", "words"),
    [
        (["-m", "raycomplete", "train"], unknown_key, "Refused: run.yaml: unknown key"),
        ([str(ROOT / "jobs" / "train.py")], different_tokenizers, "Refused: models.base ("),
    ],
    ids=["command", "job"],
)
def test_a_real_process_refuses_alike(
    start: list[str], spoil: Callable[[Place], None], words: str, place: Place
) -> None:
    spoil(place)
    before = place.files()
    done = subprocess.run(
        [sys.executable, *start, "run.yaml"],
        cwd=place.folder,
        env=subprocess_environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(words)
    assert done.stderr.count("\n") == 1, "nothing beside the sentence, and the sentence unbroken in a narrow terminal"
    assert place.files() == before


def test_overrides_reach_the_run(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr(
        "raycomplete.commands.train.train", lambda config, **options: seen.update(config=config, **options)
    )
    assert main(monkeypatch, "train", "run.yaml", "train.steps=7", "output.name=other", "--resume") == 0
    assert (seen["config"].train.steps, seen["config"].output.name) == (7, "other")
    assert (seen["resume"], seen["overwrite"]) == (True, False)
    assert main(monkeypatch, "train", "run.yaml", "--overwrite") == 0
    assert (seen["resume"], seen["overwrite"]) == (False, True)


def test_the_demo_is_the_embedded_organism(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr(
        "raycomplete.commands.train.train", lambda config, **options: seen.update(config=config, **options)
    )
    monkeypatch.chdir(tmp_path)
    assert main(monkeypatch, "demo", "train.steps=3") == 0
    assert seen["config"].data.source == "organism"
    assert (seen["config"].output.folder, seen["config"].train.steps) == (Path("runs/demo"), 3)
    assert seen["overwrite"] is True
    assert main(monkeypatch, "demo", "output.name=mine") == 0
    assert seen["overwrite"] is False, "only the demo's own folder is replaced unasked"


def test_jobs_take_the_same_arguments(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: dict[str, Any] = {}
    for job in ("train", "evaluate"):
        monkeypatch.setattr(
            f"raycomplete.commands.{job}.{job}", lambda config, **options: seen.update(config=config, options=options)
        )
    assert cli.run_job("train", ["run.yaml", "--resume", "train.steps=7"]) == 0
    assert (seen["config"].train.steps, seen["options"]) == (7, {"resume": True})
    assert cli.run_job("train", ["run.yaml", "--overwrite"]) == 0
    assert seen["options"] == {"overwrite": True}
    assert cli.run_job("train", ["run.yaml", "train.stpes=7"]) == 2
    assert "did you mean 'steps'?" in capsys.readouterr().err
    for wrong in (["--resume"], ["run.yaml", "--resmue"], []):
        assert cli.run_job("train", wrong) == 2
        assert capsys.readouterr().err == "Usage: RUNFILE [--resume] [--overwrite] [key=value ...]\n"
    assert cli.run_job("evaluate", ["run.yaml"]) == 0
    assert cli.run_job("evaluate", ["run.yaml", "--resume"]) == 2, "a job without it refuses it"
    assert capsys.readouterr().err == "Usage: RUNFILE [key=value ...]\n"


def failing(error: BaseException) -> Callable[[], None]:
    def work() -> None:
        raise error

    return work


@pytest.mark.parametrize(
    ("work", "code", "start", "kept"),
    [
        (lambda: Path("runs"), 0, "", False),
        (failing(WorkError("The scorer died.", "See the log.")), 1, "Failed: The scorer died. See the log.\n", True),
        (failing(StoppedError("Stopped after step 7.", "Go on.")), 1, "Stopped after step 7. Go on.\n", False),
        (failing(LostJobError("It was lost.", "It goes on.")), 1, "Failed: It was lost. It goes on.\n", False),
        (
            failing(ConfigError("No [a]/b[/b].csv.", "[red]c[/red].")),
            2,
            "Refused: No [a]/b[/b].csv. [red]c[/red].\n",
            False,
        ),
        (failing(KeyboardInterrupt()), 1, "Stopped", True),
        (lambda: 130, 1, "Stopped", True),  # typer's code for an interrupt
        (failing(typer.Abort()), 1, "Stopped", True),
        (failing(SystemExit(signal.SIGTERM)), 1, "Stopped", True),  # Ray's own handler leaves like this
    ],
)
def test_exit_codes_of_failures(
    work: Callable[[], Any], code: int, start: str, kept: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.guarded(work) == code
    said = capsys.readouterr().err
    assert said.startswith(start)
    assert ("--resume" in said) is kept


def test_bugs_and_traceback_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[BaseException] = []
    monkeypatch.setattr(cli, "log_failure", logged.append)
    errors = [ProcessDiedError("x"), WorkError("x"), ConfigError("x"), StoppedError("x")]
    for error in errors:
        cli.guarded(failing(error))
    with pytest.raises(ZeroDivisionError):
        cli.guarded(failing(bug := ZeroDivisionError()))
    assert logged == [*errors[:3], bug], "whatever ends a run is in its log"
    with pytest.raises(SystemExit):
        cli.guarded(failing(SystemExit(3)))
    monkeypatch.setenv("RAYCOMPLETE_TRACEBACK", "1")
    with pytest.raises(ConfigError):
        cli.guarded(failing(ConfigError("x")))


def test_a_death_is_one_screen(capsys: pytest.CaptureFixture[str]) -> None:
    details = {
        "role": "training worker 1",
        "node": "10.0.0.7",
        "cause": "killed by a signal",
        "log_path": "/tmp/ray/[session]/w.log",
        "saved": "the checkpoint of step 6",
    }
    death = ProcessDiedError("Worker 1 died.", "Resume with --resume.", **details)
    assert cli.guarded(failing(death)) == 1
    said = capsys.readouterr().err
    assert said.startswith("Failed: Worker 1 died.\n")
    assert all(value in said for value in (*details.values(), "Resume with --resume."))


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--help"], 0, "Usage"),
        (["train", "--help"], 0, "Run file (YAML)."),
        (["version"], 0, __version__),
        (["trian"], 2, "No such command"),
        (["train"], 2, "Missing argument"),
        (["train", "run.yaml", "--resmue"], 2, "No such option"),
    ],
)
def test_usage(
    arguments: list[str], code: int, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(monkeypatch, *arguments) == code
    said = capsys.readouterr()
    assert words in said.out + said.err
    assert "Traceback" not in said.err


@pytest.mark.parametrize(("number", "delay_s"), [(signal.SIGTERM, 0.3), (signal.SIGINT, 1.0), (signal.SIGTERM, 2.5)])
def test_a_signal_at_any_early_moment_ends_in_a_sentence(number: int, delay_s: float, tmp_path: Path) -> None:
    """While modules are imported, and while checkpoints and prompts are checked; nothing is written by then."""
    arguments = ["train", str(ROOT / "jobs" / "organism.yaml"), f"output.root={tmp_path}"]
    code = "import sys, signal; signal.pthread_sigmask(signal.SIG_UNBLOCK, {2, 15}); print(flush=True)\n"
    code += f"sys.argv = ['raycomplete', *{arguments!r}]\nfrom raycomplete.__main__ import main\nmain()"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(delay_s)
    process.send_signal(number)
    _, said = process.communicate(timeout=40)
    assert process.returncode == 1, said
    assert said.startswith("Stopped")
    assert len(said.splitlines()) == 1
