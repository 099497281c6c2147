"""Looks of the figures: one colour and one marker for each model, the same in every figure.

The colours are those of Okabe and Ito, which people with any of the common colour-vision deficiencies can tell apart;
markers and dashes carry the same information, so that a print in grey can be read too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from matplotlib import rc_context

# The models, and contrastive decoding from base and aligned as the baseline that trains nothing.
ROLES = ("base", "aligned", "contrastive", "student")
ROLE_COLORS = {"base": "#D55E00", "aligned": "#0072B2", "contrastive": "#CC79A7", "student": "#009E73"}
ROLE_MARKERS = {"base": "s", "aligned": "o", "contrastive": "^", "student": "D"}
ROLE_HATCHES = {"base": "xx", "aligned": "//", "contrastive": "..", "student": ""}
ROLE_DASHES: dict[str, Any] = {
    "base": (0, (5, 2)),
    "aligned": (0, (1.5, 1.5)),
    "contrastive": (0, (5, 2, 1.5, 2)),
    "student": "solid",
}
KIND_DASHES: dict[str, Any] = {"harmful": "solid", "benign": (0, (5, 2))}
OUTCOME_COLORS = {"complied": "#D55E00", "refused": "#0072B2", "incoherent": "#F0E442", "empty": "#BBBBBB"}
OUTCOME_HATCHES = {"complied": "", "refused": "//", "incoherent": "..", "empty": "xx"}
SERIES_STYLES: tuple[tuple[str, Any], ...] = (  # curves that no model owns, as the terms of a loss; used in turn
    ("#0072B2", (0, (1.5, 1.5))),
    ("#D55E00", (0, (5, 2))),
    ("#CC79A7", (0, (5, 2, 1.5, 2))),
    ("#009E73", (0, (3, 1))),
    ("#E69F00", (0, (8, 2))),
    ("#56B4E9", (0, (1, 1))),
)
SEQUENTIAL_MAP = "cividis"

_SETTINGS: dict[str, Any] = {
    "figure.dpi": 100,
    "savefig.dpi": 200,
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "font.family": "DejaVu Sans",
    "font.size": 10.5,
    "axes.titlesize": 10.5,
    "axes.labelsize": 10.5,
    "legend.fontsize": 10,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "lines.linewidth": 1.8,
    "lines.markersize": 6,
    "hatch.linewidth": 0.5,
    "svg.hashsalt": "raycomplete",
}


@contextmanager
def house_style() -> Iterator[None]:
    """Applies the settings above to the figures made inside, and restores the caller's own after it."""
    with rc_context(_SETTINGS):
        yield
