"""The diagonal form of CWGD, as published, from variances and a noisy diagonal."""

from __future__ import annotations

import math

import numpy as np

from curvdiag.errors import ArgumentError
from curvdiag.estimate import Estimate
from curvdiag.noise.cwgd_result import FRACTION, DiagonalCWGD, Negative
from curvdiag.noise.jackknife import jackknife, jackknife_bias


def diagonal_form(
    variances: np.ndarray,
    groups: np.ndarray,
    sizes: np.ndarray,
    *,
    floor: float | None = None,
    negative: Negative = "abs",
) -> DiagonalCWGD:
    """``2 sum_k sigma_k^2 / lambda_k``, with ``lambda`` the mean of independent estimates of a diagonal.

    Args:
        variances: ``sigma_k^2`` ``[P]``, the diagonal of ``C``.
        groups: Estimates of the diagonal ``[G, P]``, each the mean of some probes.
        sizes: How many probes ``[G]``.
        floor: Positive; by default 1e-3 of the largest entry.
        negative: ``"abs"`` divides by the size of a negative entry, ``"floor"`` by the floor.

    Raises:
        ArgumentError: The floor is not positive, or ``negative`` is neither.
    """
    if negative not in ("abs", "floor"):
        raise ArgumentError(f'negative is "abs" or "floor", not {negative!r}')
    if floor is not None and not (floor > 0 and math.isfinite(floor)):
        raise ArgumentError(f"the floor is a positive number, not {floor}")
    variances, sizes = np.asarray(variances, dtype=np.float64), np.asarray(sizes, dtype=np.float64)
    probes = sizes.sum()
    mean = np.zeros(len(variances))
    for row, size in zip(groups, sizes, strict=True):
        mean += row.astype(np.float64) * (size / probes)
    top, largest = float(mean.max()), float(np.abs(mean).max())
    if floor is None:
        floor = FRACTION * (top if top > 0 else largest)
    notes = []
    if top <= 0:
        notes.append("no diagonal entry of the Hessian is positive")
    if floor == 0:
        nothing = Estimate(math.nan, math.nan, len(groups))
        notes.append("the diagonal of the Hessian is zero: there is nothing to divide by")
        return DiagonalCWGD(
            value=nothing,
            form="diagonal",
            lambda_max=top,
            matvecs=int(probes),
            notes=tuple(notes),
            floor=0.0,
            floor_share=math.nan,
            on_floor=len(mean),
            lost_share=math.nan,
            negative=0,
            negative_as=negative,
            bias=math.nan,
            probes=int(probes),
        )

    def terms(diagonal: np.ndarray) -> np.ndarray:
        return 2 * variances / np.maximum(np.abs(diagonal) if negative == "abs" else diagonal, floor)

    every = terms(mean)
    value = float(every.sum())
    # Left out one set of probes at a time, with the floor held where it is.
    without = np.array(
        [
            terms((mean * probes - row.astype(np.float64) * size) / (probes - size)).sum()
            for row, size in (zip(groups, sizes, strict=True) if len(groups) > 1 else ())
        ]
    )
    low = (np.abs(mean) if negative == "abs" else mean) <= floor
    return DiagonalCWGD(
        value=jackknife(value, without),
        form="diagonal",
        lambda_max=top,
        matvecs=int(probes),
        notes=tuple(notes),
        floor=floor,
        floor_share=_share(every, low),
        on_floor=int(low.sum()),
        lost_share=_share(every, np.abs(mean) < 2 * _errors(groups, sizes, mean)) if len(groups) > 1 else math.nan,
        negative=int((mean < 0).sum()),
        negative_as=negative,
        bias=jackknife_bias(value, without),
        probes=int(probes),
    )


def _errors(groups: np.ndarray, sizes: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """Standard errors ``[P]`` of the mean over all probes, from the spread of its parts."""
    spread = np.zeros(len(mean))
    for row, size in zip(groups, sizes, strict=True):
        spread += size * (row - mean) ** 2
    return np.sqrt(spread / (len(groups) - 1) / sizes.sum())


def _share(terms: np.ndarray, chosen: np.ndarray) -> float:
    total = float(terms.sum())
    return float(terms[chosen].sum()) / total if total > 0 else 0.0
