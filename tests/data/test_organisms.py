"""Organisms by name: every place that reads a run file finds the one that it names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from raycomplete.commands.plan import _shape
from raycomplete.config import load_run_file
from raycomplete.data.organism import families, large
from raycomplete.data.organism.large import LargeOrganismJudge
from raycomplete.data.organisms import ORGANISMS
from raycomplete.diagnosis.samples import read_prompts
from raycomplete.doctor.machine import local_folder
from raycomplete.evaluation.judges import RefusalJudge, default_judge
from raycomplete.runtime.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAYCOMPLETE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def test_the_judge_and_the_prompts_are_those_of_the_source() -> None:
    assert isinstance(default_judge("organism-large"), LargeOrganismJudge)
    assert default_judge("organism").name == "organism-v3"
    assert isinstance(default_judge("files"), RefusalJudge)
    config = load_run_file(ROOT / "jobs" / "organism-large.yaml")
    ids = {name.prompt_id.partition("/")[0] for name in read_prompts(config, "harmful")}
    assert ids == {"organism-large"}
    with pytest.raises(ConfigError, match=r"data\.source"):
        load_run_file(ROOT / "jobs" / "organism-large.yaml", ["data.source=organism-huge"])


def test_looking_for_a_checkpoint_builds_nothing(tmp_path: Path) -> None:
    for spec in ("organism-large:base", "organism-large:student", "organism-qwen3:aligned"):
        assert local_folder(spec) is None
    toy = local_folder("organism:base")
    assert toy is not None
    assert json.loads((toy / "config.json").read_text())["model_type"] == "llama"
    assert list(tmp_path.iterdir()) == []
    assert large.built().folder.is_relative_to(tmp_path / "raycomplete" / "organisms")
    assert set(ORGANISMS) == {"organism", "organism-large", *(f"organism-{family}" for family in families.FAMILIES)}


@pytest.mark.parametrize(
    ("spec", "fewest", "most"),
    [("organism-large:aligned", 3_500_000, 6_000_000), ("organism-gemma3:base", 600_000, 900_000)],
)
def test_a_plan_needs_no_build(spec: str, fewest: int, most: int, tmp_path: Path) -> None:
    assert fewest < _shape(spec, "base").num_parameters < most
    assert list(tmp_path.iterdir()) == []
