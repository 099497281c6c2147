"""The terminal output of a run: stages, progress bars and the closing table."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import Event, Thread
from typing import Any

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

logger = logging.getLogger(__name__)

_AT_ONCE_S = 1.0

Advance = Callable[[int, str], None]


class Pace:
    """Rate and time left of work; `total` is 0 where it is not known."""

    def __init__(self, total: int) -> None:
        self._total, self.done = total, 0
        self._since, self._before = time.monotonic(), 0

    def update(self, done: int) -> None:
        # What a resumed run has already comes at once and says nothing of the rate; a restart makes steps again.
        if done < self.done or time.monotonic() - self._since < _AT_ONCE_S:
            self._since, self._before = time.monotonic(), done
        self.done = done

    def text(self) -> str:
        """Says how fast it goes and how long the rest takes; empty before that can be told."""
        if self.done <= self._before:
            return ""
        each = (time.monotonic() - self._since) / (self.done - self._before)
        rate = f"{1 / each:.3g}/s" if each < 1 else f"{each:.3g} s each"
        return f"{rate}, {duration(each * (self._total - self.done))} left" if self._total else rate


def duration(seconds: float) -> str:
    """Formats a time in its largest unit."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


class Console:
    """Prints to a rich console. Where there is no terminal, a line every `every_s` seconds stands for spinner and bar.

    `stage_title` names the stage at work, or the one that an error or a signal ended.
    """

    def __init__(self, *, quiet: bool = False, every_s: float = 20.0) -> None:
        self.rich = RichConsole(quiet=quiet)
        self._every_s = every_s
        self._started = time.perf_counter()
        self.stage_title = ""

    def note(self, text: str) -> None:
        """Prints one line with the time since the start, and logs it."""
        line = f"[dim]{time.perf_counter() - self._started:6.1f} s[/dim]  {text}"
        self.rich.print(line, highlight=False, soft_wrap=not self.rich.is_terminal)  # a log has one line for each
        logger.info("%s", Text.from_markup(text))

    @contextmanager
    def stage(self, title: str) -> Iterator[None]:
        """Shows a spinner while the block runs, then one line with its duration."""
        started = time.perf_counter()

        def line() -> str:
            return f"{title}: at work for {duration(time.perf_counter() - started)}"

        with self.rich.status(f"{title} ..."), self._lines(title, line):
            yield

    @contextmanager
    def progress(self, title: str, total: int, *, paced: bool = False) -> Iterator[Advance]:
        """Shows a bar while the block runs; call the yielded function with (done, remark).

        `paced` remarks tell rate and time left by themselves.
        """
        pace = Pace(total)
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=10),  # the remark needs the room of 80 columns
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("[dim]{task.fields[remark]}[/dim]"),
        )
        with Progress(*columns, console=self.rich, transient=True, disable=not self.rich.is_terminal) as bar:
            task = bar.add_task(title, total=total, remark="")

            def advance(done: int, remark: str) -> None:
                pace.update(done)
                bar.update(task, completed=done, remark=remark)

            def line() -> str:
                of = f" of {total}" if total else ""  # a stream has no end that is known
                parts = [f"{pace.done}{of}", "" if paced else pace.text(), bar.tasks[0].fields["remark"]]
                return f"{title}: {', '.join(filter(None, parts))}"

            with self._lines(title, line):
                yield advance

    @contextmanager
    def _lines(self, title: str, line: Callable[[], str]) -> Iterator[None]:
        """Names the stage, prints a line now and then where no terminal shows it, and one with its duration."""
        outer, self.stage_title = self.stage_title, title
        started, ended = time.perf_counter(), Event()

        def say() -> None:
            while not ended.wait(self._every_s):
                self.note(line())

        thread = Thread(target=say, daemon=True)
        if not self.rich.is_terminal:
            thread.start()
        try:
            yield
        finally:
            ended.set()
            if thread.is_alive():
                thread.join()
        self.stage_title = outer  # not where it failed: the message names the stage
        self.note(f"{title} [dim]({time.perf_counter() - started:.1f} s)[/dim]")

    def table(self, title: str, rows: Sequence[Sequence[str]]) -> None:
        """Prints a table whose first row holds the headings."""
        table = Table(title=title, title_justify="left")
        for index, heading in enumerate(rows[0]):
            table.add_column(heading, justify="right" if index else "left", overflow="fold")
        for row in rows[1:]:
            table.add_row(*row)
        self.rich.print(table)

    def panel(self, lines: Sequence[tuple[str, Any]]) -> None:
        """Prints aligned name and value pairs."""
        print_details(self.rich, lines)


def print_details(console: RichConsole, lines: Sequence[tuple[str, Any]]) -> None:
    """Prints aligned name and value pairs as they are: no markup, and no line break within a value."""
    width = max((len(name) for name, _ in lines), default=0)
    for name, value in lines:
        console.print(f"  {name:<{width}}  {value}", highlight=False, markup=False, soft_wrap=True)
