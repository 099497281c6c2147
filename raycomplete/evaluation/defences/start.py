"""Starts the defence of an evaluation and puts it around the student."""

from __future__ import annotations

import random
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
from raycomplete.config.defences import (
    AnyDepthConfig,
    ContrastiveDefence,
    DefenceConfig,
    ProbeDefence,
    ReAskDefence,
    SafeDecodingDefence,
)
from raycomplete.config.engines import ANSWER_TIMEOUT_S
from raycomplete.data.checkpoints import fingerprint
from raycomplete.data.inputs import KINDS, Models
from raycomplete.data.sources import resolve_checkpoint
from raycomplete.engines.rollout_pool import RolloutPool
from raycomplete.engines.run import Run
from raycomplete.evaluation.attack_resources import train_copy
from raycomplete.evaluation.defences.any_depth import AnyDepthGenerator, Check, Passes, Probe, fit_probe, re_asking
from raycomplete.evaluation.defences.two_models import Rule, TwoModelWorker
from raycomplete.evaluation.model_actors import WhiteBoxClient, WhiteBoxWorker, start_actor
from raycomplete.evaluation.refusals import find_refusal
from raycomplete.runtime.errors import CheckpointError, ConfigError, WorkError
from raycomplete.runtime.files import content_hash, read_json, write_json
from raycomplete.runtime.machine import available_cpus
from raycomplete.runtime.ray_calls import wait_for
from raycomplete.runtime.types import Generator, Outcome

_EXPERT_BATCH = 8


def needs_training_prompts(config: RunConfig) -> bool:
    """Tells whether the defence of a run file learns from training prompts."""
    defence = config.evaluation.defence
    return isinstance(defence, ProbeDefence) or (isinstance(defence, SafeDecodingDefence) and defence.expert is None)


def check_defence(config: RunConfig, models: Models) -> None:
    """Refuses a defence that would fail at work.

    Raises:
        CheckpointError: SafeDecoding's expert is not there, or a chat template has no header to begin an answer anew.
        ConfigError: The model would think, or is behind an address.
    """
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
    if isinstance(defence, AnyDepthConfig) and not models.codec.answer_header:
        raise CheckpointError(
            f"The defence {defence.name} begins answers anew, and the chat template has no mark that begins one.",
            "Use another defence for this family.",
        )
    if isinstance(defence, SafeDecodingDefence) and defence.expert is not None:
        resolve_checkpoint(defence.expert, role="evaluation.defence.expert")


class Defence:
    """The defence of one evaluation at work; closing `ended` stops what it started.

    Attributes:
        settings: Its settings.
        passes: What it cost so far, in this process.
    """

    def __init__(self, run: Run, settings: DefenceConfig, ended: ExitStack) -> None:
        self.settings, self.passes = settings, Passes()
        self._run, self._ended = run, ended

    @cached_property
    def key(self) -> str:
        """Names everything that an answer depends on besides the student."""
        run = self._run
        made_from: list[Any] = [self.settings.model_dump(mode="json"), run.config.models.max_length]
        if isinstance(self.settings, AnyDepthConfig):
            made_from.append(run.models.codec.answer_end)
        if isinstance(self.settings, ProbeDefence):
            made_from += [run.config.rollout.affirmative_prefixes[0], KINDS]
        if not isinstance(self.settings, ReAskDefence):
            made_from.append(run.models.fingerprint("base"))
        if needs_training_prompts(run.config):
            prompts, codec = run.prompts.train, run.models.codec
            made_from.append(
                content_hash([[prompt.encoded(codec) for prompt in prompts[kind]] for kind in sorted(prompts)])
            )
            made_from.append(run.config.data.seed)
        if isinstance(self.settings, SafeDecodingDefence):
            expert = self.settings.expert
            made_from.append(
                run.config.rollout.max_refusal_tokens  # of those that the expert learns from
                if expert is None
                else fingerprint(resolve_checkpoint(expert, role="evaluation.defence.expert"))
            )
        return f"{self.settings.name} {content_hash(made_from)[:16]}"

    def around(self, pool: RolloutPool) -> Generator:
        """Puts the defence around a model: the student, or a copy of it that an attacker has tuned."""
        settings = self.settings
        if isinstance(settings, ContrastiveDefence):
            return self._pair(Path(pool.path), self._run.models.paths["base"])
        if isinstance(settings, SafeDecodingDefence):
            return FirstTokens(self._pair(Path(pool.path), self._expert), pool, settings.first_tokens, self.passes)
        assert isinstance(settings, AnyDepthConfig)
        if isinstance(settings, ReAskDefence):
            codec = self._run.models.codec
            check = re_asking(pool, codec.decode, self.refuses, settings.max_tokens, self.passes)
            spare = settings.max_tokens
        else:
            check, spare = self._probed(Path(pool.path)), 1
        return self._looks(pool, settings.every, check, spare, self.passes)

    def _looks(self, pool: Generator, every: int, check: Check, spare: int, passes: Passes) -> AnyDepthGenerator:
        """Looks at a model's answers where the turn could end and begin anew."""
        codec, longest = self._run.models.codec, self._run.config.models.max_length
        ends = codec.answer_end, codec.answer_header
        return AnyDepthGenerator(pool, *ends, every, check, max_length=longest, spare=spare, passes=passes)

    def tools(self, tools: AttackTools) -> AttackTools:
        """Puts the defence into the tools of attacks, as far as a decoder reaches."""
        fine_tune, white_boxes = tools.fine_tune, tools.white_boxes

        def tuned(settings: FinetuneConfig, dataset: str) -> Generator:
            assert fine_tune is not None
            pool = fine_tune(settings, dataset)
            assert isinstance(pool, RolloutPool)
            return self.around(pool)

        def shaped() -> Sequence[WhiteBox]:
            assert white_boxes is not None
            boxes = [box for box in white_boxes() if isinstance(box, WhiteBoxClient)]
            return [ShapedWhiteBox(box, self._pair(box.path, self._run.models.paths["base"])) for box in boxes]

        if isinstance(self.settings, ContrastiveDefence) and white_boxes is not None:
            tools = replace(tools, white_boxes=shaped)
        return tools if fine_tune is None else replace(tools, fine_tune=tuned)

    def result(self) -> dict[str, Any]:
        """Name, settings and cost, for the result of the student; the cost of earlier processes counts too."""
        file = self._run.folder / "evaluation" / "defence.json"
        known = read_json(file) or {}
        if known.get("key") != self.key:
            known = {"key": self.key, "passes": 0, "tokens": 0}
        known |= {"passes": known["passes"] + self.passes.passes, "tokens": known["tokens"] + self.passes.tokens}
        write_json(file, known)
        self.passes = Passes()
        per_token = known["passes"] / known["tokens"] if known["tokens"] else None
        return {"settings": self.settings.model_dump(mode="json"), "passes_per_token": per_token}

    def refuses(self, text: str) -> bool:
        """Tells whether a text declines, by patterns."""
        return find_refusal(text, judgements=2) is not None

    def _pair(self, model: Path, other: Path) -> TwoModelClient:
        return TwoModelClient(self._decoder, (model, other), ANSWER_TIMEOUT_S, self.passes)

    @cached_property
    def _decoder(self) -> Any:
        """The actor that decodes with two models."""
        settings = self.settings
        assert isinstance(settings, ContrastiveDefence | SafeDecodingDefence)
        limit = settings.plausibility if isinstance(settings, ContrastiveDefence) else settings.common
        actor = start_pair(self._run, Rule(settings.name, settings.alpha, limit), settings.batch)
        self._ended.callback(ray.kill, actor)
        return actor

    @cached_property
    def _expert(self) -> Path:
        """SafeDecoding's expert, which is made here where none is named: the student, tuned on its own refusals."""
        settings, run = self.settings, self._run
        assert isinstance(settings, SafeDecodingDefence)
        if settings.expert is not None:
            return resolve_checkpoint(settings.expert, role="evaluation.defence.expert")
        student, codec, prompts = run.models.paths["student"], run.models.codec, run.prompts.train["harmful"]
        pool = run.engines.generator.with_weights(str(student))
        said = pool.generate(
            [prompt.encoded(codec) for prompt in prompts], max_tokens=run.config.rollout.max_refusal_tokens
        )
        texts = [codec.decode(tokens) for tokens in said]
        pairs = [
            (None, prompt.text, text)
            for prompt, text in zip(prompts, texts, strict=True)
            if run.judge.outcome(prompt, "", text) is Outcome.REFUSED
        ][: settings.expert_prompts]
        if not pairs:
            raise WorkError(
                "The student refuses no harmful training prompt, so SafeDecoding's expert has nothing to learn.",
                "Name a checkpoint under evaluation.defence.expert.",
            )
        recipe = FinetuneRecipe(lr=settings.expert_lr, epochs=settings.expert_epochs, batch_size=_EXPERT_BATCH)
        return train_copy(run, pairs, recipe, student, "SafeDecoding's expert", lora_rank=settings.expert_rank)

    def _probed(self, path: Path) -> Check:
        """The check by the probe, of states under the weights at `path`."""
        settings, codec = self.settings, self._run.models.codec
        assert isinstance(settings, ProbeDefence)
        refusal, probe = codec.encode_answer(settings.refusal), self._probe

        def check(contexts: Sequence[Sequence[int]]) -> list[list[int] | None]:
            harmful_N = probe.probability(self._states(path, contexts)) > settings.threshold
            return [list(refusal) if harmful else None for harmful in harmful_N]

        return check

    def _states(self, path: Path, contexts: Sequence[Sequence[int]]) -> Any:
        """States at the role word of the header that ends each context, [N, H]: the first word that is no mark."""
        settings, codec = self.settings, self._run.models.codec
        assert isinstance(settings, ProbeDefence)
        header = codec.answer_header
        word = next((place for place, token in enumerate(header) if codec.decode([token]).strip()), len(header) - 1)
        cut = len(header) - 1 - word
        box = self._box.with_weights(path)
        layer = round(settings.layer * (box.num_layers() - 1))
        return box.hidden_states([list(context[: len(context) - cut]) for context in contexts], layer)

    @cached_property
    def _box(self) -> WhiteBoxClient:
        run = self._run
        actor = start_actor(run.config, WhiteBoxWorker, available_cpus())
        box = WhiteBoxClient(actor, run.models.paths["student"], ANSWER_TIMEOUT_S)
        self._ended.callback(box.stop)
        return box

    @cached_property
    def _probe(self) -> Probe:
        """Fitted on base's compliant answers to harmful training prompts, and on the student's to the other two kinds.

        Borderline prompts stand for the authors' harmless prompts in adversarial wording. Fitted without them, the
        probe replaced .97 of the organism's answers to such prompts.
        """
        settings, run, codec = self.settings, self._run, self._run.models.codec
        assert isinstance(settings, ProbeDefence)
        student, base = (run.models.paths[role] for role in ("student", "base"))
        file = run.folder / "evaluation" / f"probe-{content_hash([self.key, fingerprint(student)])[:16]}.json"
        if (known := read_json(file)) is not None:
            return Probe(np.asarray(known["weights"]), float(known["bias"]))
        opening = codec.encode_answer(run.config.rollout.affirmative_prefixes[0])
        generator = run.engines.generator
        looks = self._looks(generator, settings.every, lambda contexts: [None for _ in contexts], 1, Passes())
        contexts: list[list[int]] = []
        labels: list[bool] = []
        with run.console.stage("Probe fitted on answers to training prompts"):
            for kind in KINDS:
                path, begun = (base, opening) if kind == "harmful" else (student, [])
                known_prompts = run.prompts.train[kind]
                drawn = random.Random(run.config.data.seed)  # files are often sorted by topic
                prompts = drawn.sample(known_prompts, min(settings.prompts, len(known_prompts)))
                pool = generator.with_weights(str(path))
                asked = [prompt.encoded(codec) for prompt in prompts]
                said = pool.generate([[*ids, *begun] for ids in asked], max_tokens=settings.answer_tokens)
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


class TwoModelClient:
    """A decoder of two models in a Ray actor (implements `raycomplete.runtime.types.Generator`)."""

    def __init__(self, actor: Any, paths: tuple[Path, Path], timeout_s: float, passes: Passes | None = None) -> None:
        self._actor, self._paths, self._timeout_s = actor, paths, timeout_s
        self._passes = passes or Passes()

    def generate(self, sequences: Sequence[Sequence[int]], **sampling: Any) -> list[list[int]]:
        """Continues sequences; see `raycomplete.evaluation.defences.two_models.TwoModelDecoder.generate`."""
        answers = [tokens for tokens, _ in self.generate_finished(sequences, **sampling)]
        self._passes.tokens += sum(map(len, answers))
        return answers

    def generate_finished(self, sequences: Sequence[Sequence[int]], **sampling: Any) -> list[tuple[list[int], bool]]:
        """Continues sequences as `generate` does; says of each whether it ended by itself."""
        found = self.ask("generate_finished", [list(sequence) for sequence in sequences], **sampling)
        self._passes.passes += 2 * sum(len(tokens) for tokens, _ in found)
        return list(found)

    def ask(self, method: str, *arguments: Any, **options: Any) -> Any:
        """Calls a method of the decoder."""
        reference = self._actor.call.remote(self._paths, method, *arguments, **options)
        return wait_for(reference, who="decoder of two models", what="an answer", timeout_s=self._timeout_s)

    def stop(self) -> None:
        """Ends the actor and frees its memory."""
        ray.kill(self._actor)


def start_pair(run: Run, rule: Rule, batch: int) -> Any:
    """Asks Ray for the actor of a decoder of two models and returns at once."""
    config, codec = run.config, run.models.codec
    options = {
        "vocab_size": codec.vocab_size,
        "stop_ids": tuple(sorted(codec.eos_ids)),
        "max_length": config.models.max_length,
        "batch": batch,
    }
    return start_actor(config, TwoModelWorker, available_cpus(), rule, options)


class FirstTokens:
    """Decodes the first tokens of an answer with two models, and the rest with one (implements `Generator`)."""

    def __init__(self, pair: TwoModelClient, rest: Generator, count: int, passes: Passes) -> None:
        self._pair, self._rest, self._count, self._passes = pair, rest, count, passes

    def generate(self, sequences: Sequence[Sequence[int]], *, max_tokens: int, **sampling: Any) -> list[list[int]]:
        """Continues sequences (see `raycomplete.runtime.types.Generator.generate`)."""
        first = self._pair.generate_finished(sequences, max_tokens=min(self._count, max_tokens), **sampling)
        answers = [list(tokens) for tokens, _ in first]
        open_rows = [
            index
            for index, (tokens, ended) in enumerate(first)
            if not ended and len(tokens) == self._count < max_tokens
        ]
        seed = sampling.get("seed")
        each_alone = seed is not None and sampling.get("temperature", 0.0) > 0  # under the seed of its first tokens
        for batch in [[index] for index in open_rows] if each_alone else [open_rows] * bool(open_rows):
            own = sampling | ({"seed": seed + batch[0]} if each_alone and seed is not None else {})
            more = self._rest.generate(
                [[*sequences[index], *answers[index]] for index in batch], max_tokens=max_tokens - self._count, **own
            )
            for index, tokens in zip(batch, more, strict=True):
                answers[index] += tokens
                self._passes.passes += len(tokens)
        self._passes.tokens += sum(map(len, answers))
        return answers


class ShapedWhiteBox(WhiteBoxClient):
    """A model whose next-token distributions are those of a decoder of two models; gradients are its own."""

    def __init__(self, box: WhiteBoxClient, decoder: TwoModelClient) -> None:
        super().__init__(box.actor, box.path, box.timeout_s)
        self._shaped = decoder

    def top_logprobs(self, sequences: Sequence[Sequence[int]], top: int) -> Any:
        """The likeliest tokens of the decoder."""
        return self._shaped.ask("top_logprobs", [list(sequence) for sequence in sequences], top)

    def logprobs_of(self, sequences: Sequence[Sequence[int]], tokens: Sequence[Sequence[int]]) -> Any:
        """Log-probabilities of the decoder."""
        return self._shaped.ask(
            "logprobs_of", [list(sequence) for sequence in sequences], [list(ids) for ids in tokens]
        )
