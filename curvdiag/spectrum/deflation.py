"""Deflation: eigenvalues that enter a density exactly, so that its probes see only the rest.

    tr f(H) = sum_i f(lambda_i) + E[z'^T f(H) z'],   z' = (I - Q Q^T) z

The variance of one probe's ``tr H`` is about ``2 sum lambda^2`` and of ``tr H^2`` about ``2 sum lambda^4``, so a few
outliers make nearly all of it. A Ritz pair with residual r in place of an eigenpair leaves ``tr H`` without bias and
takes at most ``2 r^2`` off ``tr H^2``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from curvdiag.errors import ArgumentError
from curvdiag.memory import free_bytes, human_bytes
from curvdiag.operators.base import LinearMap
from curvdiag.spectrum.first_run import FirstRun, ritz_pairs, settled_pairs
from curvdiag.spectrum.krylov import Subspace
from curvdiag.spectrum.lanczos import Progress, Tridiagonal
from curvdiag.spectrum.projection import Projection, plan_projection
from curvdiag.spectrum.vectors import working_dtype

Deflate = int | Literal["auto"]

# A first run of fewer vectors finds too little to be worth its memory.
LEAST = 12


@dataclass(frozen=True)
class Deflation:
    """What is deflated, and what finding it cost.

    Attributes:
        values: Ritz values ``[k]``, largest magnitude first.
        projection: Keeps the probes out of their Ritz vectors; ``None`` where nothing is deflated.
        matvecs: Products of the first run.
        probe: The first run as a probe that can go on, where nothing is deflated and it is one.
        used: Probes of the seed that the first run has used up: the average starts behind them.
        note: What differs from what was asked.
    """

    values: np.ndarray
    projection: Projection | None
    matvecs: int
    probe: Tridiagonal | None = None
    used: int = 0
    note: str = ""


NOTHING = Deflation(np.empty(0), None, 0)


def find_deflation(
    operator: LinearMap, deflate: Deflate, *, steps: int, probes: int, seed: int, progress: Progress | None = None
) -> Deflation:
    """Eigenpairs of both ends from one Lanczos run of the seed's first probe.

    A number asks for the pairs of largest magnitude: the run ends when they have converged, or after ``3 k + 20``
    products with those that have. ``"auto"`` goes on for as long as what converges takes more off the variances than
    its products would, spent on probes, and in the end deflates nothing where that does not pay.

    Raises:
        ArgumentError: ``deflate`` is neither.
        NonFiniteError: A product held NaN or infinite numbers.
    """
    auto = check_deflate(deflate)
    if deflate == 0:
        return NOTHING
    size, k = operator.size, 0 if auto else min(int(deflate), operator.size)
    limit = min(steps if auto else 3 * k + 20, size)
    length, note = fitting(operator, k, limit)
    if length == 0:
        return Deflation(np.empty(0), None, 0, note=note)
    start = operator.space.rademacher(1, seed=seed, dtype=working_dtype(operator), device=operator.device)
    run = FirstRun(operator, start, length)
    if auto:
        run.go_on_while_it_pays(min(limit, length), steps * probes, progress)
        chosen = run.worthwhile(steps * probes, length // 2)
    else:
        run.until_converged(k, limit, progress)
        chosen = settled_pairs(run.space)[:k]
        if len(chosen) < k:
            found = (
                f"{len(chosen)} of {k} eigenvalues deflated: no more had converged after {run.space.matvecs} products"
            )
            note = f"{note}; {found}" if note else found
    if not len(chosen):
        note = f"{note}; nothing deflated" if note else f"nothing deflated{': it would not pay' if auto else ''}"
        return Deflation(np.empty(0), None, run.space.matvecs, run.probe(), int(run.whole), note)
    return deflation_of(run.space, chosen, used=1, note=note)


def check_deflate(deflate: Deflate) -> bool:
    """Whether the number is to be chosen.

    Raises:
        ArgumentError: It is neither a number nor ``"auto"``.
    """
    if deflate == "auto":
        return True
    if isinstance(deflate, bool) or not isinstance(deflate, int | np.integer) or deflate < 0:
        raise ArgumentError(f'deflate is a number of eigenvalues, 0 or more, or "auto", not {deflate!r}')
    return False


def deflation_of(space: Subspace, chosen: np.ndarray, *, used: int = 0, note: str = "") -> Deflation:
    """Deflate the ``chosen`` Ritz pairs of a subspace, indices in ascending order of Ritz values."""
    values, coefficients, residuals = ritz_pairs(space)
    rest = np.delete(values, chosen)
    rows = space.vectors(coefficients[:, torch.from_numpy(chosen)])
    projection = plan_projection(space.operator.space, rows, values[chosen], residuals[chosen], rest)
    return Deflation(values[chosen], projection, space.matvecs, used=used, note=note)


def fitting(operator: LinearMap, k: int, limit: int) -> tuple[int, str]:
    """Vectors that the first run may store within half of the free memory, and a note where it is not all of them.

    With ``k`` given, ``k`` vectors beside it are deflated, and where not all fit the run restarts at ``k + 10``.
    Without, as many as half of the run's.
    """
    space = operator.space
    vector = space.longest * working_dtype(operator).itemsize
    room = space.fitting(free_bytes(operator.device), 2 * vector, operator.device)
    if limit + 1 + (k or limit // 2) <= room:
        return limit, ""
    if k and k + 11 + k <= room:
        return k + 10, f"the first run's basis was restarted at {k + 10} vectors, for want of memory"
    if not k and room * 2 // 3 - 1 >= LEAST:
        length = room * 2 // 3 - 1
        return length, f"the first run's basis was limited to {length} vectors, for want of memory"
    need = (2 * k + 11 if k else LEAST * 3 // 2 + 2) * vector
    return 0, f"nothing deflated: that takes {human_bytes(need)} of vectors, more than half of the free memory"
