"""Resolves the checkpoints and prompts of a run, and refuses what does not fit before a single process starts."""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

from raycomplete.config import PromptSets, RunConfig
from raycomplete.data.augmentation import read_augmentation_files
from raycomplete.data.chat import ChatCodec, has_chat_template
from raycomplete.data.checkpoints import architecture, check_same_vocabulary, fingerprint
from raycomplete.data.heads import HeadSpec, read_head_spec
from raycomplete.data.organisms import ORGANISMS
from raycomplete.data.prompts import hub_commit, read_prompts
from raycomplete.data.remote import RememberingCodec, RemoteSpec, is_remote, refuse_remote
from raycomplete.data.samples import MAX_REFUSAL_PREFIX_TOKENS
from raycomplete.data.sources import resolve_checkpoint
from raycomplete.runtime.errors import CheckpointError, ConfigError, DataError
from raycomplete.runtime.files import content_hash
from raycomplete.runtime.types import ModelRole, Prompt, PromptKind

KINDS: tuple[PromptKind, ...] = ("harmful", "benign", "borderline")
_UNSPACED = re.compile(  # Thai, Lao, Burmese, Khmer, kana and Chinese characters
    r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]+"
)
# Keys of `rollout` that change no sample.
_OF_THE_LOOP = frozenset(
    "colocated gpu_memory_utilization max_student_tokens num_engines on_policy sync_every tensor_parallel".split()
)


@dataclass(frozen=True)
class Models:
    """The checkpoints of a run, resolved and checked."""

    paths: dict[ModelRole, Path]
    heads: dict[ModelRole, HeadSpec]
    codec: ChatCodec
    others: dict[str, Path] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    remote: dict[ModelRole, RemoteSpec] = field(default_factory=dict)

    @property
    def start(self) -> Path:
        """The folder that engines start from: base's where it has one."""
        return self.paths.get("base") or next(iter(self.paths.values()))

    def writer(self, name: str) -> Path:
        """Returns the folder of a model that `rollout.harmful_from` names."""
        return self.others.get(name) or self.paths[cast(ModelRole, name)]

    def fingerprint(self, role: ModelRole) -> str:
        """Returns the hash that names the weights of a role."""
        return self.remote[role].model_id if role in self.remote else self.heads[role].model_fingerprint


@dataclass(frozen=True)
class Prompts:
    """Prompts by purpose and kind; `notes` are sentences for the user, such as how many were left out."""

    train: dict[PromptKind, tuple[Prompt, ...]]
    evaluation: dict[PromptKind, tuple[Prompt, ...]]
    notes: tuple[str, ...] = ()
    revisions: Mapping[str, str] = field(default_factory=dict)
    held_back: frozenset[str] = frozenset()


def prepare_models(
    config: RunConfig,
    roles: Sequence[ModelRole] = ("base", "aligned", "student"),
    *,
    training: bool = False,
    remote: bool = False,
) -> Models:
    """Finds every checkpoint (for training those of `rollout.harmful_from` too) and checks that they fit together."""
    settings = config.models
    if not remote:
        refuse_remote(settings)
    specs = {"base": settings.base, "aligned": settings.aligned, "student": settings.student or settings.aligned}
    behind = {role: RemoteSpec.parse(specs[role], setting=f"models.{role}") for role in roles if is_remote(specs[role])}
    if behind and settings.thinks:
        raise ConfigError(
            "models.template_arguments sets enable_thinking, and models behind an address think as their server says.",
            "Leave it out.",
        )
    paths: dict[ModelRole, Path] = {
        role: resolve_checkpoint(specs[role], role=role) for role in roles if role not in behind
    }
    if not paths:
        raise ConfigError(
            "Every model is behind an address, and no tokenizer is there by which the depths of prefills are counted.",
            "Name a checkpoint for one of models.base and models.aligned; a small one does.",
        )
    named: dict[str, Path] = {str(role): path for role, path in paths.items()}
    if "aligned" not in named:  # `align` has a base only
        named["aligned"] = next(iter(paths.values()))
    codec = check_same_vocabulary(
        named, trust_remote_code=settings.trust_remote_code, template_arguments=settings.template_arguments
    )
    for role, path in paths.items():
        context = json.loads((path / "config.json").read_text()).get("max_position_embeddings")
        if context and settings.max_length > context:
            raise ConfigError(
                f"models.max_length is {settings.max_length}, and models.{role} ({path}) reads at most {context} "
                "tokens.",
                f"Set models.max_length to {context} or less.",
            )
    shapes = {role: architecture(path, trust_remote_code=settings.trust_remote_code) for role, path in named.items()}
    for role in paths:
        if changed := _difference(shapes[role], shapes["aligned"]):
            raise CheckpointError(
                f"models.{role} and models.aligned differ in architecture ({changed}).",
                "Base must be the model that aligned was trained from, and the student a copy of aligned.",
            )
    heads = {role: read_head_spec(path, codec.vocab_size, codec.fingerprint()) for role, path in paths.items()}
    names = [name for name in config.rollout.harmful_from if training and name not in paths]
    others = {name: _writer(config, name, named["aligned"], shapes["aligned"]) for name in names}
    borrowed = [name for name in named if not has_chat_template(named[name]) and has_chat_template(named["aligned"])]
    notes = [f"models.{name} has no chat template and is asked in that of models.aligned" for name in borrowed]
    return Models(paths, heads, RememberingCodec(codec) if behind else codec, others, tuple(notes), behind)


def _writer(config: RunConfig, spec: str, aligned: Path, shape: dict[str, Any]) -> Path:
    """Finds a checkpoint that writes harmful continuations in an engine of the run's own models."""
    key, trust_remote_code = "rollout.harmful_from", config.models.trust_remote_code
    try:
        path = resolve_checkpoint(spec, role=key)
        check_same_vocabulary({key: path, "aligned": aligned}, trust_remote_code=trust_remote_code)
        changed = _difference(architecture(path, trust_remote_code=trust_remote_code), shape)
    except CheckpointError as error:
        raise CheckpointError(error.problem.replace(f"models.{key}", key), error.remedy) from error
    if changed:
        raise CheckpointError(
            f"{key}: {path} and models.aligned differ in architecture ({changed}).",
            "Name base, aligned, student, or a checkpoint that was trained from the same model.",
        )
    return path


def prepare_prompts(config: RunConfig, codec: ChatCodec, *, training: bool = True) -> Prompts:
    """Reads every prompt of a run and checks that it fits the context."""
    data, held_out = config.data, _held_out_sets(config)
    notes: list[str] = []
    if data.source in ORGANISMS:
        organism = ORGANISMS[data.source]
        train = {kind: tuple(organism.prompts("train", kind, data.seed, data.limit_per_kind)) for kind in KINDS}
    else:
        train = {kind: _read(data.train, kind, data.seed) if training else () for kind in KINDS}
        if training:
            train, notes = _without_near_repeats(config, train)
        needed = [("data.evaluation", held_out, kind) for kind in KINDS]
        if training:
            needed += [("data.train", train, kind) for kind in ("harmful", "benign")]
        for where, sets, kind in needed:
            if not sets[kind]:
                raise DataError(f"{where}.{kind} is empty.", "Name at least one file of prompts there.")
        _check_disjoint(train, held_out, "data.train")
    longest_trained = longest_response(config)
    rooms: dict[PromptKind, list[tuple[str | None, int]]] = {kind: [(None, longest_trained)] for kind in KINDS}
    if config.rollout.safety_prompt:  # which the teachers alone read, before a refusal or h
        rooms["harmful"].append(
            (config.rollout.safety_prompt, max(config.rollout.max_refusal_tokens, _longest_h(config)) + 1)
        )
    train, too_long = _fitting(config, codec, train, rooms)
    evaluation, frame = config.evaluation, codec.frame
    longest = max(evaluation.deepest_prefill + evaluation.max_tokens, evaluation.max_utility_tokens) + 1
    if frame is not None and frame.thinks:
        longest += evaluation.max_thinking_tokens + len(frame.closing)
    longest = max(longest_trained, longest)
    for prompt in (prompt for kind in KINDS for prompt in held_out[kind]):
        _check_length(config, codec, prompt, None, longest)
    if config.rollout.prompt_augmentation.fraction > 0 and training:
        every = [prompt for kind in KINDS for prompt in train[kind]]
        read_augmentation_files(config.rollout.prompt_augmentation, every)
    notes += too_long
    read = _hub_revisions(config, notes, config.data.evaluation, *([config.data.train] if training else []))
    return Prompts(train, held_out, tuple(notes), read, _held_back(config, train))


def _held_back(config: RunConfig, train: Mapping[PromptKind, Sequence[Prompt]]) -> frozenset[str]:
    """Names the training prompts of sources with `held_back`, also where another source repeats them."""
    data, found = config.data, set()
    for kind in KINDS if data.source not in ORGANISMS else ():
        if sources := [source for source in getattr(data.train, kind) if source.held_back]:
            texts = {prompt.transcript for prompt in read_prompts(sources, kind, data.seed)}
            found |= {prompt.prompt_id for prompt in train[kind] if prompt.transcript in texts}
        if kind != "borderline" and train[kind] and found.issuperset(prompt.prompt_id for prompt in train[kind]):
            raise DataError(f"All of data.train.{kind} is held back.", "Leave held_back out where prompts shall train.")
    return frozenset(found)


def prepare_alignment_prompts(config: RunConfig) -> Prompts:
    """Reads the prompts of `align`, and keeps them as far from those of the evaluation as training prompts are."""
    where = "align.refusals or align.benign"
    sets = PromptSets(harmful=config.align.refusals, benign=config.align.benign)
    every = {kind: _read(sets, kind, config.data.seed) for kind in KINDS}
    train, notes = _without_near_repeats(config, every)
    if not (train["harmful"] and train["benign"]):
        raise DataError(f"{where} holds no prompt that is far enough from the evaluation.", "Use other files.")
    _check_disjoint(train, _held_out_sets(config), where)
    read = _hub_revisions(config, notes, sets)
    return Prompts(train, {}, tuple(notes), read)


def _hub_revisions(config: RunConfig, notes: list[str], *sets: PromptSets) -> dict[str, str]:
    """Returns the commit at which each data set of the hub was read, and notes it for the user."""
    read = {source.path: source for found in sets for kind in KINDS for source in getattr(found, kind)}
    commits = {path: hub_commit(source) for path, source in read.items() if config.data.source not in ORGANISMS}
    notes += [f"{path} is read at revision {commit}" for path, commit in commits.items() if commit]
    return {path: commit for path, commit in commits.items() if commit}


def _read(sets: PromptSets, kind: PromptKind, seed: int) -> tuple[Prompt, ...]:
    return tuple(read_prompts(getattr(sets, kind), kind, seed))


def _held_out_sets(config: RunConfig) -> dict[PromptKind, tuple[Prompt, ...]]:
    """Draws at most `evaluation.num_prompts` of each kind over all its files, whose order is kept."""
    data, count = config.data, config.evaluation.num_prompts
    if data.source in ORGANISMS:
        return {kind: tuple(ORGANISMS[data.source].prompts("heldout", kind, data.seed, count)) for kind in KINDS}
    drawn: dict[PromptKind, tuple[Prompt, ...]] = {}
    for kind in KINDS:
        prompts = _read(data.evaluation, kind, data.seed)
        draw = random.Random(f"{data.seed}:held out:{kind}")
        drawn[kind] = tuple(prompts[at] for at in sorted(draw.sample(range(len(prompts)), min(count, len(prompts)))))
    return drawn


def _without_near_repeats(
    config: RunConfig, train: dict[PromptKind, tuple[Prompt, ...]]
) -> tuple[dict[PromptKind, tuple[Prompt, ...]], list[str]]:
    """Leaves out training prompts that repeat an evaluation prompt almost word for word, and says how many."""
    if config.data.max_overlap >= 1:
        return train, []
    evaluation = config.data.evaluation
    known = [_words(prompt) for kind in KINDS for prompt in _read(evaluation, kind, config.data.seed)]

    def overlap(prompt: Prompt) -> float:
        words = _words(prompt)
        return max((len(words & other) / max(len(words | other), 1) for other in known), default=0.0)

    kept = {kind: tuple(p for p in train[kind] if overlap(p) < config.data.max_overlap) for kind in KINDS}
    dropped = {kind: len(train[kind]) - len(kept[kind]) for kind in KINDS}
    counts = ", ".join(f"{count} {kind}" for kind, count in dropped.items() if count)
    return kept, [f"Training prompts left out, too near to one of the evaluation: {counts}"] if counts else []


def _words(prompt: Prompt) -> frozenset[str]:
    """Words of the user message: a system prompt or earlier turns that many prompts share make no repeat of them."""
    text = prompt.text.lower()
    # Where a script has no spaces between words, every three characters in a row stand for one.
    threes = [run[at : at + 3] for run in _UNSPACED.findall(text) for at in range(max(len(run) - 2, 1))]
    return frozenset([*re.findall(r"\w+", _UNSPACED.sub(" ", text)), *threes])


def _check_disjoint(
    train: dict[PromptKind, tuple[Prompt, ...]], held_out: dict[PromptKind, tuple[Prompt, ...]], where: str
) -> None:
    trained = {prompt.transcript for kind in KINDS for prompt in train[kind]}
    both = [prompt for kind in KINDS for prompt in held_out[kind] if prompt.transcript in trained]
    if both:
        raise DataError(
            f"{len(both)} prompts of data.evaluation are in {where} as well ({both[0].prompt_id} is the first).",
            "Rates on trained prompts prove nothing: use other files, split one file in two, or set data.max_overlap "
            "(0.6, say) to leave them out of training.",
        )


def _fitting(
    config: RunConfig,
    codec: ChatCodec,
    train: dict[PromptKind, tuple[Prompt, ...]],
    rooms: Mapping[PromptKind, Sequence[tuple[str | None, int]]],
) -> tuple[dict[PromptKind, tuple[Prompt, ...]], list[str]]:
    """Leaves out training prompts after which a response does not fit the context, and says how many.

    `rooms` has (system prompt, longest response) by kind. A kind of which nothing fits is refused.
    """
    limit, kept = config.models.max_length, {}
    for kind in KINDS:
        kept[kind] = tuple(
            prompt
            for prompt in train[kind]
            if all(len(prompt.encoded(codec, system=system)) + room <= limit for system, room in rooms[kind])
        )
        if train[kind] and not kept[kind]:
            for system, room in rooms[kind]:
                _check_length(config, codec, train[kind][0], system, room)
    counts = [f"{len(train[kind]) - len(kept[kind])} {kind}" for kind in KINDS if len(train[kind]) > len(kept[kind])]
    left_out = f"Training prompts left out, too long for models.max_length ({limit}): {', '.join(counts)}"
    return kept, [left_out] if counts else []


def _check_length(config: RunConfig, codec: ChatCodec, prompt: Prompt, system: str | None, longest: int) -> None:
    tokens = len(prompt.encoded(codec, system=system))
    if tokens + longest > config.models.max_length:
        under = " under rollout.safety_prompt" if system else ""
        raise DataError(
            f"The prompt {prompt.prompt_id} has {tokens} tokens{under}, and responses of this run up to {longest}, "
            f"which exceeds models.max_length ({config.models.max_length}).",
            "Shorten or drop the prompt, lower evaluation.depths, evaluation.max_tokens and "
            "evaluation.max_utility_tokens where they are the longest, or raise models.max_length.",
        )


def longest_response(config: RunConfig) -> int:
    """Counts the tokens that may follow a training prompt in any part of the run."""
    train = _longest_h(config) + config.rollout.max_refusal_tokens
    rollout = max(config.rollout.max_anchor_tokens, config.rollout.max_harmful_tokens)
    if config.rollout.on_policy:
        rollout = max(rollout, config.rollout.max_anchor_tokens + config.rollout.max_student_tokens)
    return max(train, rollout) + 1


def training_fingerprints(models: Models, prompts: Prompts) -> dict[str, str]:
    """Names the content of the checkpoints, tokenizer and training prompts of a run, by role or purpose."""
    texts = [prompt.transcript for kind in KINDS for prompt in prompts.train[kind]]
    found = {str(role): models.fingerprint(role) for role in models.paths}
    found |= {name: fingerprint(path) for name, path in models.others.items()}
    codec = models.codec  # its stop tokens come from generation_config.json, which no fingerprint of weights reads
    found["tokenizer"] = content_hash([codec.fingerprint(), codec.eos_id, sorted(codec.eos_ids)])
    return found | {"training prompts": hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]}


def evaluation_fingerprint(config: RunConfig) -> str:
    """Names the content of all evaluation files, of which `evaluation.num_prompts` may draw a part."""
    read = {kind: _read(config.data.evaluation, kind, config.data.seed) for kind in KINDS}
    return content_hash([asdict(prompt) for kind in KINDS for prompt in read[kind]])


def samples_key(config: RunConfig, inputs: Mapping[str, str]) -> str:
    """Names the samples of a run: runs that agree in everything that samples are made from have equal ones."""
    train, evaluation = config.train, config.evaluation
    made_from: dict[str, Any] = config.model_dump(mode="json", include={"models", "data"})
    made_from["rollout"] = config.rollout.model_dump(mode="json", exclude=set(_OF_THE_LOOP))
    is_steered = train.validation.interval(train.steps) > 0
    held_back = [train.validation.num_prompts, train.validation.every == "auto", train.validation.max_tokens]
    made_from["held back"] = held_back if is_steered else None
    made_from["held out"] = [evaluation.num_prompts, evaluation.prefill_from]
    made_from["held out"].append(evaluation.deepest_prefill)
    if config.rollout.prompt_augmentation.fraction > 0:  # suffixes get the room that a run's responses leave
        made_from["longest"] = longest_response(config)
    return content_hash([made_from, train.seed, dict(inputs)])


def _longest_h(config: RunConfig) -> int:
    """Counts the tokens of h that a step may train: a refusal prefix, the deepest cut, what the student adds."""
    prefix = MAX_REFUSAL_PREFIX_TOKENS if config.rollout.refusal_prefix_fraction > 0 else 0
    return prefix + config.method.depth.max + (config.rollout.max_student_tokens if config.rollout.on_policy else 0)


def _difference(first: dict[str, Any], second: dict[str, Any]) -> str:
    names = sorted(name for name in first.keys() | second.keys() if first.get(name) != second.get(name))
    return ", ".join(f"{name}: {first.get(name)} and {second.get(name)}" for name in names[:3])
