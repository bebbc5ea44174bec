"""Scalars over training, with their error bands."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from scipy.special import stdtrit

from curvdiag.errors import ArgumentError
from curvdiag.plotting.style import LINES, open_frame, own_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from curvdiag.record.series import Series

LEVEL = 0.95


def scalars(
    series: Series | Sequence[Series],
    ax: Axes | None = None,
    *,
    time: str = "steps",
    log: bool | None = None,
    title: str = "",
) -> Axes:
    """One or several scalars over steps or epochs.

    The bands are Student-t intervals at 95 %, drawn where a value averages three samples or more; fewer say
    nothing usable about their own spread. NaN leaves a gap.

    Args:
        series: ``name``, ``steps``, ``epochs``, ``values``, ``standard_errors``, ``samples``; one or several.
        ax: Where to draw; a new figure if not given.
        time: ``"steps"`` or ``"epochs"``.
        log: Logarithmic values; ``None`` for yes where all are positive, their bands too, and span a factor of 30.
        title: Of the axes.

    Raises:
        ArgumentError: There is nothing to draw, or ``time`` is not one of these.
    """
    several = list(series) if isinstance(series, Sequence) else [series]
    if not several:
        raise ArgumentError("there is no series to draw")
    if time not in ("steps", "epochs"):
        raise ArgumentError(f'time is "steps" or "epochs", not {time!r}')
    shown = np.concatenate([np.asarray(one.values, dtype=np.float64) for one in several])
    shown = shown[np.isfinite(shown)]
    if log is None:
        lowest = np.concatenate([shown, *(band(one)[0] for one in several)])
        log = bool(len(shown) and np.nanmin(lowest) > 0 and shown.max() > 30 * shown.min())

    ax = own_axes(ax)
    for index, one in enumerate(several):
        colour, dash, marker = LINES[index % len(LINES)]
        at = np.asarray(getattr(one, time), dtype=np.float64)
        values = np.where(np.isfinite(one.values), one.values, np.nan)
        low, high = band(one)
        if log:
            values = np.where(values > 0, values, np.nan)
            # A band that reaches zero or less goes to the foot of the picture.
            low = np.where(low > 0, low, shown[shown > 0].min(initial=1.0) / 10)
        ax.fill_between(at, low, high, color=colour, alpha=0.18, linewidth=0)
        every = max(1, len(at) // 12)
        ax.plot(at, values, color=colour, linestyle=dash, marker=marker, markersize=3.5, markevery=every,
                linewidth=1.3, label=one.name)  # fmt: skip
    if log:
        ax.set_yscale("log")
    ax.set_xlabel("optimizer step" if time == "steps" else "epoch")
    if len(several) == 1:
        ax.set_ylabel(several[0].name)
    else:
        ax.set_ylabel("value")
        ax.legend(loc="best", fontsize="small", framealpha=0.9)
    if title:
        ax.set_title(title)
    ax.margins(x=0.02)
    open_frame(ax)
    return ax


def band(one: Series) -> tuple[np.ndarray, np.ndarray]:
    """Ends of the intervals; NaN where there is none."""
    values = np.asarray(one.values, dtype=np.float64)
    errors = np.asarray(one.standard_errors, dtype=np.float64)
    samples = np.asarray(one.samples) if len(one.samples) == len(values) else np.zeros(len(values))
    known = (samples >= 3) & np.isfinite(errors) & np.isfinite(values)
    t = stdtrit(np.maximum(samples - 1, 1), 0.5 + LEVEL / 2)
    half = np.where(known, t * errors, np.nan)
    return values - half, values + half
