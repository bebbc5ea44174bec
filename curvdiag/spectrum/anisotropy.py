"""How unequal the curvature is in different directions: summary measures of a spectrum.

All but the first come from the density, as ``tr f(H) ~ P sum_k w_k f(theta_k)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from scipy.special import gammaincinv
from torch import Tensor

from curvdiag.errors import ArgumentError, NonFiniteError
from curvdiag.estimate import Estimate
from curvdiag.operators.base import linear_map
from curvdiag.results import Result
from curvdiag.seeds import Seed, resolve_seed
from curvdiag.spectrum.density import ROUNDING, SpectralDensity, spectral_density
from curvdiag.spectrum.eigen import Eigenpairs, top_eigenpairs
from curvdiag.spectrum.lanczos import Progress

# Nodes of different probes this close, in kernel widths, are one eigenvalue.
SAME = 0.01
UNKNOWN = Estimate(math.nan, math.nan, 0)


@dataclass(frozen=True)
class Measure:
    """What a measure means.

    Attributes:
        formula: Its definition, ``lambda_1 >= lambda_2 >= ...``.
        rises: True where it grows with anisotropy, False where it falls.
        isotropic: Its value for ``c I`` of order ``P``, ``c > 0``, as a function of ``P``.
        description: One sentence.
    """

    formula: str
    rises: bool
    isotropic: Callable[[int], float]
    description: str


def _one(size: int) -> float:
    return 1.0


def _zero(size: int) -> float:
    return 0.0


MEASURES: dict[str, Measure] = {
    "top_ratio": Measure("lambda_1 / lambda_5", True, _one, "How far the sharpest direction stands above the fifth."),
    "condition_number": Measure(
        "lambda_max / lambda_min", True, _one, "Of a positive definite matrix; undefined for any other."
    ),
    "bulk_ratio": Measure(
        "lambda_max / bulk edge",
        True,
        _one,
        "The largest eigenvalue over the last one where the density holds an eigenvalue per kernel width.",
    ),
    "stable_rank": Measure(
        "||H||_F^2 / ||H||_2^2", False, float, "How many directions as sharp as the sharpest carry ||H||_F."
    ),
    "participation_ratio": Measure(
        "(tr H)^2 / tr(H^2)", False, float, "How many equal directions carry the trace; small where signs cancel."
    ),
    "intrinsic_dimension": Measure(
        "tr|H| / lambda_max", False, float, "How many directions as sharp as the sharpest carry the trace norm."
    ),
    "effective_rank": Measure(
        "exp(entropy of |lambda| / sum |lambda|)", False, float, "How many directions share the curvature."
    ),
    "negative_mass": Measure(
        "sum of |lambda| over lambda < 0 / sum |lambda|",
        True,
        _zero,
        "Which share of the curvature is downward; by size, since the signs of a bulk at zero are rounding.",
    ),
}


@dataclass(frozen=True)
class Anisotropy(Result):
    """Every measure of :data:`MEASURES` with its standard error; NaN where ``reasons`` says why.

    Standard errors are jackknifed over the density's probes, and NaN for a single one. They do not cover what
    the Lanczos steps leave unresolved.

    Attributes:
        top_ratio: ``lambda_1 / lambda_5``. Rises with anisotropy from 1. Needs eigenpairs.
        condition_number: ``lambda_max / lambda_min`` of a positive definite matrix. Rises from 1. Through
            a density a lower bound, since the smallest Ritz value lies above the smallest eigenvalue.
        bulk_ratio: ``lambda_max`` over the bulk edge. Rises from 1; no more than about 100 at the default kernel
            width, which is a fraction of the spectral range.
        stable_rank: ``||H||_F^2 / ||H||_2^2``. Falls from ``P`` to 1.
        participation_ratio: ``(tr H)^2 / tr(H^2)``. Falls from ``P``.
        intrinsic_dimension: ``tr|H| / lambda_max``. Falls from ``P`` to 1.
        effective_rank: ``exp(entropy of |lambda| / sum |lambda|)``. Falls from ``P`` to 1.
        negative_mass: Share of ``sum |lambda|`` in negative eigenvalues. Rises from 0.
        size: Order ``P`` of the matrix.
        bulk_edge: The largest eigenvalue at which the density still holds one eigenvalue per kernel width.
        matvecs: Products made for it.
        reasons: Why a measure is NaN, by its name.
    """

    top_ratio: Estimate
    condition_number: Estimate
    bulk_ratio: Estimate
    stable_rank: Estimate
    participation_ratio: Estimate
    intrinsic_dimension: Estimate
    effective_rank: Estimate
    negative_mass: Estimate
    size: int
    bulk_edge: Estimate
    matvecs: int = 0
    reasons: dict[str, str] = field(default_factory=dict)

    figure = "anisotropy"

    @property
    def measures(self) -> dict[str, Estimate]:
        """The estimates by name, in the order of :data:`MEASURES`."""
        return {name: getattr(self, name) for name in MEASURES}

    def __str__(self) -> str:
        return "\n".join(f"{name:20s} {self.reasons.get(name) or value}" for name, value in self.measures.items())


def anisotropy(
    source: Any,
    eigenpairs: Eigenpairs | None = None,
    *,
    width: float | None = None,
    steps: int = 80,
    probes: int = 4,
    tol: float = 1e-2,
    seed: Seed = 0,
    progress: Progress | None = None,
) -> Anisotropy:
    """Every measure of :data:`MEASURES` for a spectrum.

    Args:
        source: A :class:`SpectralDensity`; or all eigenvalues as a one-dimensional array or tensor, for exact values;
            or any square symmetric object with ``shape`` and ``@``, whose density and top five eigenpairs are then
            computed.
        eigenpairs: Eigenpairs of the same matrix, where ``source`` is a density: they sharpen ``lambda_max``, and the
            five largest, once converged, give ``top_ratio``. Of ``which="LM"`` those that are not negative serve,
            of ``"BE"`` those of the upper end: no eigenvalue left out exceeds them.
        width: Kernel width for the bulk edge, positive; the density's default width if not given.
        steps: Lanczos steps of the density, where ``source`` is a matrix.
        probes: Its probes. At least 2 for standard errors, 3 for intervals.
        tol: Tolerance of the eigenpairs, where ``source`` is a matrix.
        seed: For both.
        progress: Called with (products done, products planned) for the density.

    Raises:
        ArgumentError: ``source`` is none of these, or empty; ``width`` is not positive; the eigenpairs are the
            smallest, which say nothing about the largest.
        NonFiniteError: The eigenvalues or the products hold NaN or infinite numbers.
    """
    if width is not None and not (width > 0 and math.isfinite(width)):
        raise ArgumentError(f"the width of the kernel is a positive number, not {width}")
    spent = 0
    if isinstance(source, SpectralDensity):
        density, exact = source, False
        tops, settled = _largest(eigenpairs)
    elif getattr(source, "ndim", None) == 1 or isinstance(source, list | tuple):
        density, exact = _exact_density(source), True
        tops = np.sort(density.nodes[0])[::-1]
        settled = np.ones(len(tops), dtype=bool)
    else:
        linear_map(source)
        seed = resolve_seed(seed)
        density = spectral_density(source, steps=steps, probes=probes, seed=seed, progress=progress)
        if eigenpairs is None:
            eigenpairs = top_eigenpairs(source, 5, tol=tol, seed=seed)
            spent = eigenpairs.matvecs
        spent += density.matvecs
        exact = False
        tops, settled = _largest(eigenpairs)
    return _measure(density, tops, settled, exact, density.default_width() if width is None else width, spent)


def _measure(
    density: SpectralDensity, tops: np.ndarray, settled: np.ndarray, exact: bool, width: float, spent: int
) -> Anisotropy:
    """The measures from a density and the ``tops`` largest eigenvalues, of which ``settled`` have converged."""
    reasons: dict[str, str] = {}
    size = density.size
    points = _edge_grid(density, width)
    lone = density if exact else _lone_eigenvalues(density, width)
    rows = {
        "sum": size * density.per_probe(lambda x: x),
        "absolute": size * density.per_probe(np.abs),
        "squares": size * density.per_probe(np.square),
        "negative": size * density.per_probe(lambda x: np.maximum(-x, 0)),
        "logs": size * density.per_probe(_x_log_x),
        "curve": lone.density(points, width, per_probe=True) * width,
        "low": np.array([_extreme(density, i, min) for i in range(density.probes)]),
        "high": np.array([_extreme(density, i, max) for i in range(density.probes)]),
    }

    def summarise(chosen: np.ndarray) -> dict[str, float]:
        """Every measure from some of the probes."""
        mean = {name: values[chosen].mean(axis=0) for name, values in rows.items()}
        low, high = float(rows["low"][chosen].min()), float(rows["high"][chosen].max())
        if len(tops):
            high = max(high, float(tops[0]))  # every Ritz value is a bound from below, whoever found it
        norm = max(abs(low), abs(high))
        within = points[(mean["curve"] >= 1 / size) & (points <= high)]
        edge = min(float(within[-1]), high) if len(within) else math.nan
        absolute = mean["absolute"]
        return {
            "condition_number": high / low if low > ROUNDING * norm else math.nan,
            "bulk_edge": edge,
            "bulk_ratio": high / edge if edge > 0 and high > 0 else math.nan,
            "stable_rank": mean["squares"] / norm**2 if norm > 0 else math.nan,
            "participation_ratio": mean["sum"] ** 2 / mean["squares"] if norm > 0 else math.nan,
            "intrinsic_dimension": absolute / high if high > 0 else math.nan,
            # exp(ln S - sum(x ln x) / S) is the exponential of the entropy of x / S.
            "effective_rank": absolute * math.exp(-mean["logs"] / absolute) if norm > 0 else math.nan,
            "negative_mass": mean["negative"] / absolute if norm > 0 else math.nan,
        }

    whole = summarise(np.arange(density.probes))
    estimates = {name: Estimate(float(value), 0.0, 0) for name, value in whole.items()}
    if not exact:
        every = np.arange(density.probes)
        others = [summarise(np.delete(every, i)) for i in every] if density.probes > 1 else []
        estimates = {
            name: Estimate(float(value), _jackknife([one[name] for one in others]), density.probes)
            for name, value in whole.items()
        }
    estimates["top_ratio"] = UNKNOWN
    if len(tops) < 5:
        reasons["top_ratio"] = f"needs the five largest eigenvalues, and {len(tops)} are known"
    elif not settled[:5].all():
        reasons["top_ratio"] = f"{int((~settled[:5]).sum())} of the five largest eigenvalues have not converged"
    elif tops[4] <= 0:
        reasons["top_ratio"] = "the fifth largest eigenvalue is not positive"
    else:
        estimates["top_ratio"] = Estimate.exact(float(tops[0] / tops[4]))
    zero = max(abs(density.lambda_min), abs(density.lambda_max)) == 0
    for name, why in {
        "condition_number": f"the matrix is not positive definite (smallest value {density.lambda_min:.3g})",
        "bulk_ratio": "the bulk edge is not positive, or no bulk was found",
        "intrinsic_dimension": "the largest eigenvalue is not positive",
    }.items():
        if math.isnan(estimates[name].value):
            reasons[name] = why
    if zero:
        reasons |= dict.fromkeys(MEASURES, "the matrix is zero")
    return Anisotropy(**estimates, size=size, matvecs=spent, reasons=reasons)


def _lone_eigenvalues(density: SpectralDensity, width: float) -> SpectralDensity:
    """The density with weight ``1 / P`` on each eigenvalue that stands alone; good for its bulk edge only.

    A probe gives a single eigenvalue the weight ``g^2 / P`` with ``g`` about normal, so among a few outliers one
    often looks like several eigenvalues, and would be taken for the bulk. A converged outlier is a node at the
    same place for every probe, which a node of the bulk is not.
    """
    probe = np.repeat(np.arange(density.probes), density.nodes.shape[1])
    order = np.argsort(density.nodes, axis=None)
    order = order[density.weights.ravel()[order] > 0]
    if not len(order):
        return density  # every eigenvalue is deflated
    nodes, weights = density.nodes.ravel()[order], density.weights.ravel()[order]
    group = np.concatenate([[0], np.cumsum(np.diff(nodes) > SAME * width)])
    seen = np.zeros((group[-1] + 1, density.probes), dtype=bool)
    seen[group, probe[order]] = True
    count = np.bincount(group, weights) * density.size / density.probes
    chi_square = 2 * gammaincinv(density.probes / 2, 0.999)  # its quantile
    lone = seen.all(axis=1) & (count <= chi_square / density.probes)
    changed = density.weights.ravel().copy()
    # Scaling keeps the copies of an eigenvalue together and its mean over the probes at 1 / P.
    changed[order] = np.where(lone[group], weights / count[group], weights)
    return replace(density, weights=changed.reshape(density.weights.shape))


def _jackknife(without: list[float]) -> float:
    """Standard error of a function of probe averages, from its values without each probe in turn."""
    n = len(without)
    return math.sqrt((n - 1) / n * float(np.sum((np.asarray(without) - np.mean(without)) ** 2))) if n else math.nan


def _largest(pairs: Eigenpairs | None) -> tuple[np.ndarray, np.ndarray]:
    """Those of the values that no eigenvalue left out exceeds, descending, and which of them have converged."""
    if pairs is None:
        return np.empty(0), np.empty(0, dtype=bool)
    if pairs.which == "SA":
        raise ArgumentError(
            'the measures need the largest eigenvalues, and pairs with which="SA" are the smallest; pass those of '
            "top_eigenpairs(op, 5), or none"
        )
    values = pairs.values.detach().cpu().double().numpy()
    settled = pairs.converged.detach().cpu().numpy().astype(bool)
    if pairs.which == "LM":
        # What was left out is smaller in magnitude than each of these; a negative one says nothing about the top.
        serve = values >= 0
    else:
        serve = np.arange(len(values)) < (len(values) - len(values) // 2 if pairs.which == "BE" else len(values))
    order = np.argsort(-values[serve], kind="stable")
    return values[serve][order], settled[serve][order]


def _exact_density(values: Any) -> SpectralDensity:
    if isinstance(values, Tensor):
        values = values.detach().cpu().to(torch.float64).numpy()
    nodes = np.asarray(values, dtype=np.float64)
    if nodes.ndim != 1 or not len(nodes):
        raise ArgumentError(f"expected a one-dimensional array of eigenvalues, got shape {nodes.shape}")
    if not np.isfinite(nodes).all():
        raise NonFiniteError("the eigenvalues hold NaN or infinite numbers; find out where they come from")
    return SpectralDensity(nodes[None], np.full((1, len(nodes)), 1 / len(nodes)), len(nodes))


def _extreme(density: SpectralDensity, probe: int, which: Callable[..., float]) -> float:
    own = density.nodes[probe][density.weights[probe] > 0]
    return float(which(*own, *density.deflated, *own[:1]))


def _edge_grid(density: SpectralDensity, width: float) -> np.ndarray:
    """Points a quarter of a kernel width apart; no more than fit, for a width far below the range."""
    span = density.lambda_max - density.lambda_min + 10 * width
    grid = density.default_grid(int(min(max(4 * span / width, 64), 100_000)), width)
    return np.sort(np.append(grid, density.lambda_max))


def _x_log_x(x: np.ndarray) -> np.ndarray:
    absolute = np.abs(x)
    return absolute * np.log(np.where(absolute > 0, absolute, 1.0))
