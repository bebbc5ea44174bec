"""The axis on which eigenvalues are drawn, linear or symmetric-logarithmic, and densities along it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from curvdiag.errors import ArgumentError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from curvdiag.spectrum.density import SpectralDensity

LOG_10 = math.log(10)
BULK = 0.95  # share of the eigenvalues whose magnitudes set the linear part of a symmetric-log axis
DWARFED = 10.0  # an axis this many times longer than the bulk is drawn symmetric-log
APART = 4.0  # the linear part reaches over this many gaps between Ritz values: no gap then looks like a hole
CELLS = 80  # kernel widths along the axis: finer ones draw the single Ritz values of the bulk
DEEPEST = 1e-6  # and is at least this share of the largest magnitude: single precision knows no finer


@dataclass(frozen=True)
class EigenvalueAxis:
    """Positions along an axis of eigenvalues.

    On a linear axis the position of an eigenvalue is itself. On a symmetric-log axis positions count decades:
    ``x / (threshold ln 10)`` for ``|x|`` up to ``threshold``, and ``1 / ln 10 + log10(|x| / threshold)``
    beyond, which joins without a corner, so a smooth density stays smooth where the scale changes.

    Attributes:
        threshold: Where the logarithm begins; ``inf`` makes the axis linear.
        low, high: Limits, as positions.
        width: Standard deviation of the smoothing kernels, as a difference of positions.
    """

    threshold: float
    low: float
    high: float
    width: float

    @property
    def linear(self) -> bool:
        return math.isinf(self.threshold)

    @property
    def unit(self) -> str:
        """Of a density along the axis."""
        return "per unit eigenvalue" if self.linear else "per decade of the axis"

    def position(self, eigenvalues: np.ndarray) -> np.ndarray:
        return position(np.asarray(eigenvalues, dtype=np.float64), self.threshold)

    def eigenvalue(self, positions: np.ndarray) -> np.ndarray:
        positions = np.asarray(positions, dtype=np.float64)
        if self.linear:
            return positions
        beyond = np.sign(positions) * self.threshold * 10 ** (np.abs(positions) - 1 / LOG_10)
        return np.where(np.abs(positions) * LOG_10 <= 1, positions * self.threshold * LOG_10, beyond)

    def edges(self) -> np.ndarray:
        """Borders of cells along the axis, as positions, a third of a kernel wide or less."""
        cells = int(np.clip(math.ceil(3 * (self.high - self.low) / self.width), 300, 4000))
        return np.linspace(self.low, self.high, cells + 1)

    def smooth(self, density: SpectralDensity, positions: np.ndarray) -> np.ndarray:
        """Density of eigenvalues along the axis: mean over probes of Gaussian kernels, of total mass 1."""
        nodes, weights = atoms(density)
        distance = (positions[:, None] - self.position(nodes)) / self.width
        return np.exp(-0.5 * distance**2) @ weights / (math.sqrt(2 * math.pi) * self.width)

    def one_eigenvalue(self, size: int) -> float:
        """Height of the kernel of a single one of ``size`` eigenvalues: the least that a density can show."""
        return 1 / (size * math.sqrt(2 * math.pi) * self.width)

    def apply(self, ax: Axes, direction: str) -> None:
        """Give an axis of ``ax`` (``"x"`` or ``"y"``) this scale, these limits, and ticks that fit."""
        low, high = self.eigenvalue(np.array([self.low, self.high]))
        if not self.linear:
            # With this length of its linear part, Matplotlib's scale is ours.
            scale = {"linthresh": self.threshold, "linscale": 0.9 / LOG_10, "subs": range(2, 10)}
            (ax.set_xscale if direction == "x" else ax.set_yscale)("symlog", **scale)
        (ax.set_xlim if direction == "x" else ax.set_ylim)(low, high)
        if not self.linear:
            axis = ax.xaxis if direction == "x" else ax.yaxis
            axis.set_ticks(self.ticks())

    def ticks(self) -> list[float]:
        """Zero and powers of ten, thinned so that their labels do not touch."""
        first = math.ceil(math.log10(self.threshold) - 1e-9)
        low, high = self.eigenvalue(np.array([self.low, self.high]))
        last = math.floor(math.log10(max(abs(low), abs(high))))
        every = max(1, math.ceil((self.high - self.low) / 8))
        # Counted from the largest, which is the one a reader looks for.
        powers = [10.0**k for k in range(last, first - 1, -every)]
        return [t for t in sorted([*(-p for p in powers), 0.0, *powers]) if low <= t <= high]


def position(eigenvalues: np.ndarray, threshold: float) -> np.ndarray:
    if math.isinf(threshold):
        return eigenvalues
    size = np.maximum(np.abs(eigenvalues) / threshold, 1e-300)
    return np.where(size <= 1, eigenvalues / (threshold * LOG_10), np.sign(eigenvalues) * (1 / LOG_10 + np.log10(size)))


def atoms(density: SpectralDensity) -> tuple[np.ndarray, np.ndarray]:
    """Ritz values of all probes and deflated eigenvalues, with weights that sum to 1."""
    weights = np.asarray(density.weights) / len(density.weights)
    deflated = np.asarray(density.deflated)
    nodes = np.concatenate([np.ravel(density.nodes), deflated])
    shares = np.concatenate([np.ravel(weights), np.full(deflated.shape, 1 / density.size)])
    return nodes[shares > 0], shares[shares > 0]


def choose_axis(
    densities: Sequence[SpectralDensity],
    scale: str = "auto",
    range: tuple[float, float] | None = None,
    width: float | None = None,
) -> EigenvalueAxis:
    """One axis for all of ``densities``.

    Args:
        scale: ``"linear"``, ``"symlog"``, or ``"auto"``: symmetric-log where the largest eigenvalue is more
            than ten times as large as 95 % of them are.
        range: Lowest and highest eigenvalue to show; all of them, with a margin, if not given.
        width: Standard deviation of the kernels: in eigenvalues on a linear axis, in decades on a
            symmetric-log one; an eightieth of the axis if not given.

    Raises:
        ArgumentError: An argument is not one of these, or a density is not finite.
    """
    if scale not in ("auto", "linear", "symlog"):
        raise ArgumentError(f'scale is "auto", "linear" or "symlog", not {scale!r}')
    if width is not None and not (math.isfinite(width) and width > 0):
        raise ArgumentError(f"the width of the kernels must be positive, not {width}")
    if range is not None and not (range[0] < range[1] and all(map(math.isfinite, range))):
        raise ArgumentError(f"the range of eigenvalues goes from a lower to a higher one, not {range}")
    if not densities:
        raise ArgumentError("there is no density to draw")
    pooled = [atoms(density) for density in densities]
    nodes = np.concatenate([n for n, _ in pooled])
    weights = np.concatenate([w for _, w in pooled])
    if not nodes.size or not np.isfinite(nodes).all():
        raise ArgumentError("a density without finite nodes of positive weight cannot be drawn")
    bulk = weighted_quantile(np.abs(nodes), weights, BULK)
    largest = float(np.abs(nodes).max())
    symlog = largest > 0 and (scale == "symlog" or (scale == "auto" and largest > DWARFED * bulk))
    threshold = max(bulk, APART * resolution(densities), DEEPEST * largest) if symlog else math.inf

    limits = np.array(range if range is not None else (nodes.min(), nodes.max()), dtype=np.float64)
    low, high = (float(p) for p in position(limits, threshold))
    if range is None:
        least = 1e-6 * max(abs(low), abs(high)) if largest > 0 else 1.0
        margin = max(0.05 * (high - low), least)
        low, high = low - margin, high + margin
    return EigenvalueAxis(threshold, low, high, width or (high - low) / CELLS)


def resolution(densities: Sequence[SpectralDensity]) -> float:
    """How far apart the Ritz values of one probe lie in the bulk, where most of the eigenvalues are."""
    gaps, weights = [], []
    for density in densities:
        for nodes, shares in zip(np.asarray(density.nodes), np.asarray(density.weights), strict=True):
            order = np.argsort(nodes[shares > 0])
            steps = np.diff(nodes[shares > 0][order])
            if len(steps):
                gaps.append(np.maximum(np.append(steps, 0.0), np.insert(steps, 0, 0.0)))
                weights.append(shares[shares > 0][order])
    return weighted_quantile(np.concatenate(gaps), np.concatenate(weights), 0.5) if gaps else 0.0


def weighted_quantile(values: np.ndarray, weights: np.ndarray, share: float) -> float:
    """The smallest value that ``share`` of the weight does not exceed."""
    order = np.argsort(values)
    reached = np.searchsorted(np.cumsum(weights[order]), share * weights.sum())
    return float(values[order][min(reached, len(order) - 1)])
