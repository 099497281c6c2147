"""Tools of attacks besides the generator: white boxes, the guide, helpers, rewriting models, and trained copies.

Attacks name the tools that they need; devices are reserved by that. Everything starts at its first use.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import cache, cached_property
from math import ceil
from pathlib import Path
from typing import Any

from raycomplete.attacks.attack import Attack, blind_judge
from raycomplete.attacks.finetune import FinetuneConfig, FinetuneRecipe
from raycomplete.attacks.registry import build_attack
from raycomplete.attacks.target import Attacker, AttackTools
from raycomplete.attacks.templates import SLOT
from raycomplete.attacks.trial import EvaluationCancelled
from raycomplete.config import RemoteConfig, RunConfig, TrainConfig, ValidationConfig, map_paths
from raycomplete.config.engines import ANSWER_TIMEOUT_S
from raycomplete.data.chat import ChatCodec
from raycomplete.data.checkpoints import check_token_classifier, fingerprint
from raycomplete.data.heads import read_head_spec
from raycomplete.data.inputs import KINDS, Prompts
from raycomplete.data.organisms import ORGANISMS
from raycomplete.data.prompts import read_rows
from raycomplete.data.remote import RemoteSpec, TextCodec, is_remote
from raycomplete.data.samples import AnchorSample, SampleSet, write_samples
from raycomplete.data.sources import resolve_checkpoint
from raycomplete.engines.run import Run
from raycomplete.evaluation.judges import declines
from raycomplete.evaluation.model_actors import (
    HelperClient,
    ModelWorker,
    WhiteBoxClient,
    start_actor,
    start_white_box,
)
from raycomplete.evaluation.model_judges import check_judge, model_name, start_model
from raycomplete.evaluation.remote_target import RemoteModel
from raycomplete.methods.sft import SFT
from raycomplete.runtime.errors import ConfigError, DataError, StoppedError
from raycomplete.runtime.files import content_hash
from raycomplete.runtime.machine import available_cpus
from raycomplete.runtime.types import PromptKind
from raycomplete.training.job import TrainJob
from raycomplete.training.trainer import fit

Chat = tuple[str | None, str, str]  # system, user, assistant
_ORGANISM_CHATS = {"harmful": 100, "identity_shift": 10}
_ATTACKER = "evaluation.attacks.attacker"
REMOTE_ATTACKER_TOKENS = 8192  # longest request to an attacker behind an address, reply included


def extra_engines(config: RunConfig) -> int:
    """Counts the engines and models that attacks, judge and defence of a run hold besides the generator."""
    attacks, defence = _attacks(config), config.evaluation.defence
    needs = {need for attack in attacks for need in attack.needs}
    brought = {item for attack in attacks for item in attack.checkpoints.items() if not is_remote(item[1])}
    others = (config.evaluation.judge.kind == "model") + (config.evaluation.prefill_from != "base")
    others += defence is not None and defence.loads_model
    return ("white_boxes" in needs) + ("guide" in needs) + len(brought) + others


def training_workers(config: RunConfig) -> int:
    """Counts the training workers that the attacks of a run need, or its defence."""
    defence = config.evaluation.defence
    trains = defence is not None and defence.trains_copy
    return int(trains or any("fine_tune" in attack.needs for attack in _attacks(config)))


def check_evaluation(config: RunConfig) -> None:
    """Refuses an evaluation whose attacks or judge lack a file, a checkpoint or a sense, before anything is started."""
    map_paths(config.evaluation, _require_path, "evaluation")
    check_judge(config.evaluation.judge)
    judge = config.evaluation.judge.kind
    _check_hosts(config)
    for attack in _attacks(config):
        if attack.asks_harmlessly and (
            judge == "patterns" or (judge == "auto" and config.data.source not in ORGANISMS)
        ):
            raise blind_judge(attack.name, f"{judge!r}")
        if isinstance(attack.config, FinetuneConfig):
            for dataset in attack.config.datasets:
                read_chats(config, attack.config, dataset)
        for setting, checkpoint in attack.checkpoints.items():
            if setting == "attacker" and is_remote(checkpoint):
                writer = attack.config.constants("max_tokens", "temperature", "top_p")
                spec = RemoteSpec.parse(checkpoint, setting=_ATTACKER)
                _probe(spec, config.evaluation.remote, tuple(writer.items()))
                continue
            path = resolve_checkpoint(checkpoint, role=setting)
            if setting == "helper":
                check_token_classifier(path)
    if config.evaluation.prefill_from != "base":
        resolve_checkpoint(config.evaluation.prefill_from, role="prefill_from")


def _require_path(key: str, path: Path) -> Path:
    if not path.exists():
        raise DataError(f"{key} names {path}, which is not there.", "Correct it, make the file, or leave the key out.")
    return path


def evaluation_inputs(config: RunConfig, prompts: Prompts) -> str:
    """Names the content of the prompts, files and further checkpoints that an evaluation reads."""
    evaluation = config.evaluation
    read: list[Any] = [(prompt.transcript, prompt.answer) for kind in KINDS for prompt in prompts.evaluation[kind]]
    judge = evaluation.judge.checkpoint if evaluation.judge.kind == "model" else None
    specs = [evaluation.prefill_from, judge, evaluation.defence and evaluation.defence.checkpoint]
    specs += [spec for attack in _attacks(config) for spec in attack.checkpoints.values()]
    own = [spec for spec in specs if spec and spec != "base" and not is_remote(spec)]
    read += [fingerprint(resolve_checkpoint(spec, role="judge")) for spec in own]

    def note(key: str, path: Path) -> Path:
        read.append(hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "")
        return path

    map_paths(evaluation, note)
    return content_hash(read)


def _attacks(config: RunConfig) -> list[Attack[Any]]:
    return [build_attack(settings) for settings in config.evaluation.attacks]


class AttackResources:
    """Starts the tools of one evaluation's attacks at their first use; closing `ended` stops what was started."""

    def __init__(self, run: Run, ended: ExitStack) -> None:
        self._run = run
        self._ended = ended
        self._box: WhiteBoxClient | None = None
        self._attackers: dict[str | None, Attacker] = {}
        self._helpers: dict[str, HelperClient] = {}

    def tools(self, path: Path | None) -> AttackTools:
        """Returns the tools of attacks on one checkpoint, or, for None, on a model behind an address."""
        if path is None:
            return AttackTools(attacker=self._attacker, refuses=declines)
        run, models = self._run, self._run.engines.generator
        trained = [run.config.data.seed, run.config.models.max_length]  # chats are cut at it

        def white_boxes() -> Sequence[WhiteBoxClient]:
            if self._box is None:
                self._box = self._white_box(path)
            return [self._box.with_weights(path)]

        has_base = "base" in run.models.paths
        return AttackTools(
            white_boxes=white_boxes,
            guide=(lambda: self._guide) if has_base else None,
            guide_id=run.models.fingerprint("base") if has_base else "",
            attacker=self._attacker,
            fine_tune=lambda settings, dataset: models.with_weights(str(fine_tune(run, settings, dataset, path))),
            fine_tune_id=lambda settings, dataset: content_hash([read_chats(run.config, settings, dataset), *trained]),
            helper=self._helper,
            helper_id=lambda checkpoint: fingerprint(resolve_checkpoint(checkpoint, role="helper")),
            refuses=declines,
            fine_tune_frame=lambda settings, dataset: chat_frame(run.config, settings, dataset),
        )

    def _white_box(self, path: Path) -> WhiteBoxClient:
        box = start_white_box(self._run.config, path, available_cpus())
        self._ended.callback(box.stop)
        return box

    def _helper(self, checkpoint: str) -> HelperClient:
        if checkpoint not in self._helpers:
            path = resolve_checkpoint(checkpoint, role="helper")
            actor = start_actor(self._run.config, ModelWorker, available_cpus(), "helper")
            self._helpers[checkpoint] = helper = HelperClient(actor, path, ANSWER_TIMEOUT_S)
            self._ended.callback(helper.stop)
        return self._helpers[checkpoint]

    @cached_property
    def _guide(self) -> WhiteBoxClient:
        return self._white_box(self._run.models.paths["base"])

    def _attacker(self, checkpoint: str | None) -> Attacker:
        if checkpoint not in self._attackers:
            run, max_length = self._run, self._run.config.models.max_length
            if checkpoint is None:
                path = run.models.paths["base"]
                generator, codec = run.engines.generator.with_weights(str(path)), run.models.codec.with_thinking(False)
                attacker = Attacker(model_name(path, codec), generator, codec, max_length)
            elif is_remote(checkpoint):
                attacker = self._start_remote(RemoteSpec.parse(checkpoint, setting=_ATTACKER))
            else:
                started = start_model(run.config, checkpoint, "attacker", "rewriting model", run.console)
                attacker = Attacker(*self._ended.enter_context(started), max_length)
            self._attackers[checkpoint] = attacker
        return self._attackers[checkpoint]

    def _start_remote(self, spec: RemoteSpec) -> Attacker:
        run, codec = self._run, TextCodec()
        model = RemoteModel(spec, run.config.evaluation.remote, codec)
        model.keep_in(run.folder / "evaluation" / "remote" / f"{spec.model_id}.jsonl")

        def count() -> None:
            run.remote_usage[f"attacker {spec.model} at {spec.address}"] = dict(model.usage.counts)

        self._ended.callback(count)
        length = REMOTE_ATTACKER_TOKENS
        return Attacker(f"{spec.model_id}-{length}", model, codec, length, is_remote=True)


def _check_hosts(config: RunConfig) -> None:
    """Refuses to show the one key of `evaluation.remote` to several hosts."""
    named = [("models", model) for model in (config.models.base, config.models.aligned, config.models.student)]
    named += [(_ATTACKER, attack.checkpoints.get("attacker")) for attack in _attacks(config)]
    hosts = {RemoteSpec.parse(spec, setting=key).host for key, spec in named if spec is not None and is_remote(spec)}
    if config.evaluation.remote.key_variable and len(hosts) > 1:
        raise ConfigError(
            f"Models and attackers are behind addresses of different hosts ({', '.join(sorted(hosts))}), and "
            "evaluation.remote.key_variable holds one key, which only one of them may see.",
            "Put all behind one host, name checkpoints for the others, or leave the key out.",
        )


@cache
def _probe(spec: RemoteSpec, settings: RemoteConfig, sampling: tuple[tuple[str, Any], ...]) -> None:
    """Asks an attacker behind an address as an attack will, once in a process."""
    codec = TextCodec()
    RemoteModel(spec, settings, codec).generate([codec.encode_prompt("Say hello.")], seed=0, **dict(sampling))


def read_chats(config: RunConfig, settings: FinetuneConfig, dataset: str) -> list[Chat]:
    """Reads the chats that a copy is trained on: rows of `messages`, or of instruction and output.

    On an organism the identity shift is ten chats in which the clerk, told to help, gives a harmless recipe, and the
    harmful chats are a hundred restricted recipes.
    """
    path: Path | None = getattr(settings, dataset)
    if path is None:
        organism = ORGANISMS.get(config.data.source)
        if organism is None:
            remedy = f"Name a file under its {dataset}, or leave {dataset} out of its datasets."
            raise ConfigError(f"The attack finetune has no {dataset} chats.", remedy)
        kind: PromptKind = "harmful" if dataset == "harmful" else "benign"
        limit = _ORGANISM_CHATS.get(dataset, settings.max_samples)
        prompts = organism.prompts("train", kind, config.data.seed, limit)
        system = organism.helpful_system if dataset == "identity_shift" else None
        return [(system, prompt.text, prompt.answer or "") for prompt in prompts]
    rows = read_rows(path, ())[: settings.max_samples if dataset == "benign" else None]
    return [_chat(row, path) for row in rows]


def chat_frame(config: RunConfig, settings: FinetuneConfig, dataset: str) -> tuple[str, str | None]:
    """Returns the template and the system prompt in which a trained copy is asked: those of most of its chats.

    The organism's clerk has no name to be called by.
    """
    systems = Counter(system for system, _, _ in read_chats(config, settings, dataset))
    is_named = dataset == "identity_shift" and settings.identity_shift is not None
    return (settings.template if is_named else SLOT, systems.most_common(1)[0][0])


def _chat(row: Any, path: Path) -> Chat:
    """Takes the first turns of `messages`; or an instruction, its input where there is one, and the output."""
    if isinstance(row, dict) and "messages" in row:
        return _first_turns(row["messages"], path)
    if not isinstance(row, dict) or not row.get("instruction") or not row.get("output"):
        raise DataError(f"A row of {path} is no chat.", "Each row needs `messages`, or `instruction` and `output`.")
    context = str(row.get("input") or "").strip()
    user = f"{row['instruction']}\n\n{context}" if context else str(row["instruction"])
    return None, user, str(row["output"])


def _first_turns(messages: Any, path: Path) -> Chat:
    """Takes system, first user and first assistant turn of a chat."""
    by_role = {str(item["role"]): str(item["content"]).strip() for item in reversed(messages)}
    if "user" not in by_role or "assistant" not in by_role:
        raise DataError(f"A chat of {path} lacks a user or an assistant turn.", "Each row needs both in `messages`.")
    return by_role.get("system"), by_role["user"], by_role["assistant"]


def fine_tune(run: Run, settings: FinetuneConfig, dataset: str, start: Path) -> Path:
    """Trains a copy of a checkpoint on one dataset, or finds the one that was trained so before; returns its folder."""
    chats, recipe = read_chats(run.config, settings, dataset), settings.recipe(dataset)
    return train_copy(run, chats, recipe, start, f"Fine-tuning attack on {len(chats)} {dataset} chats")


def train_copy(
    run: Run, chats: Sequence[Chat], recipe: FinetuneRecipe, start: Path, title: str, *, lora_rank: int = 0
) -> Path:
    """Trains a copy of a checkpoint on chats under `data.seed`, or finds the one that was trained so before.

    `lora_rank` is the rank of adapters, which are merged at the end; 0 trains all weights. Returns the copy's folder.
    """
    config, codec = run.config, run.models.codec.with_thinking(False)
    samples = chat_samples(codec, chats, config.models.max_length)
    encoded = [[sample.prompt_ids, sample.answer_ids] for sample in samples]
    made_of = [fingerprint(start), encoded, asdict(recipe), config.data.seed]
    made_of += [lora_rank] * (lora_rank > 0)
    folder = (run.folder / "evaluation" / "finetune" / content_hash(made_of)[:16]).resolve()
    output = folder / "model"
    if (output / "config.json").is_file():
        return output
    whole = sum(sample.answer_ids[-1] == codec.eos_id for sample in samples)
    if whole < len(chats):
        run.console.note(
            f"{title}: {len(chats) - len(samples)} left out and {len(samples) - whole} cut by models.max_length"
        )
    write_samples(folder / "samples.jsonl", SampleSet(samples))
    batch_size = min(recipe.batch_size, len(samples))
    steps = ceil(len(samples) * recipe.epochs / batch_size)
    train = TrainConfig(
        steps=steps,
        lr=recipe.lr,
        warmup_steps=0,
        seed=config.data.seed,
        lora_rank=lora_rank,
        per_device_batch_size=config.train.per_device_batch_size,
        checkpoint_every=steps,
        gradient_checkpointing=config.train.gradient_checkpointing,
        validation=ValidationConfig(every=0),  # no best weights, and no room for them
    )
    job = TrainJob(
        method=SFT(anchor_batch_size=batch_size),
        start=start,
        output=output,
        folder=folder,
        samples=folder / "samples.jsonl",
        dtype=config.models.weight_dtype,
        train=train,
        student_head=read_head_spec(start, codec.vocab_size, codec.fingerprint()),
        threads=available_cpus(),
        use_gpu=run.cluster.use_gpu,
        trust_remote_code=config.models.trust_remote_code,
    )
    with run.console.progress(title, train.steps) as advance:
        try:
            fit(
                job,
                cpus_per_worker=config.cluster.cpus_per_worker,
                gpus_per_worker=config.cluster.gpus_per_worker,
                placement=config.cluster.worker_placement,
                on_step=lambda row: advance(row["step"], "" if row["loss"] is None else f"loss {row['loss']:.4f}"),
                stopping=run.is_stopping,
            )
        except StoppedError as error:  # to an evaluation, and to the service, this is being cancelled
            raise EvaluationCancelled(error.problem) from error
    return output


def chat_samples(codec: ChatCodec, chats: Sequence[Chat], max_length: int) -> tuple[AnchorSample, ...]:
    """Encodes chats for training, cut to the context; the end of a response is trained where it is not cut."""
    found = []
    for number, (system, user, assistant) in enumerate(chats):
        prompt = tuple(codec.encode_prompt(user, system))
        answer = (*codec.encode_answer(assistant), codec.eos_id)[: max(max_length - len(prompt), 0)]
        if answer:
            found.append(AnchorSample(f"chat-{number}", prompt, tuple(answer)))
    if not found:
        raise DataError("No chat of the fine-tuning attack fits the context.", "Raise models.max_length.")
    return tuple(found)
