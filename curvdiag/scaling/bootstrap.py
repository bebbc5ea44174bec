"""Means along directions with their errors: to first order, and by a bootstrap over samples; intervals from that."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

Array = NDArray[np.float64]

# Numbers in the bootstrap weights that are held at a time.
CHUNK = 2**23


class Moments:
    """Curvature, noise and (if given) mean square along directions, from numbers ``[N, n]`` of each sample.

    Attributes:
        values: By name (``"curvature"``, ``"noise"``, ``"square"``), ``[n]``.
        logs: Their logarithms to base 10, NaN where not positive.
        replicates: Logarithms ``[R, n]`` of the bootstrap's replicates, after :meth:`draw`.
    """

    def __init__(self, slopes: Array, curvatures: Array, squares: Array | None) -> None:
        self.samples = len(slopes)
        # Centred first: the variance must not be the difference of two large numbers.
        self._slopes = slopes - slopes.mean(0)
        self._terms = {"curvature": curvatures, "noise": self._slopes**2}
        if squares is not None:
            self._terms["square"] = squares
        self.values = {name: term.mean(0) for name, term in self._terms.items()}
        self.logs = {name: _log(value) for name, value in self.values.items()}
        self.replicates: dict[str, Array] = {}
        self._covariances: dict[tuple[str, str], Array] = {}

    def relative_covariance(self, one: str, other: str) -> Array:
        """Covariance of two relative errors, direction by direction: that of natural logarithms to first order."""
        if (one, other) not in self._covariances:
            self._covariances[one, other] = self._relative_covariance(one, other)
        return self._covariances[one, other]

    def _relative_covariance(self, one: str, other: str) -> Array:
        with np.errstate(invalid="ignore", divide="ignore"):
            product = ((self._terms[one] - self.values[one]) * (self._terms[other] - self.values[other])).mean(0)
            return product / (self.values[one] * self.values[other] * self.samples)

    def relative_error(self, name: str) -> Array:
        """Standard error over absolute value, ``[n]``; NaN where the value is zero."""
        return np.sqrt(self.relative_covariance(name, name))

    def draw(self, replicates: int, seed: int) -> None:
        """Resample, the same draw for all."""
        names = list(self._terms)
        *means, slope = resampled_means([*self._terms.values(), self._slopes], replicates, seed)
        self.replicates = dict(zip(names, means, strict=True))
        self.replicates["noise"] -= slope**2
        for name in names:
            self.replicates[name] = _log(self.replicates[name])


def resampled_means(columns: list[Array], replicates: int, seed: int) -> list[Array]:
    """Means ``[replicates, n]`` of each ``[N, n]`` over samples drawn with replacement, the same draw for all.

    How often each sample was drawn multiplies the columns in one matrix product.
    """
    size = len(columns[0])
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, 2])))
    means = [np.empty((replicates, c.shape[1])) for c in columns]
    step = max(1, CHUNK // size)
    for start in range(0, replicates, step):
        rows = min(step, replicates - start)
        counts = np.empty((rows, size))
        for row, drawn in zip(counts, generator.integers(size, size=(rows, size)), strict=True):
            row[:] = np.bincount(drawn, minlength=size)
        for mean, column in zip(means, columns, strict=True):
            mean[start : start + rows] = counts @ column / size
    return means


def corrected_interval(value: Array, replicates: Array, level: float, samples: int) -> tuple[float, float]:
    """Two-sided interval around ``value`` less its bias, from ``replicates`` ``[R]``.

    The bootstrap's mean less the value estimates the bias, its standard deviation the standard error; Student's t
    gives the width, with one degree of freedom less than there are samples, or replicates. Errors of ``log H`` flatten
    a slope and logarithms of noisy numbers are too small: a replicate suffers both a second time, so the difference
    shows them. NaN where fewer than nine in ten replicates could be fitted.
    """
    found = replicates[np.isfinite(replicates)]
    if len(found) < 0.9 * len(replicates) or len(found) < 2 or not np.isfinite(value):
        return np.nan, np.nan
    half = stdtrit(min(samples, len(found)) - 1, 0.5 + level / 2) * found.std(ddof=1)
    centre = 2 * value - found.mean()
    return float(centre - half), float(centre + half)


def _log(values: Array) -> Array:
    return np.log10(np.where(values > 0, values, np.nan))
