"""Eigenvalues with their residuals."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from curvdiag.plotting.style import BLUE, INK, open_frame, own_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from curvdiag.spectrum.eigen import Eigenpairs


def eigenpairs(eigenpairs: Eigenpairs, ax: Axes | None = None, *, title: str = "") -> Axes:
    """Eigenvalues by rank; bars span one residual to each side and so hold an exact eigenvalue.

    Full markers have converged, hollow ones have not. The scale is logarithmic where all values are positive
    and span a factor of 100.

    Args:
        eigenpairs: ``values``, ``residuals`` and ``converged``.
        ax: Where to draw; a new figure if not given.
        title: Of the axes.
    """
    from matplotlib.ticker import MaxNLocator

    values = np.asarray(eigenpairs.values.detach().cpu(), dtype=np.float64)
    residuals = np.asarray(eigenpairs.residuals.detach().cpu(), dtype=np.float64)
    converged = np.asarray(eigenpairs.converged.detach().cpu(), dtype=bool)
    rank = np.arange(1, len(values) + 1)
    log = bool(len(values) and values.min() > 0 and values.max() > 100 * values.min())

    ax = own_axes(ax)
    if log:
        ax.set_yscale("log")
        residuals = np.stack([np.minimum(residuals, 0.9 * values), residuals])
    else:
        ax.vlines(rank, 0.0, values, color=BLUE, linewidth=1.0, alpha=0.5)
        ax.axhline(0.0, color=INK, linewidth=0.7)
    ax.errorbar(rank, values, residuals, fmt="none", ecolor=INK, elinewidth=1.0, capsize=3.0)
    style: dict[str, Any] = {"markeredgecolor": BLUE, "linestyle": "none", "marker": "o", "markersize": 5.5}
    for which, face, label in ((converged, BLUE, "converged"), (~converged, "white", "not converged")):
        if which.any():
            ax.plot(rank[which], values[which], markerfacecolor=face, label=label, **style)
    if not converged.all():
        ax.legend(loc="best", fontsize="small", framealpha=0.9)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel("rank")
    ax.set_ylabel("eigenvalue")
    if title:
        ax.set_title(title)
    open_frame(ax)
    return ax
