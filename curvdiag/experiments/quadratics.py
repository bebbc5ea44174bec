"""SGD on quadratics under a learning-rate schedule: exact second moments, the law of the final error, simulation.

``f(x) = 1/2 sum_k lambda_k x_k^2`` with gradients ``lambda_k x_k + e_k``, where the noise ``e`` of a mini-batch has
mean zero and variance ``s_k`` in mode ``k``. A step of rate ``eta`` takes the second moment ``v_k = E[x_k^2]`` to
``(1 - eta lambda_k)^2 v_k + eta^2 s_k``: no approximation, whatever the distribution of the noise.

Arrays: curvatures, noise and starts are ``[..., d]``, rates ``[T, ...]``, one for each step and each case; everything
before the modes broadcasts. All in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import special, stats

from curvdiag.errors import ArgumentError

Array = NDArray[np.float64]

DIMENSION = 50
FINER = 15  # points of each grid but the first, in the search for the best rate
NOISES = {"isotropic": 0.0, "proportional": 1.0, "inverse": -1.0}
"""Noise variances are proportional to this power of the curvatures."""


def curvatures_of(condition: float, dimension: int = DIMENSION) -> Array:
    """Eigenvalues from 1 to ``1 / condition``, evenly spaced in their logarithms, ``[d]``."""
    if not condition >= 1:
        raise ArgumentError(f"a condition number is at least 1, not {condition}")
    return np.geomspace(1.0, 1.0 / condition, dimension)


def noise_of(kind: str, curvatures: Array) -> Array:
    """Variances ``[d]`` of one sample's gradient, of mean 1 over the modes whatever their kind."""
    if kind not in NOISES:
        raise ArgumentError(f"the noise is one of {', '.join(NOISES)}, not {kind!r}")
    raw = curvatures ** NOISES[kind]
    return raw / raw.mean()


def cosine(steps: int, floor: float = 0.0) -> Array:
    """``eta_cos(t) / eta_max`` ``[T]`` for steps ``t = 0 .. T-1``: from 1 down to ``floor``, as PyTorch's scheduler."""
    if steps < 1 or not 0 <= floor <= 1:
        raise ArgumentError(f"a cosine has at least one step and a floor in [0, 1], not {steps} and {floor}")
    return floor + (1 - floor) * (1 + np.cos(np.pi * np.arange(steps) / steps)) / 2


def cwgd(noise: Array, curvatures: Array) -> Array:
    """``2 sum_k sigma_k^2 / lambda_k`` over the last axis, with the variances of one sample."""
    return 2 * np.sum(noise / curvatures, axis=-1)


def cwgd_factor(ratio: Array, alpha: float = 1.0, *, normalized: bool = False) -> Array:
    """What CWGD-Cosine multiplies the cosine by, from ``CWGD_t / CWGD_0``: ``1 / (1 + alpha ratio)``.

    The normalised variant, ``(1 + alpha) / (1 + alpha ratio)``, starts at 1 and keeps only what is adaptive. Its curve
    at the peak rate ``eta_max`` is the other's at ``(1 + alpha) eta_max``.
    """
    return (1 + alpha if normalized else 1.0) / (1 + alpha * np.asarray(ratio))


def second_moments(
    rates: Array,
    curvatures: Array,
    noise: Array | Callable[[Array], Array],
    start: Array | float,
    *,
    path: bool = False,
) -> Array:
    """``E[x_k^2]`` after all steps ``[..., d]``, or with ``path`` before the first and after each ``[T+1, ..., d]``.

    Args:
        rates: ``[T, ...]``.
        noise: Variances of the mini-batch gradient's noise; or a function that gives them, in expectation, from the
            second moments, for noise that depends on the state.
        start: Second moments at the start.
    """
    shape = np.broadcast_shapes((*rates.shape[1:], 1), curvatures.shape, np.shape(start))
    if not callable(noise):
        shape = np.broadcast_shapes(shape, noise.shape)
    second = np.broadcast_to(np.asarray(start, dtype=np.float64), shape).copy()
    seen = [second.copy()] if path else []
    with np.errstate(over="ignore", invalid="ignore"):
        for rate in rates[..., None]:
            kick = noise(second) if callable(noise) else noise
            second *= (1 - rate * curvatures) ** 2
            second += rate**2 * kick
            if path:
                seen.append(second.copy())
    # A rate far beyond the stable ones overflows, and then inf - inf or 0 inf is no number.
    return np.nan_to_num(np.stack(seen) if path else second, nan=np.inf, posinf=np.inf)


def decay(rates: Array, curvatures: Array) -> Array:
    """``E[x_k] / x_k(0)`` after all steps ``[..., d]``: the product of ``1 - eta_t lambda_k``."""
    left = np.ones(np.broadcast_shapes((*rates.shape[1:], 1), curvatures.shape))
    with np.errstate(over="ignore", invalid="ignore"):
        for rate in rates[..., None]:
            left *= 1 - rate * curvatures
    return left


def excess(second: Array, curvatures: Array) -> Array:
    """``1/2 sum_k lambda_k v_k``: the expected loss above the minimum, from second moments or squares."""
    return 0.5 * np.sum(curvatures * second, axis=-1)


@dataclass(frozen=True)
class ErrorLaw:
    """Cumulants of the final error, which is ``1/2 sum_k lambda_k x_k^2`` with independent normal ``x_k``.

    Attributes:
        mean, variance, third: First three cumulants, each of the cases' shape.
    """

    mean: Array
    variance: Array
    third: Array

    def z_score(self, means: Array, seeds: int) -> Array:
        """Means over independent seeds as standard normal scores.

        The mean of so few skewed numbers is not normal. Its law is taken as Pearson's type III with the same three
        cumulants (Imhof 1961, after Pearson 1959, for quadratic forms), which is exact where all modes have one
        variance and no mean.
        """
        spread = np.sqrt(self.variance / seeds)
        skew = self.third / self.variance**1.5 / np.sqrt(seeds)
        law = stats.pearson3(skew, loc=self.mean, scale=spread)
        upper = np.asarray(means) > self.mean
        tail = np.where(upper, law.logsf(means), law.logcdf(means))
        return np.where(upper, -1.0, 1.0) * special.ndtri_exp(tail)


def error_law(rates: Array, curvatures: Array, noise: Array, start: Array | float) -> ErrorLaw:
    """The law of the final error for Gaussian noise that does not depend on the state, from a fixed ``start``."""
    mean = decay(rates, curvatures) * start
    variance = second_moments(rates, curvatures, noise, 0.0)
    # x^2 of a normal x with mean m and variance v has the cumulants v + m^2, 2v^2 + 4v m^2, 8v^3 + 24 v^2 m^2.
    with np.errstate(over="ignore", invalid="ignore"):
        first = excess(variance + mean**2, curvatures)
        second = np.sum((curvatures / 2) ** 2 * (2 * variance**2 + 4 * variance * mean**2), axis=-1)
        third = np.sum((curvatures / 2) ** 3 * (8 * variance**3 + 24 * variance**2 * mean**2), axis=-1)
    return ErrorLaw(first, second, third)


def simulate(
    rates: Array | Callable[[int], Array],
    steps: int,
    curvatures: Array,
    noise: Array,
    start: Array | float,
    shape: tuple[int, int],
    generator: np.random.Generator,
) -> Array:
    """Final states ``[M, S, d]`` of SGD with Gaussian noise, all runs independent.

    Args:
        rates: ``[T, M]``, or a function of ``t`` that gives the rates ``[M, 1]`` or ``[M, S]`` of a step.
        steps: T.
        curvatures, noise: ``[d]``; ``noise`` is the variance of the mini-batch's gradient.
        shape: M schedules and S seeds.
    """
    x = np.broadcast_to(np.asarray(start, dtype=np.float64), (*shape, len(curvatures))).copy()
    spread, normal = np.sqrt(noise), np.empty_like(x)
    for t in range(steps):
        rate = (rates(t) if callable(rates) else rates[t][:, None])[..., None]
        generator.standard_normal(out=normal)
        normal *= spread
        normal += curvatures * x
        normal *= rate
        x -= normal
    return x


def batch_cwgd(
    noise: Array, curvatures: Array, batch_size: int, seeds: int, generator: np.random.Generator
) -> Callable[[], Array]:
    """CWGD ``[S]`` from the variances over one mini-batch of Gaussian gradients, drawn anew at each call.

    ``B - 1`` times the variance over the mini-batch is ``sigma_k^2`` times a chi-square of ``B - 1`` degrees of
    freedom, independent of the mini-batch's mean (Cochran 1934), so that no sample need be drawn. The Hessian is
    diagonal, and Hutchinson's diagonal exact from a single probe.
    """
    if batch_size < 2:
        raise ArgumentError("the variance over a mini-batch needs two samples")
    freedom = batch_size - 1
    weights = 2 * noise / curvatures * (2 / freedom)
    return lambda: generator.standard_gamma(freedom / 2, (seeds, len(curvatures))) @ weights


@dataclass(frozen=True)
class BestRate:
    """The peak rate of least expected error, case by case.

    Attributes:
        rate, error: Of the best.
        at_edge: Whether it lies at an end of the range that was searched.
    """

    rate: Array
    error: Array
    at_edge: NDArray[np.bool_]


def best_rate(
    factor: Array, curvatures: Array, noise: Array, start: Array | float, low: float, high: float, points: int = 201
) -> BestRate:
    """Search the peak rate of least final error: a grid in the logarithm, then ever finer ones about its minimum.

    Args:
        factor: The schedule ``[T]``, relative to its peak rate.
        curvatures: ``[d]``.
        noise: Variances of the mini-batch gradient ``[n, d]``, one row for each case.
        low, high: Range of peak rates.
        points: Of the first grid, which has to tell the minima apart: few steps make several.
    """

    def errors(rates: Array) -> Array:
        """``[n, rates]`` from rates of the same shape, or from ``[rates]`` which all cases share."""
        schedule = factor.reshape((-1,) + (1,) * rates.ndim) * rates
        # The error is linear in the noise: one response serves all cases that share their rates.
        forgotten, gained = decay(schedule, curvatures), second_moments(schedule, curvatures, np.ones(1), 0.0)
        with np.errstate(over="ignore", invalid="ignore"):
            found = excess((forgotten * start) ** 2 + gained * noise[:, None, :], curvatures)
        return np.nan_to_num(found, nan=np.inf)

    grid = np.geomspace(low, high, points)
    step = grid[1] / grid[0]
    found = errors(grid)
    index = found.argmin(1)
    at_edge = (index == 0) | (index == points - 1)
    best, least = grid[index], found.min(1)
    for _ in range(3):
        finer = np.clip(best[:, None] * step ** np.linspace(-1, 1, FINER), low, high)
        step **= 2 / (FINER - 1)
        found = errors(finer)
        rows, index = np.arange(len(found)), found.argmin(1)
        best, least = finer[rows, index], found[rows, index]
    return BestRate(best, least, at_edge)


def adiabatic_tail(eta_max: float, steps: int, curvatures: Array, noise: Array) -> Array:
    """``E[x_k^2]`` at the end of a long cosine to zero, in the limit of many steps, ``[d]``.

    Near its end the cosine is ``a s^2`` with ``a = eta_max pi^2 / (4 T^2)`` and ``s`` steps to go. The noise of those
    steps has not decayed: ``s_k int_0^inf a^2 s^4 exp(-2 lambda_k a s^3 / 3) ds =
    s_k Gamma(5/3) / 3 (3 / (2 lambda_k))^(5/3) a^(1/3)``: proportional to ``eta_max^(1/3)`` in every mode.
    """
    a = eta_max * np.pi**2 / (4 * steps**2)
    return noise * special.gamma(5 / 3) / 3 * (3 / (2 * curvatures)) ** (5 / 3) * a ** (1 / 3)
