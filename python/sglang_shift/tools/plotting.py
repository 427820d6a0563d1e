"""What all pictures have in common. They need matplotlib, which is optional."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sglang_shift.errors import ShiftError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Style = dict[str, Any]

WIDTH = 8.0
"""Inches: text of 8 points and more is readable where the picture is shown 800 pixels wide."""

DPI = 150
# Okabe and Ito's colours, which the colour-blind can tell apart: https://jfly.uni-koeln.de/color/
KNOWN: dict[str, Style] = {
    "shift": {"color": "#D55E00", "marker": "o"},
    "stock-tp": {"color": "#0072B2", "marker": "s"},
    "stock-dp": {"color": "#009E73", "marker": "^"},
    "sp": {"color": "#CC79A7", "marker": "D"},
}


def panels(title: str, rows: int, columns: int, height: float, **options: Any) -> tuple[Figure, list[Axes]]:
    """A figure and its axes, row by row; a ShiftError where matplotlib is not installed."""
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
