"""Gradient noise against curvature, direction by direction."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from curvdiag.plotting.fits import LOOKS, SQUARE, Line, chosen_line, side_name, sides
from curvdiag.plotting.style import INK, open_frame, own_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from curvdiag.scaling.power_law import Directions
    from curvdiag.scaling.result import ScalingResult

GUIDES = ((1, (0, (6, 3))), (2, (0, (1.5, 2))))
MARGIN = 0.05


def scaling(
    result: ScalingResult | Directions,
    ax: Axes | None = None,
    *,
    method: str | None = None,
    count: int | None = None,
    square: bool = False,
    in_sample: bool = True,
    title: str = "",
) -> Axes:
    """``C_ii`` against ``H_ii`` in the basis of the test, both logarithmic, with the fitted power law.

    Full markers are measured on the half of the samples that did not choose the basis, hollow ones on the samples
    that did. A direction where one of the two is not positive has no place on these axes: it stands as a cross at
    the edge, on both edges' corner if neither is. The line reaches over the directions it is fitted to, which end
    where they are too uncertain for an interval; the band (an interval corrected for bias, so the line need not be in
    its middle) and the guides of slope 1 and 2 turn about the mean of their logarithms, so slopes can be compared.

    Args:
        result: ``held_out`` and ``in_sample``; or one of the two by itself.
        ax: Where to draw; a new figure if not given.
        method: Of the fit; the first one of the result if not given.
        count: Number of directions of the fit; the most that have an interval if not given.
        square: Also draw ``E[h^2]_ii``, the mean square of the per-sample Hessians, where it was measured.
        in_sample: Also draw the in-sample points.
        title: Of the axes.

    Raises:
        ArgumentError: There is no such fit.
    """
    both = sides(result)
    first = both[0]
    line = chosen_line(first, method, count)
    ax = own_axes(ax, 6.4, 4.8)
    ax.set_xscale("log")
    ax.set_yscale("log")
    shown: list[np.ndarray] = []
    for one in reversed(both if in_sample else both[:1]):  # the held-out points on top
        if square and one.square is not None:
            shown.append(draw_points(ax, one, squares=True))
        shown.append(draw_points(ax, one, squares=False))
    points = np.concatenate(shown, axis=1)
    set_limits(ax, points)
    mark_left_out(ax, first)
    if line is not None:
        draw_line(ax, line, first)
    if not points.size:
        ax.text(0.5, 0.5, "no direction has both positive", transform=ax.transAxes, ha="center", color=INK)

    basis = {"hessian": ", eigenbasis of H", "parameter": ", single parameters"}.get(getattr(result, "basis", ""), "")
    ax.set_xlabel(rf"curvature $H_{{ii}}${basis}")
    ax.set_ylabel(rf"gradient noise $C_{{ii}}${f', and {SQUARE}$_{{ii}}$' if square else ''}")
    if title:
        ax.set_title(title)
    if ax.get_legend_handles_labels()[1]:
        ax.legend(loc="best", fontsize="small", framealpha=0.9)
    open_frame(ax)
    return ax


def draw_points(ax: Axes, directions: Directions, *, squares: bool) -> np.ndarray:
    """One series of points; returns those that the axes can hold, ``[2, n]``."""
    y = np.asarray(directions.square if squares else directions.noise, dtype=np.float64)
    x = np.asarray(directions.curvature, dtype=np.float64)
    place = (x > 0) & (y > 0) & np.isfinite(x) & np.isfinite(y)
    points = np.stack([x[place], y[place]])
    if points.size:
        style: dict[str, Any] = LOOKS[squares, directions.biased] | {"linestyle": "none"}
        size = float(np.clip(9.0 * len(x) ** -0.2, 2.2, 5.0))
        name = f"{SQUARE}$_{{ii}}$" if squares else r"$C_{ii}$"
        ax.plot(
            *points, **style, markersize=size, markeredgewidth=0.6, alpha=0.55 if directions.biased else 0.85,
            label=f"{name}, {side_name(directions)}",
        )  # fmt: skip
    return points


def set_limits(ax: Axes, points: np.ndarray) -> None:
    """Limits from the points alone, so that no guide stretches the axes."""
    if not points.size:
        return
    low, high = np.log10(points.min(axis=1)), np.log10(points.max(axis=1))
    margin = np.maximum(MARGIN * (high - low), 0.1)
    ax.set_xlim(10 ** (low - margin)[0], 10 ** (high + margin)[0])
    ax.set_ylim(10 ** (low - margin)[1], 10 ** (high + margin)[1])


def mark_left_out(ax: Axes, directions: Directions) -> None:
    """Crosses for the directions that no fit uses: at the edge where a logarithm is missing, else in their place."""
    out = ~np.asarray(directions.used, dtype=bool)
    if not out.any():
        return
    x, y = np.asarray(directions.curvature)[out], np.asarray(directions.noise)[out]
    corner = [limits[0] for limits in (ax.get_xlim(), ax.get_ylim())]
    x, y = (np.where(v > 0, v, low) for v, low in zip((x, y), corner, strict=True))
    ax.plot(
        x, y, linestyle="none", marker="x", color=INK, markersize=5, markeredgewidth=1.0, clip_on=False, zorder=4,
        label=f"not positive, left out: {out.sum():,} of {len(out):,}",
    )  # fmt: skip


def draw_line(ax: Axes, line: Line, directions: Directions) -> None:
    """The fit with its band, and the guides."""
    fitted = np.asarray(directions.used, dtype=bool) & (np.arange(len(directions.used)) < line.count)
    x = np.log10(np.asarray(directions.curvature)[fitted])
    if not len(x):
        return
    middle = float(x.mean())
    height = line.intercept + line.exponent * middle
    limits = np.log10(ax.get_xlim())
    for slope, dash in GUIDES:
        # Their ends lie beyond the frame, which cuts them.
        ax.plot(
            10**limits, 10 ** (height + slope * (limits - middle)), color=INK, linewidth=0.9, linestyle=dash,
            zorder=1.5, scaley=False, scalex=False, label=f"slope {slope}",
        )  # fmt: skip
    ends = np.array([x.min(), middle, x.max()])
    if math.isfinite(line.low) and math.isfinite(line.high):
        one, two = (10 ** (height + slope * (ends - middle)) for slope in (line.low, line.high))
        ax.fill_between(10**ends, one, two, color=INK, alpha=0.25, linewidth=0, zorder=2.5)
    label = rf"$\gamma$ = {line}" + f"\n{line.count:,} directions, {side_name(directions)}"
    ax.plot(10**ends, 10 ** (height + line.exponent * (ends - middle)), color=INK, linewidth=1.6, zorder=3, label=label)
