"""How far points are from a straight line and from slope 1, beyond what errors of sampling explain."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from curvdiag.results import Result
from curvdiag.scaling import fits
from curvdiag.scaling.bootstrap import corrected_interval

Array = NDArray[np.float64]

# Of the interval of the bend: it is one more way to be wrong, beside the exponent's own.
LEVEL = 0.99
# In decades.
ROUNDING = 1e-9


@dataclass(frozen=True)
class Departure(Result):
    """What the law ``log10 C_ii = a + b log10 H_ii`` leaves over.

    Attributes:
        count: The first directions that were looked at.
        points: How many of them are used.
        decades: Range of ``log10 H_ii``.
        bottom, top: Local exponents at the smallest and at the largest curvature, by the least-squares parabola.
        bend: ``top - bottom``.
        bend_low, bend_high: Its 99 % interval, corrected for bias as those of the exponents are.
        scatter: Standard deviation of ``log10 C_ii`` about the line, in decades, beyond sampling error.
        scatter_p: Probability of so much scatter about the line from sampling alone.
        imbalance: Standard deviation of ``log10(C_ii / H_ii)``, in decades, beyond sampling error.
        imbalance_p: Probability of it where C is proportional to H.
    """

    count: int
    points: int
    decades: float
    bottom: float
    top: float
    bend: float
    bend_low: float
    bend_high: float
    scatter: float
    scatter_p: float
    imbalance: float
    imbalance_p: float


def departure(x: Array, y: Array, drawn_x: Array, drawn_y: Array, samples: int) -> Departure:
    """Compare points ``[n]`` with a line and with slope 1; replicates ``[R, n]`` tell the errors of sampling.

    NaN marks directions that are left out. The probabilities compare ``sum_k r_k^2 / v_k`` of the residuals, less
    their bias, with the same sum over the replicates, whose residuals are taken about their own mean; ``v_k`` is the
    variance of ``r_k`` over the replicates. So errors may differ from direction to direction and depend on each other.
    """
    count = len(x)
    used = np.isfinite(x) & np.isfinite(y)
    x, y, drawn_x, drawn_y = x[used], y[used], drawn_x[:, used], drawn_y[:, used]
    ends = float(x.min()), float(x.max())
    bottom, top = fits.local_slopes(x, y, ends)
    drawn_bottom, drawn_top = fits.local_slopes(drawn_x, drawn_y, ends)
    low, high = corrected_interval(top - bottom, drawn_top - drawn_bottom, LEVEL, samples)
    scatter, scatter_p = _excess(_about_line(x, y), _about_line(drawn_x, drawn_y))
    imbalance, imbalance_p = _excess(_about_mean(y - x), _about_mean(drawn_y - drawn_x))
    return Departure(
        count=count,
        points=len(x),
        decades=ends[1] - ends[0],
        bottom=float(bottom),
        top=float(top),
        bend=float(top - bottom),
        bend_low=low,
        bend_high=high,
        scatter=scatter,
        scatter_p=scatter_p,
        imbalance=imbalance,
        imbalance_p=imbalance_p,
    )


def _about_line(x: Array, y: Array) -> Array:
    slope, intercept = fits.least_squares(x, y)
    return y - slope[..., None] * x - intercept[..., None]


def _about_mean(values: Array) -> Array:
    return values - np.nanmean(values, axis=-1, keepdims=True)


def _excess(residuals: Array, drawn: Array) -> tuple[float, float]:
    """Standard deviation of residuals beyond that of sampling, and the probability of them from sampling alone."""
    if not np.isfinite(residuals).all():  # equal curvatures: no line
        return np.nan, np.nan
    mean = np.nanmean(drawn, axis=0)
    variance = np.nanvar(drawn, axis=0, ddof=1)
    residuals = 2 * residuals - mean
    excess = np.mean(residuals**2 - variance)
    # Residuals of exact laws are rounding errors of about 1e-15, and so is their spread: they depart from nothing.
    weights = 1 / (variance + ROUNDING**2)
    seen = np.mean(residuals**2 * weights)
    by_chance = np.nanmean((drawn - mean) ** 2 * weights, axis=1)
    rarer = (by_chance + ROUNDING >= seen).sum()
    return float(np.sqrt(max(excess, 0.0))), float((1 + rarer) / (1 + len(by_chance)))
