"""The run file: what is accepted, what is refused and in which words."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from raycomplete.attacks.registry import ATTACKS
from raycomplete.config import RunConfig, dump, load_run_file, parse
from raycomplete.config.loading import apply_override
from raycomplete.methods.completion import Completion
from raycomplete.methods.sft import SFT
from raycomplete.runtime.errors import ConfigError
from raycomplete.runtime.section import removed_keys

ROOT = Path(__file__).resolve().parents[2]
# All but Ray Serve's own and those of studies, which tests/config/test_study.py reads.
SHIPPED = sorted(path for path in (ROOT / "jobs").glob("*.yaml") if not path.name.startswith(("serve", "study-")))
MINIMAL = {"models": {"base": "organism:base", "aligned": "organism:aligned"}, "data": {"source": "organism"}}
# Every section differs from its default somewhere, so that a key that dump or load forgot would show.
FULL = {
    "models": {"base": "a", "aligned": "b", "student": "c", "dtype": "float32", "max_length": 99},
    "data": {
        "seed": 3,
        "train": {"harmful": [{"path": "/x.csv", "prompt": "p", "where": {"a": True, "b": 2, "c": "d"}, "limit": 7}]},
        "evaluation": {"borderline": [{"path": "/y.jsonl", "split": "c", "answer": "a"}]},
    },
    "align": {"refusals": [{"path": "/z.json"}]},
    "teacher": {"replicas": 2, "gpu_memory_utilization": 0.5},
    "rollout": {"safety_prompt": "Überlege: nein?", "harmful_from": "student"},
    "method": {"depth": {"min": 2, "max": 9, "schedule": "uniform"}, "first_token_weight": 3},
    "train": {"lr": 3e-7, "zero_stage": 2, "num_workers": 2},
    "evaluation": {"depths": [0, 3]},
    "cluster": {"use_gpu": "never"},
    "output": {"root": "elsewhere", "name": "one.two_three-4", "storage": "s3://bucket/runs?region=eu-west-1"},
}


def write(folder: Path, tree: Any) -> Path:
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


@pytest.mark.parametrize("tree", [MINIMAL, FULL], ids=["minimal", "full"])
def test_dump_and_load_give_an_equal_config(tree: dict[str, Any], tmp_path: Path) -> None:
    config = load_run_file(write(tmp_path, tree))
    again = tmp_path / "dumped.yaml"
    again.write_text(dump(config), encoding="utf-8")
    assert load_run_file(again) == config


def test_attacks_on_a_run_fit_its_folder() -> None:
    """The attacks add to what the training left behind: same models, prompts, depths and lengths, more context."""
    trained, attacked = (load_run_file(ROOT / "jobs" / f"{name}.yaml") for name in ("smollm2", "smollm2-attacks"))
    assert (attacked.data, attacked.output) == (trained.data, trained.output)
    assert attacked.models.model_copy(update={"max_length": trained.models.max_length}) == trained.models
    assert attacked.models.max_length > trained.models.max_length
    for name in ("depths", "max_tokens", "max_utility_tokens", "num_prompts"):
        assert getattr(attacked.evaluation, name) == getattr(trained.evaluation, name), "else nothing is reused"
    missing = set(ATTACKS) - {attack.name for attack in attacked.evaluation.attacks}
    assert missing == {"crescendo", "prefill_thinking"}, "refusal patterns are too blind for it, and SmolLM2 thinks not"


def test_a_run_file_replaces_values_of_the_one_that_it_extends(tmp_path: Path) -> None:
    (tmp_path / "under.yaml").write_text(yaml.safe_dump(FULL), encoding="utf-8")
    (tmp_path / "between.yaml").write_text("extends: under.yaml\ntrain: {lr: 1.0e-3}\n", encoding="utf-8")
    path = tmp_path / "over.yaml"
    path.write_text("extends: between.yaml\nmodels: {base: z}\nevaluation: {depths: [1]}\n", encoding="utf-8")
    config = load_run_file(path, ["train.num_workers=4"])
    assert (config.models.base, config.models.aligned, config.train.lr) == ("z", "b", 1e-3)
    assert (config.train.zero_stage, config.train.num_workers, config.evaluation.depths) == (2, 4, [1])


@pytest.mark.parametrize("name", ["run.yaml", "../other.yaml", "gone.yaml", 3])
def test_a_run_file_extends_one_of_its_folder(name: str | int, tmp_path: Path) -> None:
    (tmp_path.parent / "other.yaml").write_text(yaml.safe_dump(MINIMAL), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"gone\.yaml cannot be read" if name == "gone.yaml" else "another run file"):
        load_run_file(write(tmp_path, {"extends": name}))


def test_two_run_files_that_extend_each_other_are_refused(tmp_path: Path) -> None:
    (tmp_path / "other.yaml").write_text("extends: run.yaml\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="does not extend this one"):
        load_run_file(write(tmp_path, {"extends": "other.yaml"}))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_shipped_run_file_loads(path: Path) -> None:
    config = load_run_file(path)
    assert config.output.name != "run", "a shipped run file names its run folder"


def test_the_embedded_default_is_the_shipped_run_file() -> None:
    assert any(path.name == "organism.yaml" for path in SHIPPED)
    shipped, packaged = ROOT / "jobs" / "organism.yaml", ROOT / "raycomplete" / "data" / "organism" / "organism.yaml"
    assert not packaged.is_symlink(), "an archive of the package would hold a link that leads nowhere"
    assert shipped.resolve() == packaged
    inputs = load_run_file(shipped, ["data.train.harmful=[{path: mine.jsonl}]"]).data.train.harmful
    assert inputs[0].path == str(ROOT / "jobs" / "mine.jsonl"), "paths are relative to the link, not to its target"


@pytest.mark.parametrize(
    ("section", "wrong", "nearest"),
    [
        ((), "trian", "train"),
        (("models",), "alligned", "aligned"),
        (("data",), "sede", "seed"),
        (("data", "train"), "harmfull", "harmful"),
        (("data", "train", "harmful", 0), "promt", "prompt"),
        (("align",), "stpes", "steps"),
        (("align", "refusals", 0), "limt", "limit"),
        (("teacher",), "replica", "replicas"),
        (("rollout",), "temprature", "temperature"),
        (("train",), "step", "steps"),
        (("method", "weights"), "anker", "anchor"),
        (("method", "depth"), "shedule", "schedule"),
        (("method",), "contrastive_alfa", "contrastive_alpha"),
        (("evaluation",), "depth", "depths"),
        (("cluster",), "adress", "address"),
        (("output",), "nmae", "name"),
    ],
    ids=lambda value: ".".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_unknown_keys_are_refused_with_the_nearest_known_one(
    section: tuple[str | int, ...], wrong: str, nearest: str, tmp_path: Path
) -> None:
    tree: Any = yaml.safe_load(yaml.safe_dump(FULL))
    node = tree
    for part in section:
        node = node.setdefault(part, {}) if isinstance(node, dict) else node[part]
    node[wrong] = 1
    with pytest.raises(ConfigError) as caught:
        load_run_file(write(tmp_path, tree))
    where = ".".join(map(str, (*section, wrong)))
    assert f"unknown key {where!r}, did you mean {nearest!r}?" in str(caught.value)


def test_an_unknown_key_like_no_other_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"unknown key 'output.zzz', known keys: root, name"):
        parse({**MINIMAL, "output": {"zzz": 1}}, "here")


_ELSEWHERE = {"attacks", "defences", "methods", "sources"}
RUN_FILE_KEYS = sorted(key for key in removed_keys() if key.partition(".")[0] not in _ELSEWHERE)


@pytest.mark.parametrize("key", RUN_FILE_KEYS)
def test_removed_keys_say_what_took_their_place(key: str) -> None:
    """And none of them is a key again."""
    tree: Any = yaml.safe_load(yaml.safe_dump(MINIMAL))
    apply_override(tree, f"{key}=1")
    with pytest.raises(ConfigError, match=re.escape(removed_keys()[key])):
        parse(tree, "run.yaml")


def test_a_record_may_hold_removed_keys(tmp_path: Path) -> None:
    record = write(tmp_path, {**MINIMAL, "method": {"name": "completion", "push_forward": {"tau": 0.3}}})
    assert load_run_file(record, sections={"models", "data", "method"}).method == Completion()
    with pytest.raises(ConfigError, match=r"method\.push_forward"):
        load_run_file(record)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"models": {"base": "a"}}, "the key 'models.aligned' is missing"),
        ({"data": {"train": {"harmful": [{"prompt": "p"}]}}}, "the key 'data.train.harmful.0.path' is missing"),
        ({"train": {"lr": 0}}, "train.lr: "),
        ({"train": {"steps": "many"}}, "train.steps: "),
        ({"train": {"seed": -1}}, "train.seed: "),
        ({"train": {"zero_stage": 4}}, "train.zero_stage: "),
        ({"train": {"num_workers": 3}}, "method.anchor_batch_size must be a multiple of train.num_workers (3)"),
        ({"method": {"depth": {"min": 9, "max": 8}}}, "method.depth.max (8) is below method.depth.min (9)"),
        ({"method": {"depth": {"min": 0}}}, "method.depth.min: "),
        ({"method": {"name": "sft", "depth": {"min": 0}}}, "method.depth.min: "),
        ({"method": {"name": "sft", "weights": {}}}, "unknown key 'method.weights'"),
        ({"method": "sft"}, "method: must be a mapping with a name"),
        ({"train": {"zero_stage": 3, "lora_rank": 4}}, "set train.zero_stage to 2 or less"),
        ({"evaluation": {"depths": [4, -1]}}, "evaluation.depths must not be negative"),
        ({"evaluation": {"depths": []}}, "evaluation.depths: "),
        ({"output": {"name": "../up"}}, "output.name: "),
        ({"models": None}, "models: "),
    ],
)
def test_wrong_values_are_named(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse({**MINIMAL, **change}, "origin.yaml")
    assert words in str(caught.value)
    assert str(caught.value).startswith("origin.yaml: ")


@pytest.mark.parametrize(
    ("storage", "words"),
    [
        ("runs", "must be a URI that begins with one of file://, s3://"),
        ("S4://bucket/runs", "found the scheme 's4'"),
        ("s3://AKIA:hush-hush@bucket/runs", "must not hold a user, key or password"),
        ("sftp://me:hush-hush@host/runs", "must not hold a user, key or password"),
        ("s3://bucket/runs?secret_key=hush-hush", "must not hold the options secret_key"),
        ("s3://bucket/runs?region=a&secret_key", "must not hold the options secret_key"),
        ("s3://bucket/runs#hush-hush", "must not hold the options #"),
        ("file://runs", "needs an absolute path"),
        ("s3://", "names no place"),
        ("file:///tmp/runs/demo/mirror", "lies in the run folder"),
        ("file:///tmp/runs", "lies in the run folder"),
    ],
)
def test_storage_names_a_place_elsewhere_and_no_secret(storage: str, words: str) -> None:
    tree = MINIMAL | {"output": {"root": "/tmp/runs", "name": "demo", "storage": storage}}
    with pytest.raises(ConfigError) as caught:
        parse(tree, "run.yaml")
    assert words in str(caught.value)
    assert "hush" not in str(caught.value)


def test_every_run_has_its_own_place_in_the_storage() -> None:
    output = parse(MINIMAL | {"output": {"name": "demo", "storage": "s3://b/runs/?region=x"}}, "run.yaml").output
    assert output.mirror == "s3://b/runs/demo?region=x"
    assert output.renamed("-align").mirror == "s3://b/runs/demo-align?region=x"
    assert parse(MINIMAL, "run.yaml").output.mirror is None


def test_every_problem_is_reported_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        parse({**MINIMAL, "train": {"lr": -1, "stpes": 3}}, "here")
    assert "train.lr" in str(caught.value)
    assert "'steps'" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"models: [unclosed", "is not valid YAML"),
        (b"- a\n- b\n", "must hold a mapping with the keys models, data"),
        (b"", "must hold a mapping"),
        (b"models: \xff\xfe", "is not UTF-8"),
    ],
)
def test_files_that_are_no_run_file_are_refused_by_name(content: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_run_file(path)
    assert words in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value), "one sentence for the terminal"


@pytest.mark.parametrize("name", ["missing.yaml", "."])
def test_a_run_file_that_cannot_be_read_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot be read \(.+\)\. Check the path\."):
        load_run_file(tmp_path / name)


def test_overrides_replace_values_at_any_depth(tmp_path: Path) -> None:
    config = load_run_file(
        write(tmp_path, MINIMAL | {"models": MINIMAL["models"] | {"student": "somewhere"}}),
        ["train.steps=7", "train.lr=1e-4", "method.depth.max=5", "evaluation.depths=[8, 0, 8]", "models.student=null"],
    )
    assert (config.train.steps, config.train.lr, config.method.depth.max) == (7, 1e-4, 5)
    assert config.method.depth.min == 1, "the rest of the section is kept"
    assert config.evaluation.depths == [0, 8], "sorted, repeats dropped"
    assert config.models.student is None


def test_a_method_is_chosen_by_its_name(tmp_path: Path) -> None:
    assert load_run_file(write(tmp_path, MINIMAL)).method == Completion()
    config = load_run_file(write(tmp_path, MINIMAL), ["method.name=sft", "method.anchor_batch_size=6"])
    assert config.method == SFT(anchor_batch_size=6)
    assert load_run_file(write(tmp_path, yaml.safe_load(dump(config)))).method == config.method
    ours = write(tmp_path, MINIMAL | {"method": {"suffix_adversary": {"steps": 0}, "recovery_batch_size": 5}})
    for overrides in (["method.beta=0.3", "method.name=npo"], ["method.name=npo", "method.beta=0.3"]):
        method: Any = load_run_file(ours, overrides).method
        assert (method.name, method.recovery_batch_size, method.beta) == ("npo", 5, 0.3), "what both have is kept"
    with pytest.raises(ConfigError, match="There is no training method 'dpo'"):
        load_run_file(write(tmp_path, MINIMAL), ["method.name=dpo"])


def test_one_writer_of_harmful_continuations_is_a_list_of_one(tmp_path: Path) -> None:
    assert load_run_file(write(tmp_path, MINIMAL), ["rollout.harmful_from=student"]).rollout.harmful_from == ["student"]
    both = load_run_file(write(tmp_path, MINIMAL), ["rollout.harmful_from=[base, aligned]"]).rollout
    assert {writer for writer, opening in both.harmful_openings if not opening} == {"base"}, "aligned would refuse"


def test_the_last_override_wins_and_a_value_may_hold_equals_signs(tmp_path: Path) -> None:
    config = load_run_file(write(tmp_path, MINIMAL), ["train.steps=7", "train.steps=8", "rollout.safety_prompt=a=b"])
    assert config.train.steps == 8
    assert config.rollout.safety_prompt == "a=b"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.steps", "is not of the form key.sub=value"),
        ("=5", "is not of the form key.sub=value"),
        ("models.base.deeper=1", "goes below 'base', which holds a plain value"),
        ("train.steps=[1", "is not valid YAML"),
        ("train.stesp=1", "did you mean 'steps'?"),
        ("nowhere.to=1", "unknown key 'nowhere'"),
        ("rollout={harmful_from: aligned, affirmative_prefixes: ['']}", "an opening that is not empty"),
        ("rollout.prompt_augmentation={fraction: 1, random_suffix_tokens: 0}", "needs something to draw from"),
        ("rollout.prompt_augmentation.recovery_fraction=0.5", "would teach that changed prompts are harmful"),
    ],
)
def test_wrong_overrides_are_refused(override: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_run_file(write(tmp_path, MINIMAL), [override])
    assert words in str(caught.value)


def test_prompt_paths_are_relative_to_the_run_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "jobs"
    folder.mkdir()
    source = [{"path": "../data/a.csv"}, {"path": "/abs/b.csv"}]
    tree = MINIMAL | {
        "data": {"train": {"benign": source}, "evaluation": {"harmful": source}},
        "align": {"refusals": source, "benign": source},
    }
    write(folder, tree)
    monkeypatch.chdir(tmp_path)  # the run file itself is given relative to here
    config = load_run_file("jobs/run.yaml")
    expected = [str(tmp_path / "data" / "a.csv"), "/abs/b.csv"]
    lists = (config.data.train.benign, config.data.evaluation.harmful, config.align.refusals, config.align.benign)
    for sources in lists:
        assert [item.path for item in sources] == expected
    assert config.output.folder == Path("runs/run"), "results go to where the user stands"


def test_a_config_cannot_be_changed_in_place() -> None:
    config: Any = RunConfig.model_validate(MINIMAL)
    with pytest.raises(ValueError, match="frozen"):
        config.train.steps = 3


def test_the_config_is_importable_without_torch() -> None:
    code = "import sys, raycomplete.config; print({'torch', 'ray', 'transformers', 'vllm'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, cwd=ROOT, timeout=60, capture_output=True, text=True
    )
    assert done.stdout.strip() == "set()"
