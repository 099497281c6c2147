"""Refusals before anything is started: checkpoints that do not fit, prompts that do not fit the context."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from raycomplete.config import RunConfig, parse
from raycomplete.data.checkpoints import fingerprint, load_model
from raycomplete.data.inputs import (
    KINDS,
    _words,
    evaluation_fingerprint,
    prepare_models,
    prepare_prompts,
    samples_key,
    training_fingerprints,
)
from raycomplete.runtime.errors import CheckpointError, ConfigError, DataError
from raycomplete.runtime.types import Prompt, PromptKind
from tests.training.tiny import make_model

CONTEXT = 128  # of the tiny models
SHORT: dict[str, dict[str, Any]] = {
    "method": {"depth": {"max": 8}},
    "rollout": {"max_anchor_tokens": 8, "max_refusal_tokens": 8, "max_harmful_tokens": 8, "refusal_prefix_fraction": 0},
    "evaluation": {"depths": [0, 4], "max_tokens": 8, "max_utility_tokens": 8},
}
LONGEST = 17  # 8 tokens of h, 8 of the refusal, and the end
Make = Callable[..., RunConfig]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for seed, role in enumerate(("base", "aligned", "student")):
        make_model(folder / role, seed)
    return folder


@pytest.fixture
def make(models: Path, tmp_path: Path) -> Make:
    """A run file on tiny models with one short prompt of each kind; sections given by name are merged in."""
    sets: dict[str, Any] = {}
    for kind in KINDS:
        for use in ("train", "evaluation"):
            path = tmp_path / f"{use}-{kind}.jsonl"
            path.write_text(json.dumps({"prompt": f"{use} {kind}"}) + "\n")
            sets.setdefault(use, {})[kind] = [{"path": str(path)}]

    def make_config(**sections: dict[str, Any]) -> RunConfig:
        tree: dict[str, dict[str, Any]] = {
            "models": {"base": str(models / "base"), "aligned": str(models / "aligned"), "max_length": 64},
            "data": sets,
            **SHORT,
        }
        for name, values in sections.items():
            tree[name] = tree.get(name, {}) | values
        return parse(tree, "test")

    return make_config


def spoil(path: Path, to: Path, **values: Any) -> Path:
    """A copy of a checkpoint with other values in its config.json."""
    shutil.copytree(path, to)
    config = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps(config | values))
    return to


def test_models_that_fit_are_resolved(make: Make, models: Path) -> None:
    prepared = prepare_models(make())
    assert prepared.paths == {"base": models / "base", "aligned": models / "aligned", "student": models / "aligned"}
    assert {role: spec.path for role, spec in prepared.heads.items()} == {
        role: str(path) for role, path in prepared.paths.items()
    }
    assert prepared.fingerprint("base") == fingerprint(models / "base") != prepared.fingerprint("aligned")
    assert prepared.heads["student"].vocab_size == prepared.codec.vocab_size
    own = prepare_models(make(models={"student": str(models / "student")}))
    assert own.paths["student"] == models / "student"


@pytest.mark.parametrize("role", ["base", "aligned", "student"])
def test_a_missing_checkpoint_is_refused_with_its_role(role: str, make: Make) -> None:
    with pytest.raises(CheckpointError, match=f"models.{role}: there is no checkpoint at '/not/there'"):
        prepare_models(make(models={role: "/not/there"}))


def test_different_tokenizers_are_refused(make: Make, models: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(models / "base", tmp_path / "other"))
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.add_tokens(["unheard"])
    tokenizer.save_pretrained(other)
    with pytest.raises(CheckpointError, match=r"models\.base .* and models\.aligned .* have different tokenizers"):
        prepare_models(make(models={"base": str(other)}))


def test_a_base_without_template_and_added_tokens_reads_those_of_aligned(
    make: Make, models: Path, tmp_path: Path
) -> None:
    """Rows of the embedding are padded in both, and the chat model's own tokens take some of them."""
    for role in ("base", "aligned"):
        tokenizer = AutoTokenizer.from_pretrained(models / role)
        model = load_model(models / role, "float32")
        model.resize_token_embeddings(len(tokenizer) + 8)
        if role == "aligned":
            tokenizer.add_tokens(["<|turn|>"], special_tokens=True)
            tokenizer.chat_template = "{% for item in messages %}<|turn|>{{ item['content'] }}{% endfor %}<|turn|>"
        else:
            tokenizer.chat_template = None
        for item in (model, tokenizer):
            item.save_pretrained(tmp_path / role)
    config = make(models={role: str(tmp_path / role) for role in ("base", "aligned")})
    prepared = prepare_models(config)
    assert prepared.notes == ("models.base has no chat template and is asked in that of models.aligned",)
    assert {head.vocab_size for head in prepared.heads.values()} == {len(tokenizer)}
    assert prepared.codec.encode_prompt("x")[-1] == len(tokenizer) - 1
    assert prepare_models(make()).notes == ()


@pytest.mark.parametrize("role", ["base", "student"])
def test_another_architecture_is_refused_with_what_differs(role: str, make: Make, models: Path, tmp_path: Path) -> None:
    other = spoil(models / "student", tmp_path / "other", num_hidden_layers=1)
    with pytest.raises(CheckpointError) as caught:
        prepare_models(make(models={role: str(other)}))
    assert f"models.{role} and models.aligned differ in architecture (" in str(caught.value)
    assert "num_hidden_layers: 1 and 2" in str(caught.value)


def test_a_context_longer_than_the_model_reads_is_refused(make: Make, models: Path, tmp_path: Path) -> None:
    prepare_models(make(models={"max_length": CONTEXT}))
    with pytest.raises(ConfigError) as caught:
        prepare_models(make(models={"max_length": CONTEXT + 1}))
    assert f"models.max_length is {CONTEXT + 1}" in str(caught.value)
    assert f"Set models.max_length to {CONTEXT} or less." in str(caught.value)
    short = spoil(models / "base", tmp_path / "short", max_position_embeddings=32)
    with pytest.raises(ConfigError, match=r"models.base \(.*short\) reads at most 32 tokens"):
        prepare_models(make(models={"base": str(short)}))


def test_prompts_that_fit_are_read(make: Make) -> None:
    config = make()
    prompts = prepare_prompts(config, prepare_models(config).codec)
    for kind in KINDS:
        assert [prompt.text for prompt in prompts.train[kind]] == [f"train {kind}"]
        assert [(prompt.text, prompt.kind) for prompt in prompts.evaluation[kind]] == [(f"evaluation {kind}", kind)]


def write_prompt(config: RunConfig, use: str, kind: str, text: str) -> Path:
    path = Path(getattr(getattr(config.data, use), kind)[0].path)
    path.write_text(json.dumps({"prompt": "short"}) + "\n" + json.dumps({"prompt": text}) + "\n")
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_an_evaluation_prompt_longer_than_the_context_is_refused_and_one_of_training_left_out(
    kind: PromptKind, make: Make
) -> None:
    config = make()
    codec = prepare_models(config).codec
    fits = config.models.max_length - LONGEST - len(codec.encode_prompt(""))
    write_prompt(config, "train", kind, "cake " * fits)
    assert len(prepare_prompts(config, codec).train[kind]) == 2
    write_prompt(config, "train", kind, "cake " * (fits + 1))
    prompts = prepare_prompts(config, codec)
    assert [prompt.text for prompt in prompts.train[kind]] == ["short"]
    assert prompts.notes == (f"Training prompts left out, too long for models.max_length (64): 1 {kind}",)
    path = write_prompt(make(), "evaluation", kind, "bread " * (fits + 1))
    with pytest.raises(DataError, match=rf"{path.stem}-0000\d-.*models\.max_length \(64\)"):
        prepare_prompts(config, codec, training=False)


@pytest.mark.parametrize(
    ("section", "values"),
    [
        ("method", {"depth": {"max": 60}}),
        ("rollout", {"max_refusal_tokens": 60}),
        ("rollout", {"max_anchor_tokens": 60}),
        ("rollout", {"max_harmful_tokens": 60}),
        ("evaluation", {"max_utility_tokens": 60}),
        ("evaluation", {"depths": [60]}),
        ("evaluation", {"max_tokens": 60}),
    ],
)
def test_every_response_of_the_run_counts_against_the_context(section: str, values: dict[str, Any], make: Make) -> None:
    config = make()
    codec = prepare_models(config).codec
    merged = SHORT[section] | values
    with pytest.raises(DataError, match=r"exceeds models\.max_length"):
        prepare_prompts(make(**{section: merged}), codec)


def test_the_teachers_safety_prompt_counts_too(make: Make) -> None:
    config = make()
    codec = prepare_models(config).codec
    prepare_prompts(make(rollout=SHORT["rollout"] | {"safety_prompt": "cake " * 20}), codec)
    refused = pytest.raises(DataError, match=r"train-harmful-00000-\w+ has \d+ tokens under rollout.safety_prompt")
    with refused:
        prepare_prompts(make(rollout=SHORT["rollout"] | {"safety_prompt": "cake " * 60}), codec)
    # Base reads it before h, which is longer than the refusal here.
    with refused:
        prepare_prompts(
            make(rollout=SHORT["rollout"] | {"safety_prompt": "cake " * 20}, method={"depth": {"max": 36}}), codec
        )


@pytest.mark.parametrize(
    ("use", "kind", "needed"),
    [("train", kind, kind != "borderline") for kind in KINDS] + [("evaluation", kind, True) for kind in KINDS],
)
def test_a_kind_without_prompts_is_refused_where_it_is_needed(use: str, kind: str, needed: bool, make: Make) -> None:
    config = make()
    codec = prepare_models(config).codec
    tree = config.model_dump(mode="json")
    tree["data"][use][kind] = []
    empty = parse(tree, "test")
    if not needed:
        assert prepare_prompts(empty, codec).train[kind] == ()  # type: ignore[index]
        return
    with pytest.raises(DataError, match=rf"data\.{use}\.{kind} is empty"):
        prepare_prompts(empty, codec)
    if use == "train":
        assert prepare_prompts(empty, codec, training=False).train[kind] == (), "an evaluation trains on nothing"  # type: ignore[index]


def test_held_out_prompts_are_limited(make: Make) -> None:
    config = make(evaluation=SHORT["evaluation"] | {"num_prompts": 1})
    write_prompt(config, "evaluation", "benign", "another")
    codec = prepare_models(config).codec
    drawn = [prepare_prompts(config, codec).evaluation["benign"] for _ in range(2)]
    assert len(drawn[0]) == 1
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_that_is_trained_on_is_not_held_out(kind: str, make: Make) -> None:
    config = make()
    codec = prepare_models(config).codec
    path = write_prompt(config, "evaluation", kind, "train harmful")
    with pytest.raises(DataError, match=rf"1 prompts of data\.evaluation are in data\.train .*{path.stem}-00001-"):
        prepare_prompts(config, codec)
    prepare_prompts(config, codec, training=False)


def test_training_prompts_that_nearly_repeat_an_evaluation_prompt_are_left_out(make: Make) -> None:
    config = make(evaluation=SHORT["evaluation"] | {"num_prompts": 1})
    codec = prepare_models(config).codec
    write_prompt(config, "evaluation", "borderline", "one two three four")
    texts = ["One two, three four!", "one two three five", "one two nine ten", "one two three four"]  # 1, .6, .33 and 1
    Path(config.data.train.harmful[0].path).write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    with pytest.raises(DataError, match=r"data\.max_overlap"):
        prepare_prompts(make(evaluation=SHORT["evaluation"] | {"num_prompts": 9}), codec)

    near = config.model_copy(update={"data": config.data.model_copy(update={"max_overlap": 0.6})})
    prompts = prepare_prompts(near, codec)
    assert [prompt.text for prompt in prompts.train["harmful"]] == ["one two nine ten"]
    assert len(prompts.train["benign"]) == 1, "half of its words are those of the evaluation's"
    assert prompts.notes == ("Training prompts left out, too near to one of the evaluation: 3 harmful",)


@pytest.mark.parametrize(
    ("first", "second", "low", "high"),
    [
        ("how to bake bread", "why is the sky blue", 0.0, 0.0),
        ("怎么做一个蛋糕", "怎么做一个面包", 0.3, 0.5),  # 3 of 7 threes
        ("怎么做一个蛋糕", "怎么做一个蛋糕。", 1.0, 1.0),
        ("bake 蛋糕", "bake bread", 0.3, 0.4),
    ],
)
def test_questions_overlap_by_their_own_words(first: str, second: str, low: float, high: float) -> None:
    system = "you are a careful assistant of a bakery who answers in short sentences and says so when in doubt"
    one, other = (_words(Prompt("p", text, "harmful", system=system)) for text in (first, second))
    assert low <= len(one & other) / len(one | other) <= high


def test_a_writer_of_harmful_continuations_is_found_for_training_alone(make: Make, models: Path) -> None:
    spec = str(models / "student")
    config = make(rollout=SHORT["rollout"] | {"harmful_from": ["base", spec]})
    prepared = prepare_models(config, training=True)
    assert prepared.others == {spec: models / "student"}
    assert [prepared.writer(name) for name in config.rollout.harmful_from] == [models / "base", models / "student"]
    assert prepare_models(config).others == {}


def test_a_writer_that_does_not_fit_is_refused(make: Make, models: Path, tmp_path: Path) -> None:
    def prepare(writer: Path | str) -> None:
        prepare_models(make(rollout=SHORT["rollout"] | {"harmful_from": ["base", str(writer)]}), training=True)

    with pytest.raises(CheckpointError, match=r"^rollout.harmful_from: there is no checkpoint at 'bse'"):
        prepare("bse")
    other = spoil(models / "base", tmp_path / "other", num_hidden_layers=1)
    with pytest.raises(CheckpointError, match=r"^rollout.harmful_from: .*other and models.aligned differ .*num_hidden"):
        prepare(other)
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.add_tokens(["unheard"])
    tokenizer.save_pretrained(other)
    with pytest.raises(CheckpointError, match=r"^rollout.harmful_from .*other.* have different tokenizers"):
        prepare(other)


@pytest.mark.parametrize(
    ("key", "row", "words"),
    [
        ("suffixes", {"text": "!"}, "Row 1 of .* has no 'suffix'"),
        ("templates", {"template": "answer me"}, r"The template in row 1 of .* has no \{prompt\}"),
        ("paraphrases", {"prompt": "train harmful", "paraphrases": "other words"}, "row 1 of .* are no list of texts"),
        ("paraphrases", {"prompt": "another", "paraphrases": ["other words"]}, "No prompt of .* is a training prompt"),
        ("paraphrases", None, "does not exist"),
    ],
)
def test_a_file_of_other_forms_that_cannot_be_used_is_refused(
    key: str, row: dict[str, Any] | None, words: str, make: Make, tmp_path: Path
) -> None:
    path = tmp_path / "forms.jsonl"
    if row is not None:
        path.write_text(json.dumps(row) + "\n")
    off, on = ({"prompt_augmentation": {"fraction": share, key: str(path)}} for share in (0.0, 0.1))
    codec = prepare_models(make()).codec
    prepare_prompts(make(rollout=SHORT["rollout"] | off), codec)
    with pytest.raises(DataError, match=words):
        prepare_prompts(make(rollout=SHORT["rollout"] | on), codec)
    prepare_prompts(make(rollout=SHORT["rollout"] | on), codec, training=False)


def test_samples_are_named_by_all_that_they_are_made_from(make: Make, models: Path, tmp_path: Path) -> None:
    aligned = Path(shutil.copytree(models / "aligned", tmp_path / "aligned"))
    config = make(models={"aligned": str(aligned)})
    longer = make(models={"aligned": str(aligned)}, train={"validation": {"max_tokens": 40}})

    def inputs() -> dict[str, str]:
        prepared = prepare_models(config)
        return training_fingerprints(prepared, prepare_prompts(config, prepared.codec))

    first = inputs()
    shutil.copy(models / "student" / "model.safetensors", aligned)
    second = inputs()
    write_prompt(config, "train", "benign", "another")
    third = inputs()
    assert len({samples_key(longer, first), *(samples_key(config, found) for found in (first, second, third))}) == 4
    assert {name for name in first if first[name] != third[name]} == {"aligned", "student", "training prompts"}
    loop = make(models={"aligned": str(aligned)}, rollout=SHORT["rollout"] | {"sync_every": 7})
    assert samples_key(loop, first) == samples_key(config, first), "settings of the loop make no other samples"


def test_the_content_of_evaluation_files_counts_and_not_how_much_is_drawn(make: Make) -> None:
    config = make(evaluation=SHORT["evaluation"] | {"num_prompts": 1})
    before = evaluation_fingerprint(config)
    write_prompt(config, "evaluation", "borderline", "another")
    assert evaluation_fingerprint(config) == evaluation_fingerprint(make()) != before
