"""Straight lines through points: ordinary least squares, Theil-Sen, and Deming's line for errors in both coordinates.

Each function takes points ``x``, ``y`` of shape ``[..., n]`` and fits every row of the leading dimensions at once, as
a bootstrap needs it. A point with a NaN coordinate is left out of its row.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Line = tuple[Array, Array]

# Theil-Sen looks at no more pairs than this; at all of them up to 447 points.
PAIRS = 100_000
# Numbers that Theil-Sen holds at a time.
CHUNK = 2**22


def least_squares(x: Array, y: Array) -> Line:
    """Slope and intercept that minimise the sum of squared vertical distances."""
    x, y, mean_x, mean_y, present = _centred(x, y)
    with np.errstate(invalid="ignore", divide="ignore"):
        slope = np.where(present.sum(-1) > 1, (x * y).sum(-1) / (x * x).sum(-1), np.nan)
    return slope, mean_y - slope * mean_x


def theil_sen(x: Array, y: Array) -> Line:
    """Median of the slopes over pairs of points; the intercept is ``median(y) - slope median(x)``.

    Up to 29 % of the points may be arbitrarily wrong. Above 447 points 100,000 random pairs stand for all, always the
    same ones.
    """
    first, second = _pairs(x.shape[-1])
    present = np.isfinite(x) & np.isfinite(y)
    xs = np.where(present, x, np.nan).reshape(-1, x.shape[-1])
    ys = np.where(present, y, np.nan).reshape(-1, x.shape[-1])
    slopes = np.empty(len(xs))
    step = max(1, CHUNK // max(1, len(first)))
    for start in range(0, len(xs), step):
        rows = slice(start, start + step)
        with np.errstate(invalid="ignore", divide="ignore"):
            run = xs[rows, second] - xs[rows, first]
            slopes[rows] = _median(np.where(run == 0, np.nan, (ys[rows, second] - ys[rows, first]) / run))
    shape = x.shape[:-1]
    slope = slopes.reshape(shape)
    return slope, _median(ys).reshape(shape) - slope * _median(xs).reshape(shape)


def deming(x: Array, y: Array, variance_x: float, variance_y: float, covariance: float = 0.0) -> Line:
    """The line that minimises ``sum (y - a - b x)^2 / (variance_y - 2 b covariance + b^2 variance_x)``.

    The maximum-likelihood line where all scatter about it is error, of these variances and this covariance in every
    point (only their ratios matter). Without error in ``x`` it is least squares, for equal variances the major axis.
    The minimum solves ``p b^2 + q b + r = 0`` with ``p = Sxy Vx - Sxx Vxy``, ``q = Sxx Vy - Syy Vx``,
    ``r = Syy Vxy - Sxy Vy``; of the two roots one is the minimum, the other the maximum. Where no line is better than
    another (all three zero: no errors, or errors along the line of points), it is least squares.
    """
    x, y, mean_x, mean_y, present = _centred(x, y)
    sxx, sxy, syy = (x * x).sum(-1), (x * y).sum(-1), (y * y).sum(-1)
    p = sxy * variance_x - sxx * covariance
    q = sxx * variance_y - syy * variance_x
    r = syy * covariance - sxy * variance_y
    root = np.sqrt(np.maximum(q * q - 4 * p * r, 0))
    with np.errstate(invalid="ignore", divide="ignore"):
        # The same root twice, each form where it does not cancel.
        slope = np.where(q >= 0, -2 * r / (q + root), (root - q) / (2 * p))
        undecided = np.abs(p) + np.abs(q) + np.abs(r) <= 1e-9 * (sxx * variance_y + syy * variance_x)
        slope = np.where(undecided, sxy / sxx, slope)
    slope = np.where(present.sum(-1) > 1, slope, np.nan)
    return slope, mean_y - slope * mean_x


def local_slopes(x: Array, y: Array, at: tuple[float, float]) -> tuple[Array, Array]:
    """Slopes of the least-squares parabola at two places ``at``; their difference is its bend between them."""
    x, y, mean_x, _, present = _centred(x, y)
    count = present.sum(-1)
    square = x * x
    with np.errstate(invalid="ignore", divide="ignore"):
        # What is left of the square when a line is taken out of it.
        tilt = (square * x).sum(-1) / square.sum(-1)
        rest = square - square.sum(-1, keepdims=True) / count[..., None] - tilt[..., None] * x
        rest = np.where(present, rest, 0.0)
        second = np.where(count > 2, (rest * y).sum(-1) / (rest * square).sum(-1), np.nan)
        first = (x * y).sum(-1) / square.sum(-1) - tilt * second
    low, high = (first + 2 * second * (place - mean_x) for place in at)
    return low, high


def r_squared(x: Array, y: Array, line: Line) -> Array:
    """Share of the variance of ``y`` that the line explains."""
    slope, intercept = line
    present = np.isfinite(x) & np.isfinite(y)
    rest = np.where(present, y - slope[..., None] * x - intercept[..., None], 0.0)
    centred = _centred(x, y)[1]
    with np.errstate(invalid="ignore", divide="ignore"):
        return 1 - (rest**2).sum(-1) / (centred**2).sum(-1)


def _pairs(points: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    if points * (points - 1) // 2 <= PAIRS:
        first, second = np.triu_indices(points, 1)
        return first, second
    first, second = np.random.default_rng(0).integers(points, size=(2, PAIRS))
    return first[first != second], second[first != second]


def _centred(x: Array, y: Array) -> tuple[Array, Array, Array, Array, NDArray[np.bool_]]:
    """Deviations from the means over the points that are there (zero for the others), the means, and which are."""
    present = np.isfinite(x) & np.isfinite(y)
    count = np.maximum(present.sum(-1), 1)
    mean_x = np.where(present, x, 0.0).sum(-1) / count
    mean_y = np.where(present, y, 0.0).sum(-1) / count
    x = np.where(present, x - mean_x[..., None], 0.0)
    y = np.where(present, y - mean_y[..., None], 0.0)
    return x, y, mean_x, mean_y, present


def _median(rows: Array) -> Array:
    """Median over the last axis of what is not NaN; much faster than ``nanmedian`` where nothing is."""
    missing = np.isnan(rows)
    if not missing.any():
        return np.median(rows, axis=-1)
    ordered = np.sort(rows, axis=-1)
    last = np.maximum((~missing).sum(-1, keepdims=True) - 1, 0)
    low, high = last // 2, (last + 1) // 2
    return ((np.take_along_axis(ordered, low, -1) + np.take_along_axis(ordered, high, -1)) / 2)[..., 0]
