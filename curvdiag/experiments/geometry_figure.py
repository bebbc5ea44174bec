"""The picture of the ``geometry`` experiment: trajectories on contours, p along them, and where many starts end."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from curvdiag.experiments.geometry_results import ANGLES, COSINE, GD, METHODS, SIGN, UNSMOOTHED, Geometry, Outcome
from curvdiag.experiments.toys import OPTIMUM, TOYS, Toy
from curvdiag.plotting.style import INK, LINES, open_frame

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LABELS: dict[str, str] = {GD: "GD, p = 2", SIGN: "signGD, p = ∞", COSINE: "LPSGD, cosine p (published)"} | {
    method: f"LPSGD, {method}" for method in METHODS[3:]
}
LOOKS = dict(zip(METHODS, LINES, strict=False))
FLOOR = 1e-9
"""Smaller ends are drawn here: they say how many digits a double has."""


def draw(found: Geometry) -> Figure:
    """A column for each toy: contours, p, and distance and loss after the last step at the published rates.

    Last, the distance with each method at its own best rate.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.0, 15.5), layout="constrained")
    grid = figure.subplots(5, 2, gridspec_kw={"height_ratios": [1.5, 1, 1, 1, 1]})
    for toy, column in zip(TOYS, grid.T, strict=True):
        trajectories(found, toy, column[0])
        p_along(found, toy, column[1])
        ends(found, toy, column[2], "distance")
        ends(found, toy, column[3], "loss")
        ends(found, toy, column[4], "distance", "best")
    for row in grid[2:]:
        row[1].set_yticklabels([])
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False)
    return figure


def trajectories(found: Geometry, toy: Toy, ax: Axes) -> None:
    """The paths of all methods on contours of the loss; the floor of a narrow valley is shown larger as well."""
    _paths(found, toy, ax, (-0.35, 1.75), (-0.4, 4.7))
    x, y = found.paths[toy.name][GD].points[0].tolist()
    ax.plot(x, y, marker="o", mfc="none", mec=INK, markersize=9)
    offset: dict[str, Any] = {"xytext": (0, -16), "textcoords": "offset points", "ha": "center", "fontsize": "small"}
    ax.annotate("start", (x, y), **offset)
    ax.plot(*OPTIMUM, marker="+", color=INK, markersize=13, linestyle="none", zorder=4)
    ax.set(xlabel=r"$\theta_1$", ylabel=r"$\theta_2$")
    largest, smallest = toy.curvatures
    ax.set_title(f"{toy.name}: curvatures {largest:g} and {smallest:g}")
    open_frame(ax)
    if toy.condition_number > 100:
        inset = ax.inset_axes((0.14, 0.42, 0.36, 0.54))
        _paths(found, toy, inset, (0.95, 1.05), (0.98, 1.32))
        inset.set(xticks=[0.96, 1.0, 1.04], yticks=[1.0, 1.1, 1.2, 1.3])
        inset.tick_params(labelsize="x-small")
        ax.indicate_inset_zoom(inset, edgecolor=INK)


def _paths(found: Geometry, toy: Toy, ax: Axes, across: tuple[float, float], up: tuple[float, float]) -> None:
    x, y = np.linspace(*across, 200), np.linspace(*up, 200)
    values = toy.value(torch.from_numpy(np.stack(np.meshgrid(x, y), axis=-1))).numpy()
    levels = np.geomspace(values.max() / 3e4, values.max(), 14)
    ax.contour(x, y, values, levels=levels, colors="#c4c4c4", linewidths=0.7)
    for method in METHODS:
        if method == UNSMOOTHED:
            continue
        color, dashes, marker = LOOKS[method]
        points = found.paths[toy.name][method].points.numpy()
        ax.plot(*points.T, color=color, linestyle=dashes, linewidth=1.3, alpha=0.9, zorder=3)
        look: dict[str, Any] = {"markersize": 7, "markeredgecolor": "white", "markeredgewidth": 0.6}
        ax.plot(*points[-1:].T, color=color, marker=marker, linestyle=dashes, label=LABELS[method], zorder=5, **look)
    ax.set(xlim=across, ylim=up)


def p_along(found: Geometry, toy: Toy, ax: Axes) -> None:
    """``p`` at each step; dots are that of PredictedDecreaseP without smoothing."""
    for method in METHODS:
        color, dashes, _ = LOOKS[method]
        p = found.paths[toy.name][method].p
        if method == UNSMOOTHED:
            ax.plot(p, ".", color=color, markersize=4, zorder=2, label="predicted p without smoothing")
        elif method != SIGN:
            ax.plot(p, color=color, linestyle=dashes, linewidth=1.5, zorder=3)
    ax.set(xlabel="step", ylabel="p", ylim=(1.8, 6.3))
    ax.legend(loc=(0.02, 0.3), fontsize="small", framealpha=0.9, handletextpad=0.1)
    open_frame(ax)


def ends(found: Geometry, toy: Toy, ax: Axes, what: str, rates: str = "published") -> None:
    """Medians over the starts, with nine in ten of them; filled on the axes, open with the eigenvectors turned."""
    last = found.steps[-1]
    for filled, (angle, shift) in zip((True, False), zip(ANGLES, (-0.14, 0.14), strict=True), strict=True):
        outcomes = found.outcomes[toy.name][angle][rates][last]
        for place, method in enumerate(METHODS):
            color, _, marker = LOOKS[method]
            middle, low, high = _clipped(outcomes[method], what)
            ax.plot([low, high], [place + shift] * 2, color=color, linewidth=1.6, alpha=0.6)
            ax.plot(middle, place + shift, marker=marker, color=color, mfc=color if filled else "white", markersize=6)
        ax.plot([], [], "o", color=INK, mfc=INK if filled else "white", label=f"eigenvectors {angle}")
    ax.set(xscale="log", ylim=(len(METHODS) - 0.5, -0.5), xlim=(FLOOR / 3, 30))
    powers = range(round(math.log10(FLOOR)), 2, 2)
    ax.set_xticks([10.0**k for k in powers], ["$\\leq 10^{-9}$", *(f"$10^{{{k}}}$" for k in powers[1:])], minor=False)
    ax.minorticks_off()
    ax.set_yticks(range(len(METHODS)), [method.replace(", ", ",\n") for method in METHODS])
    ax.set_xlabel(f"{what} after {last} steps, {'each at its best rate' if rates == 'best' else 'published rates'}")
    if (what, rates) == ("distance", "published") and toy is not TOYS[0]:
        title = f"medians of {found.starts:,} starts; bars: nine in ten"
        ax.legend(loc="lower left", fontsize="x-small", framealpha=0.9, title=title, title_fontsize="x-small")
    ax.grid(axis="x", color="#dddddd", linewidth=0.6)
    ax.set_axisbelow(True)
    open_frame(ax)


def _clipped(outcome: Outcome, what: str) -> list[float]:
    return [max(value, FLOOR) for value in getattr(outcome, what)]
