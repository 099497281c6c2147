"""A sampling that is interrupted asks for no finished piece again, and cuts its pieces as if it had not been."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from raycomplete.engines.generation_cache import SAMPLING_FILE, CachedGenerator, sampled_from
from raycomplete.runtime.console import Console

PROMPTS = [[number, 1, 2] for number in range(10)]
SAMPLED = {"max_tokens": 8, "temperature": 1.0, "top_p": 0.9}


class Engines:
    """Answers a sequence by itself, its seed and the batch that it is in, as rounding does; dies at a given call."""

    side_by_side = 4

    def __init__(self, path: str = "aligned", dies_at: int = 99, stop_ids: tuple[int, ...] = (1,)) -> None:
        self.path, self.dies_at, self.stop_ids = path, dies_at, list(stop_ids)
        self.asked: list[int] = []  # first tokens of what was answered

    def with_weights(self, path: str) -> Engines:
        self.path = path
        return self

    def submit(self, sequences: Sequence[Sequence[int]], *, seed: int | None = None, **sampling: Any) -> Any:
        return sequences, seed

    def collect(self, call: Any) -> list[tuple[list[int], bool]]:
        sequences, seed = call
        self.dies_at -= 1
        if self.dies_at < 0:
            raise KeyboardInterrupt
        self.asked += [sequence[0] for sequence in sequences]
        batch = sum(sequence[0] for sequence in sequences)
        found = [
            ([*sequence, -1 if seed is None else seed + i, batch], i % 2 == 0) for i, sequence in enumerate(sequences)
        ]
        return [(tokens[:0] if tokens[0] == 3 else tokens, finished) for tokens, finished in found]


def answers(engines: Any, path: Path, prompts: Any = PROMPTS, seed: int | None = 70, **options: Any) -> Any:
    return CachedGenerator(engines, path).generate_finished(prompts, seed=seed, **SAMPLED | options)


def test_an_interrupted_sampling_goes_on_where_it_stopped(tmp_path: Path) -> None:
    calm = answers(Engines(), tmp_path / "calm")
    assert [tokens[3] for tokens, _ in calm if tokens] == [70, 71, 72, 74, 75, 76, 77, 78, 79], "seeds by place"
    stopped, resumed = Engines(dies_at=2), Engines()
    with pytest.raises(KeyboardInterrupt):
        answers(stopped, tmp_path / "kept")
    assert answers(resumed, tmp_path / "kept") == calm
    assert stopped.asked + resumed.asked == list(range(10)), "nothing twice"
    again = Engines()
    assert answers(again, tmp_path / "kept") == calm
    assert again.asked == []


@pytest.mark.parametrize("change", [{"seed": 71}, {"seed": None}, {"temperature": 0.5}, {"max_tokens": 9}])
def test_other_questions_have_other_answers(change: dict[str, Any], tmp_path: Path) -> None:
    answers(Engines(), tmp_path / "kept")
    other = Engines()
    answers(other, tmp_path / "kept", **change)
    assert other.asked == list(range(10))


def test_other_weights_and_prompts_are_asked_anew(tmp_path: Path) -> None:
    answers(Engines(), tmp_path / "kept")
    other, changed = Engines("base"), Engines()
    answers(other, tmp_path / "kept")
    assert other.asked == list(range(10))
    longer = Engines(stop_ids=(1, 7))
    answers(longer, tmp_path / "kept")
    assert longer.asked == list(range(10)), "answers end at other tokens"
    answers(changed, tmp_path / "kept", [*PROMPTS[:5], [99], *PROMPTS[6:]])
    assert changed.asked == [4, 99, 6, 7], "the piece of the changed prompt alone"


def test_progress_is_told_and_only_the_owner_reads(tmp_path: Path) -> None:
    told: list[int] = []
    CachedGenerator(Engines(), tmp_path / "kept", told.append).generate(PROMPTS, max_tokens=8)  # type: ignore[arg-type]
    assert told == [4, 8, 10]
    assert (tmp_path / "kept").stat().st_mode & 0o777 == 0o600


def test_a_run_keeps_what_its_engines_say(tmp_path: Path) -> None:
    run: Any = SimpleNamespace(
        folder=tmp_path, console=Console(quiet=True), engines=SimpleNamespace(generator=Engines("another"))
    )
    with sampled_from(run, Path("base"), "Answers of base", 10) as base:
        found = base.generate(PROMPTS, max_tokens=8)
    rows = [json.loads(line) for line in (tmp_path / SAMPLING_FILE).read_text().splitlines()]
    assert [tokens for row in rows for tokens, _ in row["answers"]] == found
    assert run.engines.generator.path == "base"
