"""How well the eigenvectors of the noise covariance C are those of the Hessian H, beside random eigenvectors.

Definitions: Zhang, Yang and Tu, arXiv:2602.05600 (commutator, diagonal recovery, coupling); Wu, Wang and Su 2022
(loss-scaled alignment). A number without its random-eigenvector baseline says little: with a few large eigenvalues
and many near zero, even unrelated matrices nearly commute.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from curvdiag.errors import ArgumentError, NonFiniteError
from curvdiag.estimate import Estimate
from curvdiag.results import Result
from curvdiag.scaling.haar import SpectralMoments, random_commutator, random_cosine, random_coupling
from curvdiag.scaling.joint_traces import Means, joint_traces
from curvdiag.seeds import Seed, resolve_seed
from curvdiag.spectrum.lanczos import Progress
from curvdiag.spectrum.vectors import row_dots

PROBES = 24


@dataclass(frozen=True)
class Alignment(Result):
    """Commutator and cosine of two whole matrices, from the same products.

    Attributes:
        commutator: ``||CH - HC||_F / (||C||_F ||H||_F)``, between 0 and the root of 2.
        cosine: ``tr(HC) / (||H||_F ||C||_F)``.
        commutator_baseline: Its root mean square over random eigenvectors with the same spectra.
        cosine_baseline: Its mean over random eigenvectors.
    """

    commutator: Estimate
    cosine: Estimate
    commutator_baseline: float
    cosine_baseline: float

    def __str__(self) -> str:
        return (
            f"commutator {self.commutator} (random eigenvectors {self.commutator_baseline:.3g}), "
            f"cosine {self.cosine} (random eigenvectors {self.cosine_baseline:.3g})"
        )


@dataclass(frozen=True)
class Window(Result):
    """Alignment inside the span of the eigenvectors ``first`` to ``last - 1`` of H, where C is ``K`` and H is ``L``.

    Attributes:
        name: ``"top"`` or ``"bulk"``.
        first: First direction, from 0.
        last: One behind the last direction.
        commutator: ``||KL - LK||_F / (||K||_F ||L||_F)``.
        diagonal_recovery: ``sum_i K_ii^2 / sum_ij K_ij^2``; 1 where K is diagonal.
        coupling_mean: Mean of ``|K_ij| / sqrt(K_ii K_jj)`` over ``i < j``.
        coupling_variance: Its variance over the same pairs.
        rank_correlation: Spearman's, of ``K_ii`` with the eigenvalues.
        baseline: The same five numbers for random eigenvectors of C, see :func:`windows`.
        left_out: Directions whose ``K_ii`` is not positive; the coupling leaves them out.

    What is undefined (a zero matrix, one direction, equal eigenvalues) is NaN.
    """

    name: str
    first: int
    last: int
    commutator: float
    diagonal_recovery: float
    coupling_mean: float
    coupling_variance: float
    rank_correlation: float
    baseline: dict[str, float]
    left_out: int = 0

    def __str__(self) -> str:
        names = ("commutator", "diagonal_recovery", "coupling_mean", "coupling_variance", "rank_correlation")
        parts = [f"{n.replace('_', ' ')} {getattr(self, n):.3g} (random {self.baseline[n]:.3g})" for n in names]
        return f"{self.name} {self.first}..{self.last - 1}: " + ", ".join(parts)


def alignment(H: Any, C: Any, *, probes: int = PROBES, seed: Seed = 0, progress: Progress | None = None) -> Alignment:
    """Commutator and cosine with their baselines: exact for two dense matrices, else from 4 products a probe.

    For operators, with random signs z, ``E ||(CH - HC) z||^2 = ||CH - HC||_F^2``, ``E ||Hz||^2 = ||H||_F^2`` and
    ``E (Hz).(Cz) = tr(HC)``. The standard errors of the ratios are the jackknife's over the probes.

    Args:
        H: Symmetric, any square object with ``shape`` and ``@``; a dense tensor or array counts as dense.
        C: The same, of the same size.
        probes: Random vectors where one of them is not dense.
        seed: An integer, or a generator that advances.
        progress: Called with (products done, products planned).

    Raises:
        ArgumentError: The sizes differ, or there is no probe.
        NonFiniteError: A matrix or product held NaN or infinite numbers.
    """
    traces = joint_traces(H, C, probes, seed, True, progress)
    size, mean = int(H.shape[0]), traces.means()
    h = SpectralMoments(size, mean.h, mean.hh)
    c = SpectralMoments(size, mean.c, mean.cc)
    return Alignment(
        traces.estimate(_commutator), traces.estimate(_cosine), random_commutator(h, c), random_cosine(h, c)
    )


def commutator(H: Any, C: Any, *, probes: int = PROBES, seed: Seed = 0, progress: Progress | None = None) -> Estimate:
    """``||CH - HC||_F / (||C||_F ||H||_F)``: 0 where the eigenvectors are shared. As :func:`alignment`."""
    return joint_traces(H, C, probes, seed, True, progress).estimate(_commutator)


def cosine(H: Any, C: Any, *, probes: int = PROBES, seed: Seed = 0, progress: Progress | None = None) -> Estimate:
    """``tr(HC) / (||H||_F ||C||_F)``: 1 where C is a multiple of H. As :func:`alignment`, with 2 products a probe."""
    return joint_traces(H, C, probes, seed, False, progress).estimate(_cosine)


def loss_scaled_alignment(
    C: Any, G: Any, loss: float, *, probes: int = PROBES, seed: Seed = 0, progress: Progress | None = None
) -> Estimate:
    """``tr(CG) / (2 L ||G||_F^2)`` (Wu, Wang and Su 2022), G the Gauss-Newton matrix and L the loss.

    Raises:
        ArgumentError: The loss is not positive, the sizes differ, or there is no probe.
        NonFiniteError: A matrix or product held NaN or infinite numbers.
    """
    if not (loss > 0 and math.isfinite(loss)):
        raise ArgumentError(f"the alignment is scaled by a positive loss, not {loss}")
    return joint_traces(G, C, probes, seed, False, progress).estimate(lambda m: _ratio(m.hc, 2 * loss * m.hh))


def gradient_share(gradient: Tensor, vectors: Tensor) -> float:
    """Share of ``||g||^2`` ``[P]`` in the span of the columns ``[P, k]``, which need not be quite orthonormal.

    NaN for a zero gradient.

    Raises:
        ArgumentError: The shapes do not fit.
    """
    if gradient.ndim != 1 or vectors.ndim != 2 or len(vectors) != len(gradient):
        raise ArgumentError(
            f"a gradient [P] and directions [P, k] are needed, not {tuple(gradient.shape)} and {tuple(vectors.shape)}"
        )
    g = gradient.detach()[None].to(vectors)
    norm = float(row_dots(g, g))
    if norm == 0:
        return math.nan
    parts = (g @ vectors)[0].cpu().double()
    overlaps = (vectors.T @ vectors).cpu().double()
    return float(parts @ torch.linalg.pinv(overlaps, hermitian=True) @ parts) / norm


def windows(
    coupling: Any,
    eigenvalues: Any,
    *,
    top: int = 100,
    bulk: int = 900,
    spectrum: Any = None,
    size: int | None = None,
    draws: int = 4,
    seed: Seed = 0,
) -> tuple[Window, ...]:
    """Alignment in the span of the first ``top`` and of the next ``bulk`` eigenvectors of H, beside baselines.

    In the baseline H and its eigenvectors stay, and C has random eigenvectors:

    - with ``spectrum``, those of all of C in all ``size`` dimensions: the window's K becomes ``V^T C V`` for random
      orthonormal V. Also how much of C lies in the window is then random;
    - without it, those of K inside the window: ``Q^T diag(eigenvalues of K) Q``. How much of C lies in the window is
      taken as it is, so this baseline is the milder one, and the only one without the spectrum of C.

    The commutator's baseline is the root of the ratio of its mean squares, the recovery's the ratio of means, both in
    closed form; the rank correlation's is 0 by symmetry (one draw has the standard deviation ``(n - 1)^-1/2``); the
    coupling's are means over ``draws`` drawn matrices.

    Args:
        coupling: ``K = V^T C V`` ``[n, n]`` in the leading eigenvectors of H.
        eigenvalues: ``L`` ``[n]``, in their order.
        top: Directions in the first window; fewer where ``n`` is smaller.
        bulk: Directions in the second, which is left out where nothing is left for it.
        spectrum: Eigenvalues of C: all, or the nonzero ones together with ``size``.
        size: ``P``.
        draws: Random matrices for the coupling's baseline.
        seed: An integer, or a generator that advances.

    Raises:
        ArgumentError: The shapes do not fit, or a window or the number of draws is empty.
        NonFiniteError: ``K`` or ``L`` holds NaN or infinite numbers.
    """
    k, values = _array(coupling), _array(eigenvalues)
    if values.ndim != 1 or not len(values) or k.shape != (len(values), len(values)):
        raise ArgumentError(f"K is [n, n] beside n eigenvalues, not of shape {k.shape} beside {values.shape}")
    if top < 1 or bulk < 0 or draws < 1:
        raise ArgumentError(f"windows of {top} and {bulk} directions with {draws} draws: they must not be empty")
    if not (np.isfinite(k).all() and np.isfinite(values).all()):
        raise NonFiniteError("K = V^T C V or the eigenvalues hold NaN or infinite numbers; look at the products with C")
    start, found = resolve_seed(seed), []
    for name, first, last in (("top", 0, top), ("bulk", top, top + bulk)):
        inside, curvature = k[first:last, first:last], values[first:last]
        if not len(curvature):
            continue
        own = np.linalg.eigvalsh(inside) if spectrum is None else _array(spectrum)
        random = _random_window(own, size if spectrum is not None else None, curvature, draws, (start, first))
        measured, left_out = _statistics(inside, curvature)
        found.append(Window(name, first, first + len(curvature), **measured, baseline=random, left_out=left_out))
    return tuple(found)


def _statistics(k: np.ndarray, values: np.ndarray) -> tuple[dict[str, float], int]:
    diagonal, squares = np.diag(k), float(np.sum(k * k))
    commuted = float(np.sum((k * (values[None] - values[:, None])) ** 2))
    positive = diagonal > 0
    scale = np.sqrt(diagonal[positive])
    couplings = np.abs(k[np.ix_(positive, positive)] / scale[:, None] / scale)[np.triu_indices(len(scale), 1)]
    return {
        "commutator": _ratio(math.sqrt(commuted), math.sqrt(squares * float(values @ values))),
        "diagonal_recovery": _ratio(float(diagonal @ diagonal), squares),
        "coupling_mean": float(couplings.mean()) if len(couplings) else math.nan,
        "coupling_variance": float(couplings.var()) if len(couplings) else math.nan,
        "rank_correlation": _rank_correlation(diagonal, values),
    }, int((~positive).sum())


def _random_window(
    spectrum: np.ndarray, size: int | None, values: np.ndarray, draws: int, seed: tuple[int, int]
) -> dict[str, float]:
    n = len(values)
    on, off = SpectralMoments.of_spectrum(spectrum, size).entries
    squares = n * on + n * (n - 1) * off
    commuted = off * float(np.sum((values[None] - values[:, None]) ** 2))
    streams = np.random.SeedSequence(seed).generate_state(draws, np.uint64)
    drawn = [_statistics(random_coupling(spectrum, n, size=size, seed=int(s)), values)[0] for s in streams]
    return {
        "commutator": _ratio(math.sqrt(commuted), math.sqrt(squares * float(values @ values))),
        "diagonal_recovery": _ratio(n * on, squares),
        "coupling_mean": float(np.mean([d["coupling_mean"] for d in drawn])),
        "coupling_variance": float(np.mean([d["coupling_variance"] for d in drawn])),
        "rank_correlation": 0.0,
    }


def _rank_correlation(x: np.ndarray, y: np.ndarray) -> float:
    from scipy.stats import rankdata  # scipy.stats takes longer to import than all else here

    a, b = (rank - rank.mean() for rank in (rankdata(x), rankdata(y)))
    return _ratio(float(a @ b), math.sqrt(float(a @ a) * float(b @ b)))


def _commutator(m: Means) -> float:
    return _ratio(math.sqrt(m.commuted), math.sqrt(m.hh * m.cc))


def _cosine(m: Means) -> float:
    return _ratio(m.hc, math.sqrt(m.hh * m.cc))


def _ratio(above: float, below: float) -> float:
    return above / below if below > 0 else math.nan


def _array(x: Any) -> np.ndarray:
    return np.asarray(x.detach().cpu() if isinstance(x, Tensor) else x, dtype=np.float64)
