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


class ProgressPace:
    """Rate and time left of work of which a known number is to be done.

    Args:
        total: How much is to be done; 0 where that is not known.
        clock: Returns seconds.

    Attributes:
        done: How much is done.
    """

    def __init__(self, total: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._total, self._clock = total, clock
        self._since, self._last = (clock(), 0), clock()
        self.done = 0

    def update(self, done: int) -> None:
        """Takes in how much is done now."""
        now = self._clock()
        # What a resumed run has already comes at once and says nothing of the rate; a restart makes steps again.
        if done < self._since[1]:
            self._since = (now, done)
        elif now - self._since[0] < _AT_ONCE_S:
            self._since = (self._since[0], done)
        self._last, self.done = now, done

    def text(self) -> str:
        """Says how fast it goes and how long the rest takes; empty before that can be told."""
        since, before = self._since
        if self.done <= before:
            return ""
        each = (self._last - since) / (self.done - before)
        rate = f"{1 / each:.3g}/s" if each < 1 else f"{each:.3g} s each"
        left = each * (self._total - self.done) - (self._clock() - self._last)
        return f"{rate}, {duration(max(left, 0.0))} left" if self._total else rate


def duration(seconds: float) -> str:
    """Formats a time in its largest unit."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


class Console:
    """Prints to a rich console; quiet in tests. Where there is no terminal, lines stand for spinners and bars.

    Args:
        quiet: Prints nothing.
        every_s: Seconds between two such lines, at most.
    """

    def __init__(self, *, quiet: bool = False, every_s: float = 20.0) -> None:
        self.rich = RichConsole(quiet=quiet)
        self._every_s = every_s
        self._started = time.perf_counter()
        self.stage_title = ""
        """The stage at work, or the one that an error or a signal ended."""

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

        with self._named(title), self.rich.status(f"{title} ..."), self._lines(line):
            yield
        self.note(f"{title} [dim]({time.perf_counter() - started:.1f} s)[/dim]")

    @contextmanager
    def progress(self, title: str, total: int, *, paced: bool = False) -> Iterator[Advance]:
        """Shows a bar while the block runs; call the yielded function with (done, remark).

        Args:
            paced: Remarks tell rate and time left by themselves.
        """
        started = time.perf_counter()
        pace = ProgressPace(total)
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

            with self._named(title), self._lines(line):
                yield advance
        self.note(f"{title} [dim]({time.perf_counter() - started:.1f} s)[/dim]")

    @contextmanager
    def _named(self, title: str) -> Iterator[None]:
        outer, self.stage_title = self.stage_title, title
        yield
        self.stage_title = outer  # not where it failed: the message names the stage

    @contextmanager
    def _lines(self, line: Callable[[], str]) -> Iterator[None]:
        """Prints a line every now and then while the block runs, where no terminal shows that it does."""
        if self.rich.is_terminal:
            yield
            return
        ended = Event()

        def say() -> None:
            while not ended.wait(self._every_s):
                self.note(line())

        thread = Thread(target=say, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def table(self, title: str, rows: Sequence[Sequence[str]]) -> None:
        """Prints a table whose first row holds the headings."""
        widths = column_widths(rows, self.rich.width)
        if sum(widths) + 3 * len(widths) + 1 > self.rich.width:  # not even its longest words fit side by side
            self.rich.print(title, highlight=False, markup=False)
            for row in rows[1:]:
                self.panel(list(zip(rows[0], row, strict=True)))
            return
        table = Table(title=title, title_justify="left")
        for index, (heading, width) in enumerate(zip(rows[0], widths, strict=True)):
            table.add_column(heading, justify="left" if index == 0 else "right", width=width, overflow="fold")
        for row in rows[1:]:
            table.add_row(*row)
        self.rich.print(table)

    def panel(self, lines: Sequence[tuple[str, Any]]) -> None:
        """Prints aligned name and value pairs."""
        print_details(self.rich, lines)


def column_widths(rows: Sequence[Sequence[str]], width: int) -> list[int]:
    """Widths of the columns of a table that fits, so that cells break between words and no word is cut.

    Rich shrinks the widest column first, whatever its words.
    """
    columns = list(zip(*rows, strict=True))
    wanted = [max(map(len, column)) for column in columns]
    found = [max((len(word) for cell in column for word in cell.split()), default=0) for column in columns]
    for _ in range(width - 3 * len(columns) - 1 - sum(found)):
        short = [most - now for most, now in zip(wanted, found, strict=True)]
        # Numbers first: a name in two lines reads better than a number in two.
        _, lacks, narrowest = max((min(index, lack, 1), lack, index) for index, lack in enumerate(short))
        found[narrowest] += lacks > 0
    return found


def print_details(console: RichConsole, lines: Sequence[tuple[str, Any]]) -> None:
    """Prints aligned name and value pairs as they are: no markup, and no line break within a value."""
    width = max((len(name) for name, _ in lines), default=0)
    for name, value in lines:
        console.print(f"  {name:<{width}}  {value}", highlight=False, markup=False, soft_wrap=True)
