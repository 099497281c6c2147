"""Lines of stages and progress where there is no terminal: one each, with rate and time left."""

from __future__ import annotations

import io
from itertools import pairwise
from threading import Event

import pytest
from rich.console import Console as RichConsole

from raycomplete.runtime.console import Console, ProgressPace, column_widths


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def paced(total: int, *updates: tuple[float, int], now: float = 0.0) -> str:
    """Makes updates (seconds since the start, done) and returns the text a while after the last."""
    clock = Clock()
    pace = ProgressPace(total, clock)
    for seconds, done in updates:
        clock.now = 100.0 + seconds
        pace.update(done)
    clock.now += now
    return pace.text()


@pytest.mark.parametrize(
    ("updates", "text"),
    [
        ([], ""),
        ([(20.0, 2)], "10 s each, 80 s left"),
        ([(5.0, 10)], "2/s, 0 s left"),
        ([(0.1, 5), (20.1, 6)], "20.1 s each, 80 s left"),  # a resumed run: what was there says nothing
        ([(0.1, 5)], ""),
        ([(10.0, 8), (12.0, 4), (22.0, 5)], "4.4 s each, 22 s left"),
    ],
)
def test_rate_and_time_left(updates: list[tuple[float, int]], text: str) -> None:
    assert paced(10, *updates) == text


def test_time_left_shrinks_while_nothing_is_finished() -> None:
    assert paced(10, (20.0, 2), now=30.0) == "10 s each, 50 s left"
    assert paced(10, (20.0, 2), now=300.0) == "10 s each, 0 s left"


def test_a_restart_counts_from_where_it_began_again() -> None:
    """Steps that are made again after a death are no progress of minus so many."""
    assert paced(10, (0.5, 6), (10.0, 4), (20.0, 6)) == "5 s each, 20 s left"


def test_work_without_a_known_end_has_a_rate() -> None:
    assert paced(0, (10.0, 20)) == "2/s"


def console_to(shown: io.StringIO, every_s: float = 0.02) -> Console:
    console = Console(every_s=every_s)
    console.rich = RichConsole(file=shown, width=80)
    return console


def test_a_long_line_stays_one_line_in_a_log() -> None:
    shown = io.StringIO()
    console_to(shown).note("word " * 60)
    assert shown.getvalue().count("\n") == 1


def test_a_stage_with_a_known_size_says_all_of_it() -> None:
    shown = io.StringIO()
    with console_to(shown).progress("Answers", 20) as advance:
        Event().wait(1.1)
        advance(5, "")
        for _ in range(500):
            if "Answers: 5 of 20, " in shown.getvalue():
                break
            Event().wait(0.01)
    assert "" not in shown.getvalue().splitlines(), "a bar that nobody sees leaves no empty line"
    line = next(line for line in shown.getvalue().splitlines() if "Answers: 5 of 20" in line)
    assert "/s, " in line
    assert line.endswith(" left")


def test_a_failed_stage_is_known_afterwards() -> None:
    console = Console(quiet=True)
    with console.stage("outer"):
        with console.stage("inner"):
            assert console.stage_title == "inner"
        assert console.stage_title == "outer"
    assert console.stage_title == ""
    with pytest.raises(KeyboardInterrupt), console.progress("sampling", 3):
        raise KeyboardInterrupt
    assert console.stage_title == "sampling"


def test_lines_come_at_their_interval() -> None:
    shown = io.StringIO()
    with console_to(shown, every_s=0.2).stage("Engines"):
        Event().wait(1.1)
    times = [float(line.split()[0]) for line in shown.getvalue().splitlines()]
    assert len(times) >= 4
    assert max(b - a for a, b in pairwise(times)) < 1.0


RATE = "100.0 % [96.3, 100.0]"
WIDE = [["", "base", "aligned", "student"], ["rank_assisted_prefill, worst of n", RATE, RATE, "12.0 % [7.0, 19.8]"]]


def test_a_table_breaks_between_words_only() -> None:
    shown = io.StringIO()
    console_to(shown).table("Attack success rate", WIDE)
    text = shown.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    for word in ("rank_assisted_prefill,", "worst of n", "[96.3,", "100.0]", "12.0 %"):
        assert word in text
    assert "\u2026" not in text


def test_a_table_whose_words_do_not_fit_side_by_side_becomes_lines() -> None:
    shown = io.StringIO()
    headings = ["", *(f"measurement_number_{number}" for number in range(5))]
    console_to(shown).table("Wide", [headings, ["rank_assisted_prefill", *["100.0"] * 5]])
    lines = shown.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0] == "Wide"
    assert all(any(heading in line for line in lines) for heading in headings)


def test_a_table_that_fits_is_as_wide_as_its_cells() -> None:
    assert column_widths([["", "base"], ["worst of n", "1"]], 80) == [10, 4]
    assert column_widths(WIDE, 400) == [33, 21, 21, 18]
