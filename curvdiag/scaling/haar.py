"""What alignment two matrices would show if their eigenvectors had nothing to do with each other.

The spectra are kept, and the eigenvectors of one matrix are random in the basis of the other: an orthogonal matrix
from the Haar measure. Entries of ``M = Q diag(spectrum) Q^T`` then have the second moments (Weingarten calculus)

    E[M_ij M_kl] = a d_ij d_kl + b (d_ik d_jl + d_il d_jk)

    b = (P tr M^2 - (tr M)^2) / (P (P-1) (P+2)),    a = ((P+1) (tr M)^2 - 2 tr M^2) / (P (P-1) (P+2)),

from which the averages below follow. They need two traces of each matrix, and no eigenvalue.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from curvdiag.errors import ArgumentError
from curvdiag.seeds import Seed, resolve_seed


@dataclass(frozen=True)
class SpectralMoments:
    """What a random-eigenvector average needs of a symmetric matrix.

    Attributes:
        size: ``P``.
        trace: ``tr M``.
        square: ``tr M^2``.
    """

    size: int
    trace: float
    square: float

    @classmethod
    def of_spectrum(cls, eigenvalues: Any, size: int | None = None) -> SpectralMoments:
        """Those of a matrix with these eigenvalues; ``size`` where zero eigenvalues are not among them.

        Raises:
            ArgumentError: There are more eigenvalues than ``size``, or none.
        """
        values, size = _spectrum(eigenvalues, size)
        return cls(size, float(values.sum()), float(values @ values))

    @property
    def spread(self) -> float:
        """``tr M^2 - (tr M)^2 / P``: what is left without the part proportional to the identity."""
        return max(self.square - self.trace**2 / self.size, 0.0)

    @property
    def entries(self) -> tuple[float, float]:
        """``E[M_ii^2]`` and ``E[M_ij^2]`` for ``i != j`` in a random basis."""
        p = self.size
        if p == 1:
            return self.square, 0.0
        off = self.spread / ((p - 1) * (p + 2))
        return self.trace**2 / p**2 + 2 * off * (p - 1) / p, off


def random_commutator(h: SpectralMoments, c: SpectralMoments) -> float:
    """Root mean square of ``||CH - HC||_F / (||C||_F ||H||_F)`` over random eigenvectors.

    ``E ||CH - HC||_F^2 = 2 P / ((P-1)(P+2)) (tr H^2 - (tr H)^2/P) (tr C^2 - (tr C)^2/P)``; NaN for a zero matrix.

    Raises:
        ArgumentError: The sizes differ.
    """
    p = _same_size(h, c)
    if h.square <= 0 or c.square <= 0:
        return math.nan
    return math.sqrt(2 * p * h.spread * c.spread / ((p - 1) * (p + 2) * h.square * c.square)) if p > 1 else 0.0


def random_cosine(h: SpectralMoments, c: SpectralMoments) -> float:
    """Mean of ``tr(HC) / (||H||_F ||C||_F)`` over random eigenvectors: ``tr H tr C / P`` over the norms.

    It is near 1 where both matrices are near a multiple of the identity, whatever their eigenvectors. NaN for a zero
    matrix.

    Raises:
        ArgumentError: The sizes differ.
    """
    p = _same_size(h, c)
    if h.square <= 0 or c.square <= 0:
        return math.nan
    return h.trace * c.trace / (p * math.sqrt(h.square) * math.sqrt(c.square))


def random_coupling(eigenvalues: Any, count: int, *, size: int | None = None, seed: Seed = 0) -> np.ndarray:
    """One draw of ``V^T C V`` ``[count, count]`` for random orthonormal ``V`` ``[size, count]``.

    ``eigenvalues`` are those of C; with ``size`` they may be the nonzero ones alone. Then only the rows of ``V`` that
    meet them are drawn, and the rest enters through the triangular factor of its Wishart matrix (Bartlett 1933), so
    that the cost does not depend on ``size`` and the distribution is exact.

    Raises:
        ArgumentError: More eigenvalues or directions than ``size``.
    """
    values, size = _spectrum(eigenvalues, size)
    if not 1 <= count <= size:
        raise ArgumentError(f"between 1 and {size} orthonormal directions exist in {size} dimensions, not {count}")
    generator = np.random.default_rng(resolve_seed(seed))
    rows = generator.standard_normal((len(values), count))
    others = size - len(values)
    if others >= count:
        rest = np.triu(generator.standard_normal((count, count)), 1)
        rest[np.diag_indices(count)] = np.sqrt(generator.chisquare(others - np.arange(count)))
    else:
        rest = generator.standard_normal((others, count))
    basis, triangle = np.linalg.qr(np.concatenate([rows, rest]))
    # The factor with a positive diagonal is the one that makes the basis uniform.
    met = basis[: len(values)] * np.where(np.diag(triangle) < 0, -1.0, 1.0)
    return (met.T * values) @ met


def _spectrum(eigenvalues: Any, size: int | None) -> tuple[np.ndarray, int]:
    values = np.asarray(eigenvalues, dtype=np.float64).reshape(-1)
    if not len(values):
        raise ArgumentError("a spectrum needs at least one eigenvalue")
    if size is not None and size < len(values):
        raise ArgumentError(f"a matrix of size {size} has no {len(values)} eigenvalues")
    return values, len(values) if size is None else int(size)


def _same_size(h: SpectralMoments, c: SpectralMoments) -> int:
    if h.size != c.size:
        raise ArgumentError(f"H of size {h.size} and C of size {c.size} are not matrices over the same parameters")
    return h.size
