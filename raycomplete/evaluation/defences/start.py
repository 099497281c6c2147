"""Starts the defence of an evaluation and puts it around the student: one class for each defence."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import ray

from raycomplete.attacks.finetune import FinetuneConfig, FinetuneRecipe
from raycomplete.attacks.target import AttackTools, WhiteBox
from raycomplete.config import RunConfig
from raycomplete.config.engines import ANSWER_TIMEOUT_S
from raycomplete.data.checkpoints import fingerprint
from raycomplete.data.inputs import KINDS, Models
from raycomplete.data.sources import resolve_checkpoint
from raycomplete.engines.rollout_pool import RolloutPool
from raycomplete.engines.run import Run
from raycomplete.evaluation.attack_resources import train_copy
from raycomplete.evaluation.defences.any_depth import AnyDepthGenerator, Check, Passes, Probe, fit_probe, re_asking
from raycomplete.evaluation.defences.two_models import (
    FirstTokens,
    Rule,
    ShapedWhiteBox,
    TwoModelClient,
    TwoModelWorker,
)
from raycomplete.evaluation.judges import declines
from raycomplete.evaluation.model_actors import WhiteBoxClient, start_actor, start_white_box
from raycomplete.runtime.errors import CheckpointError, ConfigError, WorkError
from raycomplete.runtime.files import content_hash, read_json, write_json
from raycomplete.runtime.machine import available_cpus
from raycomplete.runtime.types import Generator, Outcome

# SafeDecoding, as its authors' code has it: how far from the student to the expert and beyond, the tokens of an answer
# that are moved, and the tokens among the likeliest of both models that may be said.
SAFE_ALPHA, SAFE_FIRST_TOKENS, SAFE_COMMON = 3.0, 2, 5
EXPERT, EXPERT_PROMPTS, EXPERT_RANK = FinetuneRecipe(lr=2e-3, epochs=2, batch_size=8), 36, 16
RE_ASK_TOKENS = 20  # of what is said anew, greedily
PROBE_LAYER = 0.5  # whose input is probed, as a share of the depth
PROBE_PROMPTS, PROBE_ANSWER_TOKENS = 200, 500  # of each kind, on whose answers the probe is fitted


def check_defence(config: RunConfig, models: Models) -> None:
    """Refuses a defence that would fail at work: CheckpointError or ConfigError."""
    defence = config.evaluation.defence
    if defence is None:
        return
    if "student" in models.remote or "base" in models.remote:
        raise ConfigError(
            "evaluation.defence reads distributions of the student and base, and one of them is behind an address.",
            "Leave the defence out, or name checkpoints.",
        )
    if config.models.thinks or any(attack.name == "prefill_thinking" for attack in config.evaluation.attacks):
        raise ConfigError(
            "evaluation.defence acts on answers, and enable_thinking or prefill_thinking lets the model think first.",
            "Leave enable_thinking out of models.template_arguments, and prefill_thinking out of evaluation.attacks.",
        )
    if defence.begins_anew and not models.codec.answer_header:
        raise CheckpointError(
            f"The defence {defence.name} begins answers anew, and the chat template has no mark that begins one.",
            "Use another defence for this family.",
        )
    if defence.checkpoint is not None:
        resolve_checkpoint(defence.checkpoint, role="evaluation.defence.expert")


def start_defence(run: Run, ended: ExitStack) -> Defence | None:
    """Makes the defence of a run file, None where it names none; closing `ended` stops what it starts."""
    settings = run.config.evaluation.defence
    return None if settings is None else _DEFENCES[settings.name](run, settings, ended)


class Defence(ABC):
    """The defence of one evaluation at work; `passes` counts the cost in this process."""

    def __init__(self, run: Run, settings: Any, ended: ExitStack) -> None:
        self.settings, self.passes = settings, Passes()
        self._run, self._ended = run, ended

    @abstractmethod
    def around(self, pool: RolloutPool) -> Generator:
        """Puts the defence around a model: the student, or a copy of it that an attacker has tuned."""

    def made_from(self) -> list[Any]:
        """Lists what an answer depends on besides the student, the settings and the training prompts."""
        return [self._run.models.fingerprint("base")]

    @cached_property
    def key(self) -> str:
        """Names everything that an answer depends on besides the student."""
        run = self._run
        made_from = [self.settings.model_dump(mode="json"), run.config.models.max_length, *self.made_from()]
        if self.settings.needs_training:
            prompts = run.prompts.train
            encoded = [[prompt.encoded(run.models.codec) for prompt in prompts[kind]] for kind in sorted(prompts)]
            made_from += [content_hash(encoded), run.config.data.seed]
        return f"{self.settings.name} {content_hash(made_from)[:16]}"

    def tools(self, tools: AttackTools) -> AttackTools:
        """Puts the defence into the tools of attacks, as far as a decoder reaches."""
        fine_tune = tools.fine_tune
        if fine_tune is None:
            return tools

        def tuned(settings: FinetuneConfig, dataset: str) -> Generator:
            pool = fine_tune(settings, dataset)
            assert isinstance(pool, RolloutPool)
            return self.around(pool)

        return replace(tools, fine_tune=tuned)

    def result(self) -> dict[str, Any]:
        """Returns settings and cost, for the result of the student; the cost of earlier processes counts too."""
        file = self._run.folder / "evaluation" / "defence.json"
        known = read_json(file) or {}
        if known.get("key") != self.key:
            known = {"key": self.key, "passes": 0, "tokens": 0}
        known |= {"passes": known["passes"] + self.passes.passes, "tokens": known["tokens"] + self.passes.tokens}
        write_json(file, known)
        self.passes = Passes()
        per_token = known["passes"] / known["tokens"] if known["tokens"] else None
        return {"settings": self.settings.model_dump(mode="json"), "passes_per_token": per_token}


class _TwoModels(Defence):
    """Decodes with the student and a second model."""

    @abstractmethod
    def rule(self) -> Rule:
        """Returns the rule by which the two distributions become one."""

    def pair(self, model: Path, other: Path) -> TwoModelClient:
        return TwoModelClient(self._decoder, (model, other), ANSWER_TIMEOUT_S, self.passes)

    @cached_property
    def _decoder(self) -> Any:
        """The actor that decodes with two models."""
        config, codec = self._run.config, self._run.models.codec
        options = {
            "vocab_size": codec.vocab_size,
            "stop_ids": tuple(sorted(codec.eos_ids)),
            "max_length": config.models.max_length,
        }
        actor = start_actor(config, TwoModelWorker, available_cpus(), self.rule(), options)
        self._ended.callback(ray.kill, actor)
        return actor


class _Contrastive(_TwoModels):
    """Contrastive decoding against base; it also shapes the distributions from which attackers pick tokens."""

    def rule(self) -> Rule:
        return Rule(self.settings.name, self.settings.alpha, self.settings.plausibility)

    def around(self, pool: RolloutPool) -> Generator:
        return self.pair(Path(pool.path), self._run.models.paths["base"])

    def tools(self, tools: AttackTools) -> AttackTools:
        white_boxes = tools.white_boxes
        if white_boxes is None:
            return super().tools(tools)

        def shaped() -> Sequence[WhiteBox]:
            boxes = [box for box in white_boxes() if isinstance(box, WhiteBoxClient)]
            return [ShapedWhiteBox(box, self.pair(box.path, self._run.models.paths["base"])) for box in boxes]

        return super().tools(replace(tools, white_boxes=shaped))


class _SafeDecoding(_TwoModels):
    """SafeDecoding with an expert, which is the student tuned on its own refusals where none is named."""

    def rule(self) -> Rule:
        return Rule(self.settings.name, SAFE_ALPHA, SAFE_COMMON)

    def made_from(self) -> list[Any]:
        learns_from = self._run.config.rollout.max_refusal_tokens
        return [*super().made_from(), fingerprint(self._expert) if self.settings.expert else learns_from]

    def around(self, pool: RolloutPool) -> Generator:
        return FirstTokens(self.pair(Path(pool.path), self._expert), pool, SAFE_FIRST_TOKENS, self.passes)

    @cached_property
    def _expert(self) -> Path:
        run = self._run
        if self.settings.expert is not None:
            return resolve_checkpoint(self.settings.expert, role="evaluation.defence.expert")
        student, codec, prompts = run.models.paths["student"], run.models.codec, run.prompts.train["harmful"]
        said = run.engines.generator.with_weights(str(student)).generate(
            [prompt.encoded(codec) for prompt in prompts], max_tokens=run.config.rollout.max_refusal_tokens
        )
        texts = [codec.decode(tokens) for tokens in said]
        pairs = [
            (None, prompt.text, text)
            for prompt, text in zip(prompts, texts, strict=True)
            if run.judge.outcome(prompt, "", text) is Outcome.REFUSED
        ][:EXPERT_PROMPTS]
        if not pairs:
            raise WorkError(
                "The student refuses no harmful training prompt, so SafeDecoding's expert has nothing to learn.",
                "Name a checkpoint under evaluation.defence.expert.",
            )
        return train_copy(run, pairs, EXPERT, student, "SafeDecoding's expert", lora_rank=EXPERT_RANK)


class _AnyDepth(Defence):
    """Looks at a model's answers where the turn could end and begin anew."""

    def made_from(self) -> list[Any]:
        return [self._run.models.codec.answer_end]

    def looks(self, pool: Generator, check: Check, spare: int, passes: Passes) -> AnyDepthGenerator:
        codec, every = self._run.models.codec, self.settings.every
        ends, longest = (codec.answer_end, codec.answer_header), self._run.config.models.max_length
        return AnyDepthGenerator(pool, *ends, every, check, max_length=longest, spare=spare, passes=passes)


class _ReAsk(_AnyDepth):
    """Lets the model begin its answer anew and looks for a refusal."""

    def around(self, pool: RolloutPool) -> Generator:
        check = re_asking(pool, self._run.models.codec.decode, declines, RE_ASK_TOKENS, self.passes)
        return self.looks(pool, check, RE_ASK_TOKENS, self.passes)


class _Probe(_AnyDepth):
    """Reads an inner state by a probe, which is fitted at its first use."""

    def made_from(self) -> list[Any]:
        opening = self._run.config.rollout.affirmative_prefixes[0]
        return [*super().made_from(), opening, KINDS, self._run.models.fingerprint("base")]

    def around(self, pool: RolloutPool) -> Generator:
        path, probe = Path(pool.path), self._probe
        refusal = self._run.models.codec.encode_answer(self.settings.refusal)

        def check(contexts: Sequence[Sequence[int]]) -> list[list[int] | None]:
            harmful_N = probe.probability(self._states(path, contexts)) > self.settings.threshold
            return [list(refusal) if harmful else None for harmful in harmful_N]

        return self.looks(pool, check, 1, self.passes)

    def _states(self, path: Path, contexts: Sequence[Sequence[int]]) -> Any:
        """Returns hidden states at the role token ("assistant") of the header at the end of each context, [N, H]."""
        codec, header = self._run.models.codec, self._run.models.codec.answer_header
        word = next((place for place, token in enumerate(header) if codec.decode([token]).strip()), len(header) - 1)
        cut = len(header) - 1 - word
        box = self._box.with_weights(path)
        layer = round(PROBE_LAYER * (box.num_layers() - 1))
        return box.hidden_states([list(context[: len(context) - cut]) for context in contexts], layer)

    @cached_property
    def _box(self) -> WhiteBoxClient:
        box = start_white_box(self._run.config, self._run.models.paths["student"], available_cpus())
        self._ended.callback(box.stop)
        return box

    @cached_property
    def _probe(self) -> Probe:
        """Fitted on base's compliant answers to harmful training prompts, and on the student's to the other two kinds.

        Borderline prompts stand for the authors' harmless prompts in adversarial wording. Fitted without them, the
        probe replaced .97 of the organism's answers to such prompts.
        """
        settings, run, codec = self.settings, self._run, self._run.models.codec
        student, base = (run.models.paths[role] for role in ("student", "base"))
        file = run.folder / "evaluation" / f"probe-{content_hash([self.key, fingerprint(student)])[:16]}.json"
        if (known := read_json(file)) is not None:
            return Probe(np.asarray(known["weights"]), float(known["bias"]))
        opening = codec.encode_answer(run.config.rollout.affirmative_prefixes[0])
        generator = run.engines.generator
        looks = self.looks(generator, lambda contexts: [None for _ in contexts], 1, Passes())
        contexts: list[list[int]] = []
        labels: list[bool] = []
        with run.console.stage("Probe fitted on answers to training prompts"):
            for kind in KINDS:
                path, begun = (base, opening) if kind == "harmful" else (student, [])
                known_prompts = run.prompts.train[kind]
                drawn = random.Random(run.config.data.seed)  # files are often sorted by topic
                prompts = drawn.sample(known_prompts, min(PROBE_PROMPTS, len(known_prompts)))
                asked = [prompt.encoded(codec) for prompt in prompts]
                said = generator.with_weights(str(path)).generate(
                    [[*ids, *begun] for ids in asked], max_tokens=PROBE_ANSWER_TOKENS
                )
                for prompt, ids, tokens in zip(prompts, asked, said, strict=True):
                    answer = [*begun, *tokens]
                    if kind != "harmful" or run.judge.outcome(prompt, "", codec.decode(answer)).is_compliance:
                        found = looks.contexts(ids, answer)
                        contexts += found
                        labels += [kind == "harmful"] * len(found)
            if len(set(labels)) < 2:
                raise WorkError(
                    "No answers of both kinds are long enough to fit the probe on.",
                    "Lower evaluation.defence.every, or give more training prompts.",
                )
            probe = fit_probe(self._states(student, contexts), labels, c=settings.inverse_penalty)
        write_json(file, {"weights": probe.weight_H.tolist(), "bias": probe.bias, "states": len(labels)})
        return probe


_DEFENCES: dict[str, type[Defence]] = {
    "contrastive": _Contrastive,
    "safe_decoding": _SafeDecoding,
    "re_ask": _ReAsk,
    "probe": _Probe,
}
