"""Provides what all pictures have in common. Pictures need matplotlib, which is optional."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sglang_shift.errors import ShiftError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Style = dict[str, Any]

WIDTH = 8.0
"""Width in inches. If a picture is shown 800 pixels wide, text of 8 points and more is readable."""

DPI = 150
# These are Okabe and Ito's colours. The colour-blind can tell them apart: https://jfly.uni-koeln.de/color/
STYLES: dict[str, Style] = {
    "shift": {"color": "#D55E00", "marker": "o"},
    "stock-tp": {"color": "#0072B2", "marker": "s"},
    "stock-dp": {"color": "#009E73", "marker": "^"},
    "sp": {"color": "#CC79A7", "marker": "D"},
}


def panels(title: str, rows: int, columns: int, height: float, **options: Any) -> tuple[Figure, list[Axes]]:
    """Return a figure and its axes, row by row. Raise a ShiftError if matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ShiftError("plots need matplotlib, which is not installed: `pip install matplotlib`") from error
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    figure.suptitle(title, fontsize=12)
    axes = list(figure.subplots(rows, columns, squeeze=False, **options).flat)
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes
