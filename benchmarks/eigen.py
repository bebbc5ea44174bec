"""Products that eigenpairs cost: ours beside PyHessian's power iteration and SciPy's eigsh, and from warm starts."""

from __future__ import annotations

import importlib
import statistics
from unittest import mock

import numpy as np
import torch
from digits import TRAININGS, checkpoints, trained
from measure import Timing
from nets import Batches
from report import Row
from scipy.sparse.linalg import eigsh
from settings import Settings
from torch import Tensor, nn
from whole_runs import pyhessian

from curvdiag import Hessian, Objective, top_eigenpairs

WIDTH, TRAINED, NET = 20, 1500, "digits MLP, trained"
K, TOL = 10, 1e-3
SHARE = 3
"""Ours may take at most a third of the products of power iteration."""
EVERY, CHECKPOINTS, WARM = 50, 10, {1e-2: 0.7, 1e-3: 0.8}
"""Steps between measurements, how many, and the most that a warm start may take of a cold one's products."""
RUNS = 6
"""Training runs, from different seeds, over which warm starts are compared: one alone may say anything."""
EXCESS = 2
"""Most products that a warm start may take beyond a cold one, ever."""


def eigen_rows(settings: Settings) -> list[Row]:
    return [*top_rows(settings), *warm_rows(settings)]


def top_rows(settings: Settings) -> list[Row]:
    """Counts on a trained net, each from a few start vectors; the median decides."""
    section = f"Products for the top {K} eigenpairs, relative residual {TOL:g}"
    model, batch = trained(WIDTH, TRAINED)
    objective = Objective(model, nn.CrossEntropyLoss(), batches=[batch])
    truth = Hessian(objective, dtype=torch.float64)
    values = np.linalg.eigvalsh(truth.dense(chunk=256).numpy())[::-1][:K].copy()
    seeds = range(1 if settings.quick else 5)
    ours = [own_count(objective, truth, values, seed) for seed in seeds]
    scipy = [scipy_count(objective, truth, values, seed) for seed in seeds]
    loose = [loosest_scipy(objective, truth, values, seed) for seed in seeds]
    power = [power_count(model, [batch], truth, values, seed) for seed in seeds]
    counts = [Timing(tuple(float(count) for count, _ in found)) for found in (ours, power, scipy, loose)]
    notes = [_worst(found) for found in (ours, power, scipy, loose)]
    most = counts[0].median
    found_all = all(words.startswith("all") for _, words in scipy)
    own = Row(section, NET, "curvdiag", most, *counts[0].quartiles, note=notes[0], unit="count")
    others = (
        ("PyHessian, power iteration", SHARE, f"at least {SHARE} times ours", True),
        ("SciPy eigsh, its tolerance as asked", 1, "no fewer than ours", found_all),
        ("SciPy eigsh, loosest that reaches it", 1, "", True),
    )
    return [
        own,
        *(
            _against(section, what, count, times * most, target, note if compared else f"void: {note}", compared)
            for (what, times, target, compared), count, note in zip(others, counts[1:], notes[1:], strict=True)
        ),
    ]


def own_count(objective: Objective, truth: Hessian, values: np.ndarray, seed: int) -> tuple[int, str]:
    found = top_eigenpairs(Hessian(objective), K, tol=TOL, seed=seed)
    return found.matvecs, quality(truth, found.values, found.vectors, values)


def scipy_count(
    objective: Objective, truth: Hessian, values: np.ndarray, seed: int, tol: float = TOL
) -> tuple[int, str]:
    """Products that ARPACK makes with its default basis."""
    operator = Hessian(objective)
    start = np.random.default_rng(seed).standard_normal(operator.size).astype(np.float32)
    found, vectors = eigsh(operator.to_scipy(), k=K, which="LA", tol=tol, v0=start)
    return operator.cost.matvecs, quality(truth, torch.from_numpy(found), torch.from_numpy(vectors), values)


def loosest_scipy(objective: Objective, truth: Hessian, values: np.ndarray, seed: int) -> tuple[int, str]:
    """Its tolerance is a share of each eigenvalue, ours of the largest: the fewest products that reach ours."""
    tol = TOL * values[0] / values[-1]
    while True:
        count, words = scipy_count(objective, truth, values, seed, tol)
        if words.startswith("all") and residual_of(words) <= TOL:
            return count, words
        if tol < TOL / 10:
            raise RuntimeError(f"eigsh does not reach a residual of {TOL:g}: {words}")
        tol /= 2


def power_count(model: nn.Module, batches: Batches, truth: Hessian, values: np.ndarray, seed: int) -> tuple[int, str]:
    """Products of PyHessian's power iteration as it ships: one hundred at most for each, a change of a thousandth."""
    module = importlib.import_module("pyhessian.hessian")
    asked = pyhessian(model, batches)
    multiply = module.hessian_vector_product
    with (
        mock.patch.object(module, "hessian_vector_product", side_effect=multiply) as counted,
        torch.random.fork_rng(devices=[]),
    ):
        torch.manual_seed(seed)
        found, vectors = asked.eigenvalues(maxIter=100, tol=TOL, top_n=K)
    columns = torch.stack([torch.cat([part.detach().reshape(-1) for part in v]) for v in vectors], 1)
    return counted.call_count, quality(truth, torch.tensor(found), columns, values)


def quality(truth: Hessian, found: Tensor, vectors: Tensor, values: np.ndarray) -> str:
    """How many of LAPACK's values were found, and the largest residual as a share of the largest eigenvalue."""
    vectors = vectors.double() / vectors.double().norm(dim=0)
    residual = float((truth @ vectors - vectors * found.double()).norm(dim=0).max() / values[0])
    # A residual bounds the distance to some eigenvalue; that much and no more is asked of each.
    leeway = max(2 * TOL, residual) * values[0]
    got = np.sort(found.double().numpy())[::-1]
    hits = int((np.abs(got - values) <= leeway).sum())
    return (
        f"{'all' if hits == len(values) else hits} of LAPACK's values, largest residual {residual:.1e} of the largest"
    )


def residual_of(words: str) -> float:
    return float(words.split("largest residual ")[1].split()[0])


def warm_rows(settings: Settings) -> list[Row]:
    """The top eigenpair along training runs, from the last measurement's vector and from nothing."""
    section = f"Products for lambda_max from a warm start, {EVERY} SGD steps later, in those of a cold one"
    rows, worst = [], (-100, "", "")
    seeds = range(1 if settings.quick else RUNS)
    for net in TRAININGS:
        for tol, limit in WARM.items():
            counts = [pair for seed in seeds for pair in warm_and_cold(net, tol, seed, settings.quick)]
            shares = Timing(tuple(warm / cold for warm, cold in counts))
            means = [statistics.fmean(column) for column in zip(*counts, strict=True)]
            note = (
                f"mean over {len(counts)} checkpoints of {len(seeds)} runs; {means[0]:.1f} products for {means[1]:.1f}"
            )
            what, target = f"curvdiag, tolerance {tol:g}", f"at most {limit}"
            low, high = shares.quartiles
            rows.append(Row(section, net, what, shares.mean, low, high, target, shares.mean <= limit, note, "times"))
            excess = max(warm - cold for warm, cold in counts)
            worst = max(worst, (excess, net, f"at tolerance {tol:g}"))
    excess, net, where = worst
    what, target = "curvdiag, worst excess over cold", f"at most {EXCESS}"
    return [*rows, Row(section, net, what, excess, excess, excess, target, excess <= EXCESS, where, "count")]


def warm_and_cold(net: str, tol: float, seed: int, quick: bool) -> list[tuple[int, int]]:
    """Products at each checkpoint after the first, warm and cold."""
    counts, last = [], None
    run = checkpoints(TRAININGS[net], first=300, every=EVERY, count=4 if quick else CHECKPOINTS + 1, seed=seed)
    for index, (model, batch) in enumerate(run):
        operator = Hessian(Objective(model, nn.CrossEntropyLoss(), batches=[batch]))
        cold = top_eigenpairs(operator, 1, tol=tol, seed=1000 * seed + index)
        warm = cold if last is None else top_eigenpairs(operator, 1, tol=tol, start=last, seed=1000 * seed + index)
        if last is not None:
            counts.append((warm.matvecs, cold.matvecs))
        last = warm.vectors[:, 0]
    return counts


def _worst(found: list[tuple[int, str]]) -> str:
    """What the run with the largest residual says."""
    return max((words for _, words in found), key=residual_of)


def _against(section: str, what: str, counts: Timing, least: float, target: str, note: str, compared: bool) -> Row:
    """A count of another library that is to be no smaller than ``least``."""
    holds = counts.median >= least if compared and target else None
    return Row(section, NET, what, counts.median, *counts.quartiles, target, holds, note, "count")
