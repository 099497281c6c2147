"""Cost before an evaluation starts, and speed and time left by attack, from measured speeds only."""

from __future__ import annotations

import io
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from rich.console import Console as RichConsole

from raycomplete.attacks.registry import build_attack, parse_attack
from raycomplete.attacks.target import Target
from raycomplete.attacks.trial import Decoding, Progress, Trial, TrialCost
from raycomplete.config import EvaluationConfig
from raycomplete.evaluation.judges import RefusalJudge
from raycomplete.evaluation.pace import EvaluationPace
from raycomplete.evaluation.runner import Callbacks, EvaluationSets, evaluate_model
from raycomplete.runtime.console import Console, duration
from raycomplete.runtime.types import Prompt
from tests.attacks.scripted import COMPLY

TRIALS = [Trial("x", "x", Prompt(f"p{n}", "t", "harmful"), (1,), Decoding(100)) for n in range(10)]


@pytest.mark.parametrize(
    ("entry", "cost"),
    [
        ({"name": "templates"}, TrialCost(10, 1000)),
        ({"name": "gcg", "steps": 5, "search_width": 100}, TrialCost(10, 1000, 10 * (1 + 5 * 2), 10 * 5)),
        ({"name": "random_search", "queries": 100, "batch": 30}, TrialCost(10, 1000, 10 * (1 + 4))),
        ({"name": "pair", "streams": 1, "rounds": 3, "max_tokens": 50}, TrialCost(10, 3 * 10 * 150)),
        ({"name": "rank_assisted_prefill", "steps": 7}, TrialCost(10, 70, 14)),
        ({"name": "base_guided_decoding", "steps": 7}, TrialCost(10, 70, 14)),
        ({"name": "best_of_n", "samples": 9}, TrialCost(10, 9000)),
        ({"name": "soft_prompt", "steps": 4}, TrialCost(10, 1000, 1000, 40)),
    ],
)
def test_costs_are_upper_bounds(entry: dict[str, Any], cost: TrialCost) -> None:
    assert build_attack(parse_attack(entry)).cost(TRIALS) == cost


def test_nothing_is_estimated_before_it_was_measured() -> None:
    seconds = [0.0]
    pace = EvaluationPace(lambda: seconds[0])
    costs = {"prefill": TrialCost(10, 100), "templates": TrialCost(5, 100), "gcg": TrialCost(4, 40, 400, 40)}
    pace.start(costs, {"prefill": 2, "templates": 0, "gcg": 0})
    assert pace.table()[0] == ["", "trials", "tokens", "passes", "gradients"]
    assert pace.table()[3] == ["gcg", "4", "40", "400", "40"]
    assert pace.seconds_left("prefill") is None

    def done(attack: str, number: int, at: float) -> str:
        seconds[0] = at
        return pace.update(Progress("base", attack, "v", number, 21, 2))

    assert done("", 0, 1.0) == ""
    assert done("prefill", 2, 2.0) == "prefill 2/12", "stored trials are no speed"
    assert done("prefill", 7, 12.0) == "prefill 7/12, 0.5/s, 10 s left"
    assert done("prefill", 12, 22.0) == "prefill 12/12, 0.5/s"
    # 100 tokens took 20 s; what searches takes was never measured.
    assert pace.seconds_left("templates") == pytest.approx(20.0)
    assert pace.summary() == "about 20 s left, and gcg, not measured yet"
    done("templates", 17, 27.0)
    assert done("gcg", 18, 127.0) == "gcg 1/4, 0.01/s, 5 min left"
    # The next model starts with these speeds.
    pace.start(costs, {"prefill": 0, "templates": 5, "gcg": 0})
    table = pace.table()
    assert table[0][-1] == "time"
    assert [row[-1] for row in table[1:]] == ["20 s", "5 s", "7 min"]


def test_a_table_fits_eighty_columns() -> None:
    pace = EvaluationPace(lambda: 0.0)
    pace.start(
        {"rank_assisted_prefill": TrialCost(123_456, 98_765_432_100, 25_600_000, 50_000)}, {"rank_assisted_prefill": 0}
    )
    rows = [[*row, "time" if not number else "123.4 h"] for number, row in enumerate(pace.table())]
    assert rows[1] == ["rank_assisted_prefill", "123k", "98.8G", "25.6M", "50k", "123.4 h"]
    console, shown = Console(), io.StringIO()
    console.rich = RichConsole(file=shown, width=80)
    console.table("Evaluation of student: cost at most", rows)
    assert "rank_assisted_prefill" in shown.getvalue()
    assert max(map(len, shown.getvalue().splitlines())) <= 80
    assert (duration(89), duration(91), duration(5401)) == ("89 s", "2 min", "1.5 h")


def test_the_cost_of_what_is_missing_is_told_before_anything_is_generated(
    model: Any, codec: Any, sets: EvaluationSets, tmp_path: Path
) -> None:
    config = EvaluationConfig(depths=[0, 4], max_tokens=10, max_utility_tokens=12)
    seen: list[Any] = []

    def run(generator: Any) -> None:
        target = Target("student", "weights", generator, codec, RefusalJudge(), 128, 10)
        told = lambda costs, stored: seen.append((dict(costs), dict(stored), len(generator.calls)))  # noqa: E731
        evaluate_model(target, sets, config, tmp_path, Callbacks(on_plan=told))

    with pytest.raises(RuntimeError, match="died"):
        run(model(COMPLY, fail_at_call=1))
    run(model(COMPLY))
    assert seen[0] == (
        {"prefill": TrialCost(7, 70), "harmless": TrialCost(5, 3 * 12 + 2 * 10)},
        {"prefill": 0, "harmless": 0},
        0,
    )
    assert seen[1] == ({"prefill": TrialCost(3, 30), "harmless": TrialCost(5, 56)}, {"prefill": 4, "harmless": 0}, 0)


def test_without_a_terminal_a_line_comes_every_now_and_then() -> None:
    """As in a job whose output goes to a file; the real interval is 20 seconds."""
    console, shown = Console(every_s=0.02), io.StringIO()
    console.rich = RichConsole(file=shown, width=80)

    pause = Event()

    def wait_for(words: str) -> None:
        for _ in range(2000):
            if words in shown.getvalue():
                return
            pause.wait(0.01)
        raise AssertionError(shown.getvalue())

    with console.progress("Evaluation of base", 20, paced=True) as advance:
        advance(3, "gcg 1/4, 0.01/s, 5 min left")
        wait_for("Evaluation of base: 3 of 20, gcg 1/4, 0.01/s, 5 min left")
    with console.stage("Sampling"):
        wait_for("Sampling: at work for 0 s")
    ended = shown.getvalue()
    pause.wait(0.1)
    assert shown.getvalue() == ended, "the lines end with the block"
    assert Console()._every_s <= 30
