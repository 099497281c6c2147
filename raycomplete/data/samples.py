"""Training samples as token ids, and the file that hands them from sampling to training."""

from __future__ import annotations

import json
from collections.abc import Set
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from raycomplete.data.openings import num_common
from raycomplete.runtime.errors import DataError
from raycomplete.runtime.files import PRIVATE, write_text
from raycomplete.runtime.types import PromptKind

MID_ANSWER = "from mid-answer"  # end of the source of an h without its beginning
SUFFIXES = ("random suffix", "suffix")  # augmentations that put words behind the prompt
MAX_REFUSAL_PREFIX_TOKENS = 48  # a refusal prefix is read and scored in addition to the deepest cut of h


@dataclass(frozen=True, slots=True)
class _Sample:
    """A prompt; `sample_id` is its name and, where several samples were drawn, "#" and the number of the draw."""

    sample_id: str
    prompt_ids: tuple[int, ...]

    @property
    def prompt_id(self) -> str:
        """Name of the prompt, which all its draws share."""
        return self.sample_id.rsplit("#", 1)[0]


@dataclass(frozen=True, slots=True)
class AnchorSample(_Sample):
    """A prompt of any kind and the aligned model's own answer (in SFT: the answer to learn)."""

    answer_ids: tuple[int, ...]
    kind: PromptKind = "benign"
    complies: bool = False
    teacher_prompt_ids: tuple[int, ...] = ()
    augmentation: str = ""

    @property
    def kept_ids(self) -> tuple[int, ...]:
        """Tokens of the answer that training keeps."""
        return self.answer_ids[:1] if self.complies else self.answer_ids

    @property
    def plain_prompt_ids(self) -> tuple[int, ...]:
        """Tokens that the teachers read before the answer."""
        return self.teacher_prompt_ids or self.prompt_ids

    def augmented(self, kind: str, prompt_ids: tuple[int, ...]) -> AnchorSample:
        """The sample with another prompt for the student alone."""
        return replace(self, prompt_ids=prompt_ids, teacher_prompt_ids=self.plain_prompt_ids, augmentation=kind)


@dataclass(frozen=True, slots=True)
class RecoverySample(_Sample):
    """A harmful prompt, a compliant continuation h and the aligned model's refusal r."""

    teacher_prompt_ids: tuple[int, ...]
    harmful_ids: tuple[int, ...]
    refusal_ids: tuple[int, ...]
    refusal_prefix_tokens: int = 0
    source: str = ""
    augmentation: str = ""
    suffix: tuple[int, int] = (0, 0)

    @property
    def can_move_suffix(self) -> bool:
        """Tells whether its prompt has a suffix, and the beginning of h follows."""
        return self.suffix[1] > 0 and not self.refusal_prefix_tokens and not self.source.endswith(MID_ANSWER)

    def augmented(self, kind: str, prompt_ids: tuple[int, ...]) -> RecoverySample:
        """The sample with another prompt for the student alone."""
        suffix = (0, 0)
        if kind in SUFFIXES:
            start = num_common(self.prompt_ids, prompt_ids)
            end = len(prompt_ids) - num_common(self.prompt_ids[start:][::-1], prompt_ids[::-1])
            suffix = (start, end - start)
        return replace(self, prompt_ids=prompt_ids, augmentation=kind, suffix=suffix)


@dataclass(frozen=True, slots=True)
class SampleSet:
    """All samples of a run."""

    anchor: tuple[AnchorSample, ...]
    recovery: tuple[RecoverySample, ...] = ()
    profile: tuple[AnchorSample, ...] = ()
    held_back_anchor: tuple[AnchorSample, ...] = ()
    held_back_recovery: tuple[RecoverySample, ...] = ()
    held_back_greedy: tuple[AnchorSample, ...] = ()

    def without(self, prompt_ids: Set[str]) -> SampleSet:
        """Returns the set with the training samples of these prompts left out."""
        return replace(
            self,
            anchor=tuple(sample for sample in self.anchor if sample.prompt_id not in prompt_ids),
            recovery=tuple(sample for sample in self.recovery if sample.prompt_id not in prompt_ids),
        )


_PARTS = tuple(field.name for field in fields(SampleSet))


def write_samples(path: Path, samples: SampleSet) -> None:
    """Writes the samples atomically, readable by the owner only: they hold harmful continuations as token ids."""
    lines = [json.dumps({"part": part, **asdict(sample)}) for part in _PARTS for sample in getattr(samples, part)]
    write_text(path, "\n".join(lines) + "\n", mode=PRIVATE)


def read_samples(path: Path) -> SampleSet:
    """Reads what `write_samples` wrote."""
    if not path.is_file():
        raise DataError(f"The sample file {path} does not exist.", "Run again with --overwrite.")
    parts: dict[str, list[Any]] = {part: [] for part in _PARTS}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        part = row.pop("part")
        sample_class = RecoverySample if part.endswith("recovery") else AnchorSample
        values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in row.items()}
        parts[part].append(sample_class(**values))
    if not parts["anchor"]:
        raise DataError(f"The sample file {path} holds no training sample.", "Run again with --overwrite.")
    return SampleSet(**{part: tuple(found) for part, found in parts.items()})
