"""Keeping Lanczos vectors out of a known subspace, at a few steps chosen in advance.

Between two projections the known directions come back: by rounding, by the residuals of vectors that are only nearly
eigenvectors, and by the growth that the recurrence gives to everything outside the spectrum of the rest, a factor
``x + sqrt(x^2 - 1)`` a step at ``x`` half-widths from its middle (Chebyshev; Parlett and Scott 1979 on selective
orthogonalisation). That much is known before the run starts, so nothing in its loop waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from curvdiag.operators.precision import multiplication
from curvdiag.space import Space
from curvdiag.space.inner_products import cross_products

# The known directions may add this share of the rest's half-width to a diagonal entry of the tridiagonal matrix.
SPOILT = 1e-3
# Longest stretch without a projection.
LONGEST = 16


@dataclass(frozen=True)
class Projection:
    """The projection out of the span of orthonormal rows, and when to make it.

    Attributes:
        parts: Rows ``[few, local]`` and how many steps go by without a projection out of them; then it is made at two
            steps in a row, since both vectors of the recurrence have to be clean. 0 projects at each step.
        scale: Size of the largest eigenvalue outside, against which the rest may be rounding.
        space: Of the rows; whole in this process where it is not given.
    """

    parts: tuple[tuple[Tensor, int], ...]
    scale: float
    space: Space | None = None

    def __call__(self, vectors: Tensor) -> None:
        """Take the whole span out of ``vectors`` ``[p, local]``, in place: two matrix products for all of them."""
        for rows, _ in self.parts:
            take_out(self.space, vectors, rows)

    def at(self, step: int) -> Callable[[Tensor], None] | None:
        """What to do with the vectors that step ``step``, counted from 0, makes."""
        due = [rows for rows, gap in self.parts if is_due(step, gap)]
        if not due:
            return None

        def project(vectors: Tensor) -> None:
            for rows in due:
                take_out(self.space, vectors, rows)

        return project


def is_due(step: int, gap: int) -> bool:
    """Whether step ``step`` is followed by a projection."""
    return step % (gap + 2) >= gap


@multiplication("ieee")  # whatever the process does with its own products
def take_out(space: Space | None, vectors: Tensor, rows: Tensor) -> None:
    """Subtract from ``vectors`` ``[p, local]``, in place, their components along orthonormal ``rows``."""
    components = cross_products(vectors, rows) if space is None else space.cross(vectors, rows)
    vectors.addmm_(components.to(vectors.dtype), rows, alpha=-1)


def plan_projection(
    space: Space, rows: Tensor, values: np.ndarray, residuals: np.ndarray, rest: np.ndarray
) -> Projection:
    """When to project out of Ritz vectors with these values and residuals, in a run that sees ``rest``."""
    gaps = gaps_between(values, residuals, rest, torch.finfo(rows.dtype).eps)
    # Three kinds: at each step, at two of three, and as seldom as all of the others allow.
    kinds = [gaps == 0, gaps == 1, gaps > 1]
    parts = []
    for kind in kinds:
        if kind.any():
            some = rows if kind.all() else rows[torch.from_numpy(kind).to(rows.device)]
            parts.append((some, int(gaps[kind].min())))
    return Projection(tuple(parts), float(np.abs(values).max(initial=0)), space)


def gaps_between(values: np.ndarray, residuals: np.ndarray, rest: np.ndarray, eps: float) -> np.ndarray:
    """How many steps may go by between projections out of each Ritz vector ``[k]``, see :attr:`Projection.parts`.

    Args:
        values: Ritz values outside ``[k]``.
        residuals: Their residuals ``[k]``.
        rest: Ritz values of what the run sees.
        eps: Relative rounding of a product.
    """
    if not len(values) or not len(rest) or not np.ptp(rest) > 0:
        return np.zeros(len(values), dtype=np.int64)
    middle, half = (rest.max() + rest.min()) / 2, np.ptp(rest) / 2
    away = np.abs(values - middle) / half
    growth = np.log(away + np.sqrt(np.maximum(away**2 - 1, 0)), where=away > 1, out=np.zeros_like(away))
    allowed = np.sqrt(SPOILT / np.maximum(away, 1e-300))
    # Off-diagonal entries of the rest's tridiagonal matrix are about half of its half-width.
    arrives = (eps * np.abs(values).max() + residuals) / (half / 2)
    room = np.log(allowed / np.maximum(arrives, 1e-300))
    free = 1 + np.floor(np.minimum(room / np.maximum(growth, 1e-12), LONGEST - 1))
    return np.where(arrives > allowed, 0, free).astype(np.int64)
