"""One page and a folder of figures from a run folder."""

from raycomplete.report.html import write_report

__all__ = ["write_report"]
