"""The noise along directions against the curvature along them: power laws on more and more directions, with intervals.

Directions come from outside, as numbers of each sample along them. Where the directions were found on other samples
(held out), what a fit estimates is the exponent of ``v^T C v`` against ``v^T H v`` in the population, in that basis,
and the bootstrap over the measuring samples holds the basis fixed. Where ``C`` is proportional to ``H`` this is 1 in
every basis.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from curvdiag.errors import ArgumentError, NonFiniteError
from curvdiag.results import Result
from curvdiag.scaling import fits
from curvdiag.scaling.bootstrap import Moments, corrected_interval
from curvdiag.scaling.departure import Departure, departure
from curvdiag.seeds import Seed, resolve_seed

Array = NDArray[np.float64]
METHODS = ("ols", "theil-sen", "deming")

# Directions that may be left out (or be unresolved) before the range of the fits (or of their intervals) ends.
LEFT_OUT = 0.05
# Up to this relative standard error of H_ii and C_ii the bootstrap sees the bias of their logarithms. Measured: at 0.3
# to 0.6 in the weakest directions its 95 % intervals covered 93 to 100 %, above 1 only 66 to 81 %.
RESOLVED = 0.5
# The smallest number of directions that a fit is made on, and of replicates that tell 1 % from nothing.
FEWEST, REPLICATES = 3, 100
# Replicates of the Theil-Sen fit, which is slow; the interval needs their mean and spread only, and allows for both.
ROBUST_REPLICATES = 100


@dataclass(frozen=True)
class DirectionSamples:
    """What each sample's gradient ``g_i`` and Hessian ``h_i`` do along directions ``v_k``; float64 on the CPU.

    Directions are in descending order of the eigenvalues that they had where they were found.

    Attributes:
        slopes: ``[N, n]``, ``v_k . g_i``.
        curvatures: ``[N, n]``, ``v_k^T h_i v_k``.
        squares: ``[N, n]``, ``||h_i v_k||^2``, or None.
    """

    slopes: Tensor
    curvatures: Tensor
    squares: Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("slopes", "curvatures", "squares"):
            values = getattr(self, name)
            if values is not None and (values.dim() != 2 or values.shape != self.slopes.shape):
                expected = tuple(self.slopes.shape)
                raise ArgumentError(f"{name} are [samples, directions] like the slopes {expected}, not {values.shape}")

    @property
    def noise(self) -> Tensor:
        """``v_k^T C v_k``: variance of the slopes over the samples, ``[n]``."""
        return self.slopes.var(dim=0, correction=0)

    @property
    def curvature(self) -> Tensor:
        """``v_k^T H v_k``, ``[n]``."""
        return self.curvatures.mean(dim=0)

    @property
    def square(self) -> Tensor | None:
        """``v_k^T E[h^2] v_k``, ``[n]``."""
        return None if self.squares is None else self.squares.mean(dim=0)


@dataclass(frozen=True)
class PowerLaw(Result):
    """``log10 y = intercept + exponent log10 x`` on the first ``counts[j]`` directions, those of largest curvature.

    Attributes:
        counts: ``[m]``, directions up to which each fit goes.
        exponent, intercept, r_squared: ``[m]``, the fit itself, not corrected for anything.
        low, high: ``[m]``, interval of the exponent, corrected for bias and so not centred on ``exponent``; NaN where
            there is none.
        method: ``"ols"``, ``"theil-sen"`` or ``"deming"``.
    """

    counts: NDArray[np.int64]
    exponent: Array
    intercept: Array
    r_squared: Array
    low: Array
    high: Array
    method: str

    def __str__(self) -> str:
        rows = zip(self.counts, self.exponent, self.low, self.high, strict=True)
        return f"{self.method}: " + ", ".join(f"{e:.3f} [{lo:.3f}, {hi:.3f}] on {c}" for c, e, lo, hi in rows)


@dataclass(frozen=True)
class Directions(Result):
    """Curvature and noise along directions, and the power laws between them.

    Attributes:
        curvature, noise: ``[n]``, ``H_ii`` and ``C_ii``.
        curvature_error, noise_error: ``[n]``, their standard errors.
        square: ``[n]``, ``E[h^2]_ii``, or None.
        used: ``[n]``, where both ``H_ii`` and ``C_ii`` are positive; the others are left out of every fit.
        reach: The largest number of directions of which at most 5 % are left out. No fit goes beyond.
        resolved: The largest number of directions of which at most 5 % are left out or have a relative standard error
            above 1/2. No interval goes beyond: it would not keep its promise.
        noise_fits, square_fits: The fits of ``C_ii`` and of ``E[h^2]_ii`` on ``H_ii``, by method.
        departure: How far the points are from a straight line, and from slope 1, up to the largest count that has an
            interval; None without a bootstrap or with fewer than 3 such directions.
        level: Of the intervals.
        biased: The same samples gave the directions and the numbers along them.
    """

    curvature: Array
    noise: Array
    curvature_error: Array
    noise_error: Array
    square: Array | None
    used: NDArray[np.bool_]
    reach: int
    resolved: int
    noise_fits: dict[str, PowerLaw]
    square_fits: dict[str, PowerLaw]
    departure: Departure | None
    level: float
    biased: bool

    figure = "scaling"

    @property
    def left_out(self) -> int:
        """How many directions have no positive curvature or no positive noise."""
        return int((~self.used).sum())


def measure_power_law(
    samples: DirectionSamples,
    *,
    counts: Sequence[int] | None = None,
    bootstrap: int = 1000,
    level: float = 0.95,
    seed: Seed = 0,
    biased: bool = False,
    methods: Sequence[str] = METHODS,
) -> Directions:
    """Fit ``log10 C_ii`` and ``log10 E[h^2]_ii`` on ``log10 H_ii`` over the first so many directions.

    Three lines: ordinary least squares (``"ols"``, as published, and the default of the verdict), Theil-Sen (robust),
    and Deming (admits errors in both, of the mean variances and covariance that the samples tell). The interval of
    each is the bootstrap's normal interval less the bootstrap's bias. On made-up problems with known exponents
    (``benchmarks/calibration.py``: 20 directions over two decades) it covers 94 to 96 % with least squares at 2,000
    samples or more, and about 93 % at 400 and 91 % at 100, where the percentile interval falls to 76 %: errors of
    ``log H`` flatten the line, and resampling flattens it again. Where the population's points lie beside a line, as in
    a basis found on few samples, the other two are no safe ground: Deming's line takes what lies beside it for error
    (down to 87 %), and Theil-Sen's median jumps from pair to pair (82 %).

    Args:
        samples: Along directions found on other samples; or on the same ones, and then say ``biased=True``.
        counts: Numbers of directions to fit; those beyond the reach become the reach. By default 10, 20, 50, 100 and so
            on, with the numbers of directions that are resolved and that are in reach.
        bootstrap: Replicates, at least 100, or 0 for no intervals. Theil-Sen uses no more than 100 of them.
        level: Of the intervals.
        seed: Of the bootstrap.
        biased: Marks the result; changes no number.
        methods: Which lines to fit.

    Raises:
        ArgumentError: Fewer than three directions or two samples, or an argument out of its range.
        NonFiniteError: The samples hold NaN or infinite numbers.
    """
    _check(samples, counts, bootstrap, level, methods)
    squares = None if samples.squares is None else samples.squares.double().numpy()
    moments = Moments(samples.slopes.double().numpy(), samples.curvatures.double().numpy(), squares)
    used = (moments.values["curvature"] > 0) & (moments.values["noise"] > 0)
    errors = {name: moments.relative_error(name) for name in ("curvature", "noise")}
    reach = _furthest(used)
    resolved = _furthest(used & (errors["curvature"] <= RESOLVED) & (errors["noise"] <= RESOLVED))
    sizes = _sizes(counts, reach, resolved, used)
    if bootstrap:
        moments.draw(bootstrap, resolve_seed(seed))

    def laws(name: str) -> dict[str, PowerLaw]:
        certain = sizes <= resolved if bootstrap else np.zeros(len(sizes), dtype=bool)
        return {m: _power_law(_Points(moments, name, used), m, sizes, certain, level) for m in methods}

    certain = sizes[sizes <= resolved]
    return Directions(
        curvature=moments.values["curvature"],
        noise=moments.values["noise"],
        curvature_error=errors["curvature"] * np.abs(moments.values["curvature"]),
        noise_error=errors["noise"] * moments.values["noise"],
        square=moments.values.get("square"),
        used=used,
        reach=reach,
        resolved=resolved,
        noise_fits=laws("noise"),
        square_fits={} if squares is None else laws("square"),
        departure=_departure(_Points(moments, "noise", used), int(certain[-1])) if len(certain) else None,
        level=level,
        biased=biased,
    )


class _Points:
    """Logarithms of curvature and of one other quantity, NaN where a direction is left out, with their errors."""

    def __init__(self, moments: Moments, name: str, used: NDArray[np.bool_]) -> None:
        self.moments, self.name, self.used, self.samples = moments, name, used, moments.samples
        self.x = np.where(used, moments.logs["curvature"], np.nan)
        self.y = np.where(used, moments.logs[name], np.nan)

    def drawn(self, count: int, replicates: int | None = None) -> tuple[Array, Array]:
        used = self.used[:count]
        drawn = (self.moments.replicates[name][:replicates, :count] for name in ("curvature", self.name))
        x, y = (np.where(used, points, np.nan) for points in drawn)
        return x, y

    def errors(self, count: int) -> tuple[float, float, float]:
        """Mean variance of x, of y and their covariance over the first directions; the unit of all is the same."""
        names = (("curvature", "curvature"), (self.name, self.name), ("curvature", self.name))
        used = self.used[:count]
        a, b, c = (float(self.moments.relative_covariance(*pair)[:count][used].mean()) for pair in names)
        return a, b, c


def _power_law(
    points: _Points, method: str, sizes: NDArray[np.int64], certain: NDArray[np.bool_], level: float
) -> PowerLaw:
    columns = np.full((5, len(sizes)), np.nan)
    for j, count in enumerate(sizes):
        x, y = points.x[:count], points.y[:count]
        errors = points.errors(count) if method == "deming" else ()
        fit = {"ols": fits.least_squares, "theil-sen": fits.theil_sen, "deming": fits.deming}[method]
        line = fit(x, y, *errors)  # type: ignore[operator]
        interval = (np.nan, np.nan)
        if certain[j]:
            drawn = points.drawn(count, ROBUST_REPLICATES if method == "theil-sen" else None)
            interval = corrected_interval(line[0], fit(*drawn, *errors)[0], level, points.samples)  # type: ignore[operator]
        columns[:, j] = (*line, fits.r_squared(x, y, line), *interval)
    exponent, intercept, r_squared, low, high = columns
    return PowerLaw(sizes, exponent, intercept, r_squared, low, high, method)


def _departure(points: _Points, count: int) -> Departure | None:
    if not points.moments.replicates:
        return None
    return departure(points.x[:count], points.y[:count], *points.drawn(count), points.samples)


def _furthest(good: NDArray[np.bool_]) -> int:
    """The largest number of first directions of which at most 5 % are not good."""
    within = np.cumsum(~good) <= LEFT_OUT * np.arange(1, len(good) + 1)
    return int(np.flatnonzero(within)[-1]) + 1 if within.any() else 0


def _sizes(counts: Sequence[int] | None, reach: int, resolved: int, used: NDArray[np.bool_]) -> NDArray[np.int64]:
    if counts is None:
        steps = (step * 10**power for power in itertools.count(1) for step in (1, 2, 5))
        counts = [*itertools.takewhile(lambda size: size < reach, steps), resolved, reach]
    sizes = np.unique(np.minimum(np.asarray(counts, dtype=np.int64), reach))
    return sizes[[bool(used[:size].sum() >= FEWEST) for size in sizes]] if len(sizes) else sizes


def _check(
    samples: DirectionSamples, counts: Sequence[int] | None, bootstrap: int, level: float, methods: Sequence[str]
) -> None:
    size, directions = samples.slopes.shape
    if size < 2 or directions < FEWEST:
        raise ArgumentError(
            f"a power law needs at least {FEWEST} directions and 2 samples, not {directions} and {size}: give more"
        )
    for name in ("slopes", "curvatures", "squares"):
        values = getattr(samples, name)
        if values is not None and not bool(values.isfinite().all()):
            raise NonFiniteError(f"the {name} along directions hold NaN or infinite numbers: look at the loss there")
    if counts is not None and (len(counts) == 0 or min(counts) < FEWEST):
        raise ArgumentError(f"counts are numbers of directions, each at least {FEWEST}, not {list(counts)}")
    if bootstrap != 0 and bootstrap < REPLICATES:
        raise ArgumentError(f"bootstrap is a number of replicates, at least {REPLICATES} or 0, not {bootstrap}")
    if not 0 < level < 1:
        raise ArgumentError(f"the level of an interval lies between 0 and 1, not {level}")
    if not methods or not set(methods) <= set(METHODS):
        raise ArgumentError(f"methods are among {', '.join(METHODS)}, not {list(methods)}")
