"""`raycomplete plan` as a user meets it: tables, JSON and refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from raycomplete import cli
from raycomplete.commands.plan import shapes_of
from raycomplete.commands.train import resources
from raycomplete.config import load_run_file
from raycomplete.config.run import AlignConfig
from raycomplete.data.organism import checkpoint_path
from raycomplete.engines.cluster import Node, check_devices
from raycomplete.plan.catalogue import find_hardware, preset
from raycomplete.plan.estimate import Request, make_plan
from raycomplete.runtime.errors import CheckpointError

JOBS = Path(__file__).resolve().parents[2] / "jobs"
LARGE = [str(JOBS / "plan-70b.yaml"), "--nodes", "8", "--gpus-per-node", "8"]


def run(*arguments: str) -> int:
    return cli.guarded(lambda: cli.app(["plan", *arguments], standalone_mode=False))


def test_the_screen_holds_roles_bottleneck_and_assumptions(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    assert run(*LARGE) == 0
    printed = capsys.readouterr().out
    for words in ("aligned scorers", "rollout engines", "optimizer", "KV cache", "Bottleneck: ", "Assumed:", "example"):
        assert words in printed
    assert printed.index("aligned scorers") < printed.index("Bottleneck") < printed.index("Assumed")


def test_json_is_whole_and_says_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*LARGE, "--json", "--price-per-gpu-hour", "2") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["cost"] == pytest.approx(found["step_s"] * 1000 / 3600 * 64 * 2)
    assert found["step_s"] == max(found["seconds"].values()) + found["seconds"]["updates of weights"]
    assert found["models"]["student"]["parameters"] == 8_030_261_248
    assert set(found["memory"]) == {"training worker", "aligned scorer", "base scorer", "rollout engine"}
    assert any("Price: 2.00" in line and "as given" in line for line in found["assumptions"])


@pytest.mark.parametrize("arguments", [LARGE, [str(JOBS / "organism.yaml"), "--student", "135m", "--teacher", "135m"]])
def test_80_columns_cut_no_word(
    arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert run(*arguments) == 0
    printed = capsys.readouterr().out
    assert "…" not in printed
    assert max(map(len, printed.splitlines())) <= 80
    for word in ("training", "workers", "tokens", "step", "optimizer", "activations", "head", "gradient"):
        assert word in printed  # cells break between words


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([*LARGE, "--hardware", "h1000"], "Did you mean 'h100'?"),
        ([*LARGE, "--student", "9B"], "There is no model shape '9B'"),
        ([*LARGE[:1], "--nodes", "0"], "--nodes must be positive"),
        ([*LARGE[:1], "--gpus-per-node", "0"], "--gpus-per-node must be positive"),
        (LARGE[:1], "The aligned scorer does not fit"),
        ([], "Missing argument"),
    ],
)
def test_refusals_are_one_sentence_and_exit_code_2(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "arguments", "parameters"),
    [
        ("llama3.1-8b", ["--gpus-per-node", "8"], 8_030_261_248),
        ("qwen2.5-7b", ["--gpus-per-node", "8"], 7_615_616_512),
        ("mistral-7b", ["--gpus-per-node", "8"], 7_248_023_552),
        ("qwen3-8b", ["--gpus-per-node", "8"], 8_190_735_360),
        ("qwen3-0.6b", [], 596_049_920),
        (
            "gemma3-270m",
            ["--hardware", "cpu", *(f"--{role}=gemma-3-270m" for role in ("student", "teacher"))],
            268_098_176,
        ),
    ],
)
def test_a_run_file_says_what_its_plan_says(
    name: str, arguments: list[str], parameters: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """The number of parameters is that of the published checkpoint."""
    path = JOBS / f"{name}.yaml"
    assert run(str(path), *arguments, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["models"]["student"]["parameters"] == found["models"]["base"]["parameters"] == parameters
    head = " ".join(line.lstrip("# ") for line in path.read_text().splitlines() if line.startswith("#"))
    assert "Not run by us." in head or "Run by us" in head, "each says which it is"
    assert f"{found['step_s']:.2g} s a step" in head
    needs = [part["total"] / 2**30 for part in found["memory"].values()]
    shown = f"{sum(needs):.0f} GiB in all" if name.startswith("gemma") else f"{needs[0]:.0f} GiB"
    assert shown in head


@pytest.mark.parametrize("name", ["llama3.1-8b", "qwen2.5-7b", "mistral-7b", "qwen3-8b", "qwen3-0.6b"])
def test_a_run_file_for_gpus_fits_the_machine_that_it_names(name: str) -> None:
    config = load_run_file(JOBS / f"{name}.yaml")
    placed, gpus = resources(config), 1 if name == "qwen3-0.6b" else 8
    check_devices(config.cluster, placed, use_gpu=True)
    assert placed.problem([Node(64, gpus)], use_gpu=True) == ""
    needs = make_plan(Request(config, shapes_of(config), find_hardware("h100"), devices_per_node=gpus)).memory
    shares = {"training worker": config.cluster.gpus_per_worker}
    for role, parts in needs.items():
        share = shares.get(role, config.cluster.gpus_per_engine) * find_hardware("h100").memory_bytes
        assert sum(parts.values()) <= share, role


def test_before_align_has_run_its_twin_has_the_shape_of_base() -> None:
    config = load_run_file(JOBS / "smollm2.yaml", ["models.base=organism:base", "models.aligned=runs/not-there"])
    found = shapes_of(config)
    assert found["aligned"] == found["base"]
    with pytest.raises(CheckpointError):
        shapes_of(config.model_copy(update={"align": AlignConfig()}))


def test_shapes_come_from_config_files_and_flags(tmp_path: Path) -> None:
    organism = load_run_file(JOBS / "organism.yaml")
    found = shapes_of(organism)
    counted = sum(tensor.numel() for tensor in load_file(checkpoint_path("aligned") / "model.safetensors").values())
    assert {shape.num_parameters for shape in found.values()} == {counted}
    flagged = shapes_of(organism, student="8B", teacher="70B")
    assert (flagged["student"], flagged["base"]) == (preset("8B"), preset("70B"))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="architecture"):
        shapes_of(organism, student=str(tmp_path))


def test_an_aligned_twin_that_is_yet_to_be_made_has_the_shape_of_base(tmp_path: Path) -> None:
    twin = str(tmp_path / "twin")
    changes = ["models.base=organism:base", f"models.aligned={twin}", "align.refusals=[{path: x.jsonl}]"]
    found = shapes_of(load_run_file(JOBS / "organism.yaml", changes))
    assert found["aligned"] == found["base"]


def test_an_unknown_hub_id_is_not_downloaded() -> None:
    config = load_run_file(JOBS / "organism.yaml", ["models.base=hub:some/where"])
    with pytest.raises(CheckpointError, match="a plan downloads nothing"):
        shapes_of(config)
