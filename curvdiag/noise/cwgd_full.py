"""The full form of CWGD from a matrix and vectors: Lanczos quadrature of ``2 tr((|H| + delta)^-1 C)``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from curvdiag.distributed import collectively
from curvdiag.errors import ArgumentError
from curvdiag.estimate import Estimate
from curvdiag.memory import free_bytes
from curvdiag.noise.cwgd_result import FRACTION, FullCWGD
from curvdiag.noise.jackknife import ratio_of_means
from curvdiag.operators.base import linear_map
from curvdiag.spectrum.lanczos import Progress, Tridiagonal, lanczos

# Shorter quadratures, from half the steps on, that must agree with the whole one.
LENGTHS = 8


@collectively
def full_form(
    op: Any,
    sums: Tensor,
    *,
    delta: float | None = None,
    steps: int = 32,
    max_steps: int = 512,
    progress: Progress | None = None,
) -> FullCWGD:
    """``2 tr((|H| + delta)^-1 C)`` by Lanczos quadrature from vectors of covariance ``C``.

    ``E[b^T f(H) b] = tr(f(H) C)``. The steps are doubled until the value moves by less than
    its standard error while they double: not between the two ends alone but at lengths in between as well. A Ritz
    value that comes to lie near zero by chance lifts a quadrature of this peaked function, so that two lengths may
    agree long before it has settled: where only the two ends had to agree, up to five standard errors of bias were left
    (tests/test_cwgd.py).

    Args:
        op: Any square symmetric object with ``shape`` and ``@``.
        sums: Rows ``[k, P]``, or what ``op.space`` has of them here, with ``E[b b^T] = C``; at least 2, and 3 for an
            interval.
        delta: Positive; by default 1e-3 of the largest Ritz value.
        steps: Lanczos steps to begin with, at least 2.
        max_steps: Where doubling ends, converged or not.

    Raises:
        ArgumentError: Too few vectors or steps, or a delta that is not positive.
        NonFiniteError: A product held NaN or infinite numbers.
    """
    if len(sums) < 2:
        raise ArgumentError(f"the full form needs two starts at least, to know when to stop, not {len(sums)}")
    if delta is not None and not (delta > 0 and math.isfinite(delta)):
        raise ArgumentError(f"delta is a positive number, not {delta}")
    if not 2 <= steps <= max_steps:
        raise ArgumentError(f"steps are at least 2 and at most max_steps, not {steps} with max_steps={max_steps}")
    operator = linear_map(op)
    space, device = operator.space, operator.device
    lengths = space.dots(sums, sums)
    alive = lengths > 0  # all signs alike, or no noise at all: nothing to begin with, and the sample is 0
    if not bool(alive.any()):
        zero = Estimate.exact(0.0)
        note = ("the gradients of all samples are equal",)
        return FullCWGD(zero, "full", math.nan, 0, note, math.nan, zero, zero, zero, 0, (0.0, 0.0, 0.0), True)
    limit = min(max_steps, operator.size)
    taken = min(steps, limit)
    group = max(1, space.fitting(free_bytes(device), 8 * space.longest * sums.element_size(), device))
    parts: Sequence[Tensor | Tridiagonal] = sums[alive].split(group)
    spent, goes_on = 0, len(parts) == 1  # with several groups the vectors of one make room for those of the next
    while True:
        runs = [lanczos(operator, part, taken, progress=progress, resumable=goes_on) for part in parts]
        spent = runs[0].matvecs if goes_on else spent + sum(run.matvecs for run in runs)
        parts = runs if goes_on else parts
        quadrature = _Quadratures(runs, len(sums))
        shift = quadrature.fraction_of_top() if delta is None else delta
        shifts = (shift, shift / 10, shift * 10)
        values = [Estimate.from_samples(quadrature.values(s, taken)) for s in shifts]
        shorter = sorted({max(1, taken // 2 + i * taken // (2 * LENGTHS)) for i in range(LENGTHS)})
        changes = tuple(
            max(abs(value.value - quadrature.values(s, n).mean()) for n in shorter)
            for value, s in zip(values, shifts, strict=True)
        )
        settled = changes[0] < values[0].standard_error or quadrature.exhausted or taken >= operator.size
        if settled or taken >= limit or shift == 0:
            break
        taken = min(2 * taken, limit)
    ended = quadrature.exhausted or taken >= operator.size
    notes = []
    if quadrature.lambda_max <= 0:
        scale = ": delta is 1e-3 of |lambda|" if delta is None else ""
        notes.append(f"no positive curvature was found along the noise{scale}")
    if not settled:
        notes.append(f"{taken} steps are not enough: over the last half of them the value moved by {changes[0]:.2g}")
    elif not ended and changes[1] > values[1].standard_error:
        notes.append("with delta / 10 the quadrature has not settled: take more steps to trust with_tenth")
    if 0 < shift < torch.finfo(operator.dtype).eps * quadrature.largest:
        notes.append(f"products in {operator.dtype} do not resolve delta: measure with dtype=torch.float32")
    slopes = quadrature.values(shift, taken, power=2)
    return FullCWGD(
        value=values[0],
        form="full",
        lambda_max=quadrature.lambda_max,
        matvecs=spent,
        notes=tuple(notes),
        delta=shift,
        with_tenth=values[1],
        with_tenfold=values[2],
        log_slope=ratio_of_means(-shift * slopes, quadrature.values(shift, taken)),
        steps=taken,
        change=(0.0, 0.0, 0.0) if ended else changes,
        converged=settled,
    )


class _Quadratures:
    """``2 b^T f(H) b`` of every start from its tridiagonal matrix, or from the leading part of it."""

    def __init__(self, runs: list[Tridiagonal], starts: int) -> None:
        self.runs, self.starts = runs, starts
        self.squares = np.concatenate([run.norms for run in runs]) ** 2
        self.exhausted = all((run.lengths < run.alphas.shape[1]).all() for run in runs)
        nodes = np.concatenate([run.quadrature()[0] for run in runs])
        self.lambda_max = float(nodes.max())
        self.largest = float(np.abs(nodes).max())
        self.cut: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def fraction_of_top(self) -> float:
        return FRACTION * (self.lambda_max if self.lambda_max > 0 else self.largest)

    def values(self, shift: float, steps: int, power: int = 1) -> np.ndarray:
        """``[k]`` for ``f = (|lambda| + shift)^-power``; starts without length count as zero."""
        nodes, weights = self._leading(steps)
        if shift == 0:
            return np.full(self.starts, math.nan)
        found = 2 * self.squares * np.sum(weights / (np.abs(nodes) + shift) ** power, axis=1)
        return np.concatenate([found, np.zeros(self.starts - len(found))])

    def _leading(self, steps: int) -> tuple[np.ndarray, np.ndarray]:
        if steps not in self.cut:
            pairs = [
                replace(
                    run,
                    alphas=run.alphas[:, :steps],
                    betas=run.betas[:, :steps],
                    lengths=np.minimum(run.lengths, steps),
                ).quadrature()
                for run in self.runs
            ]
            nodes, weights = zip(*pairs, strict=True)
            self.cut[steps] = np.concatenate(nodes), np.concatenate(weights)
        return self.cut[steps]
