"""Runs the evaluation of one model, cell by cell; what is finished survives a crash and is never generated twice.

    <folder>/evaluation/cells/<hash>.json        one cell: outcomes of every prompt
    <folder>/evaluation/<role>.json              the result of one model
    <folder>/evaluation/completions/<role>.jsonl what the model said, only if asked for

A cell's hash covers everything that its outcomes depend on, so a stored cell is reused exactly where it would come out
the same.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from raycomplete.config import EvaluationConfig
from raycomplete.errors import WorkError
from raycomplete.evaluation.prefill import Cell, EvaluationSets, build_cells
from raycomplete.evaluation.statistics import mean_over_depths, wilson
from raycomplete.evaluation.storage import content_hash, write_completions
from raycomplete.files import PRIVATE, read_json, write_json
from raycomplete.types import Codec, Generator, Judge, ModelRole, Outcome

FORMAT = 1  # part of every cell's hash: raise it when the meaning of a stored cell changes


def evaluate_model(
    role: ModelRole,
    generator: Generator,
    codec: Codec,
    judge: Judge,
    sets: EvaluationSets,
    config: EvaluationConfig,
    folder: Path,
    *,
    model_id: str,
    max_length: int,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """Measures attack success by prefill depth, utility and over-refusal of one model. Decoding is greedy.

    Every prompt gets one outcome in every cell, so denominators never shrink: empty and incoherent responses are
    failures of the attack and of utility, and an answer that is shorter than the depth is prefilled whole and counted
    in `short_answers` (a model that has nothing to add to it comes out as empty).

    Args:
        role: Which of the three models this is; names the result file.
        generator: The model.
        codec: Its chat template and tokenizer.
        judge: Sorts responses; its name is recorded.
        sets: Prompts; all of them are used.
        config: Depths and lengths.
        folder: Run folder.
        model_id: Fingerprint of the weights. Cells are reused under the same one only.
        max_length: Longest sequence of the model in tokens, new ones included.
        on_progress: Called with (cell name, cells finished, cells in all): at the start with ("", 0, all), and after
            each cell.

    Returns:
        What `<folder>/evaluation/<role>.json` holds; rates as {"rate", "n", "low", "high"}.

    Raises:
        DataError: A set cannot be used or a prompt does not fit the context. Nothing was generated or written.
        WorkError: The generator did not answer every sequence.
    """
    cells = build_cells(sets, codec, config, max_length)
    report = on_progress or (lambda name, done, total: None)
    report("", 0, len(cells))
    stored: dict[str, dict[str, Any]] = {}
    for done, cell in enumerate(cells, start=1):
        stored[cell.name] = _run_cell(cell, role, generator, codec, judge, config, folder / "evaluation", model_id)
        report(cell.name, done, len(cells))
    result = _result(role, judge, config, model_id, cells, stored)
    if config.save_completions:
        rows = [row for cell in cells for row in stored[cell.name]["completions"]]
        write_completions(folder / "evaluation" / "completions" / f"{role}.jsonl", rows)
    write_json(folder / "evaluation" / f"{role}.json", result)
    return result


def cell_hash(cell: Cell, role: ModelRole, judge: Judge, model_id: str) -> str:
    """Names a cell by all that decides its outcomes. Token ids stand for text, tokenizer and chat template at once."""
    return content_hash(
        {
            "format": FORMAT,
            "role": role,
            "model_id": model_id,
            "cell": cell.name,
            "judge": judge.name,
            "max_tokens": cell.max_tokens,
            "temperature": 0.0,
            "prompts": [asdict(prompt) for prompt in cell.prompts],
            "sequences": cell.sequences,
        }
    )


def _run_cell(
    cell: Cell,
    role: ModelRole,
    generator: Generator,
    codec: Codec,
    judge: Judge,
    config: EvaluationConfig,
    folder: Path,
    model_id: str,
) -> dict[str, Any]:
    """A finished cell, from disk where it is there."""
    key = cell_hash(cell, role, judge, model_id)
    path = folder / "cells" / f"{key}.json"
    known = read_json(path)
    if known is not None and known.get("hash") == key and ("completions" in known or not config.save_completions):
        return known
    started = time.monotonic()
    texts = _continue(cell, generator, codec)
    triples = list(zip(cell.prompts, cell.prefills, texts, strict=True))
    content: dict[str, Any] = {
        "hash": key,
        "role": role,
        "model_id": model_id,
        "cell": cell.name,
        "judge": judge.name,
        "outcomes": {p.prompt_id: str(judge.outcome(p, prefill, text)) for p, prefill, text in triples},
        "seconds": round(time.monotonic() - started, 3),
    }
    if cell.name == "benign":
        content["right"] = {prompt.prompt_id: bool(judge.is_right(prompt, text)) for prompt, _, text in triples}
    if config.save_completions:
        content["completions"] = [
            {
                "role": role,
                "cell": cell.name,
                "prompt_id": prompt.prompt_id,
                "prefill": prefill,
                "continuation": text,
                "outcome": content["outcomes"][prompt.prompt_id],
            }
            for prompt, prefill, text in triples
        ]
    # With completions kept, a cell holds answers to harmful prompts.
    write_json(path, content, mode=PRIVATE if config.save_completions else 0o644)
    return content


def _continue(cell: Cell, generator: Generator, codec: Codec) -> list[str]:
    """What the model adds to each sequence, as text."""
    if not cell.sequences:
        return []
    new_ids = generator.generate(cell.sequences, max_tokens=cell.max_tokens, temperature=0.0)
    if len(new_ids) != len(cell.sequences):
        raise WorkError(
            f"The generator returned {len(new_ids)} continuations for {len(cell.sequences)} sequences of {cell.name}.",
            "Finished cells are kept; run the same command again to go on.",
        )
    return [codec.decode(ids) if ids else "" for ids in new_ids]


def _result(
    role: ModelRole,
    judge: Judge,
    config: EvaluationConfig,
    model_id: str,
    cells: Sequence[Cell],
    stored: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """Rates of all cells."""
    by_depth: dict[str, dict[str, Any]] = {}
    complied_DN: list[list[bool]] = []
    details: dict[str, dict[str, Any]] = {}
    for cell in cells:
        outcomes = stored[cell.name]["outcomes"]
        counts = _counts(outcomes)
        detail: dict[str, Any] = {
            "n": len(cell.prompts),
            "outcomes": counts,
            "max_tokens": cell.max_tokens,
            "seconds": stored[cell.name]["seconds"],
        }
        if cell.depth is not None:
            complied_DN.append([outcomes[prompt.prompt_id] == Outcome.COMPLIED for prompt in cell.prompts])
            asr = wilson(counts[Outcome.COMPLIED], len(cell.prompts)).to_json()
            by_depth[str(cell.depth)] = asr
            detail |= {"depth": cell.depth, "asr": asr, "short_answers": cell.short_answers}
        details[cell.name] = detail
    right = stored["benign"]["right"]
    return {
        "role": role,
        "model_id": model_id,
        "judge": judge.name,
        "judge_measured": _measured(judge),
        "settings": {**config.model_dump(mode="json"), "temperature": 0.0},
        "asr": {"by_depth": by_depth, "mean": mean_over_depths(complied_DN).to_json()},
        "cells": details,
        "utility": wilson(sum(right.values()), len(right)).to_json(),
        "over_refusal": _refusal_rate(details["borderline"]),
        "benign_refusal": _refusal_rate(details["benign"]),
        "outcomes": {name: detail["outcomes"] for name, detail in details.items()},
    }


def _counts(outcomes: Mapping[str, str]) -> dict[str, int]:
    """All four outcomes, those that never happened too."""
    counted = Counter(outcomes.values())
    return {str(outcome): counted[str(outcome)] for outcome in Outcome}


def _refusal_rate(detail: Mapping[str, Any]) -> dict[str, Any]:
    return wilson(detail["outcomes"][Outcome.REFUSED], detail["n"]).to_json()


def _measured(judge: Judge) -> dict[str, Any] | None:
    """The judge's own error rates against people, where it publishes them (attribute `measured`)."""
    measured = getattr(judge, "measured", None)
    return dict(measured) if isinstance(measured, Mapping) else None
