"""The exponent against the number of directions, over several runs of the same training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from curvdiag.plotting.fits import LOOKS, fits_of, side_name, sides
from curvdiag.plotting.style import INK, open_frame, own_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from curvdiag.scaling.power_law import Directions
    from curvdiag.scaling.result import ScalingResult


def exponents_of_runs(
    results: Sequence[ScalingResult],
    ax: Axes | None = None,
    *,
    method: str | None = None,
    reference: Mapping[int, float] | None = None,
    title: str = "",
) -> Axes:
    """``gamma`` of ``C_ii ~ H_ii^gamma``: the mean over runs, and a band from the smallest to the largest.

    Numbers of directions that not all runs have reached are left out.

    Args:
        results: One for each run (seed).
        ax: Where to draw; a new figure if not given.
        method: Of the fits; the first one of each result if not given.
        reference: In-sample exponents by number of directions, from elsewhere, shown as crosses.
        title: Of the axes.

    Raises:
        ArgumentError: There is no fit by this method.
    """
    ax = own_axes(ax)
    ax.set_xscale("log")
    for slope in (1, 2):
        ax.axhline(slope, color=INK, linewidth=0.9, linestyle=(0, (6, 3)) if slope == 1 else (0, (1.5, 2)), zorder=1)
    for index in range(max((len(sides(result)) for result in results), default=0)):
        _draw(ax, [sides(result)[index] for result in results], method)
    if reference:
        look: dict[str, Any] = {"marker": "x", "linestyle": "none", "markersize": 7, "markeredgewidth": 1.6}
        ax.plot(*zip(*reference.items(), strict=True), color=INK, label="reference, in-sample", zorder=5, **look)
    ax.set_xlabel("directions fitted, those of largest curvature first")
    ax.set_ylabel(r"exponent $\gamma$")
    if ax.get_legend_handles_labels()[0]:
        ax.legend(loc="best", fontsize="small", framealpha=0.9)
    if title:
        ax.set_title(title)
    open_frame(ax)
    return ax


def _draw(ax: Axes, runs: Sequence[Directions], method: str | None) -> None:
    """One side (held out, or in-sample) of all runs."""
    fits = [fits_of(one, method) for one in runs]
    known = [dict(zip(f.counts.tolist(), f.exponent.tolist(), strict=True)) if f is not None else {} for f in fits]
    counts = sorted(set.intersection(*map(set, known)))
    if not counts:
        return
    values = np.array([[one[count] for count in counts] for one in known])
    look = LOOKS[False, runs[0].biased]
    number = f", {len(runs)} runs" if len(runs) > 1 else ""
    ax.fill_between(counts, values.min(0), values.max(0), color=look["color"], alpha=0.2, linewidth=0)
    ax.plot(counts, values.mean(0), label=f"{side_name(runs[0])}{number}", zorder=3, markersize=5, **look)
