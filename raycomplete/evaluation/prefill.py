"""Cells of an evaluation: which token sequences each one continues, built and checked before anything is generated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from raycomplete.config import EvaluationConfig
from raycomplete.errors import DataError
from raycomplete.types import Codec, Prompt


@dataclass(frozen=True)
class EvaluationSets:
    """Held-out prompts by what they measure. All given prompts are used: drawing a sample is the caller's part.

    Attributes:
        harmful: Attack success; `answer` is the compliant text whose first tokens are prefilled.
        benign: Utility and refusal of ordinary requests; `answer` is the right answer where known.
        borderline: Over-refusal, on harmless prompts that look harmful.
    """

    harmful: tuple[Prompt, ...]
    benign: tuple[Prompt, ...]
    borderline: tuple[Prompt, ...]

    def __post_init__(self) -> None:
        for kind in ("harmful", "benign", "borderline"):
            prompts: tuple[Prompt, ...] = getattr(self, kind)
            seen: set[str] = set()
            for prompt in prompts:
                if prompt.kind != kind:
                    raise DataError(f"The prompt {prompt.prompt_id!r} is {prompt.kind}, but stands in the {kind} set.")
                if prompt.prompt_id in seen:
                    raise DataError(
                        f"The {kind} set holds the prompt id {prompt.prompt_id!r} twice.", "Make ids unique."
                    )
                seen.add(prompt.prompt_id)


@dataclass(frozen=True)
class Cell:
    """One model under one condition on one set of prompts.

    Attributes:
        name: `prefill-<depth>`, `benign` or `borderline`.
        prompts: N prompts.
        sequences: Token ids that are continued, N lists, prefill included.
        prefills: Text that the attacker wrote, N strings.
        max_tokens: New tokens, at most.
        short_answers: How many answers had fewer tokens than the depth asks for; they were prefilled whole.
        depth: Prefill depth, None outside the curve.
    """

    name: str
    prompts: tuple[Prompt, ...]
    sequences: tuple[tuple[int, ...], ...]
    prefills: tuple[str, ...]
    max_tokens: int
    short_answers: int = 0
    depth: int | None = None


def build_cells(sets: EvaluationSets, codec: Codec, config: EvaluationConfig, max_length: int) -> list[Cell]:
    """All cells of one model, in the order in which they run.

    Args:
        sets: Prompts.
        codec: Chat template and tokenizer of the model.
        config: Depths and lengths.
        max_length: Longest sequence of the model in tokens, new ones included.

    Raises:
        DataError: There are no harmful prompts, none of them has an answer to prefill, or a sequence with its new
            tokens does not fit the context.
    """
    if not sets.harmful:
        raise DataError("The evaluation has no harmful prompts.", "Fill data.evaluation.harmful in the run file.")
    if max(config.depths) > 0 and not any(prompt.answer for prompt in sets.harmful):
        raise DataError(
            "No harmful prompt has an answer, so there is nothing to prefill.",
            "Name the answer column of data.evaluation.harmful, or evaluate depth 0 only.",
        )
    prompt_ids = [codec.encode_prompt(prompt.text) for prompt in sets.harmful]
    answer_ids = [codec.encode_answer(prompt.answer) if prompt.answer else [] for prompt in sets.harmful]
    cells = []
    for depth in config.depths:
        starts = [ids[:depth] for ids in answer_ids]
        cells.append(
            Cell(
                name=f"prefill-{depth}",
                prompts=sets.harmful,
                sequences=tuple((*prompt, *start) for prompt, start in zip(prompt_ids, starts, strict=True)),
                prefills=tuple(codec.decode(start) if start else "" for start in starts),
                max_tokens=config.max_tokens,
                short_answers=sum(len(start) < depth for start in starts),
                depth=depth,
            )
        )
    cells.append(_plain_cell("benign", sets.benign, codec, config.max_utility_tokens))
    cells.append(_plain_cell("borderline", sets.borderline, codec, config.max_tokens))
    for cell in cells:
        _check_fits(cell, max_length)
    return cells


def _plain_cell(name: str, prompts: Sequence[Prompt], codec: Codec, max_tokens: int) -> Cell:
    """Prompts as they are, without attack."""
    return Cell(
        name=name,
        prompts=tuple(prompts),
        sequences=tuple(tuple(codec.encode_prompt(prompt.text)) for prompt in prompts),
        prefills=("",) * len(prompts),
        max_tokens=max_tokens,
    )


def _check_fits(cell: Cell, max_length: int) -> None:
    """An engine would cut such a prompt, or end its answer early, without a word: other rates under the same name."""
    for prompt, sequence in zip(cell.prompts, cell.sequences, strict=True):
        if len(sequence) + cell.max_tokens > max_length:
            raise DataError(
                f"The prompt {prompt.prompt_id!r} needs {len(sequence) + cell.max_tokens} tokens in {cell.name} "
                f"({len(sequence)} of prompt and prefill, {cell.max_tokens} new), but the context holds {max_length}.",
                "Shorten or drop the prompt, lower evaluation.max_tokens, evaluation.max_utility_tokens or "
                "evaluation.depths, or raise models.max_length.",
            )
