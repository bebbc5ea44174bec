"""The exponent of the power law in each layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from curvdiag.errors import ArgumentError
from curvdiag.plotting.fits import LOOKS, chosen_line, side_name, sides
from curvdiag.plotting.style import INK, open_frame, own_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from curvdiag.scaling.result import ScalingResult


def exponents_by_layer(
    results: Mapping[str, ScalingResult],
    ax: Axes | None = None,
    *,
    method: str | None = None,
    count: int | None = None,
    title: str = "",
) -> Axes:
    """``gamma`` of C by layer with its interval, held out (full) and in-sample (hollow), one row a layer.

    At the right the held-out exponent in figures and the number of directions it is fitted to; a dash where there
    is none. Lines stand at 1 and 2.

    Args:
        results: By layer, in the order of the rows.
        ax: Where to draw; a new figure if not given.
        method: Of the fits; the first one of each result if not given.
        count: Number of directions of the fits; for each the most that have an interval if not given.
        title: Of the axes.

    Raises:
        ArgumentError: There is no layer, or no such fit.
    """
    if not results:
        raise ArgumentError("there is no layer to draw")
    ax = own_axes(ax, 6.4, 1.3 + 0.42 * len(results))
    for at, dash in ((1, (0, (6, 3))), (2, (0, (1.5, 2)))):
        ax.axvline(at, color=INK, linewidth=0.9, linestyle=dash, zorder=1)
    named: set[str] = set()
    reach = [0.8, 2.2]
    for row, result in enumerate(results.values()):
        both = sides(result)
        for one, shift in zip(both, (0.0, 0.24), strict=False):
            line = chosen_line(one, method, count)
            if one is both[0]:
                text = "-" if line is None else f"{line}, n = {line.count:,}"
                ax.text(1.02, row, text, transform=ax.get_yaxis_transform(), va="center", color=INK, fontsize="small")
            if line is None:
                continue
            look, name = LOOKS[False, one.biased] | {"linestyle": "none"}, side_name(one)
            ends = [end for end in (line.low, line.high) if math.isfinite(end)]
            if ends:
                ax.hlines(row + shift, ends[0], ends[-1], color=look["color"], linewidth=1.6)
            ax.plot([line.exponent], [row + shift], **look, markersize=5.5, label="" if name in named else name)
            reach += [line.exponent, *ends]
            named.add(name)
    margin = 0.04 * (max(reach) - min(reach))
    ax.set_xlim(min(reach) - margin, max(reach) + margin)
    ax.set_ylim(len(results) - 0.5, -0.5)
    ax.set_yticks(range(len(results)), list(results))
    ax.set_xlabel(r"exponent $\gamma$ of $C_{ii} \sim H_{ii}^{\gamma}$")
    if title:
        ax.set_title(title, pad=26)
    if named:
        # Above the rows: a row has something at any place along it.
        ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, fontsize="small", frameon=False)
    open_frame(ax)
    return ax
