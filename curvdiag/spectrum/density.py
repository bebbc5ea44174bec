"""Stochastic Lanczos quadrature: the eigenvalue density of a matrix known by its products.

Ghorbani, Krishnan and Xiao 2019 (arXiv:1901.10159); Ubaru, Chen and Saad 2017 for the quadrature of traces.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from curvdiag.distributed import collectively
from curvdiag.errors import ArgumentError
from curvdiag.estimate import Estimate
from curvdiag.memory import free_bytes
from curvdiag.modes import outside_modes
from curvdiag.operators.base import LinearMap, linear_map
from curvdiag.results import Result
from curvdiag.seeds import Seed, resolve_seed
from curvdiag.spectrum.accuracy import check_rtol, reach
from curvdiag.spectrum.deflation import Deflate, Deflation, find_deflation
from curvdiag.spectrum.lanczos import Progress, Reorthogonalize
from curvdiag.spectrum.quadrature import Quadrature
from curvdiag.spectrum.vectors import working_dtype

# Kernel width over spectral range. The common code takes the variance 1e-5 * max(1, range); this is the same at
# range 1, but scales with the matrix: the density of c H is that of H, stretched by c.
RELATIVE_WIDTH = math.sqrt(1e-5)
# Ritz values of single-precision products are known to about this fraction of the largest one.
ROUNDING = 1e-7


@dataclass(frozen=True)
class SpectralDensity(Result):
    """The density of a symmetric matrix's eigenvalues as weighted points, one set for each probe.

    Every estimate averages over the probes, and its standard error is taken across them.

    Attributes:
        nodes: Ritz values ``[probes, m]``, float64; padding has weight 0.
        weights: Their weights ``[probes, m]``; each row adds up to ``1 - len(deflated) / size``.
        size: Order ``P`` of the matrix.
        deflated: Ritz values ``[k]`` that enter for themselves, each with weight ``1 / size``; the matrix has an
            eigenvalue within a hundredth of each.
        steps: Lanczos steps of each probe, or the most where they differ.
        matvecs: Products that the density cost.
        note: What differs from what was asked, if anything.
    """

    nodes: np.ndarray
    weights: np.ndarray
    size: int
    deflated: np.ndarray = field(default_factory=lambda: np.empty(0))
    steps: int = 0
    matvecs: int = 0
    note: str = ""

    figure = "density"

    @property
    def probes(self) -> int:
        """How many probes were averaged."""
        return len(self.nodes)

    @property
    def lambda_max(self) -> float:
        """The largest Ritz value: from below, and close where the top of the spectrum stands alone."""
        return float(self._support().max())

    @property
    def lambda_min(self) -> float:
        """The smallest Ritz value, from above."""
        return float(self._support().min())

    def __call__(self, grid: ArrayLike, width: float | None = None) -> np.ndarray:
        """The same as :meth:`density`."""
        return self.density(grid, width)

    def density(self, grid: ArrayLike, width: float | None = None, *, per_probe: bool = False) -> np.ndarray:
        """Density at the points of ``grid``: a Gaussian kernel at each node, of total mass 1.

        Args:
            grid: Eigenvalues, any shape.
            width: Standard deviation of the kernel, in units of the eigenvalues; :meth:`default_width` if
                not given. A comparison of several densities needs one width for all.
            per_probe: Return one density for each probe, ``[probes, *grid.shape]``, instead of their mean.
        """
        width = self.default_width() if width is None else float(width)
        if not (width > 0 and math.isfinite(width)):
            raise ArgumentError(f"the width of the kernel is a positive number, not {width}")
        points = np.asarray(grid, dtype=np.float64)
        rows = [_kernels(points.ravel(), *pair, width) for pair in zip(self.nodes, self.weights, strict=True)]
        known = _kernels(points.ravel(), self.deflated, np.full(len(self.deflated), 1 / self.size), width)
        curves = (np.stack(rows) + known).reshape(self.probes, *points.shape)
        return curves if per_probe else curves.mean(axis=0)

    def default_width(self) -> float:
        """Kernel width ``sqrt(1e-5)`` times the spectral range: 1/316 of it, whatever the matrix's scale.

        Where all eigenvalues are equal, the same fraction of their absolute value; 1/316 for a zero matrix.
        """
        low, high = self.lambda_min, self.lambda_max
        scale = max(abs(low), abs(high))
        spread = high - low
        return RELATIVE_WIDTH * (spread if spread > 4 * ROUNDING * scale else scale or 1.0)

    def default_grid(self, points: int = 2048, width: float | None = None) -> np.ndarray:
        """Evenly spaced eigenvalues from 5 kernel widths below the smallest node to 5 above the largest."""
        width = self.default_width() if width is None else width
        return np.linspace(self.lambda_min - 5 * width, self.lambda_max + 5 * width, points)

    def moment(self, k: int) -> Estimate:
        """``tr(H^k) / P``; without bias for Rademacher probes and ``k < 2 * steps``, where nothing is deflated."""
        return Estimate.from_samples(self.per_probe(lambda x: x**k))

    def trace(self) -> Estimate:
        """``tr(H)``, which is Hutchinson's estimate from the same probes."""
        return Estimate.from_samples(self.size * self.per_probe(lambda x: x))

    def squared_frobenius_norm(self) -> Estimate:
        """``tr(H^2)``."""
        return Estimate.from_samples(self.size * self.per_probe(np.square))

    def frobenius_norm(self) -> Estimate:
        """``sqrt(tr(H^2))``; the standard error is carried through the root to first order."""
        return square_root(self.squared_frobenius_norm())

    def count(self, low: float, high: float, *, tolerance: float | None = None) -> Estimate:
        """How many eigenvalues lie in ``[low, high]``.

        Both ends belong to the interval and are moved outwards by ``tolerance``, by default 1e-7 of the
        largest absolute node, so that an eigenvalue that stands exactly at an end is not lost to rounding.
        Two intervals that touch may both count it. A node inside the bulk stands for all eigenvalues about it,
        so an end there is uncertain by the weight of its neighbouring node besides the standard error.

        Raises:
            ArgumentError: ``low`` exceeds ``high``.
        """
        if not low <= high:
            raise ArgumentError(f"the interval [{low}, {high}] is empty: the lower end comes first")
        if tolerance is None:
            tolerance = ROUNDING * max(abs(self.lambda_min), abs(self.lambda_max))
        low, high = low - tolerance, high + tolerance
        return Estimate.from_samples(
            self.size * self.per_probe(lambda x: ((x >= low) & (x <= high)).astype(np.float64))
        )

    def per_probe(self, function: Any) -> np.ndarray:
        """``tr(f(H)) / P`` as each probe estimates it, ``[probes]``; ``function`` maps arrays elementwise."""
        known = float(np.sum(function(self.deflated))) / self.size
        return np.sum(self.weights * function(self.nodes), axis=1) + known

    def __str__(self) -> str:
        outliers = f", {len(self.deflated)} deflated" if len(self.deflated) else ""
        return (
            f"density of {self.size:,} eigenvalues in [{self.lambda_min:.4g}, {self.lambda_max:.4g}]{outliers}\n"
            f"  trace           {self.trace()}\n"
            f"  Frobenius norm  {self.frobenius_norm()}\n"
            f"  {self.probes} probe{'s' * (self.probes != 1)} of {self.steps} steps, {self.matvecs} products"
            + (f"; {self.note}" if self.note else "")
        )

    def _support(self) -> np.ndarray:
        return np.concatenate([self.nodes[self.weights > 0], self.deflated])


@outside_modes
@collectively
def spectral_density(
    op: Any,
    *,
    steps: int = 80,
    probes: int = 4,
    seed: Seed = 0,
    deflate: Deflate = 0,
    rtol: float | None = None,
    reorthogonalize: Reorthogonalize = "none",
    progress: Progress | None = None,
) -> SpectralDensity:
    """Eigenvalue density by Lanczos quadrature from Rademacher probes, at ``steps * probes`` products.

    The probes advance in lockstep, as many at a time as fit into memory; the result does not depend on how
    many. Without reorthogonalisation, the default, three vectors of size ``P`` are kept for each probe:
    converged eigenvalues then come as several copies that share one weight, which changes no moment or count.

    Args:
        op: Any square symmetric object with ``shape`` and ``@``.
        steps: Lanczos steps; more than the order of the matrix are clipped, and noted in the result.
        probes: Random vectors. At least 3 for an interval.
        seed: An integer, or a generator that advances.
        deflate: How many eigenvalues, those of largest magnitude, enter exactly, so that the probes see only the rest;
            or ``"auto"``: as many as take more off the errors of ``tr H`` and ``tr H^2`` than the products that find
            them would, spent on probes, and none where that does not pay. The first run that finds them is made
            beside the ``probes``, and takes part in the average only where nothing is deflated. See
            :mod:`curvdiag.spectrum.deflation`.
        rtol: Wanted relative accuracy, see :mod:`curvdiag.spectrum.accuracy`: ``steps`` are then the most that a probe
            takes, and ``probes``, at least 4, those of a first stage, by whose spread up to fifteen times as many are
            added. The note says whether it was reached.
        reorthogonalize: See :func:`curvdiag.spectrum.lanczos.lanczos`.
        progress: Called with (products done, products planned).

    Raises:
        ArgumentError: ``steps`` or ``probes`` is not positive, ``deflate`` or ``rtol`` out of range, or ``op`` not
            square.
        NonFiniteError: A product held NaN or infinite numbers.
    """
    check_counts(steps, probes)
    if rtol is not None:
        check_rtol(rtol, reorthogonalize)
    operator, seed = linear_map(op), resolve_seed(seed)
    deflation = find_deflation(operator, deflate, steps=steps, probes=probes, seed=seed, progress=progress)
    return density_outside(
        operator,
        deflation,
        steps=steps,
        probes=probes,
        seed=seed,
        rtol=rtol,
        reorthogonalize=reorthogonalize,
        progress=progress,
    )


def check_counts(steps: int, probes: int) -> None:
    """Raises ArgumentError where a density cannot have so many steps or probes."""
    if isinstance(probes, bool) or int(probes) != probes or probes < 1:
        raise ArgumentError(f"a density needs a positive number of probes, not {probes!r}")
    if isinstance(steps, bool) or int(steps) != steps or steps < 1:
        raise ArgumentError(f"a density takes a positive number of steps, not {steps!r}")


def density_outside(
    operator: LinearMap,
    deflation: Deflation,
    *,
    steps: int,
    probes: int,
    seed: int,
    rtol: float | None = None,
    reorthogonalize: Reorthogonalize = "none",
    progress: Progress | None = None,
) -> SpectralDensity:
    """The density of a matrix of which ``deflation`` is known already; see :func:`spectral_density`.

    Each probe is scaled so that its weights add up to the share of the eigenvalues that it stands for. That makes the
    mass exactly 1 and takes the random length of what is left of a probe out of the variance, at a bias of at most
    ``k / P`` of a diagonal entry.
    """
    size, known = operator.size, deflation.values
    rest = size - len(known)
    notes = [deflation.note] if deflation.note else []
    if not rest:
        notes += [f"rtol={rtol:g} reached: every eigenvalue is deflated"] if rtol is not None else []
        zeros = np.zeros((probes, 1))
        return SpectralDensity(zeros, zeros, size, deflated=known, matvecs=deflation.matvecs, note="; ".join(notes))
    taken = min(steps, rest)
    if taken < steps:
        what = "what is left to the probes" if len(known) else "the matrix"
        notes.append(f"{steps} steps clipped to {taken}, the order of {what}")
    group = lockstep(operator, probes, taken if reorthogonalize != "none" else 0)
    run = Quadrature(operator, deflation, seed, group, reorthogonalize, progress)
    if rtol is None:
        run.take(probes, taken, run.matvecs + taken * probes)
    else:
        notes.append(reach(run, rtol, taken, probes))
    nodes, weights = run.arrays()
    return SpectralDensity(
        nodes,
        weights * (rest / size),
        size,
        deflated=known,
        steps=nodes.shape[1],
        matvecs=run.matvecs,
        note="; ".join(notes),
    )


def square_root(squared: Estimate) -> Estimate:
    """The root of a non-negative estimate, its standard error to first order (the delta method)."""
    root = math.sqrt(max(squared.value, 0.0))
    error = squared.standard_error / (2 * root) if root > 0 else squared.standard_error
    return Estimate(root, error, squared.samples)


def _kernels(points: np.ndarray, nodes: np.ndarray, weights: np.ndarray, width: float) -> np.ndarray:
    curve = np.zeros(len(points))
    for node, weight in zip(nodes, weights, strict=True):
        if weight > 0:
            curve += weight * np.exp(-0.5 * ((points - node) / width) ** 2)
    return curve / (width * math.sqrt(2 * math.pi))


def lockstep(operator: LinearMap, probes: int, stored: int) -> int:
    """How many probes fit at once: three vectors and their products each, in at most half the free memory."""
    space, device = operator.space, operator.device
    one = (5 + stored) * space.longest * working_dtype(operator).itemsize
    return max(1, min(probes, space.fitting(free_bytes(device), 2 * one, device)))
