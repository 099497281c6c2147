"""Lines of stages and progress where there is no terminal: one each, with rate and time left."""

from __future__ import annotations

import io
from threading import Event

import pytest
from rich.console import Console as RichConsole

from raycomplete.runtime.console import Console


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


RATE = "100.0 % [96.3, 100.0]"
WIDE = [["", "base", "aligned", "student"], ["rank_assisted_prefill, worst of n", RATE, RATE, "12.0 % [7.0, 19.8]"]]
