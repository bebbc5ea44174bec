"""CWGD-Cosine and its controls on quadratics, cell by cell: exact, simulated, and each at its own best peak rate."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from scipy import stats

from curvdiag.estimate import Estimate
from curvdiag.experiments.quadratics import (
    NOISES,
    Array,
    BestRate,
    batch_cwgd,
    best_rate,
    cosine,
    curvatures_of,
    cwgd,
    cwgd_factor,
    decay,
    error_law,
    excess,
    noise_of,
    second_moments,
    simulate,
)
from curvdiag.results import Result

ALPHA, ETA_MAX, START = 1.0, 1.0, 10.0
"""The published alpha; a peak rate of ``1 / lambda_max``; every coordinate of the start. The last two are ours."""
LIMIT = 1 - 2 ** (-1 / 3)
"""What halving the peak rate of a long cosine to zero takes off the final error: 20.6 %."""
METHODS = ("cosine", "cwgd", "halved", "normalised")
MEASURED = ("cwgd", "normalised")
LOWEST = 5e-4
"""The lowest peak rate of the search, in units of ``1 / lambda_max``."""


@dataclass(frozen=True)
class Grid(Result):
    """The cells: every combination. The paper's own values are not known, but for the dimension, 50."""

    conditions: tuple[float, ...] = (1.0, 10.0, 100.0, 1000.0)
    batch_sizes: tuple[int, ...] = (4, 16, 64)
    noises: tuple[str, ...] = tuple(NOISES)
    floors: tuple[float, ...] = (0.0, 0.1)
    steps: tuple[int, ...] = (500, 5000)
    seeds: int = 64

    def __len__(self) -> int:
        sizes = (self.conditions, self.batch_sizes, self.noises, self.floors, self.steps)
        return int(np.prod([len(one) for one in sizes]))


@dataclass(frozen=True)
class Cell(Result):
    """One cell; errors are the expected loss above the minimum after the last step.

    Attributes:
        condition, noise, batch_size, floor, steps: What it is.
        exact: Expected final error by method: ``"cosine"``, ``"cwgd"`` (CWGD-Cosine, CWGD known and computed at each
            step), ``"halved"`` (cosine at ``eta_max / (1 + alpha)``) and ``"normalised"``.
        simulated: The same over seeds.
        z_scores: How far the simulation is from the exact error, as standard normal scores.
        measured: With CWGD from each step's mini-batch, as published: final error of ``"cwgd"`` and ``"normalised"``
            over the exact one of plain cosine.
        best_cosine, best_cwgd: Peak rate and error of cosine and of CWGD-Cosine, each at its own best.
        at_edge: Whether a best rate is one whose first step is on the edge of stability: too few steps for slow modes.
    """

    condition: float
    noise: str
    batch_size: int
    floor: float
    steps: int
    exact: dict[str, float]
    simulated: dict[str, Estimate]
    z_scores: dict[str, float]
    measured: dict[str, Estimate]
    best_cosine: tuple[float, float]
    best_cwgd: tuple[float, float]
    at_edge: bool

    @property
    def gain(self) -> float:
        """What CWGD-Cosine takes off the final error of cosine at the same ``eta_max``."""
        return 1 - self.exact["cwgd"] / self.exact["cosine"]


@dataclass(frozen=True)
class Agreement(Result):
    """Exact recursion against simulation over all cells and methods, whose noise is independent.

    Attributes:
        scores: How many.
        largest: The largest of their sizes.
        allowed: What the largest of so many standard normal numbers stays under with 99 % probability.
        mean_square: Of the scores; 1 in expectation.
        mean_square_range: Where it lies with 99 % probability.
    """

    scores: int
    largest: float
    allowed: float
    mean_square: float
    mean_square_range: tuple[float, float]

    @property
    def holds(self) -> bool:
        low, high = self.mean_square_range
        return self.largest < self.allowed and low < self.mean_square < high


def run_cells(grid: Grid, *, seed: int = 0, progress: Callable[[str], object] = lambda text: None) -> list[Cell]:
    """Every cell of the grid. Each has its own stream of random numbers, whatever the rest of the grid is."""
    cells: list[Cell] = []
    for steps, floor, condition in product(grid.steps, grid.floors, grid.conditions):
        progress(f"quadratics: condition number {condition:g}, cosine to {floor:g}, {steps} steps")
        cells += _group(grid, condition, floor, steps, seed)
    return cells


def schedules(noise: Array, curvatures: Array, steps: int, floor: float, eta_max: float = ETA_MAX) -> dict[str, Array]:
    """The rates ``[T]`` of each method, with CWGD known."""
    plain = eta_max * cosine(steps, floor)
    seen = np.array([cwgd(noise, curvatures) for _ in range(steps)])  # nothing in it depends on the state
    ratio = seen / seen[0]
    return {
        "cosine": plain,
        "cwgd": plain * cwgd_factor(ratio, ALPHA),
        "halved": eta_max / (1 + ALPHA) * cosine(steps, floor),
        "normalised": plain * cwgd_factor(ratio, ALPHA, normalized=True),
    }


def _group(grid: Grid, condition: float, floor: float, steps: int, seed: int) -> Iterator[Cell]:
    """All cells that share their curvatures and their cosine."""
    curvatures = curvatures_of(condition)
    names = list(product(grid.noises, grid.batch_sizes))
    single = [noise_of(kind, curvatures) for kind, _ in names]
    batched = np.array([noise / size for noise, (_, size) in zip(single, names, strict=True)])
    best = best_rates(curvatures, batched, floor, steps)
    for row, ((kind, size), noise) in enumerate(zip(names, single, strict=True)):
        rates = schedules(noise, curvatures, steps, floor)
        table = np.stack(list(rates.values()), axis=1)
        law = error_law(table, curvatures, batched[row], START)
        key = [seed, int(condition), size, list(NOISES).index(kind), round(1000 * floor), steps]
        errors = _simulated(table, curvatures, noise, size, grid.seeds, np.random.default_rng(key))
        known, measured = errors[: len(METHODS)], errors[len(METHODS) :] / law.mean[0]
        scores = law.z_score(known.mean(1), grid.seeds)
        yield Cell(
            condition=condition,
            noise=kind,
            batch_size=size,
            floor=floor,
            steps=steps,
            exact=dict(zip(METHODS, law.mean.tolist(), strict=True)),
            simulated={name: Estimate.from_samples(e) for name, e in zip(METHODS, known, strict=True)},
            z_scores=dict(zip(METHODS, scores.tolist(), strict=True)),
            measured={name: Estimate.from_samples(e) for name, e in zip(MEASURED, measured, strict=True)},
            best_cosine=(float(best["cosine"].rate[row]), float(best["cosine"].error[row])),
            best_cwgd=(float(best["cwgd"].rate[row]), float(best["cwgd"].error[row])),
            at_edge=bool(best["cosine"].at_edge[row] or best["cwgd"].at_edge[row]),
        )


def best_rates(curvatures: Array, batched: Array, floor: float, steps: int) -> dict[str, BestRate]:
    """Of cosine and of CWGD-Cosine, each searched by itself up to the peak rate at which its first step is unstable."""
    shapes = schedules(np.ones_like(curvatures), curvatures, steps, floor, 1.0)
    top = float(curvatures.max())
    return {
        name: best_rate(shapes[name], curvatures, batched, START, LOWEST, 2 / (top * shapes[name][0]))
        for name in ("cosine", "cwgd")
    }


def _simulated(
    table: Array, curvatures: Array, noise: Array, batch_size: int, seeds: int, generator: np.random.Generator
) -> Array:
    """Final errors ``[6, S]``: the four schedules with CWGD known, and two with CWGD from the mini-batch."""
    measure = batch_cwgd(noise, curvatures, batch_size, seeds, generator)
    first = measure()
    rates = np.empty((len(METHODS) + len(MEASURED), seeds))

    def at(t: int) -> Array:
        ratio = first / first if t == 0 else measure() / first
        factor = cwgd_factor(ratio, ALPHA)
        rates[: len(METHODS)] = table[t][:, None]
        rates[len(METHODS)] = table[t, 0] * factor
        rates[len(METHODS) + 1] = table[t, 0] * factor * (1 + ALPHA)
        return rates

    states = simulate(at, len(table), curvatures, noise / batch_size, START, rates.shape, generator)
    return excess(states**2, curvatures)


def agreement(cells: Sequence[Cell], level: float = 0.99) -> Agreement:
    """Whether exact errors and simulation agree, over all cells together."""
    scores = np.array([score for cell in cells for score in cell.z_scores.values()])
    each = level ** (1 / len(scores))  # all scores are independent
    low, high = stats.chi2.ppf([(1 - level) / 2, (1 + level) / 2], len(scores)) / len(scores)
    return Agreement(
        scores=len(scores),
        largest=float(np.abs(scores).max()),
        allowed=float(stats.norm.ppf((1 + each) / 2)),
        mean_square=float(np.mean(scores**2)),
        mean_square_range=(float(low), float(high)),
    )


def gains_by_horizon(
    horizons: Sequence[int], conditions: Sequence[float], floor: float, start: float = START, batch_size: int = 16
) -> Array:
    """``1 - error(CWGD-Cosine) / error(cosine)`` at the same peak rate, isotropic noise, ``[conditions, horizons]``."""
    curvatures = np.stack([curvatures_of(c) for c in conditions])
    gains = []
    for steps in horizons:
        rates = schedules(np.ones(1), np.ones(1), steps, floor)
        table = np.stack([rates["cosine"], rates["cwgd"]], axis=1)[..., None]
        forgotten, gained = decay(table, curvatures), second_moments(table, curvatures, np.ones(1) / batch_size, 0.0)
        errors = excess(gained + (forgotten * start) ** 2, curvatures)
        gains.append(1 - errors[1] / errors[0])
    return np.stack(gains, axis=1)
