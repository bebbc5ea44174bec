"""An estimate with its interval."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from curvdiag.plotting.style import BLUE, open_frame, own_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from curvdiag.estimate import Estimate


def estimate(estimate: Estimate, ax: Axes | None = None, *, label: str = "estimate") -> Axes:
    """A value, or an array of them by index, with 95 % Student-t intervals from three samples or more.

    Args:
        estimate: ``value``, ``standard_error``, ``samples``.
        ax: Where to draw; a new figure if not given.
        label: Of the values.
    """
    values = np.ravel(np.asarray(estimate.value, dtype=np.float64))
    low, high = (np.ravel(end) for end in estimate.interval(0.95))
    known = np.isfinite(low) & np.isfinite(high)
    bars = np.where(known, np.stack([values - low, high - values]), 0.0)

    scalar = np.ndim(estimate.value) == 0
    ax = own_axes(ax, 2.6 if scalar else 6.4, 3.2)
    ax.errorbar(np.arange(len(values)), values, bars, fmt="o", color=BLUE, markersize=4.5, capsize=4.0)
    if scalar:
        ax.set_xticks([])
        ax.set_xlim(-1, 1)
        ax.set_title(str(estimate), fontsize="small")
    else:
        ax.set_xlabel("index")
    ax.set_ylabel(label)
    open_frame(ax)
    return ax
