"""The model under attack, and what an attack may use besides asking it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from raycomplete.attacks.settings import FinetuneAttack
from raycomplete.attacks.trial import Decoding, EvaluationCancelled, Trial
from raycomplete.attacks.white_box import WhiteBox
from raycomplete.runtime.errors import DataError, SetupError
from raycomplete.runtime.types import Codec, Generator, Judge


@dataclass(frozen=True)
class Attacker:
    """A local model that rewrites prompts.

    Attributes:
        attacker_id: Fingerprint of its weights.
        generator: The model.
        codec: Its tokenizer and chat template.
        max_length: Longest sequence that it reads, new tokens included.
    """

    attacker_id: str
    generator: Generator
    codec: Codec
    max_length: int


@dataclass(frozen=True)
class AttackTools:
    """What some attacks need besides a generator. Those that are missing make these attacks refuse to start.

    Attributes:
        white_boxes: Starts copies of the target with gradients and full distributions; searches share them.
        guide: Starts the model that a rank-assisted prefill follows (base).
        guide_id: Fingerprint of its weights.
        attacker: The rewriting model of PAIR.
        fine_tune: Trains a copy of the target on a dataset and returns it.
        fine_tune_ids: By dataset, a name of all that the training depends on besides the target and the settings.
    """

    white_boxes: Callable[[], Sequence[WhiteBox]] | None = None
    guide: Callable[[], WhiteBox] | None = None
    guide_id: str = ""
    attacker: Attacker | None = None
    fine_tune: Callable[[FinetuneAttack, str], Generator] | None = None
    fine_tune_ids: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Target:
    """The model under attack.

    Attributes:
        role: base, aligned or student.
        model_id: Fingerprint of its weights.
        generator: Asks it.
        codec: Its tokenizer and chat template.
        judge: Sorts responses; attacks with feedback ask it too.
        max_length: Longest sequence in tokens, new ones included.
        max_tokens: New tokens of a response to a harmful prompt.
        tools: See there.
        cancelled: Whether someone asked to stop.
    """

    role: str
    model_id: str
    generator: Generator
    codec: Codec
    judge: Judge
    max_length: int
    max_tokens: int
    tools: AttackTools = field(default_factory=AttackTools)
    cancelled: Callable[[], bool] = lambda: False

    def stop_if_cancelled(self) -> None:
        """Raises EvaluationCancelled where someone asked to stop."""
        if self.cancelled():
            raise EvaluationCancelled

    def white_boxes(self, attack: str) -> Sequence[WhiteBox]:
        """Copies with gradients and full distributions; at least one."""
        if self.tools.white_boxes is None:
            raise SetupError(f"The attack {attack} needs the weights of the model.", "Run it by raycomplete evaluate.")
        return self.tools.white_boxes()

    def draw(self, sequences: Sequence[Sequence[int]], decoding: Decoding, seed: int | None) -> list[list[int]]:
        """Continues sequences; generators know no top-k, so that a white box samples with it."""
        self.stop_if_cancelled()
        if decoding.top_k:
            box = self.white_boxes("decoding")[0]
            return box.sample(sequences, decoding, seed=seed or 0, stop_ids=self.codec.eos_ids)
        return self.generator.generate(
            sequences,
            max_tokens=decoding.max_tokens,
            temperature=decoding.temperature,
            top_p=decoding.top_p,
            seed=seed if decoding.temperature > 0 else None,
        )


def check_fits(trials: Sequence[Trial], max_length: int) -> None:
    """An engine would cut such a prompt, or end its answer early, without a word: other rates under the same name.

    Raises:
        DataError: A sequence with its new tokens does not fit the context.
    """
    for trial in trials:
        new = trial.decoding.max_tokens
        if len(trial.sequence) + new > max_length:
            raise DataError(
                f"The prompt {trial.prompt.prompt_id!r} needs {len(trial.sequence) + new} tokens in {trial.variant} "
                f"({len(trial.sequence)} of prompt and prefill, {new} new), but the context holds {max_length}.",
                "Shorten or drop the prompt, lower evaluation.max_tokens, evaluation.max_utility_tokens or "
                "evaluation.depths, or raise models.max_length.",
            )
