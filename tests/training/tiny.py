"""Tiny random models and samples for training tests, and scores of frozen models without an engine."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from raycomplete.config import TrainConfig
from raycomplete.data.chat import ChatCodec
from raycomplete.data.checkpoints import load_model, tensor_files
from raycomplete.data.heads import HeadSpec, load_head, read_head_spec
from raycomplete.data.organism.toy import build_tokenizer
from raycomplete.data.samples import AnchorSample, RecoverySample, SampleSet, read_samples, write_samples
from raycomplete.losses.heads import Head, HiddenStates
from raycomplete.losses.loss import LossInputs, LossOutput
from raycomplete.losses.reference import reference_loss
from raycomplete.losses.settings import LossSettings
from raycomplete.methods.completion import Completion, LossWeights
from raycomplete.methods.registry import DepthConfig, Method
from raycomplete.methods.sft import SFT
from raycomplete.runtime.types import Outcome, Prompt
from raycomplete.training.batches import BatchBuilder, MicroBatch, teacher_contexts
from raycomplete.training.job import ResponseJudge, TrainJob
from raycomplete.training.on_policy import Rollout, RolloutBatch, StudentEngines
from raycomplete.training.step_plan import StepPlan, StepSequences
from raycomplete.training.student import StudentModule
from raycomplete.training.teacher_prefetcher import TeacherPrefetcher

MIXTURES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 32},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
}


def make_model(folder: Path, seed: int, *, tied: bool = True, kind: str = "llama", **values: Any) -> Path:
    """A two-layer model with the organism's tokenizer, random weights under a seed."""
    tokenizer = build_tokenizer()
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        kind,
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        # Large enough that two seeds give distributions that differ by whole nats.
        initializer_range=0.3,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        **MIXTURES.get(kind, {}),
        **values,
    )
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(str(folder), safe_serialization=True)
    tokenizer.save_pretrained(str(folder))
    return folder


def head_spec(path: Path) -> HeadSpec:
    """Its head spec."""
    return read_head_spec(path, len(build_tokenizer()), "test")


def make_samples(seed: int, *, anchor: int = 10, recovery: int = 10) -> SampleSet:
    """Random token sequences of random lengths."""
    rng = np.random.default_rng(seed)

    def tokens(low: int, high: int) -> tuple[int, ...]:
        return tuple(int(token) for token in rng.integers(5, 90, rng.integers(low, high)))

    return SampleSet(
        anchor=tuple(AnchorSample(f"a{i}", tokens(3, 8), tokens(4, 12)) for i in range(anchor)),
        recovery=tuple(
            RecoverySample(f"r{i}", prompt := tokens(3, 8), prompt, tokens(10, 20), tokens(3, 9))
            for i in range(recovery)
        ),
        profile=tuple(AnchorSample(f"p{i}", tokens(3, 8), tokens(5, 10)) for i in range(3)),
        held_back_anchor=tuple(AnchorSample(f"v{i}", tokens(3, 8), tokens(4, 12)) for i in range(3)),
        held_back_recovery=tuple(
            RecoverySample(f"w{i}", prompt := tokens(3, 8), prompt, tokens(10, 20), tokens(3, 9)) for i in range(3)
        ),
        held_back_greedy=tuple(AnchorSample(f"v{i}", tokens(3, 8), tokens(4, 12)) for i in range(3)),
    )


class CountingJudge:
    """Sorts random words by their number, which is as good as any rule that depends on every token."""

    name = "counting"

    def outcome(self, prompt: Prompt, prefill: str, continuation: str) -> Outcome:
        return (Outcome.COMPLIED, Outcome.REFUSED, Outcome.INCOHERENT)[sum(map(ord, continuation)) % 3]

    def is_right(self, prompt: Prompt, continuation: str) -> bool:
        return False


def steered(job: TrainJob) -> TrainJob:
    """The same job with a judge for the held-back prompts."""
    samples = read_samples(job.samples)
    held = [*samples.held_back_recovery, *samples.held_back_greedy]
    prompts = {sample.prompt_id: Prompt(sample.prompt_id, "x", "harmful") for sample in held}
    codec = ChatCodec(job.folder / "aligned")
    return replace(job, response_judge=ResponseJudge(CountingJudge(), codec, prompts))


class LocalScores:
    """A frozen model read by transformers in the calling process (stands in for a `TeacherClient`)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._model: Any = None

    def submit_sequences(self, sequences: Sequence[tuple[tuple[int, ...], int]]) -> Any:
        return list(sequences)

    def warm_sequences(self, sequences: Sequence[tuple[tuple[int, ...], int]]) -> None:
        """Nothing runs ahead here."""

    def collect_tensors(self, reference: Any) -> list[torch.Tensor]:
        if self._model is None:
            self._model = load_model(self.path, "float32").base_model
        states = []
        with torch.no_grad():
            for tokens, num_prompt in reference:
                hidden_TH = self._model(torch.tensor([tokens[:-1]])).last_hidden_state[0]
                states.append(hidden_TH[num_prompt - 1 :].clone())
        return states


class LocalStudentEngines(StudentEngines):
    """The student as rollout engines would hold it, in the process of rank 0.

    Like the real engines it proves every update: what it says of the probe must be what the trainer says.

    Args:
        sends_until: First version that cannot be sent to them any more.
    """

    def __init__(self, start: Path, max_tokens: int, sends_until: int = 0) -> None:
        self.start, self.max_tokens = start, max_tokens
        self.version, self.sends_until = -1, sends_until
        self.is_sending = sends_until > 0
        self._model: Any = None

    def _stored(self, state: Mapping[str, Any], version: int, expected: Sequence[torch.Tensor]) -> dict[str, Any]:
        lora = self._train.lora_rank > 0
        self._model = load_model(self.start, "float32") if lora else self._loaded(state)
        own = dict(self._model.named_parameters())
        with torch.no_grad():
            for name, (a_RI, b_OR, scale) in state.items() if lora else ():
                own[name].add_(scale * b_OR @ a_RI)
        for (tokens, num_prompt), expected_T in zip(self._probe, expected, strict=True):
            logits_TV = self._model(torch.tensor([tokens])).logits[0, num_prompt - 1 : -1]
            log_probs_T = logits_TV.log_softmax(-1).gather(1, torch.tensor(tokens[num_prompt:])[:, None])[:, 0]
            torch.testing.assert_close(log_probs_T, expected_T, atol=1e-4, rtol=0)
        self.version = version
        return {"version": version, "mean_abs_difference": 0.0, "transfer": "store"}

    def _sent(
        self, state: Mapping[str, torch.Tensor], version: int, expected: Sequence[torch.Tensor]
    ) -> dict[str, Any] | None:
        if version >= self.sends_until:
            return None
        return self._stored(state, version, expected) | {"transfer": "nccl"}

    def _loaded(self, state: Mapping[str, Any]) -> Any:
        """The model of weights that come by the names of the checkpoint's files."""
        assert state.keys() == tensor_files(self.start).keys()
        with tempfile.TemporaryDirectory() as folder:
            shutil.copy(self.start / "config.json", folder)
            save_file(dict(state), f"{folder}/model.safetensors")
            return load_model(Path(folder), "float32")

    def submit(self, batch: RolloutBatch, seed: int) -> Any:
        """Answers at once, greedily; `seed` only makes answers differ between steps."""
        answers = []
        for index, sequence in enumerate(batch.sequences()):
            tokens = list(sequence)
            for _ in range(1 + (seed + index) % self.max_tokens):
                with torch.no_grad():
                    tokens.append(int(self._model(torch.tensor([tokens])).logits[0, -1].argmax()))
            refused = index < len(batch.recovery) and index % 2 == 0
            new = tuple(tokens[len(sequence) :])
            answers.append(Rollout(new, (1,) if index % 3 == 0 else (), refused, self.version))
        return answers

    def collect(self, reference: Any) -> list[Rollout]:
        return list(reference)


class FourBins(DepthConfig):
    """Few enough bins for short depths."""

    bins = 4


class CountedDepths(FourBins):
    """The depth sampler follows counts of compliance."""

    measure = "compliance"


def completion(**changes: Any) -> Completion:
    """The method with its opening, on steps of eight sequences."""
    sizes = {"anchor_batch_size": 4, "recovery_batch_size": 4, "depth": DepthConfig(min=1, max=16)}
    return Completion.model_validate({**sizes, "weights": LossWeights(opening=0.3), **changes})


def prefetcher_of(method: Method, sources: Mapping[str, Any]) -> TeacherPrefetcher:
    """Asks for what a method's rows read."""
    builder = BatchBuilder(method.loss(), 1.0)
    return TeacherPrefetcher(sources, partial(teacher_contexts, builder, method))


def build_batch(method: Method, plan: StepPlan, scores: Any, **options: Any) -> MicroBatch:
    """A whole step in one micro-batch."""
    step_sequences = StepSequences.of(plan, method)
    builder = BatchBuilder(method.loss(), **{"scale": 1.0, **options})
    return builder.build(step_sequences.micro_batches(0, 1, 1)[0], step_sequences.normalisers, scores)


class Engine:
    """As much of DeepSpeed's engine as a measurement needs."""

    device = torch.device("cpu")

    def __init__(self, module: StudentModule) -> None:
        self._module = module
        self.eval, self.train = module.eval, module.train

    def __call__(self, batch: Any, mode: str) -> Any:
        assert not self._module.training, "dropout would blur a measurement"
        return self._module(batch, mode)


def make_student(start: Path, settings: LossSettings, folder: Path) -> StudentModule:
    """The student module on a checkpoint, with the heads of `folder/base` and `folder/aligned`."""
    teachers = {role: load_head(head_spec(folder / role), dtype=torch.float32) for role in ("base", "aligned")}
    return StudentModule(load_model(start, "float32"), head_spec(start), teachers, settings, external_head=False)


def make_job(folder: Path, train: TrainConfig, method: Method | None = None, **values: Any) -> TrainJob:
    """A job on two tiny models; `folder/base` and `folder/aligned` are made where missing."""
    method = method or completion()
    for seed, role in enumerate(("base", "aligned")):
        if not (folder / role).exists():
            make_model(folder / role, seed, **values)
    samples = folder / "samples.jsonl"
    write_samples(samples, make_samples(0))
    scored = not isinstance(method, SFT)
    return TrainJob(
        method=method,
        start=folder / "base" if scored else folder / "aligned",
        output=folder / "student",
        folder=folder,
        samples=samples,
        dtype="float32",
        train=train,
        student_head=head_spec(folder / "base"),
        teacher_heads={role: head_spec(folder / role) for role in ("base", "aligned")} if scored else {},
        scorers={role: LocalScores(folder / role) for role in ("base", "aligned")} if scored else {},
    )


def plain_loss(job: TrainJob, batch: MicroBatch, settings: LossSettings) -> tuple[Any, LossOutput]:
    """The float64 reference of a batch in plain PyTorch: no DeepSpeed, no micro-batches, no chunks.

    Returns:
        The float64 student, whose parameters take the gradient, and its loss.
    """
    model = load_model(job.start, "float32").double()
    hidden_BTH = model.base_model(**batch.model_inputs()).last_hidden_state
    heads = {role: load_head(spec, dtype=torch.float64) for role, spec in job.teacher_heads.items()}
    assert batch.aligned_hidden_PH is not None
    base_PH = batch.base_hidden_PH
    inputs = LossInputs(
        HiddenStates(hidden_BTH.flatten(0, 1)[batch.row_N], Head(model.lm_head.weight)),
        HiddenStates(batch.aligned_hidden_PH.double(), heads["aligned"]),
        None if base_PH is None else HiddenStates(base_PH.double(), heads["base"]),
        batch.term_N,
        batch.weight_N.double(),
        batch.token_N,
    )
    return model, reference_loss(inputs, settings)
