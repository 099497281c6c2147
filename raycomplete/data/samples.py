"""Training samples as token ids, and the file that holds them between the rollouts and the trainer."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from raycomplete.runtime.errors import DataError
from raycomplete.runtime.files import PRIVATE, write_text
from raycomplete.runtime.types import PromptKind

MAX_REFUSAL_PREFIX_TOKENS = 48  # tokens of a refusal prefix, at most: it is read and scored beside the deepest cut of h


@dataclass(frozen=True, slots=True)
class AnchorSample:
    """A prompt of any kind and the aligned model's own answer (in SFT: the answer to learn).

    Attributes:
        sample_id: Name of the prompt and of the draw.
        prompt_ids: Tokens up to where the response starts.
        answer_ids: Response tokens, end-of-response included where the answer ended by itself.
        kind: Of the prompt.
    """

    sample_id: str
    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    kind: PromptKind = "benign"


@dataclass(frozen=True, slots=True)
class RecoverySample:
    """A harmful prompt, a compliant continuation h and the aligned model's refusal r.

    Attributes:
        sample_id: Name of the prompt and of the draw.
        prompt_ids: What the student reads before h.
        teacher_prompt_ids: What the teacher reads before r; differs where only the teacher sees a safety prompt.
        harmful_ids: h, cut at the drawn depth when a batch is built.
        refusal_ids: r, end-of-response included where it ended by itself.
        refusal_prefix_tokens: How many tokens at the start of `harmful_ids` imitate a refusal and turn away from it; cuts are
            counted from after them.
    """

    sample_id: str
    prompt_ids: tuple[int, ...]
    teacher_prompt_ids: tuple[int, ...]
    harmful_ids: tuple[int, ...]
    refusal_ids: tuple[int, ...]
    refusal_prefix_tokens: int = 0


@dataclass(frozen=True, slots=True)
class SampleSet:
    """All samples of a run.

    Attributes:
        anchor: Trained in every run.
        recovery: Empty in SFT.
        profile: Held-out harmful prompts with continuations, read before and after training for the position profile.
        held_back_anchor: Of training prompts that are not trained but tell when to stop.
        held_back_recovery: The same for recovery.
    """

    anchor: tuple[AnchorSample, ...]
    recovery: tuple[RecoverySample, ...] = ()
    profile: tuple[AnchorSample, ...] = ()
    held_back_anchor: tuple[AnchorSample, ...] = ()
    held_back_recovery: tuple[RecoverySample, ...] = ()


_PARTS = tuple(field.name for field in fields(SampleSet))


def write_samples(path: Path, samples: SampleSet) -> None:
    """Writes the samples atomically, readable by the owner only: they hold harmful continuations as token ids."""
    lines = [json.dumps({"part": part, **asdict(sample)}) for part in _PARTS for sample in getattr(samples, part)]
    write_text(path, "\n".join(lines) + "\n", mode=PRIVATE)


def read_samples(path: Path) -> SampleSet:
    """Reads what `write_samples` wrote.

    Raises:
        DataError: The file is missing or holds no training sample.
    """
    if not path.is_file():
        raise DataError(f"The sample file {path} does not exist.", "Run again with --overwrite.")
    parts: dict[str, list[AnchorSample | RecoverySample]] = {part: [] for part in _PARTS}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        part = row.pop("part")
        kind = RecoverySample if part.endswith("recovery") else AnchorSample
        values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in row.items()}
        parts[part].append(kind(**values))
    if not parts["anchor"]:
        raise DataError(f"The sample file {path} holds no training sample.", "Run again with --overwrite.")
    return SampleSet(*(tuple(parts[name]) for name in _PARTS))  # type: ignore[arg-type]
