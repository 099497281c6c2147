"""Every defence around the organism's aligned model, in this process: what it does to prefills, and what it costs."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from raycomplete.attacks.target import AttackTools
from raycomplete.attacks.white_box import TorchModel
from raycomplete.config import load_run_file
from raycomplete.config.defences import parse_defence
from raycomplete.data.chat import ChatCodec
from raycomplete.data.checkpoints import fingerprint, load_model
from raycomplete.data.inputs import prepare_prompts
from raycomplete.data.organism import checkpoint_path
from raycomplete.evaluation import model_actors
from raycomplete.evaluation.defences import start, two_models
from raycomplete.evaluation.defences.start import Defence, check_defence, start_defence
from raycomplete.evaluation.defences.two_models import Rule, ShapedWhiteBox, TwoModelDecoder
from raycomplete.evaluation.judges import default_judge
from raycomplete.runtime.console import Console
from raycomplete.runtime.errors import CheckpointError, ConfigError
from tests.conftest import ROOT

NUM_PROMPTS, DEPTH = 6, 12


@cache
def loaded(path: Path) -> TorchModel:
    return TorchModel(load_model(path, "float32"))


class Pool:
    """The weights at a path, decoded plainly (stands in for a `RolloutPool`)."""

    def __init__(self, path: Path, codec: ChatCodec) -> None:
        self.path, self._codec = str(path), codec

    def with_weights(self, path: str) -> Pool:
        return Pool(Path(path), self._codec)

    def generate(self, sequences: Sequence[Sequence[int]], **sampling: Any) -> list[list[int]]:
        limits = {"vocab_size": self._codec.vocab_size, "stop_ids": self._codec.eos_ids, "max_length": 256}
        model = loaded(Path(self.path))  # contrasted with itself it is left as it is
        plain = TwoModelDecoder(model, model, Rule("contrastive", 1.0, 1e-30), **limits)  # type: ignore[arg-type]
        return [tokens for tokens, _ in plain.generate_finished(sequences, **sampling)]


class Local:
    """A worker in this process behind the interface of a Ray actor: `actor.call.remote(...)` answers at once."""

    def __init__(self, worker: Any) -> None:
        self._worker = worker

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=getattr(self._worker, name))


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    config = load_run_file(ROOT / "jobs" / "organism.yaml", [f"evaluation.num_prompts={NUM_PROMPTS}"])
    config = config.model_copy(update={"data": config.data.model_copy(update={"limit_per_kind": 16})})
    codec = ChatCodec(checkpoint_path("aligned"))
    paths = {
        "base": checkpoint_path("base"),
        "aligned": checkpoint_path("aligned"),
        "student": checkpoint_path("aligned"),
    }
    models = SimpleNamespace(paths=paths, remote={}, codec=codec, fingerprint=lambda role: fingerprint(paths[role]))
    monkeypatch.setattr(start, "PROBE_PROMPTS", 16)
    for module in (start, model_actors):
        monkeypatch.setattr(
            module, "start_actor", lambda config, worker, threads, *rest: Local(worker("float32", False, False, *rest))
        )
    for module in (two_models, model_actors):
        monkeypatch.setattr(module, "wait_for", lambda reference, **_: reference)
    monkeypatch.setattr(start.ray, "kill", lambda actor: None)
    return SimpleNamespace(
        config=config,
        folder=tmp_path,
        models=models,
        prompts=prepare_prompts(config, codec),
        engines=SimpleNamespace(generator=Pool(paths["aligned"], codec)),
        judge=default_judge("organism"),
        console=Console(quiet=True),
    )


def defended(run: Any, **settings: Any) -> Defence[Any]:
    found = parse_defence(settings)
    evaluation = run.config.evaluation.model_copy(update={"defence": found})
    run.config = run.config.model_copy(update={"evaluation": evaluation})
    defence = start_defence(run, ExitStack())
    assert defence is not None
    return defence


def success(run: Any, generator: Any) -> float:
    """Share of prompts whose prefilled answer goes on."""
    codec, prompts = run.models.codec, run.prompts.evaluation["harmful"]
    starts = [codec.encode_answer(prompt.answer)[:DEPTH] for prompt in prompts]
    said = generator.generate(
        [[*prompt.encoded(codec), *begun] for prompt, begun in zip(prompts, starts, strict=True)], max_tokens=40
    )
    complied = [
        run.judge.outcome(prompt, codec.decode(begun), codec.decode(tokens)).is_compliance
        for prompt, begun, tokens in zip(prompts, starts, said, strict=True)
    ]
    return sum(complied) / len(complied)


def harmless(run: Any, generator: Any) -> list[str]:
    codec = run.models.codec
    return [
        codec.decode(tokens)
        for tokens in generator.generate(
            [prompt.encoded(codec) for prompt in run.prompts.evaluation["benign"]], max_tokens=112
        )
    ]


@pytest.mark.parametrize(
    ("defence", "override", "matters"),
    [
        ({"name": "probe"}, 'rollout.affirmative_prefixes=["step one :"]', True),
        ({"name": "safe_decoding"}, "rollout.max_refusal_tokens=9", True),
        ({"name": "contrastive"}, "models.max_length=200", True),
        ({"name": "contrastive"}, "rollout.max_refusal_tokens=9", False),
    ],
)
def test_the_key_names_what_probe_and_expert_are_made_from(
    run: Any, defence: dict[str, Any], override: str, matters: bool
) -> None:
    before = defended(run, **defence).key
    changed = load_run_file(ROOT / "jobs" / "organism.yaml", [f"evaluation.num_prompts={NUM_PROMPTS}", override])
    run.config = changed.model_copy(update={"data": run.config.data})
    assert (defended(run, **defence).key != before) is matters


def test_without_a_defence_prefills_go_on(run: Any) -> None:
    assert success(run, run.engines.generator) == 1.0


def test_contrastive_decoding_asks_both_models_for_every_token(run: Any) -> None:
    defence = defended(run, name="contrastive", alpha=2.0)
    assert harmless(run, defence.around(run.engines.generator)) == harmless(run, run.engines.generator)
    assert defence.result()["passes_per_token"] == pytest.approx(2.0)


def test_safe_decoding_leaves_all_but_the_first_tokens_alone(run: Any) -> None:
    defence = defended(run, name="safe_decoding", expert=str(checkpoint_path("aligned")))
    assert harmless(run, defence.around(run.engines.generator)) == harmless(run, run.engines.generator)
    assert 1.0 < defence.result()["passes_per_token"] < 1.2


@pytest.mark.parametrize("name", ["re_ask", "probe"])
def test_any_depth_defences_answer_harmless_prompts_as_before(run: Any, name: str) -> None:
    extra = {"refusal": "i cannot help with that ."} if name == "probe" else {}
    defence = defended(run, name=name, every=8, **extra)
    plain = harmless(run, run.engines.generator)
    kept = [
        ours == theirs for ours, theirs in zip(harmless(run, defence.around(run.engines.generator)), plain, strict=True)
    ]
    print(
        name,
        "keeps",
        sum(kept),
        "of",
        len(kept),
        "and lets",
        success(run, defence.around(run.engines.generator)),
        "go on",
    )
    assert sum(kept) >= len(kept) - 1
    assert defence.result()["passes_per_token"] > 1.0


def test_the_probe_closes_prefills_and_is_fitted_once(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"name": "probe", "every": 4, "refusal": "i cannot help with that ."}
    assert success(run, defended(run, **settings).around(run.engines.generator)) == 0.0
    monkeypatch.setattr(start, "fit_probe", None)  # the fit is on the disk
    assert success(run, defended(run, **settings).around(run.engines.generator)) == 0.0


def test_the_probe_reads_a_sample_of_the_prompts_under_the_seed(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    shown = Pool.generate

    def generate(pool: Pool, sequences: Sequence[Sequence[int]], **sampling: Any) -> list[list[int]]:
        asked.extend(run.models.codec.decode(list(sequence)) for sequence in sequences)
        return shown(pool, sequences, **sampling)

    monkeypatch.setattr(Pool, "generate", generate)
    monkeypatch.setattr(start, "PROBE_PROMPTS", 4)
    defence: Any = defended(run, name="probe", every=4)
    assert defence._probe.weight_H.shape
    codec, train = run.models.codec, run.prompts.train["benign"]
    drawn = [index for index, prompt in enumerate(train) if codec.decode(prompt.encoded(codec)) in asked]
    assert len(drawn) == 4
    assert drawn != [0, 1, 2, 3]
    borderline = {codec.decode(prompt.encoded(codec)) for prompt in run.prompts.train["borderline"]}
    assert len(borderline & set(asked)) == 4, "without, the probe fires at nearly every borderline prompt"
    before = defence.key
    run.config = run.config.model_copy(update={"data": run.config.data.model_copy(update={"seed": 7})})
    assert defended(run, name="probe", every=4).key != before


def test_costs_of_a_resumed_evaluation_add_up(run: Any) -> None:
    first = defended(run, name="contrastive")
    harmless(run, first.around(run.engines.generator))
    before = first.result()
    assert defended(run, name="contrastive").result() == before
    other = defended(run, name="contrastive", alpha=3.0)
    assert other.key != first.key
    assert other.result()["passes_per_token"] is None


def test_attackers_who_pick_tokens_pick_from_the_decoder(run: Any) -> None:
    defence = defended(run, name="contrastive", alpha=2.0)
    box = model_actors.WhiteBoxClient(
        Local(model_actors.ModelWorker("float32", False, False, "white_box")), checkpoint_path("aligned"), 60.0
    )
    tools = defence.tools(AttackTools(white_boxes=lambda: [box]))
    assert tools.white_boxes is not None
    (shaped,) = tools.white_boxes()
    assert isinstance(shaped, ShapedWhiteBox)
    sequence = run.prompts.evaluation["harmful"][0].encoded(run.models.codec)
    shaped_top, plain_top = (found.top_logprobs([sequence], 3)[0] for found in (shaped, box))
    assert shaped_top != plain_top
    assert shaped.vocab_size() == box.vocab_size()  # the rest is the model's own
    kept = defended(run, name="re_ask").tools(AttackTools(white_boxes=lambda: [box]))
    assert kept.white_boxes is not None
    assert kept.white_boxes() == [box]


def test_what_a_defence_needs_is_told_first(run: Any) -> None:
    defended(run, name="safe_decoding", expert="nowhere")
    assert not run.config.evaluation.defence.needs_training
    with pytest.raises(CheckpointError, match="nowhere"):
        check_defence(run.config, run.models)
    defended(run, name="safe_decoding")
    assert run.config.evaluation.defence.needs_training
    check_defence(run.config, run.models)
    defended(run, name="re_ask")
    with pytest.raises(CheckpointError, match="no mark"):
        check_defence(run.config, SimpleNamespace(codec=SimpleNamespace(answer_header=()), remote={}))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="behind an address"):
        check_defence(run.config, SimpleNamespace(remote={"student": object()}))  # type: ignore[arg-type]
    thinking = run.config.models.model_copy(update={"template_arguments": {"enable_thinking": True}})
    with pytest.raises(ConfigError, match="think"):
        check_defence(run.config.model_copy(update={"models": thinking}), run.models)
