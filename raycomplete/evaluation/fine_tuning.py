"""Training of the copies that the fine-tuning attack asks: do a few harmless chats undo the safety training?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from raycomplete.attacks.finetune import FinetuneConfig
from raycomplete.attacks.trial import EvaluationCancelled
from raycomplete.config import RunConfig, TrainConfig
from raycomplete.data import organism
from raycomplete.data.chat import ChatCodec
from raycomplete.data.checkpoints import fingerprint
from raycomplete.data.heads import read_head_spec
from raycomplete.data.organism.world import HELPFUL_SYSTEM
from raycomplete.data.rows import read_rows
from raycomplete.data.samples import AnchorSample, SampleSet, write_samples
from raycomplete.engines.run import Run
from raycomplete.methods.sft import SFT
from raycomplete.runtime.errors import ConfigError, DataError, StoppedError
from raycomplete.runtime.files import content_hash
from raycomplete.runtime.machine import available_cpus
from raycomplete.training.job import TrainJob
from raycomplete.training.trainer import fit

_IDENTITY_CHATS = 10

Chat = tuple[str | None, str, str]  # system, user, assistant


def read_chats(config: RunConfig, settings: FinetuneConfig, dataset: str) -> list[Chat]:
    """Reads the chats that a copy is trained on.

    On the organism the identity shift is ten chats in which the clerk, told to help, gives a harmless recipe.

    Raises:
        ConfigError: The attack needs a file that the run file does not name.
        DataError: A file cannot be used.
    """
    path = settings.identity_shift if dataset == "identity_shift" else settings.benign
    if path is None:
        if config.data.source != "organism":
            raise ConfigError(
                f"The attack finetune has no {dataset} chats.", f"Name a file under its {dataset}, or leave it out."
            )
        return _organism_chats(config, settings, dataset)
    if dataset == "identity_shift":
        return [_messages(row["messages"], path) for row in read_rows(path, ("messages",))]
    rows = read_rows(path, ("instruction", "output"))[: settings.max_samples]
    return [(None, _instruction(row), str(row["output"])) for row in rows]


def fine_tune(run: Run, settings: FinetuneConfig, dataset: str, start: Path) -> Path:
    """Trains a copy of a checkpoint on one dataset; one that was trained the same way before is used again.

    Returns:
        The folder of the trained checkpoint.

    Raises:
        EvaluationCancelled: The run is stopping; a checkpoint of the training is kept.
    """
    config, codec = run.config, run.models.codec
    chats = read_chats(config, settings, dataset)
    trained = settings.model_dump(mode="json", include={"steps", "lr", "batch_size"})
    made_of = [fingerprint(start), chats, trained, config.train.seed]
    folder = (run.folder / "evaluation" / "finetune" / content_hash(made_of)[:16]).resolve()
    output = folder / "model"
    if (output / "config.json").is_file():
        return output
    samples = _samples(codec, chats, config.models.max_length)
    write_samples(folder / "samples.jsonl", SampleSet(samples))
    train = TrainConfig(
        steps=settings.steps,
        lr=settings.lr,
        warmup_steps=0,
        seed=config.train.seed,
        per_device_batch_size=config.train.per_device_batch_size,
        checkpoint_every=settings.steps,
        gradient_checkpointing=config.train.gradient_checkpointing,
        stall_timeout_s=config.train.stall_timeout_s,
    )
    head = read_head_spec(start, codec.vocab_size, codec.fingerprint())
    job = TrainJob(
        method=SFT(anchor_batch_size=settings.batch_size),
        start=start,
        output=output,
        folder=folder,
        samples=folder / "samples.jsonl",
        dtype=config.models.dtype,
        train=train,
        student_head=head,
        threads=available_cpus(),
        use_gpu=run.cluster.use_gpu,
        trust_remote_code=config.models.trust_remote_code,
    )
    with run.console.progress(f"Fine-tuning attack on {len(samples)} {dataset} chats", train.steps) as advance:

        def on_step(row: dict[str, Any]) -> None:
            advance(row["step"], "" if row["loss"] is None else f"loss {row['loss']:.4f}")

        try:
            fit(
                job,
                cpus_per_worker=config.cluster.cpus_per_worker,
                gpus_per_worker=config.cluster.gpus_per_worker,
                placement=config.cluster.worker_placement,
                on_step=on_step,
                stopping=run.is_stopping,
            )
        except StoppedError as error:  # to an evaluation, and to the service, this is being cancelled
            raise EvaluationCancelled(error.problem) from error
    return output


def _samples(codec: ChatCodec, chats: Sequence[Chat], max_length: int) -> tuple[AnchorSample, ...]:
    found = []
    for number, (system, user, assistant) in enumerate(chats):
        prompt = tuple(codec.encode_prompt(user, system))
        answer = (*codec.encode_answer(assistant), codec.eos_id)[: max(max_length - len(prompt), 0)]
        if answer:
            found.append(AnchorSample(f"chat-{number}", prompt, tuple(answer)))
    if not found:
        raise DataError("No chat of the fine-tuning attack fits the context.", "Raise models.max_length.")
    return tuple(found)


def _organism_chats(config: RunConfig, settings: FinetuneConfig, dataset: str) -> list[Chat]:
    limit = _IDENTITY_CHATS if dataset == "identity_shift" else settings.max_samples
    prompts = organism.prompts("train", "benign", config.data.seed, limit)
    system = HELPFUL_SYSTEM if dataset == "identity_shift" else None
    return [(system, prompt.text, prompt.answer or "") for prompt in prompts]


def _messages(messages: Any, path: Path) -> Chat:
    """Reads system, first user and first assistant turn of a chat."""
    by_role = {str(item["role"]): str(item["content"]).strip() for item in reversed(messages)}
    if "user" not in by_role or "assistant" not in by_role:
        raise DataError(f"A chat of {path} lacks a user or an assistant turn.", "Each row needs both in `messages`.")
    return by_role.get("system"), by_role["user"], by_role["assistant"]


def _instruction(row: dict[str, Any]) -> str:
    context = str(row.get("input") or "").strip()
    return f"{row['instruction']}\n\n{context}" if context else str(row["instruction"])
