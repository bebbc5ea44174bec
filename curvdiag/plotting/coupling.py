"""How the directions of the Hessian are coupled by the gradient noise."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from curvdiag.errors import ArgumentError
from curvdiag.plotting.heatmap import ink_map
from curvdiag.plotting.style import own_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from curvdiag.scaling.result import ScalingResult

TITLES = {"measured": "measured", "baseline": "random eigenvectors"}
DEEPEST = 1e-4
UNKNOWN = "#9ecae1"  # no grey: grey is a value here


def coupling(
    result: ScalingResult,
    ax: Axes | None = None,
    *,
    which: str = "measured",
    colorbar: bool = True,
    title: str | None = None,
) -> Axes:
    """``|K_ij| / sqrt(K_ii K_jj)`` of ``K = V^T C V`` as a heatmap with logarithmic colours.

    Where C and H share their eigenvectors only the diagonal is dark. The colours reach from what nine tenths of all
    entries, measured and random, exceed up to 1, the same for both matrices. Directions without noise, where the
    ratio is not defined, are pale blue.

    Args:
        result: ``coupling`` and ``coupling_baseline``, each ``[m, m]``.
        ax: Where to draw; a new figure if not given.
        which: ``"measured"``, or ``"baseline"`` for the same spectra with random eigenvectors.
        colorbar: Whether the figure gets one.
        title: ``None`` for which of the two it is, ``""`` for none.

    Raises:
        ArgumentError: ``which`` is not one of these, or there is no such matrix.
    """
    if which not in TITLES:
        raise ArgumentError(f'which is "measured" or "baseline", not {which!r}')
    ax = own_axes(ax, 5.2, 4.4)
    mesh = draw_matrix(result, ax, which)
    ax.set_title(TITLES[which] if title is None else title)
    if colorbar:
        add_bar(mesh, [ax])
    return ax


def coupling_pair(result: ScalingResult, axes: tuple[Axes, Axes] | None = None) -> tuple[Axes, Axes]:
    """The measured coupling beside that of random eigenvectors, with one colour bar.

    Args:
        result: ``coupling`` and ``coupling_baseline``.
        axes: Where to draw; a new figure if not given.
    """
    if axes is None:
        import matplotlib.pyplot as plt

        axes = tuple(plt.subplots(1, 2, figsize=(8.6, 4.2), layout="constrained", sharey=True)[1])
    for ax, which in zip(axes, TITLES, strict=True):
        mesh = draw_matrix(result, ax, which)
        ax.set_title(TITLES[which])
    axes[1].set_ylabel("")
    add_bar(mesh, list(axes))
    return axes


def draw_matrix(result: ScalingResult, ax: Axes, which: str) -> Any:
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import MaxNLocator

    matrix = result.coupling if which == "measured" else result.coupling_baseline
    if matrix is None or not np.size(matrix):
        raise ArgumentError(f"the result holds no coupling matrix ({TITLES[which]})")
    image = relative(matrix)
    size = len(image)
    norm, colours = LogNorm(floor_of(result), 1.0), ink_map().with_extremes(bad=UNKNOWN, under="white")
    extent = (0.5, size + 0.5, size + 0.5, 0.5)
    mesh = ax.imshow(np.ma.masked_invalid(image), norm=norm, cmap=colours, extent=extent, interpolation="nearest")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
    ax.set_xlabel("direction, by curvature")
    ax.set_ylabel("direction, by curvature")
    return mesh


def add_bar(mesh: Any, axes: list[Axes]) -> None:
    bar = axes[0].figure.colorbar(mesh, ax=axes, pad=0.02, extend="min")
    bar.set_label(r"$|K_{ij}|\,/\,(K_{ii} K_{jj})^{1/2}$")


def relative(matrix: np.ndarray) -> np.ndarray:
    """``|K_ij| / sqrt(K_ii K_jj)``, NaN where a diagonal entry is not positive."""
    matrix = np.asarray(matrix, dtype=np.float64)
    diagonal = np.diagonal(matrix)
    root = np.sqrt(np.where(diagonal > 0, diagonal, np.nan))
    return np.abs(matrix) / root[:, None] / root


def floor_of(result: ScalingResult) -> float:
    """Where the colours begin, for both matrices: a power of ten or half of one, between 1e-4 and 0.1."""
    entries = []
    for matrix in (result.coupling, result.coupling_baseline):
        if matrix is not None and len(matrix) > 1:
            entries.append(relative(matrix)[~np.eye(len(matrix), dtype=bool)])
    known = np.concatenate(entries) if entries else np.empty(0)
    known = known[np.isfinite(known) & (known > 0)]
    if not len(known):
        return 0.1
    low = math.floor(2 * math.log10(float(np.quantile(known, 0.1)))) / 2
    return float(np.clip(10**low, DEEPEST, 0.1))
