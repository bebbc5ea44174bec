"""The spectra of all layers side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from curvdiag.errors import ArgumentError
from curvdiag.plotting.eigenvalue_axis import EigenvalueAxis, choose_axis, position
from curvdiag.plotting.style import BLUE, INK, ORANGE, open_frame, own_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from curvdiag.spectrum.layers import LayerSpectra

DECADES = 5.0  # of density, from the tallest down, that a column's width shows
TRACE_RANGE = 1e4  # by how much the largest trace exceeds the linear part of a symmetric-log axis, at most
REACH = 0.42  # half the width of the widest column, as a share of the distance between layers


def layers(
    spectra: LayerSpectra,
    ax: Axes | None = None,
    *,
    show: str = "spectrum",
    scale: str = "auto",
    title: str = "",
) -> Axes:
    """One column for each layer, from the input to the output.

    As ``"spectrum"`` a column is the density of the layer's eigenvalues, as wide as the logarithm of their number per
    length of the axis: the narrowest that is drawn is one hundred-thousandth of the widest. A dot is ``lambda_max``
    with its residual, hollow where it has not converged. As ``"trace"`` a column is the trace with its 95 % interval.

    Args:
        spectra: ``layers`` by name, each with ``lambda_max``, ``residual``, ``converged``, ``trace`` and ``density``.
        ax: Where to draw; a new figure if not given.
        show: ``"spectrum"`` or ``"trace"``.
        scale: ``"linear"``, ``"symlog"``, or ``"auto"``: of eigenvalues chosen from the data, of traces linear.
        title: Of the axes.

    Raises:
        ArgumentError: There is no layer, or ``show`` or ``scale`` is not one of these.
    """
    if show not in ("spectrum", "trace"):
        raise ArgumentError(f'show is "spectrum" or "trace", not {show!r}')
    if scale not in ("auto", "linear", "symlog"):
        raise ArgumentError(f'scale is "auto", "linear" or "symlog", not {scale!r}')
    names = list(spectra.layers)
    if not names:
        raise ArgumentError("there is no layer to draw")
    longest = max(map(len, names))
    ax = own_axes(ax, float(np.clip(1.6 + 0.42 * len(names), 4.8, 14.0)), 4.0 + 0.06 * longest)
    (_spectra if show == "spectrum" else _traces)(ax, spectra, scale)
    ax.axhline(0, color=INK, linewidth=0.6, zorder=1)
    ax.set_xlim(-0.6, len(names) - 0.4)
    upright = longest * len(names) <= 60  # characters that fit beside each other
    ax.set_xticks(range(len(names)), names, rotation=0 if upright else 90, fontsize="small")
    if title:
        ax.set_title(title, pad=28 if ax.get_legend() else None)  # the legend stands in between
    open_frame(ax)
    return ax


def _spectra(ax: Axes, spectra: LayerSpectra, scale: str) -> None:
    found = list(spectra.layers.values())
    axis = choose_axis([layer.density for layer in found], scale)
    edges = axis.edges()
    heights = [layer.size * axis.smooth(layer.density, edges) for layer in found]
    tallest = max(float(height.max()) for height in heights)
    for at, height in enumerate(heights):
        width = REACH * np.clip(1 + np.log10(np.maximum(height / tallest, 1e-300)) / DECADES, 0, 1)
        seen = width > 0
        ax.fill_betweenx(
            axis.eigenvalue(edges), at - width, at + width, where=seen, color=BLUE, alpha=0.3, linewidth=0, zorder=2
        )
    axis.apply(ax, "y")
    places = np.arange(len(found))
    values, residuals = (np.array([getattr(layer, name) for layer in found]) for name in ("lambda_max", "residual"))
    done = np.array([layer.converged for layer in found])
    ax.errorbar(places, values, residuals, fmt="none", ecolor=ORANGE, capsize=3.0, linewidth=1.2, zorder=3)
    ax.plot(places[done], values[done], "o", color=ORANGE, markersize=5, label=r"$\lambda_{\max}$", zorder=4)
    if not done.all():
        (hollow,) = ax.plot(places[~done], values[~done], "o", color=ORANGE, markersize=5, zorder=4)
        hollow.set(markerfacecolor="white", label=r"$\lambda_{\max}$, not converged")
    ax.set_ylabel("eigenvalue")
    ax.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2, fontsize="small", frameon=False)


def _traces(ax: Axes, spectra: LayerSpectra, scale: str) -> None:
    traces = [layer.trace for layer in spectra.layers.values()]
    values = np.array([one.value for one in traces])
    ends = np.array([one.interval(0.95) for one in traces])
    bars = np.where(np.isfinite(ends), np.abs(ends - values[:, None]), 0.0).T
    ax.errorbar(range(len(values)), values, bars, fmt="s", color=BLUE, markersize=4.5, capsize=3.0)
    shown = np.append(ends[np.isfinite(ends)], values)
    largest = float(np.abs(shown).max())
    if scale == "symlog" and largest > 0:
        # Linear below the smallest trace, so that an interval about zero does not fill the picture with decades.
        smallest = float(np.abs(values[values != 0]).min(initial=largest))
        threshold = max(smallest, largest / TRACE_RANGE)
        low, high = position(np.array([min(shown.min(), 0), max(shown.max(), 0)]), threshold)
        margin = 0.05 * (high - low)
        EigenvalueAxis(threshold, low - margin, high + margin, margin).apply(ax, "y")
    ax.set_ylabel("trace")
