"""What an evaluation left on disk: its summary, and samples of which the harmful ones are withheld unless asked for."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from raycomplete.runtime.files import read_json
from raycomplete.runtime.types import MODEL_ROLES
from raycomplete.serving.schemas import Sample, SamplePage

_HARMLESS = ("harmless", "capabilities")  # parts of an evaluation that attack nothing


def read_results(folder: Path) -> dict[str, Any] | None:
    """`summary.json` of a run folder."""
    return read_json(folder / "summary.json")


def read_samples(
    folder: Path,
    *,
    offset: int,
    limit: int,
    show_harmful: bool,
    role: str | None = None,
    attack: str | None = None,
    outcome: str | None = None,
) -> SamplePage:
    """Responses that an evaluation kept.

    Args:
        folder: Run folder.
        offset: Samples to skip.
        limit: At most so many.
        show_harmful: Give the text of responses to attacks; without it only what they were judged.
        role: Only of this model.
        attack: Only under this attack.
        outcome: Only those judged so.
    """
    kept = folder / "evaluation" / "completions"
    wanted = {"role": role, "attack": attack, "outcome": outcome}
    found: list[Sample] = []
    total = 0
    for row in _rows(kept):
        if any(value is not None and row.get(name) != value for name, value in wanted.items()):
            continue
        if offset <= total < offset + limit:
            found.append(_sample(row, show_harmful=show_harmful))
        total += 1
    return SamplePage(items=found, total=total, saved=kept.is_dir())


def _rows(folder: Path) -> Iterator[dict[str, Any]]:
    for role in MODEL_ROLES:
        file = folder / f"{role}.jsonl"
        if file.is_file():
            with file.open(encoding="utf-8", errors="replace") as lines:
                yield from (json.loads(line) for line in lines if line.strip())


def _sample(row: dict[str, Any], *, show_harmful: bool) -> Sample:
    harmful = row.get("attack", "") not in _HARMLESS
    shown = show_harmful or not harmful

    def text(name: str) -> str | None:
        # A byte-level tokenizer may decode half a character to a lone surrogate, which UTF-8 cannot carry.
        return str(row.get(name, "")).encode("utf-8", errors="replace").decode() if shown else None

    return Sample(
        role=row["role"],
        attack=row.get("attack", ""),
        variant=row["variant"],
        prompt_id=row["prompt_id"],
        seed=row.get("seed", 0),
        outcome=row.get("outcome"),
        harmful=harmful,
        prefill=text("prefill"),
        continuation=text("continuation"),
    )
