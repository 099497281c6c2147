"""Study files: what runs come of them, and what is refused before the first one starts."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from raycomplete.config import load_run_file
from raycomplete.config.study import FROZEN, departures, load_study
from raycomplete.methods.registry import METHODS
from raycomplete.methods.rivals.augmentation import Augmentation
from raycomplete.methods.rivals.door import DOOR
from raycomplete.methods.rivals.w_door import WDOOR
from raycomplete.runtime.errors import ConfigError
from tests.conftest import ROOT

RUN_FILE = (ROOT / "jobs" / "organism.yaml").read_text()
PLUGIN = '''
from typing import Literal
from pydantic import Field
from raycomplete.methods.rivals.augmentation import Augmentation
from raycomplete.methods.registry import register


@register
class Refusals(Augmentation):
    """Refusals of the prompt alone."""

    name: Literal["refusals_of_a_plugin"] = Field("refusals_of_a_plugin", description="which method")
    plain_fraction = 1.0
'''


def study_file(folder: Path, text: str) -> Path:
    (folder / "run.yaml").write_text(RUN_FILE)
    path = folder / "study.yaml"
    path.write_text("run: run.yaml\n" + textwrap.dedent(text))
    return path


def test_every_method_and_seed_becomes_a_run_and_every_defence_one(tmp_path: Path) -> None:
    file = """
        settings: {train: {steps: 7}}
        methods:
          completion:
          augmentation: {train: {lr: 0.01}}
          no anchor: {method: {weights: {anchor: 0}}}
        defences: {contrast: {name: contrastive, alpha: 2}}
        seeds: [3, 4]
        output: {root: out, name: mine}
    """
    study = load_study(study_file(tmp_path, file), ["settings.train.warmup_steps=1"])
    names = [(run.label, run.seed, run.trains) for run in study.runs]
    assert names == [
        (FROZEN, None, False),
        *((label, seed, True) for label in ("completion", "augmentation", "no anchor") for seed in (3, 4)),
        ("contrast", None, False),
    ]
    by_label = {run.label: run.config for run in study.runs}
    assert {config.train.steps for config in by_label.values()} == {7}
    assert {config.train.warmup_steps for config in by_label.values()} == {1}
    assert by_label["no anchor"].method.name == "completion"
    assert by_label["no anchor"].method.loss_weights()["anchor"] == 0
    assert by_label["augmentation"].method.name == "augmentation"
    assert by_label["augmentation"].method.anchor_batch_size == 24  # what all methods have stays
    assert by_label["augmentation"].train.lr == 0.01
    assert by_label["contrast"].evaluation.defence is not None
    assert by_label["contrast"].evaluation.defence.name == "contrastive"
    assert by_label[FROZEN].evaluation.defence is None
    assert study.runs[1].config.output.folder == Path("out/mine").resolve() / "organism" / "completion-seed3"
    assert study.reference == "completion"


def test_all_runs_share_one_evaluation(tmp_path: Path) -> None:
    study = load_study(study_file(tmp_path, "methods: {completion: , npo: , door: }"))
    assert len({run.config.evaluation.model_dump_json() for run in study.runs}) == 1


def test_models_multiply_runs(tmp_path: Path) -> None:
    file = """
        models: {small: {models: {max_length: 240}}, large: {data: {limit_per_kind: 8}}}
        methods: {completion: }
    """
    study = load_study(study_file(tmp_path, file))
    assert [(run.model, run.label) for run in study.runs] == [
        ("small", FROZEN),
        ("small", "completion"),
        ("large", FROZEN),
        ("large", "completion"),
    ]
    assert study.runs[0].config.models.max_length == 240
    assert study.runs[2].config.data.limit_per_kind == 8


def test_runs_of_two_models_are_mirrored_apart(tmp_path: Path) -> None:
    file = """
        settings: {output: {storage: "s3://bucket/all?region=x"}}
        models: {small: {}, the large: {}}
        methods: {completion: }
        output: {name: mine}
    """
    places = [run.config.output.mirror for run in load_study(study_file(tmp_path, file)).runs]
    assert places == [
        f"s3://bucket/all/mine/{model}/{run}?region=x"
        for model in ("small", "the-large")
        for run in ("aligned", "completion-seed0")
    ]
    of_study = load_study(study_file(tmp_path, file), ["output.storage=s3://other"]).runs[0].config.output
    assert of_study.mirror == "s3://other/mine/small/aligned"


def test_a_method_of_a_plugin_is_named_like_any_other(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(PLUGIN)
    file = "plugins: [mine.py]\nmethods: {refusals_of_a_plugin: }"
    study = load_study(study_file(tmp_path, file))
    config = study.runs[1].config
    assert config.method.name == "refusals_of_a_plugin"
    assert config.plugins == [tmp_path / "mine.py"]


def test_a_plugin_of_a_study_may_be_a_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "elsewhere" / "package_of_a_study"
    package.mkdir(parents=True)
    (package / "rivals.py").write_text(PLUGIN.replace("refusals_of_a_plugin", "refusals_of_a_module"))
    monkeypatch.syspath_prepend(tmp_path / "elsewhere")
    file = "plugins: [package_of_a_study.rivals]\nmethods: {refusals_of_a_module: }"
    config = load_study(study_file(tmp_path, file)).runs[1].config
    assert config.method.name == "refusals_of_a_module"
    assert config.plugins == [Path("package_of_a_study.rivals")]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("methods: {}", "methods"),
        ("method: {completion: }", "unknown key 'method', did you mean 'methods'"),
        ("methods: {completion: {evaluation: {num_prompts: 3}}}", "changes evaluation"),
        ("methods: {mine: {method: {name: unheard_of}}}", "unheard_of"),
        ("methods: {completion: {train: {stepz: 3}}}", "did you mean 'steps'"),
        ("methods: {completion: }\nseeds: [1, 1]", "names a seed twice"),
        (
            "methods: {completion: }\ndefences: {a b: {name: re_ask}, a-b: {name: re_ask}}",
            "would write into the folder",
        ),
        ("methods: {completion: }\ndefences: {aligned: {name: re_ask}}", "would write into the folder"),
        ("methods: {x: }\ndefences: {x: {name: re_ask}}", "two rows of the table would be called 'x'"),
        ("methods: {base: }", "two rows of the table would be called 'base'"),
        ("methods: {aligned: }", "two rows of the table would be called 'aligned'"),
        ("methods: {completion: }\nsettings: {output: {storage: 'ftp://x/y'}}", "output.storage"),
        ("methods: {completion: }\ndefences: {x: {name: contrast}}", "There is no defence 'contrast'"),
        ("methods: {completion: }\ndefences: {x: {name: re_ask, evry: 3}}", "Did you mean 'every'"),
        ("methods: {circuit_breakers: }", "train.lora_rank"),
        ("methods: {policy_gradient: {rollout: {on_policy: true, sync_every: 2}}}", "set rollout.sync_every to 1"),
    ],
)
def test_mistakes_are_told_in_one_sentence(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said.replace("(", r"\(")):
        load_study(study_file(tmp_path, text))


def test_departures_name_what_differs_from_the_authors() -> None:
    run = load_run_file(
        ROOT / "jobs" / "organism.yaml", ["method={name: door, alpha: 0.4}", "train.lr=1e-5", "train.steps=2000"]
    )
    assert departures(run, run) == [*DOOR.departures, "method.alpha 0.4 instead of 0.2"]
    other = load_run_file(ROOT / "jobs" / "organism.yaml", ["method={name: door}", "train.steps=2000"])
    assert departures(other, other) == [*DOOR.departures, "train.lr 0.001 instead of 1e-05"]
    drawn = load_run_file(ROOT / "jobs" / "organism.yaml", ["method={name: door, depth: {max: 50}}"])
    assert "method.depth.max 50 instead of 100" in departures(drawn, drawn)


def test_departures_name_samples_and_validation_that_are_not_the_reference_s(tmp_path: Path) -> None:
    file = """
        methods:
          completion: {rollout: {on_policy: true}, train: {validation: {every: 0}}}
          augmentation: {train: {steps: 160, lr: 2.0e-5, warmup_steps: 0}}
          adaptive depth: {method: {name: completion, depth: {schedule: adaptive}}}
        settings: {method: {anchor_batch_size: 16, recovery_batch_size: 16, depth: {max: 64}}}
    """
    told = {run.label: run.departures for run in load_study(study_file(tmp_path, file)).runs}
    adversary = "method.suffix_adversary.steps 8 instead of 0"
    assert (told["completion"], told[FROZEN]) == ((adversary,), ())
    beside = (
        "rollout.on_policy False instead of the reference's True",
        "train.validation.every auto instead of the reference's 0",
    )
    assert told["adaptive depth"] == ("method.depth.schedule adaptive instead of uniform", adversary, *beside)
    # The schedule of the run file stays in a method that draws depths evenly whatever it says.
    batches = ("method.anchor_batch_size 16 instead of 64", "method.depth.max 64 instead of 100")
    assert told["augmentation"] == (*Augmentation.departures, *batches, *beside)


def test_every_rival_names_its_departures() -> None:
    ours = (method for method in METHODS.values() if method.__module__.startswith("raycomplete."))
    assert {method.__name__ for method in ours if not method.departures} == {"Completion", "SFT"}


@pytest.mark.parametrize("name", ["study-organism.yaml", "study-smollm2.yaml", "study-ablation.yaml"])
def test_the_study_files_of_the_repository_can_be_used(name: str) -> None:
    """Budgets of completion do not choose the step that a rival keeps, and no weight of its loss is without a bound."""
    study = load_study(ROOT / "jobs" / name)
    assert len(study.runs) > 4
    rivals = [run.config for run in study.runs if run.trains and run.config.method.name != "completion"]
    assert {config.train.validation.every for config in rivals} <= {0}
    assert {config.method.token_weights for config in rivals if isinstance(config.method, WDOOR)} <= {"sigmoid"}


def test_the_study_of_the_organism_trains_a_rival_on_completion_s_samples() -> None:
    study = load_study(ROOT / "jobs" / "study-organism.yaml")
    by_label = {run.label: run for run in study.runs if run.trains}
    ours, theirs = by_label["augmentation, our samples"], by_label["augmentation"]
    assert ours.config.method == theirs.config.method
    assert ours.config.rollout == by_label["completion"].config.rollout != theirs.config.rollout
    asked = by_label["completion"].config.evaluation
    reduced = {attack.name: attack.reduced_because(100) for attack in asked.attacks}
    full = {name for name, reasons in reduced.items() if not reasons}
    assert full == {"prefill_mid_answer", "refuse_then_turn", "adaptive", "decoding"}
    assert asked.max_tokens == 112
    steps = {label: by_label[label].config.train.steps for label in ("latent_adversarial", "policy_gradient")}
    assert steps == {"latent_adversarial": 100, "policy_gradient": 40}
