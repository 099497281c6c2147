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

Advance = Callable[[int, str], None]


class Console:
    """Prints to a rich console; quiet in tests. Where there is no terminal, lines stand for spinners and bars.

    Args:
        quiet: Prints nothing.
        every_s: Seconds between two such lines, at most.
    """

    def __init__(self, *, quiet: bool = False, every_s: float = 30.0) -> None:
        self.rich = RichConsole(quiet=quiet)
        self._every_s = every_s
        self._started = time.perf_counter()

    def note(self, text: str) -> None:
        """Prints one line with the time since the start, and logs it."""
        self.rich.print(f"[dim]{time.perf_counter() - self._started:6.1f} s[/dim]  {text}", highlight=False)
        logger.info("%s", Text.from_markup(text))

    @contextmanager
    def stage(self, title: str) -> Iterator[None]:
        """Shows a spinner while the block runs, then one line with its duration."""
        started = time.perf_counter()
        with self.rich.status(f"{title} ..."), self._lines(lambda: f"{title} ..."):
            yield
        self.note(f"{title} [dim]({time.perf_counter() - started:.1f} s)[/dim]")

    @contextmanager
    def progress(self, title: str, total: int) -> Iterator[Advance]:
        """Shows a bar while the block runs; call the yielded function with (done, remark)."""
        started = time.perf_counter()
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=10),  # the remark needs the room of 80 columns
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("[dim]{task.fields[remark]}[/dim]"),
        )
        with Progress(*columns, console=self.rich, transient=True) as bar:
            task = bar.add_task(title, total=total, remark="")

            def line() -> str:
                shown = bar.tasks[0]
                return f"{title}: {shown.completed:.0f} of {total}, {shown.fields['remark']}".removesuffix(", ")

            with self._lines(line):
                yield lambda done, remark: bar.update(task, completed=done, remark=remark)
        self.note(f"{title} [dim]({time.perf_counter() - started:.1f} s)[/dim]")

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
        table = Table(title=title, title_justify="left")
        for index, heading in enumerate(rows[0]):
            table.add_column(heading, justify="left" if index == 0 else "right")
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
