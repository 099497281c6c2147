"""One table, two renderings: a terminal and docs/speed.md."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table as RichTable


@dataclass(frozen=True)
class Table:
    """A title, column heads and rows of ready-made text."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def show(self, console: Console) -> None:
        """Prints to a terminal."""
        table = RichTable(title=self.title, title_justify="left")
        for index, column in enumerate(self.columns):
            table.add_column(column, justify="right" if index else "left")
        for row in self.rows:
            table.add_row(*row)
        console.print(table)

    def to_markdown(self) -> str:
        """As it stands in docs/speed.md."""
        head = [f"| {' | '.join(self.columns)} |", f"|---|{'---:|' * (len(self.columns) - 1)}"]
        return "\n".join([f"**{self.title}**", "", *head, *(f"| {' | '.join(row)} |" for row in self.rows)]) + "\n"
