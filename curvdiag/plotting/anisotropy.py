"""How unequal the curvature is: every measure with its interval."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from curvdiag.plotting.style import BLUE, INK, open_frame, own_axes, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from curvdiag.spectrum.anisotropy import Anisotropy

LEVEL = 0.95


def anisotropy(anisotropy: Anisotropy, ax: Axes | None = None, *, title: str = "") -> Axes:
    """The measures on one logarithmic axis, each with its Student-t interval at 95 % and its value in figures.

    The intervals are drawn where a value averages three probes or more; one that comes close to zero, or passes it,
    goes to the left edge. A measure that is NaN is listed with ``-``, one that is zero with its value alone. Dotted
    lines stand at 1 and at the order of the matrix, where a multiple of the identity has its ratios and its ranks.

    Args:
        anisotropy: ``measures``, estimates by name, and ``size``.
        ax: Where to draw; a new figure if not given.
        title: Of the axes.
    """
    ax = own_axes(ax, 6.4, 3.4)
    measures = anisotropy.measures
    ax.set_xscale("log")
    for at in {1, anisotropy.size}:
        ax.axvline(at, color=INK, linewidth=0.8, linestyle=":")
    shown = {name: one for name, one in measures.items() if one.value > 0 and math.isfinite(one.value)}
    ends = {name: one.interval(LEVEL) for name, one in shown.items()}
    reach = [1.0, float(anisotropy.size), *(one.value for one in shown.values())]
    for name, one in shown.items():
        if np.isfinite(ends[name]).all():
            reach += [max(ends[name][0], 0.1 * one.value), ends[name][1]]
    low, high = min(reach) / 1.6, max(reach) * 1.6

    for row, (name, one) in enumerate(measures.items()):
        text = "-" if math.isnan(one.value) else short(one.value)
        ax.text(1.02, row, text, transform=ax.get_yaxis_transform(), va="center", color=INK, fontsize="small")
        if name not in shown:
            continue
        ax.plot([one.value], [row], color=BLUE, marker="o", markersize=5.5, linestyle="none")
        if np.isfinite(ends[name]).all() and ends[name][0] < ends[name][1]:
            ax.hlines(row, max(ends[name][0], low), ends[name][1], color=BLUE, linewidth=1.6)
    ax.set_xlim(low, high)
    ax.set_ylim(len(measures) - 0.5, -0.5)
    ax.set_yticks(range(len(measures)), [name.replace("_", " ") for name in measures])
    ax.set_xlabel(f"value; dotted: 1 and the order, {anisotropy.size:,}")
    if title:
        ax.set_title(title)
    open_frame(ax)
    return ax
