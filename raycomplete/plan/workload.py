"""What one optimizer step reads and writes, in sequences and tokens, from the run file."""

from __future__ import annotations

from dataclasses import dataclass

from raycomplete.config import RunConfig


@dataclass(frozen=True)
class Sequences:
    """Sequences of one kind.

    Attributes:
        count: How many.
        prompt: Tokens before the response.
        response: Tokens of the response.
    """

    count: float
    prompt: float
    response: float

    @property
    def length(self) -> float:
        """Tokens that a model reads: the last one predicts nothing that is asked for."""
        return self.prompt + self.response - 1

    @property
    def tokens(self) -> float:
        """Of all sequences."""
        return self.count * self.length

    @property
    def rows(self) -> float:
        """Response tokens of all sequences: a row of hidden states each."""
        return self.count * self.response


@dataclass(frozen=True)
class Workload:
    """One optimizer step over all workers.

    Attributes:
        trained: Sequences that the student reads.
        scored: Sequences that each frozen model reads, by role.
        rollouts: What the student samples: prompt with prefill, and new tokens; None off-policy.
        loss_rows: Rows of the loss.
        base_rows: Those of them that need base.
        micro_batches: Forward passes of one worker.
    """

    trained: tuple[Sequences, ...]
    scored: dict[str, tuple[Sequences, ...]]
    rollouts: Sequences | None
    loss_rows: float
    base_rows: float
    micro_batches: int

    @property
    def trained_tokens(self) -> float:
        """Tokens of the trained sequences, as metrics.jsonl counts them."""
        return sum(item.count * (item.prompt + item.response) for item in self.trained)

    def payload_rows(self, role: str) -> float:
        """Rows of hidden states that a frozen model sends."""
        return sum(item.rows for item in self.scored[role])

    @classmethod
    def of_run(cls, config: RunConfig, prompt_tokens: float, num_workers: int | None = None) -> Workload:
        """The expected step of a run file.

        Responses are taken at their longest and depths at the middle of their range.

        Args:
            config: Run file.
            prompt_tokens: Mean tokens of a prompt with its chat template.
            num_workers: Training workers; the run file's when absent.
        """
        train, rollout = config.train, config.rollout
        contrastive = train.contrastive.alpha > 0
        penalised = train.weights.penalty > 0
        deepest = min(train.depth.max, rollout.max_harmful_tokens)
        depth = (train.depth.min + deepest) / 2
        anchor = Sequences(train.anchor_batch, prompt_tokens, rollout.max_anchor_tokens)
        refusal = Sequences(train.recovery_batch, prompt_tokens, rollout.max_refusal_tokens)
        harmful = Sequences(train.recovery_batch, prompt_tokens, rollout.max_harmful_tokens)
        student = Sequences(train.recovery_batch, prompt_tokens, depth + rollout.max_refusal_tokens)
        along = (harmful,) if penalised else ()
        penalty_rows = train.recovery_batch * depth if penalised else 0.0
        rows = anchor.rows + refusal.rows + penalty_rows
        per_worker = (train.anchor_batch + train.recovery_batch) // (num_workers or train.num_workers)
        return cls(
            trained=(anchor, student),
            scored={
                "aligned": (anchor, refusal, *along),
                "base": (*along, *((anchor, refusal) if contrastive else ())),
            },
            rollouts=Sequences(
                train.recovery_batch * rollout.oversample, prompt_tokens + depth, rollout.max_student_tokens
            )
            if rollout.on_policy
            else None,
            loss_rows=rows,
            base_rows=rows if contrastive else penalty_rows,
            micro_batches=-(-per_worker // min(train.per_device_batch_size, max(per_worker, 1))) if per_worker else 1,
        )
