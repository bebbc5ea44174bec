"""Several spectra on one axis, above all those of C and H."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from curvdiag.errors import ArgumentError
from curvdiag.plotting.eigenvalue_axis import choose_axis
from curvdiag.plotting.style import LINES, open_frame, own_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from curvdiag.scaling.result import ScalingResult
    from curvdiag.spectrum.density import SpectralDensity

ROUNDING = float(np.finfo(np.float64).eps)
LONG = 30  # ranks from which on their axis is logarithmic
NAMES = {"curvature_spectrum": "H", "noise_spectrum": "C"}


def spectra(
    result: ScalingResult | Mapping[str, Any],
    ax: Axes | None = None,
    *,
    scale: str = "auto",
    title: str = "",
) -> Axes:
    """Eigenvalues by rank with logarithmic values; densities where not all spectra are known whole.

    Positive eigenvalues are full markers, the largest first; negative ones are hollow, at their magnitude, the most
    negative first. What lies below the rounding of its largest eigenvalue (order times 2.2e-16) is not drawn but
    counted as zero in the legend.

    Args:
        result: ``curvature_spectrum`` and ``noise_spectrum``; or by label the eigenvalues ``[n]`` or a density
            (``nodes``, ``weights``, ``deflated``, ``size``).
        ax: Where to draw; a new figure if not given.
        scale: Of the eigenvalues of densities: ``"linear"``, ``"symlog"``, or ``"auto"``, chosen from the data.
        title: Of the axes.

    Raises:
        ArgumentError: No spectrum is known, one holds what is not finite, or ``scale`` is not one of these.
    """
    if isinstance(result, Mapping):
        known = dict(result)
    else:
        known = {name: getattr(result, field) for field, name in NAMES.items() if getattr(result, field) is not None}
    if not known:
        raise ArgumentError("there is no spectrum to draw: whole spectra are known only where the matrices are dense")
    densities = {name: one for name, one in known.items() if hasattr(one, "nodes")}
    values = {name: eigenvalues(one, name) for name, one in known.items() if name not in densities}
    ax = own_axes(ax)
    if densities:
        draw_densities(ax, {name: densities.get(name) or as_density(values[name]) for name in known}, scale)
    else:
        draw_ranks(ax, values)
    if title:
        ax.set_title(title)
    ax.legend(loc="best", fontsize="small", framealpha=0.9)
    open_frame(ax)
    return ax


def eigenvalues(given: Any, name: str) -> np.ndarray:
    values = np.asarray(given.detach().cpu() if hasattr(given, "detach") else given, dtype=np.float64).ravel()
    if not len(values) or not np.isfinite(values).all():
        raise ArgumentError(f"the spectrum of {name} is empty or not finite; there is nothing to draw")
    return values


def draw_ranks(ax: Axes, spectra: Mapping[str, np.ndarray]) -> None:
    longest, lowest = 0, np.inf
    for index, (name, values) in enumerate(spectra.items()):
        colour, _, marker = LINES[1:][index % (len(LINES) - 1)]
        floor = len(values) * ROUNDING * np.abs(values).max()
        positive, negative = np.sort(values[values > floor])[::-1], np.sort(-values[values < -floor])[::-1]
        counts = [f"{len(positive):,} positive"]
        counts += [f"{len(negative):,} negative"] if len(negative) else []
        zero = len(values) - len(positive) - len(negative)
        counts += [f"{zero:,} zero"] if zero else []
        size = float(np.clip(9.0 * max(len(positive), 1) ** -0.2, 2.0, 5.0))
        style: dict[str, Any] = {"color": colour, "marker": marker, "markersize": size, "markeredgewidth": 0.6}
        ranks = np.arange(1, len(values) + 1)
        ax.plot(ranks[: len(positive)], positive, linewidth=0.8, label=f"{name}: {', '.join(counts)}", **style)
        if len(negative):
            style |= {"markerfacecolor": "white", "linestyle": "none"}
            ax.plot(ranks[: len(negative)], negative, label=f"{name}, negative: magnitude", **style)
        shown = np.concatenate([positive, negative])
        longest, lowest = max(longest, len(positive), len(negative)), min(lowest, shown.min(initial=np.inf))
    if np.isfinite(lowest):
        ax.set_yscale("log")
    if longest > LONG:
        ax.set_xscale("log")
    ax.set_xlabel("rank")
    ax.set_ylabel("eigenvalue")


def draw_densities(ax: Axes, densities: Mapping[str, SpectralDensity], scale: str) -> None:
    axis = choose_axis(list(densities.values()), scale)
    edges = axis.edges()
    floor = min(axis.one_eigenvalue(one.size) for one in densities.values()) / 20
    top = floor
    for index, (name, one) in enumerate(densities.items()):
        colour, dash, _ = LINES[1:][index % (len(LINES) - 1)]
        height = axis.smooth(one, edges)
        ax.fill_between(axis.eigenvalue(edges), floor, np.maximum(height, floor), color=colour, alpha=0.15, linewidth=0)
        seen = np.where(height >= floor, height, np.nan)
        ax.plot(axis.eigenvalue(edges), seen, color=colour, linestyle=dash, linewidth=1.4, label=name)
        top = max(top, float(height.max()))
    axis.apply(ax, "x")
    ax.set_yscale("log")
    ax.set_ylim(floor, top * (top / floor) ** 0.15)
    ax.set_xlabel("eigenvalue")
    ax.set_ylabel(f"density, {axis.unit}")


def as_density(values: np.ndarray) -> Any:
    """Known eigenvalues beside densities: an atom each."""
    return SimpleNamespace(
        nodes=values[None], weights=np.full((1, len(values)), 1 / len(values)), deflated=np.empty(0), size=len(values)
    )
