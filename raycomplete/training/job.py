"""The job of a training run: plain, picklable values, so that the same job runs on any node."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raycomplete.config import Dtype, RolloutConfig, TrainConfig
from raycomplete.data.heads import HeadSpec
from raycomplete.data.samples import MAX_REFUSAL_PREFIX_TOKENS
from raycomplete.methods.registry import Method
from raycomplete.runtime.types import Codec, Judge, Outcome, Prompt


@dataclass(frozen=True)
class ResponseJudge:
    """A judge that reads token ids: what the student writes on training prompts, in a training worker."""

    judge: Judge
    codec: Codec
    prompts: Mapping[str, Prompt]

    def outcome(self, prompt_id: str, prefill_ids: Sequence[int], answer_ids: Sequence[int]) -> Outcome:
        """Sorts an answer after a prefill; what follows an end-of-response is left out."""
        ends = (place for place, token in enumerate(answer_ids) if token in self.codec.eos_ids)
        text = self.codec.decode(answer_ids[: next(ends, len(answer_ids))])
        return self.judge.outcome(self.prompts[prompt_id], self.codec.decode(prefill_ids), text)


@dataclass(frozen=True)
class TrainJob:
    """One training run."""

    method: Method
    start: Path  # checkpoint that the student starts from
    output: Path
    folder: Path  # run folder: metrics, profile and checkpoints
    samples: Path  # written by `raycomplete.data.samples.write_samples`
    dtype: Dtype
    train: TrainConfig
    student_head: HeadSpec
    teacher_heads: dict[str, HeadSpec] = field(default_factory=dict)  # none where the method reads no teacher
    scorers: dict[str, Any] = field(default_factory=dict)  # `TeacherClient` by role, likewise
    prefetch: int = 2  # steps scored ahead
    threads: int = 1
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    student_engines: Any = None  # `StudentEngines`; None trains on the samples as drawn
    response_judge: ResponseJudge | None = None  # None measures nothing on held-back prompts
    plugins: tuple[Path, ...] = ()
    use_gpu: bool = False
    trust_remote_code: bool = False

    @property
    def metrics_file(self) -> Path:
        return self.folder / "metrics.jsonl"

    @property
    def failures_file(self) -> Path:
        """One JSON row a death of workers (`raycomplete.training.trainer`)."""
        return self.folder / "failures.jsonl"

    @property
    def stop_file(self) -> Path:
        """A file whose existence makes the workers finish their step, write a checkpoint and leave."""
        return self.folder / "stop"

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def newest_checkpoint(self) -> int:
        """Finished steps of the newest complete checkpoint; 0 where there is none."""
        names = (path.parent.name for path in self.checkpoints.glob("step-*/complete.json"))
        return max((int(name.removeprefix("step-")) for name in names), default=0)

    @property
    def best_checkpoint(self) -> Path:
        return self.folder / "best"

    @property
    def kept_step_file(self) -> Path:
        """JSON that names the step kept in the end, and why; absent where nothing was measured."""
        return self.folder / "kept_step.json"

    @property
    def rollouts_ahead(self) -> int:
        """Batches rolled out ahead of the trainer."""
        return self.rollout.ahead(fresh=self.method.needs_fresh_rollouts)

    @property
    def max_harmful_tokens(self) -> int:
        """Longest h that a step may train on: a refusal prefix, the deepest cut, on-policy what the student adds."""
        turn = MAX_REFUSAL_PREFIX_TOKENS if self.rollout.refusal_prefix_fraction > 0 else 0
        return turn + self.method.depth.max + (0 if self.student_engines is None else self.rollout.max_student_tokens)
