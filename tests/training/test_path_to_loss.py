"""The way of a harmful prompt to its loss: docs/method.md lists the files that it passes, and they are these."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from raycomplete.config import TrainConfig, load_run_file
from raycomplete.data.chat import ChatCodec
from raycomplete.data.checkpoints import load_model
from raycomplete.data.heads import load_head
from raycomplete.data.inputs import Models, prepare_prompts
from raycomplete.data.organism import checkpoint_path
from raycomplete.data.organism.judge import OrganismJudge
from raycomplete.losses.loss import LossOutput
from raycomplete.methods.registry import DepthConfig
from raycomplete.runtime.console import Console
from raycomplete.training.feedback import DepthSampler
from raycomplete.training.sampling import make_samples
from raycomplete.training.step_plan import Planner
from raycomplete.training.student import HeadSettings, StudentModule
from tests.conftest import ROOT
from tests.training.test_sampling import AS_ASKED, ScriptedModel, uncached  # noqa: F401
from tests.training.tiny import LocalScores, build_batch, completion, head_spec, make_model, prefetcher_of

MOST_FILES = 15
# Files that answer without knowing what they are asked about.
SERVICES = re.compile(
    r"(config|runtime|attacks|evaluation)/|data/(chat|openings|families|checkpoints|heads|organism)"
    r"|losses/(settings|terms|heads|gradients|kernels|divergences|base_favored)\.py"
)


def listed_files() -> list[str]:
    section = (ROOT / "docs" / "method.md").read_text(encoding="utf-8").split("## From a prompt to its loss")[1]
    return re.findall(r"^\d+\. `raycomplete/([\w/]+\.py)`", section.split("\n## ")[0], re.MULTILINE)


def test_the_list_is_short_and_its_files_are_there() -> None:
    files = listed_files()
    assert 0 < len(files) <= MOST_FILES
    assert len(set(files)) == len(files)
    assert [file for file in files if not (ROOT / "raycomplete" / file).is_file()] == []


def test_a_prompt_passes_the_files_of_the_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file whose code runs between the prompts and the gradient is listed, in the order of its first call."""
    config = load_run_file(
        ROOT / "jobs" / "organism.yaml", ["data.limit_per_kind=4", "train.validation.every=0", *AS_ASKED]
    )
    codec = ChatCodec(checkpoint_path("aligned"))
    paths = {role: make_model(tmp_path / role, seed) for seed, role in enumerate(("base", "aligned", "student"))}
    heads = {role: load_head(head_spec(paths[role]), dtype=torch.float32) for role in ("base", "aligned")}
    method = completion(depth=DepthConfig(min=1, max=8))
    loss = method.loss(TrainConfig())
    spec = head_spec(paths["student"])
    lm = load_model(paths["student"], "float32")
    student = StudentModule(
        lm, HeadSettings(spec.scale, spec.softcap, spec.vocab_size), heads, loss, external_head=False
    )
    prefetcher = prefetcher_of(method, {role: LocalScores(paths[role]) for role in ("base", "aligned")})

    passed: list[str] = []

    def note(frame: Any, event: str, _: Any) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(ROOT / "raycomplete"):
            passed.append(path.relative_to(ROOT / "raycomplete").as_posix())

    sys.setprofile(note)
    try:
        run: Any = SimpleNamespace(
            config=config,
            console=Console(quiet=True),
            models=Models({"aligned": Path("aligned"), "base": Path("base")}, {}, codec),
            prompts=prepare_prompts(config, codec),
            engines=SimpleNamespace(generator=ScriptedModel(codec)),
            judge=OrganismJudge(),
        )
        samples = make_samples(run)
        planner = Planner(samples, anchor_batch_size=4, recovery_batch_size=4, seed=0)
        plan = planner.plan(0, DepthSampler(method.depth, 0))
        prefetcher.request(0, *planner.samples_of(0))
        batch = build_batch(method, plan, prefetcher.take(0))
        LossOutput.unflatten(student(batch), loss).total.backward()  # type: ignore[no-untyped-call]
    finally:
        sys.setprofile(None)
    files = [file for file in dict.fromkeys(passed) if not SERVICES.match(file)]
    assert files == [file for file in listed_files() if file != "training/worker.py"]  # the loop is this test
