"""One spectral density."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from curvdiag.plotting.eigenvalue_axis import EigenvalueAxis, atoms, choose_axis
from curvdiag.plotting.style import BLUE, INK, ORANGE, open_frame, own_axes, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from curvdiag.spectrum.density import SpectralDensity


def density(
    density: SpectralDensity,
    ax: Axes | None = None,
    *,
    scale: str = "auto",
    range: tuple[float, float] | None = None,
    width: float | None = None,
    title: str = "",
    operator: str = "",
) -> Axes:
    """Eigenvalue density on a logarithmic scale, with its outliers marked.

    Outliers are Ritz values apart from the bulk (see :func:`outliers`). They get a marker at the height of
    one eigenvalue and, where there is room, their value.

    Args:
        density: ``nodes``, ``weights``, ``deflated`` and ``size``.
        ax: Where to draw; a new figure if not given.
        scale: Of the eigenvalues: ``"linear"``, ``"symlog"``, or ``"auto"``, chosen from the data.
        range: Lowest and highest eigenvalue shown; all if not given.
        width: Standard deviation of the kernels, in eigenvalues (linear) or decades (symmetric-log);
            an eightieth of the axis if not given.
        title: Of the axes.
        operator: Named in the label of the eigenvalues, e.g. ``"Hessian"``.

    Raises:
        ArgumentError: An argument is not one of these.
    """
    axis = choose_axis([density], scale, range, width)
    edges = axis.edges()
    height = axis.smooth(density, edges)
    single = axis.one_eigenvalue(density.size)
    floor = single / 20
    found = outliers(density, axis)

    ax = own_axes(ax)
    at = axis.eigenvalue(edges)
    ax.fill_between(at, floor, np.maximum(height, floor), color=BLUE, alpha=0.25, linewidth=0)
    ax.plot(at, np.where(height >= floor, height, np.nan), color=BLUE, linewidth=1.3, label="density")
    axis.apply(ax, "x")
    ax.set_yscale("log")
    ax.axhline(single, color=INK, linewidth=0.7, linestyle=(0, (4, 3)), zorder=1, label="one eigenvalue")
    top = max(float(height.max()), single)
    ax.set_ylim(floor, top * (top / floor) ** 0.2)
    if len(found):
        ax.vlines(found, floor, single, color=ORANGE, linewidth=1.1)
        ax.plot(found, np.full(len(found), single), "v", color=ORANGE, markersize=5, label="outliers")
        write_values(ax, found, axis, np.maximum(height, single))
    ax.set_xlabel(f"{operator} eigenvalue".strip())
    ax.set_ylabel(f"density, {axis.unit}")
    if title:
        ax.set_title(title)
    ax.legend(loc="best", fontsize="small", frameon=False)
    open_frame(ax)
    return ax


def outliers(density: SpectralDensity, axis: EigenvalueAxis) -> np.ndarray:
    """Eigenvalues beyond the bulk, ascending; one for each group of Ritz values that hang together.

    The bulk reaches from its peak to where the density first falls below that of one eigenvalue, and over
    every group of more than four eigenvalues. Several probes find an eigenvalue at almost the same place, and
    ghost copies lie on it too, so what is less than 1.5 kernel widths apart is one group. A group stands for
    its outermost Ritz value, because Ritz values approach the ends of a spectrum from within.
    """
    nodes, weights = atoms(density)
    order = np.argsort(nodes)
    nodes, weights = nodes[order], weights[order]
    cuts = np.flatnonzero(np.diff(axis.position(nodes)) > 1.5 * axis.width)
    first, last = np.append(0, cuts + 1), np.append(cuts, len(nodes) - 1)
    many = np.add.reduceat(weights, first) * density.size > 4
    if not many.any():
        return np.empty(0)  # a handful of eigenvalues: none stands out
    edges = axis.edges()
    height = axis.smooth(density, edges)
    peak = int(np.argmax(height))
    faint = np.flatnonzero(height < axis.one_eigenvalue(density.size))
    low = edges[faint[faint < peak].max(initial=0)]
    high = edges[faint[faint > peak].min(initial=len(edges) - 1)]
    low = min(low, axis.position(nodes[first[many][0]]))
    high = max(high, axis.position(nodes[last[many][-1]]))
    below, above = axis.position(nodes[last]) < low, axis.position(nodes[first]) > high
    return np.concatenate([nodes[first[below]], nodes[last[above]]])


def write_values(ax: Axes, found: np.ndarray, axis: EigenvalueAxis, heights: np.ndarray) -> None:
    """Values of the outliers upright above curve and markers, the outermost first, none over another."""
    from matplotlib.patheffects import withStroke

    room = 0.035 * (axis.high - axis.low)
    edges = axis.edges()
    taken: list[float] = []
    for value in sorted(found, key=lambda x: -abs(x)):
        at = float(axis.position(value))
        if axis.low < at < axis.high and all(abs(at - other) > room for other in taken):
            taken.append(at)
            above = float(heights[np.abs(edges - at) < room / 2].max())
            ax.annotate(
                short(value), (value, above), xytext=(0, 6), textcoords="offset points", rotation=90,
                ha="center", va="bottom", fontsize="x-small", color=INK,
                path_effects=[withStroke(linewidth=2, foreground="white")],
            )  # fmt: skip
