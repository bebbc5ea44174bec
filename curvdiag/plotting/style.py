"""What the figures share: their axes, their colours, their labels."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours from dark to light; dashes and markers tell apart what is close in grey.
LINES = (
    ("#000000", "-", "o"),
    ("#0072B2", "--", "s"),
    ("#D55E00", "-.", "^"),
    ("#009E73", ":", "D"),
    ("#CC79A7", (0, (5, 1, 1, 1, 1, 1)), "v"),
    ("#56B4E9", (0, (7, 3)), "X"),
    ("#E69F00", (0, (1, 1)), "P"),
)
INK = "#222222"
BLUE = "#0072B2"
ORANGE = "#D55E00"


def own_axes(ax: Axes | None, width: float = 6.4, height: float = 4.0) -> Axes:
    """``ax``, or the axes of a new figure of this size in inches."""
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=(width, height), layout="constrained")[1]


def operator_label(operator: str, block: str = "") -> str:
    """``("hessian", "conv1") -> "Hessian of conv1"``."""
    words = operator.replace("_", " ").replace("-", " ")
    name = words[:1].upper() + words[1:]
    return f"{name} of {block}" if block else name


def open_frame(ax: Axes) -> None:
    """Leave out the two frame lines that carry no scale."""
    ax.spines[["top", "right"]].set_visible(False)


def short(value: float) -> str:
    """Three significant digits, without trailing zeros and without exponents where they are not needed."""
    text = f"{value:.3g}"
    if "e" in text and abs(value) < 1e6 and abs(value) >= 1e-4:
        text = f"{value:.0f}"
    return text.replace("-", "\N{MINUS SIGN}")
