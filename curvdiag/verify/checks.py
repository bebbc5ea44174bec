"""The comparisons: curvdiag beside LAPACK and beside PyHessian, each of which gives its rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from curvdiag.objective import Objective
from curvdiag.operators import Hessian
from curvdiag.space.probes import gaussian, rademacher
from curvdiag.spectrum import spectral_density, top_eigenpairs, trace
from curvdiag.verify.dense import Dense
from curvdiag.verify.problems import Problem, problems
from curvdiag.verify.pyhessian import PyHessian, require
from curvdiag.verify.rows import Check, Verification

MakeOperator = Callable[..., Any]
Progress = Callable[[int, int], None]

LAPACK, PYHESSIAN = "LAPACK", "PyHessian"
PROBES, STEPS = 64, 30
DENSITY_PROBES = 32  # each costs STEPS products
# Random quantities may lie this many of their exact standard deviations from the truth: 1 in 16,000 would not.
DEVIATIONS = 4.0
POWER_TOLERANCE, POWER_ITERATIONS = 1e-7, 3000
# PyHessian divides vectors by their norm plus 1e-6, which shifts an eigenvalue by twice that; the second one also
# by what is left of the first vector.
PYHESSIAN_SHIFT = 1e-6


def verify(
    cases: list[Problem] | None = None, *, operator: MakeOperator = Hessian, progress: Progress | None = None
) -> Verification:
    """Compare curvdiag with dense LAPACK and with PyHessian on small problems, in float64.

    Args:
        cases: What to compare on; :func:`problems` by default.
        operator: Makes the operator under test from an objective and ``dtype=``; another one than
            :class:`Hessian` shows what the checks notice.
        progress: Called with (problems done, problems in all).

    Raises:
        CurvdiagError: PyHessian is not installed.
    """
    require()
    cases = problems() if cases is None else cases
    checks: list[Check] = []
    with _one_thread():
        for index, problem in enumerate(cases):
            if progress is not None:
                progress(index, len(cases))
            checks += check_problem(problem, operator)
    if progress is not None:
        progress(len(cases), len(cases))
    return Verification(tuple(checks))


def check_problem(problem: Problem, operator: MakeOperator = Hessian) -> list[Check]:
    """All checks of one problem; a check that raises is a row that fails."""
    truth, peer = Dense.hessian(problem), PyHessian(problem)
    checks: list[Check] = []
    try:
        objective = Objective(problem.model, nn.CrossEntropyLoss(), batches=problem.batches)
        op, single = operator(objective), operator(objective, dtype=torch.float32)
    except Exception as error:
        return [_broken(problem, "the operator", LAPACK, error)]
    groups: list[tuple[str, str, Callable[[], Iterator[Check]]]] = [
        ("product", LAPACK, lambda: _products(problem, op, truth)),
        ("eigenvalues", LAPACK, lambda: _eigenvalues(problem, op, truth)),
        ("trace", LAPACK, lambda: _traces(problem, op, truth)),
        ("moments", LAPACK, lambda: _moments(problem, op, single, truth)),
        ("density", LAPACK, lambda: _density(problem, op, truth)),
        ("product", PYHESSIAN, lambda: _peer_product(problem, op, peer)),
        ("eigenvalues", PYHESSIAN, lambda: _peer_eigenvalues(problem, op, peer, truth)),
        ("trace", PYHESSIAN, lambda: _peer_trace(problem, op, peer, truth)),
        ("density", PYHESSIAN, lambda: _peer_density(problem, op, peer, truth)),
    ]
    for quantity, against, group in groups:
        try:
            checks += group()
        except Exception as error:
            checks.append(_broken(problem, quantity, against, error))
    return checks


# Against LAPACK


def _products(problem: Problem, op: Any, truth: Dense) -> Iterator[Check]:
    vectors = gaussian(5, truth.size, seed=11, dtype=torch.float64).T
    yield _vectors(problem, "product, relative", LAPACK, op @ vectors, truth.matrix @ vectors, 1e-10)


def _eigenvalues(problem: Problem, op: Any, truth: Dense) -> Iterator[Check]:
    k, tol = 3, 1e-8
    top = top_eigenpairs(op, k, which="LA", tol=tol)
    low = top_eigenpairs(op, 1, which="SA", tol=tol)
    allowed = tol * truth.scale
    for i, (value, exact) in enumerate(zip(top.values.tolist(), truth.eigenvalues.flip(0).tolist(), strict=False)):
        yield Check(problem.name, f"eigenvalue {i + 1}", LAPACK, value, exact, abs(value - exact), allowed)
    value, exact = float(low.values[0]), float(truth.eigenvalues[0])
    yield Check(problem.name, "smallest eigenvalue", LAPACK, value, exact, abs(value - exact), allowed)


def _traces(problem: Problem, op: Any, truth: Dense) -> Iterator[Check]:
    value = float(op.dense().diagonal().sum())
    allowed = 1e-10 * float(truth.eigenvalues.abs().sum())
    yield Check(problem.name, "trace, exact", LAPACK, value, truth.trace, abs(value - truth.trace), allowed)

    estimate, error = trace(op, probes=PROBES, seed=5), truth.spread() / math.sqrt(PROBES)
    difference = abs(estimate.value - truth.trace)
    note = f"within {DEVIATIONS:g} exact standard errors of {PROBES} probes"
    yield Check(
        problem.name, "trace, Hutchinson", LAPACK, estimate.value, truth.trace, difference, DEVIATIONS * error, note
    )
    # A sample deviation of 64 nearly normal values strays by 9 %.
    claimed = estimate.standard_error
    yield Check(problem.name, "its standard error, relative", LAPACK, claimed, error, abs(claimed - error) / error, 0.4)


def _moments(problem: Problem, op: Any, single: Any, truth: Dense) -> Iterator[Check]:
    """Quadrature from each start vector against ``z^T H^k z``, in both precisions, no basis stored."""
    probes, seed = 4, 7
    starts = rademacher(probes, truth.size, seed=seed, dtype=torch.float64)
    exact, bounds, power = [], [], starts
    for k in range(1, 5):
        power = power @ truth.matrix
        exact.append((starts * power).sum(1) / truth.size)
        bounds.append(_measure(truth, starts) @ truth.eigenvalues.abs() ** k)
    for which, operator, tolerance in (("float64", op, 1e-8), ("float32", single, 1e-5)):
        density = spectral_density(operator, steps=STEPS, probes=probes, seed=seed)
        found = [torch.from_numpy(density.per_probe(lambda x, k=k: x**k)) for k in range(1, 5)]
        errors = [(f - e).abs() / b for f, e, b in zip(found, exact, bounds, strict=True)]
        yield Check(
            problem.name,
            f"moments 1 to 4, {which}, relative",
            LAPACK,
            float(found[1].mean()),
            float(exact[1].mean()),
            float(torch.stack(errors).max()),
            tolerance,
            "of each probe's quadrature, against z^T H^k z; the figures are the second moments",
        )


def _density(problem: Problem, op: Any, truth: Dense) -> Iterator[Check]:
    density = spectral_density(op, steps=STEPS, probes=DENSITY_PROBES, seed=3)
    width = density.default_width()
    points = max(2048, math.ceil(4 * (density.lambda_max - density.lambda_min) / width))
    grid = density.default_grid(points)
    mass = float(np.trapezoid(density.density(grid, width), grid))
    yield Check(problem.name, "mass of the density", LAPACK, mass, 1.0, abs(mass - 1), 1e-6)

    threshold = truth.widest_gap()
    counted = density.count(threshold, math.inf).value
    projector = truth.projector(threshold)
    error = projector.spread() / math.sqrt(DENSITY_PROBES)
    yield Check(
        problem.name,
        f"eigenvalues above {threshold:.3g}",
        LAPACK,
        counted,
        projector.trace,
        abs(counted - projector.trace),
        DEVIATIONS * error,
        f"within {DEVIATIONS:g} exact standard errors of {DENSITY_PROBES} probes",
    )


# Against PyHessian


def _peer_product(problem: Problem, op: Any, peer: PyHessian) -> Iterator[Check]:
    vector = gaussian(1, op.shape[0], seed=13, dtype=torch.float64)[0]
    yield _vectors(problem, "product, relative", PYHESSIAN, op @ vector, peer.product(vector), 1e-10)


def _peer_eigenvalues(problem: Problem, op: Any, peer: PyHessian, truth: Dense) -> Iterator[Check]:
    """Its power iteration stops where the value stands still to ``tol``; what the rest of the geometric series
    adds follows from the gap to the next eigenvalue."""
    values = top_eigenpairs(op, 2, which="LM", tol=1e-8).values.tolist()
    theirs = peer.eigenvalues(2, tol=POWER_TOLERANCE, iterations=POWER_ITERATIONS)
    exact = truth.by_magnitude.abs().tolist()
    for i, (value, other) in enumerate(zip(values, theirs, strict=True)):
        remaining = POWER_TOLERANCE / (1 - (exact[i + 1] / exact[i]) ** 2)
        yield Check(
            problem.name,
            f"eigenvalue {i + 1} by magnitude",
            PYHESSIAN,
            value,
            other,
            abs(value - other),
            exact[i] * remaining + 4 * PYHESSIAN_SHIFT,
            "PyHessian's power iteration stops a little early and divides by norms plus 1e-6; both are allowed for",
        )


def _peer_trace(problem: Problem, op: Any, peer: PyHessian, truth: Dense) -> Iterator[Check]:
    estimate, theirs = trace(op, probes=PROBES, seed=5), peer.trace(PROBES)
    other = math.fsum(theirs) / len(theirs)
    error = truth.spread() * math.sqrt(1 / PROBES + 1 / len(theirs))
    yield Check(
        problem.name,
        "trace, Hutchinson",
        PYHESSIAN,
        estimate.value,
        other,
        abs(estimate.value - other),
        DEVIATIONS * error,
        f"within {DEVIATIONS:g} exact standard errors of {PROBES} and {len(theirs)} probes",
    )


def _peer_density(problem: Problem, op: Any, peer: PyHessian, truth: Dense) -> Iterator[Check]:
    theirs = peer.density_trace(min(STEPS, truth.size))
    if isinstance(theirs, float):
        estimate = spectral_density(op, steps=STEPS, probes=DENSITY_PROBES, seed=3).trace()
        error = truth.spread() * math.sqrt(1 / DENSITY_PROBES + 1)
        difference = abs(estimate.value - theirs)
        yield Check(
            problem.name, "trace of the density", PYHESSIAN, estimate.value, theirs, difference, DEVIATIONS * error
        )
        return
    distance = _distance_from_dense(op, truth)
    yield Check(
        problem.name,
        "density, distance of the curves",
        "LAPACK instead",
        distance,
        0.0,
        distance,
        1e-6,
        f"PyHessian's density fails, so the dense spectrum as the same probes see it stands in: {theirs}",
    )


def _distance_from_dense(op: Any, truth: Dense) -> float:
    """``integral |p - q|`` of the smoothed densities; Lanczos runs to the end, where quadrature is exact."""
    probes, seed = 1, 17
    density = spectral_density(op, steps=truth.size, probes=probes, seed=seed, reorthogonalize="full")
    weights = _measure(truth, rademacher(probes, truth.size, seed=seed, dtype=torch.float64)).mean(0)
    width = float(truth.eigenvalues[-1] - truth.eigenvalues[0]) / 200
    low, high = (f(float(truth.eigenvalues[i]), e) for f, i, e in _ends(density))
    grid = np.linspace(low - 6 * width, high + 6 * width, math.ceil(4 * (high - low) / width) + 50)
    z = (grid[:, None] - truth.eigenvalues.numpy()) / width
    exact = (np.exp(-0.5 * z**2) @ weights.numpy()) / (width * math.sqrt(2 * math.pi))
    return float(np.trapezoid(np.abs(density.density(grid, width) - exact), grid))


def _ends(density: Any) -> tuple[tuple[Any, int, float], tuple[Any, int, float]]:
    return (min, 0, density.lambda_min), (max, -1, density.lambda_max)


# Helpers


def _measure(truth: Dense, starts: Tensor) -> Tensor:
    """The weight ``[probes, P]`` that each start vector gives to each eigenvalue."""
    return (starts @ truth.eigenvectors).square() / truth.size


def _vectors(
    problem: Problem, quantity: str, against: str, value: Tensor, reference: Tensor, tolerance: float
) -> Check:
    difference = float((value - reference).norm() / reference.norm())
    return Check(problem.name, quantity, against, float(value.norm()), float(reference.norm()), difference, tolerance)


def _broken(problem: Problem, quantity: str, against: str, error: Exception) -> Check:
    message = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return Check(problem.name, quantity, against, math.nan, math.nan, math.inf, 0.0, message)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Matrices this small are faster on one thread, and far faster on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
