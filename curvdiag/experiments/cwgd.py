"""Where the 20 % of CWGD-Cosine come from, and what is left of it where curvature or noise change along the way.

Hamza and Goel (arXiv:2606.30455) divide a cosine schedule by 1 + CWGD_t / CWGD_0 and report about 20 % lower final
errors on strongly convex quadratics. There CWGD is constant and the division halves the peak rate. This experiment
takes 50-dimensional quadratics (condition numbers 1 to 1000, three batch sizes, three kinds of noise, cosine to 0 and
to a tenth), exactly by the recursion of second moments and by simulation, beside the controls: cosine at half the
peak rate, both at their best peak rate, and the normalised variant. Then noise that depends on the state, Hessians
that are rotated or turn, a quartic, and a small net on digits, where each method is tuned and compared with cosine on
fresh seeds.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from curvdiag.experiments.cwgd_adaptive import Outcome, compare_methods
from curvdiag.experiments.cwgd_cases import STEPS, all_cases
from curvdiag.experiments.cwgd_cells import (
    ALPHA,
    ETA_MAX,
    LIMIT,
    START,
    Agreement,
    Cell,
    Grid,
    agreement,
    best_rates,
    gains_by_horizon,
    run_cells,
    schedules,
)
from curvdiag.experiments.cwgd_digits import compare_on_digits
from curvdiag.experiments.cwgd_measured import MeasuredRun, measured_run
from curvdiag.experiments.quadratics import cosine, curvatures_of, error_law, excess, noise_of, second_moments
from curvdiag.results import Result

MINUTES = 9.0
"""Of the whole run on 2 CPU cores."""
HORIZONS = (200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
QUICK = Grid(conditions=(1.0, 100.0), batch_sizes=(16,), floors=(0.0, 0.1), steps=(100,), seeds=16)


@dataclass(frozen=True)
class Horizons(Result):
    """``1 - error(CWGD-Cosine) / error(cosine)`` at the same peak rate, by cosine floor ``[conditions, steps]``."""

    steps: tuple[int, ...]
    conditions: tuple[float, ...]
    gains: dict[str, list[list[float]]]


@dataclass(frozen=True)
class Paths(Result):
    """Expected error of one cell before step ``at``, by method."""

    condition: float
    noise: str
    batch_size: int
    at: tuple[int, ...]
    errors: dict[str, list[float]]


@dataclass(frozen=True)
class RateCurves(Result):
    """Final error of cosine and of CWGD-Cosine against the peak rate, by condition number."""

    steps: int
    rates: tuple[float, ...]
    errors: dict[str, tuple[list[float], list[float]]]


@dataclass(frozen=True)
class Published(Result):
    """The published set-up and its controls."""

    grid: Grid
    agreement: Agreement
    cells: tuple[Cell, ...]
    horizons: Horizons
    paths: Paths
    rate_curves: RateCurves
    measured: tuple[MeasuredRun, ...]


@dataclass(frozen=True)
class Study(Result):
    """All of it: the published set-up, and the cases that have something to adapt to."""

    published: Published
    adaptive: tuple[Outcome, ...]


def run(*, seed: int = 0, quick: bool = False, progress: Callable[[str], object] = print) -> Study:
    """The whole experiment; ``quick`` is a run of seconds on a few cells and short trainings, for tests."""
    published = run_published(QUICK if quick else Grid(), seed=seed, quick=quick, progress=progress)
    rates = 2.0 ** np.arange(-4, 2)
    few: dict[str, Any] = {"tuning_seeds": 8, "seeds": 8, "rates": rates} if quick else {}
    adaptive = [compare_methods(c, seed=seed, progress=progress, **few) for c in all_cases(60 if quick else STEPS)]
    if quick:
        few |= {"tuning_seeds": 1, "seeds": 2, "rates": rates[1:3], "epochs": 1, "forms": ("diagonal",), "refreshes": 2}
    adaptive.append(compare_on_digits(seed=seed, progress=progress, **few))
    return Study(published, tuple(adaptive))


def run_published(
    grid: Grid, *, seed: int = 0, quick: bool = False, progress: Callable[[str], object] = print
) -> Published:
    """The published set-up over a grid, with everything that the figure shows of it."""
    cells = run_cells(grid, seed=seed, progress=progress)
    steps = max(grid.steps)
    progress("quadratics: horizons, one cell along the way, peak rates, CWGD measured along a run")
    measured = [
        measured_run(noise=noise, rotated=rotated, steps=50 if quick else 2000, points=2 if quick else 9, seed=seed)
        for noise, rotated in ((("isotropic", False),) if quick else (("isotropic", False), ("isotropic", True)))
    ]
    return Published(
        grid=grid,
        agreement=agreement(cells),
        cells=tuple(cells),
        horizons=_horizons(HORIZONS[:2] if quick else HORIZONS, grid.conditions),
        paths=_paths(steps),
        rate_curves=_rate_curves(steps, grid.conditions, points=9 if quick else 81),
        measured=tuple(measured),
    )


def _horizons(steps: Sequence[int], conditions: Sequence[float]) -> Horizons:
    gains = {f"{floor:g}": gains_by_horizon(steps, conditions, floor).tolist() for floor in (0.0, 0.1)}
    return Horizons(tuple(steps), tuple(conditions), gains)


def _paths(steps: int, condition: float = 100.0, noise: str = "isotropic", batch_size: int = 16) -> Paths:
    curvatures = curvatures_of(condition)
    single = noise_of(noise, curvatures)
    batched = single / batch_size
    best = best_rates(curvatures, batched[None], 0.0, steps)
    own = schedules(single, curvatures, steps, 0.0)
    rates = {
        "cosine": own["cosine"],
        "CWGD-Cosine": own["cwgd"],
        "cosine from half the rate": own["halved"],
        "normalised": own["normalised"],
        "cosine, best rate": float(best["cosine"].rate[0]) * cosine(steps),
        "CWGD-Cosine, best rate": float(best["cwgd"].rate[0]) / (1 + ALPHA) * cosine(steps),
    }
    table = np.stack(list(rates.values()), axis=1)
    moments = second_moments(table, curvatures, batched, START**2, path=True)
    at = np.unique(np.linspace(0, steps, 251).round().astype(int))
    errors = excess(moments[at], curvatures)
    return Paths(
        condition, noise, batch_size, tuple(at.tolist()), {name: errors[:, i].tolist() for i, name in enumerate(rates)}
    )


def _rate_curves(steps: int, conditions: Sequence[float], points: int, batch_size: int = 16) -> RateCurves:
    rates = np.geomspace(0.001, 8.0, points)
    found = {}
    for condition in conditions:
        curvatures = curvatures_of(condition)
        noise = noise_of("isotropic", curvatures)
        shapes = schedules(noise, curvatures, steps, 0.0, 1.0)
        pair = [
            error_law(shapes[name][:, None] * rates, curvatures, noise / batch_size, START).mean.tolist()
            for name in ("cosine", "cwgd")
        ]
        found[f"{condition:g}"] = (pair[0], pair[1])
    return RateCurves(steps, tuple(rates.tolist()), found)


def summary(study: Study) -> dict[str, Any]:
    """The figures that the text quotes."""
    cells = study.published.cells
    long = max(study.published.grid.steps)

    def span(values: list[float]) -> list[float]:
        return [min(values), max(values)]

    gains: dict[str, list[float]] = {}
    for cell in cells:
        steps = f"{cell.steps} steps, cosine to {cell.floor:g}"
        gains.setdefault(f"{steps}, condition {cell.condition:g}", []).append(cell.gain)
        if cell.steps == long and cell.condition <= 100:
            gains.setdefault(f"{steps}, condition 1 to 100", []).append(cell.gain)
    measured: dict[str, list[tuple[float, float]]] = {}
    for cell in cells:
        for name, plain in (("cwgd", cell.exact["halved"]), ("normalised", cell.exact["cosine"])):
            one, scale = cell.measured[name], cell.exact["cosine"] / plain
            pair = scale * one.value, scale * one.standard_error
            measured.setdefault(f"{name}, batch {cell.batch_size}", []).append(pair)
    return {
        "1 - 2^(-1/3)": LIMIT,
        "gain at the same peak rate": {name: span(values) for name, values in sorted(gains.items())},
        "|CWGD-Cosine / cosine at half the peak rate - 1|, largest": max(
            abs(c.exact["cwgd"] / c.exact["halved"] - 1) for c in cells
        ),
        "|normalised / cosine - 1|, largest": max(abs(c.exact["normalised"] / c.exact["cosine"] - 1) for c in cells),
        "|CWGD-Cosine / cosine - 1| each at its best peak rate, largest": max(
            abs(c.best_cwgd[1] / c.best_cosine[1] - 1) for c in cells
        ),
        "best peak rate of CWGD-Cosine / of cosine": span([c.best_cwgd[0] / c.best_cosine[0] for c in cells]),
        "cells whose best peak rate is on the edge of stability": sum(c.at_edge for c in cells),
        "CWGD from each mini-batch: final error / that with CWGD known, mean over cells and its standard error": {
            name: [float(np.mean([value for value, _ in pairs])), math.hypot(*(e for _, e in pairs)) / len(pairs)]
            for name, pairs in measured.items()
        },
        "agreement of exact and simulated holds": study.published.agreement.holds,
        "where curvature or noise change": [
            f"{o.name}, {c.form}: {c.method} {c.ratio:.3f} [{c.low:.3f}, {c.high:.3f}] of tuned cosine: {c.verdict}"
            for o in study.adaptive
            for c in o.comparisons
        ],
    }


def reproduce(
    out: Path, *, seed: int = 0, quick: bool = False, progress: Callable[[str], object] = print
) -> list[Path]:
    """Run it all and write ``cwgd.png`` and ``cwgd.json`` into ``out``; returns their paths."""
    from matplotlib.figure import Figure

    from curvdiag.experiments.saved import make_folder, save
    from curvdiag.plotting.cwgd_page import HEIGHT, WIDTH, cwgd_page

    make_folder(out)
    started = time.perf_counter()
    study = run(seed=seed, quick=quick, progress=progress)
    page = cwgd_page(study, Figure(figsize=(WIDTH, HEIGHT), layout="constrained"))
    options = {"alpha": ALPHA, "eta_max": ETA_MAX, "start": START, "quick": quick}
    results = {"summary": summary(study), **study.to_dict()}
    return save("cwgd", out, page, results, options=options, seed=seed, seconds=time.perf_counter() - started)
