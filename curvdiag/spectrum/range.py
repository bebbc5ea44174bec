"""Orthonormal vectors that span given ones, for estimates that take the trace of a subspace exactly."""

from __future__ import annotations

import torch
from torch import Tensor

from curvdiag.errors import NonFiniteError
from curvdiag.space import Space
from curvdiag.space.inner_products import PIECE, wide_dtype
from curvdiag.spectrum.vectors import NON_FINITE

# Squares of singular values below this share of the largest square are rounding in a Gram matrix.
LEAST = 1e-14


def orthonormal_range(space: Space, rows: Tensor) -> tuple[Tensor, Tensor, int]:
    """Orthonormal rows Q ``[m, local]`` that span ``rows`` ``[k, local]``, coordinates ``[rank, k]`` in them, the rank.

    Only the first ``rank`` rows of Q matter; directions at rounding level are left out. Vectors of which each rank
    holds a part are made orthonormal by their Gram matrix, twice (Yamamoto et al. 2015, ETNA 44, with its root in place
    of a Cholesky factor): directions below 1e-7 of the largest are then left out as well.

    Raises:
        NonFiniteError: The rows are not finite.
    """
    if not all_finite(space, rows):
        raise NonFiniteError(NON_FINITE)
    if not space.whole:
        return _by_gram(space, rows)
    basis, triangle = torch.linalg.qr(rows.T)
    left, singular, right = torch.linalg.svd(small(triangle), full_matrices=False)
    rank = int((singular > 8 * torch.finfo(rows.dtype).eps * len(rows) * singular[0].clamp(min=1e-300)).sum())
    turned = left.T.to(basis) @ basis.T
    return turned, singular[:rank, None] * right[:rank], rank


def all_finite(space: Space, rows: Tensor) -> bool:
    """A finite sum has finite terms; only where it is not, or overflows, the slow look at each of them is needed."""
    finite = bool(rows.sum().isfinite()) or bool(rows.isfinite().all())
    if space.whole:
        return finite
    return float(space.complete(torch.tensor([0.0 if finite else 1.0], device=rows.device))) == 0


def small(matrix: Tensor) -> Tensor:
    """A matrix of no vector's length, on the CPU in float64."""
    return matrix.detach().cpu().double()


def _by_gram(space: Space, rows: Tensor) -> tuple[Tensor, Tensor, int]:
    squares, vectors = torch.linalg.eigh(_gram(space, rows))
    squares, vectors = squares.flip(0), vectors.flip(1)
    least = max(LEAST, (8 * torch.finfo(rows.dtype).eps * len(rows)) ** 2)
    rank = int((squares > least * squares[0].clamp(min=1e-300)).sum())
    singular, right = squares[:rank].sqrt(), vectors[:, :rank].T
    if not rank:
        return rows[:0], right, 0
    basis = (right / singular[:, None]).to(rows) @ rows
    # What rounding has left of other directions in the smallest is taken out.
    squares, vectors = torch.linalg.eigh(_gram(space, basis))
    root = (vectors * squares.sqrt()) @ vectors.T
    straight = (vectors / squares.sqrt()) @ vectors.T
    return straight.to(rows) @ basis, root @ (singular[:, None] * right), rank


def _gram(space: Space, rows: Tensor) -> Tensor:
    """All inner products ``[k, k]`` in float64, of terms in float64."""
    wide, counted = wide_dtype(rows.device), space.counted(rows)
    gram = torch.zeros(len(rows), len(rows), dtype=wide, device=rows.device)
    for part in counted.split(PIECE, 1):
        gram += part.to(wide) @ part.to(wide).T
    return small(space.complete(gram))
