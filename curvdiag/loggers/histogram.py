"""A spectral density as a histogram, the one form of it that loggers know."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from curvdiag.plotting.eigenvalue_axis import atoms, choose_axis
from curvdiag.results import Result

if TYPE_CHECKING:
    from curvdiag.spectrum.density import SpectralDensity


@dataclass(frozen=True)
class Histogram(Result):
    """How many eigenvalues lie where, by the mean over the probes.

    Attributes:
        edges: Of the bins ``[k + 1]``, increasing.
        counts: Eigenvalues in each bin ``[k]``; fractions of one too, adding up to the order of the matrix.
        low, high: The outermost Ritz values.
        sum, sum_squares: Of the eigenvalues: estimates of ``tr(H)`` and ``tr(H^2)``.
    """

    edges: np.ndarray
    counts: np.ndarray
    low: float
    high: float
    sum: float
    sum_squares: float


def histogram(density: SpectralDensity, bins: int = 64) -> Histogram:
    """Count eigenvalues in bins of equal width on the axis of the plots: symmetric-logarithmic where outliers dwarf
    the bulk, so that neither hides in a bin of the other.

    Raises:
        ArgumentError: The density is not finite.
    """
    axis = choose_axis([density])
    nodes, shares = atoms(density)
    edges = axis.eigenvalue(np.linspace(axis.low, axis.high, bins + 1))
    counts, _ = np.histogram(nodes, edges, weights=density.size * shares)
    first, second = (float(density.size * (shares @ nodes**k)) for k in (1, 2))
    return Histogram(edges, counts, float(nodes.min()), float(nodes.max()), first, second)
