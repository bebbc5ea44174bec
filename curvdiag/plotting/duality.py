"""What the activity-weight duality predicts of the gradient noise, beside the noise itself."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from curvdiag.errors import ArgumentError
from curvdiag.plotting.style import LINES, open_frame, own_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from curvdiag.scaling.duality import Duality


def duality(result: Duality, ax: Axes | None = None, *, title: str = "") -> Axes:
    """Measured ``C_ii`` and each prediction of it against ``H_ii``, both logarithmic, with their exponents.

    What is not positive has no place on these axes and is not drawn.

    Args:
        result: With what it found along directions.
        ax: Where to draw; a new figure if not given.
        title: Of the axes.

    Raises:
        ArgumentError: Nothing was measured along directions.
    """
    if result.noise is None or result.curvature is None:
        raise ArgumentError("there is nothing to draw: give activity_weight_duality directions=, say eigenvectors of H")
    ax = own_axes(ax, 6.4, 4.8)
    ax.set_xscale("log")
    ax.set_yscale("log")
    curvature = np.asarray(result.curvature, dtype=np.float64)
    series = {"measured C": (result.noise, result.noise_exponent)}
    series |= {name: (one.along, one.exponent) for name, one in result.predictions.items() if one.along is not None}
    size = float(np.clip(9.0 * len(curvature) ** -0.2, 2.2, 5.0))
    for (name, (values, exponent)), (colour, _, marker) in zip(series.items(), LINES, strict=False):
        y = np.asarray(values, dtype=np.float64)
        seen = (curvature > 0) & (y > 0)
        slope = "" if math.isnan(exponent) else f", exponent {exponent:.2f}"
        measured = name == "measured C"
        ax.plot(
            curvature[seen], y[seen], linestyle="none", marker=marker, color=colour, markersize=size,
            markerfacecolor=colour if measured else "white", markeredgewidth=0.6, alpha=0.85,
            zorder=3 if measured else 2, label=name + slope,
        )  # fmt: skip
    ax.set_xlabel(r"curvature $H_{ii}$")
    ax.set_ylabel(r"gradient noise $C_{ii}$, measured and predicted")
    if title:
        ax.set_title(title)
    ax.legend(loc="best", fontsize="small", framealpha=0.9)
    open_frame(ax)
    return ax
