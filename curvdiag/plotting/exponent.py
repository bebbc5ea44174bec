"""The exponent of the power law as a function of how many directions are fitted."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from curvdiag.plotting.fits import LOOKS, SQUARE, fits_of, side_name, sides
from curvdiag.plotting.style import INK, open_frame, own_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from curvdiag.scaling.power_law import Directions, PowerLaw
    from curvdiag.scaling.result import ScalingResult


def exponent(
    result: ScalingResult | Directions,
    ax: Axes | None = None,
    *,
    method: str | None = None,
    square: bool = True,
    in_sample: bool = True,
    title: str = "",
) -> Axes:
    """``gamma`` of ``C_ii ~ H_ii^gamma`` and of ``E[h^2]_ii`` against the number of directions, with intervals.

    Full markers are held out, hollow ones in-sample. Vertical lines mark where the held-out fits end, since more than
    5 % of the directions are not positive, and where their intervals end, since more than 5 % are not known to half of
    their size; not where that is at the last direction. Bands that reach more than 1 beyond all exponents are cut by
    the frame.

    Args:
        result: ``held_out`` and ``in_sample``; or one of the two by itself.
        ax: Where to draw; a new figure if not given.
        method: Of the fits; the first one of the result if not given.
        square: Also the exponents of ``E[h^2]``, where they were measured.
        in_sample: Also the in-sample exponents.
        title: Of the axes.

    Raises:
        ArgumentError: There is no fit by this method.
    """
    both = sides(result)
    ax = own_axes(ax)
    ax.set_xscale("log")
    for slope, dash in ((1, (0, (6, 3))), (2, (0, (1.5, 2)))):
        ax.axhline(slope, color=INK, linewidth=0.9, linestyle=dash, zorder=1)
    for one in reversed(both if in_sample else both[:1]):
        for squares in (True, False) if square else (False,):
            fits = fits_of(one, method if not squares or method in one.square_fits else None, squares)
            if fits is not None:
                draw_fits(ax, fits, one, squares)
    set_limits(ax)
    first = both[0]
    for at, before, style, what in (
        (first.reach, len(first.curvature), "-", "fits end"),
        (first.resolved, first.reach, "-.", "intervals end"),
    ):
        if 0 < at < before:
            ax.axvline(at, color=INK, linewidth=0.8, linestyle=style, alpha=0.6, zorder=1, label=f"{what} at {at:,}")
    plain_ticks(ax)
    ax.set_xlabel("directions fitted, those of largest curvature first")
    ax.set_ylabel(rf"exponent $\gamma$, with {first.level:.0%} intervals".replace("%", " %"))
    if title:
        ax.set_title(title)
    if ax.get_legend_handles_labels()[1]:
        handles, labels = ax.get_legend_handles_labels()
        ax.legend(handles[::-1], labels[::-1], loc="best", fontsize="small", framealpha=0.9)
    open_frame(ax)
    return ax


def draw_fits(ax: Axes, fits: PowerLaw, directions: Directions, squares: bool) -> None:
    """One line with its band; a bar where a single fit has an interval."""
    at = np.asarray(fits.counts)
    values, low, high = (np.asarray(part, dtype=np.float64) for part in (fits.exponent, fits.low, fits.high))
    look = LOOKS[squares, directions.biased]
    known = np.isfinite(low) & np.isfinite(high)
    if known.sum() == 1:
        ax.vlines(at[known], low[known], high[known], color=look["color"], linewidth=1.6)
    else:
        ax.fill_between(at, low, high, color=look["color"], alpha=0.18, linewidth=0)
    name = f"{SQUARE}$_{{ii}}$" if squares else r"$C_{ii}$"
    every = max(1, len(at) // 12)
    ax.plot(at, values, **look, markersize=4.0, linewidth=1.3, markevery=every,
            label=rf"$\gamma$ of {name}, {side_name(directions)}")  # fmt: skip


def set_limits(ax: Axes) -> None:
    """All exponents, the guides, and what is near them of the bands: two or three directions say next to nothing."""
    from matplotlib.collections import LineCollection, PolyCollection

    values = np.concatenate([np.asarray(line.get_ydata(), dtype=np.float64) for line in ax.lines] or [np.ones(1)])
    bands = [
        np.asarray(path.vertices)[:, 1]
        for drawn in ax.collections
        if isinstance(drawn, LineCollection | PolyCollection)
        for path in drawn.get_paths()
    ]
    ends = np.concatenate([values, *bands])
    values, ends = values[np.isfinite(values)], ends[np.isfinite(ends)]
    low = max(ends.min(), min(values.min(), 1.0) - 1.0)
    high = min(ends.max(), max(values.max(), 2.0) + 1.0)
    low, high = min(low, 0.9), max(high, 2.1)
    margin = 0.05 * (high - low)
    ax.set_ylim(low - margin, high + margin)


def plain_ticks(ax: Axes) -> None:
    """Numbers of directions as 20, 50, 100 and not as powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    ax.xaxis.set_minor_formatter(NullFormatter())
