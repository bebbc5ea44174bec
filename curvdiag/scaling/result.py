"""What the test of C against H found, and how it reads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from curvdiag.estimate import Estimate
from curvdiag.results import Result
from curvdiag.scaling.alignment import Window
from curvdiag.scaling.duality import Duality
from curvdiag.scaling.power_law import Directions, PowerLaw
from curvdiag.scaling.verdict import Verdict

Array = NDArray[np.float64]
Truths = NDArray[np.bool_]

# Rounding that the bounds are allowed, relative to their larger side.
ROUNDING = 1e-5


@dataclass(frozen=True)
class Bounds(Result):
    """``H_ii^2 <= E[h^2]_ii <= kappa_max H_ii`` along each direction, on the samples that were measured.

    The lower bound holds for any samples (Jensen), so that a failure is an error of the computation. The upper one
    needs positive semi-definite ``h_i``.

    Attributes:
        lower_holds: ``[n]``.
        upper_holds: ``[n]``, or None where some ``h_i`` is indefinite or nothing is known about them.
        kappa_max: The largest eigenvalue of any ``h_i``; None likewise.
    """

    lower_holds: Truths
    upper_holds: Truths | None
    kappa_max: float | None

    @classmethod
    def of(cls, directions: Directions, kappa_max: float | None) -> Bounds | None:
        """The bounds checked on what was measured; None where the squares were not."""
        if directions.square is None:
            return None
        curvature, square = directions.curvature, directions.square
        upper = None if kappa_max is None else square <= kappa_max * curvature * (1 + ROUNDING)
        return cls(curvature**2 <= square * (1 + ROUNDING), upper, kappa_max)

    def __str__(self) -> str:
        lines = f"H_ii^2 <= E[h^2]_ii {_share(self.lower_holds)}"
        if self.upper_holds is None:
            return lines + "; the upper bound needs per-sample Hessians known to be positive semi-definite"
        return lines + f"; E[h^2]_ii <= {self.kappa_max:.3g} H_ii {_share(self.upper_holds)}"


@dataclass(frozen=True)
class ScalingResult(Result):
    """Whether gradient noise is shaped like curvature, in one block of parameters.

    Attributes:
        block: What was measured, ``""`` for the whole model.
        basis: ``"hessian"``, eigenvectors of H, or ``"parameter"``, the coordinates.
        method: ``"dense"``, ``"kronecker"`` or ``"matrix-free"``.
        size, samples: ``P`` and ``N``.
        held_out: The basis from one half of the samples, the numbers along it from the other.
        in_sample: Both from all samples, as published; biased.
        windows: Alignment inside the span of the leading and of the following directions, on all samples.
        commutator, commutator_baseline: ``||CH - HC||_F / (||C||_F ||H||_F)``, and with random eigenvectors.
        cosine, cosine_baseline: ``tr(HC) / (||H||_F ||C||_F)``, and with random eigenvectors.
        coupling: ``V^T C V`` ``[m, m]`` of the leading directions, at most 100, on all samples.
        coupling_baseline: The same where the directions are random.
        curvature_spectrum, noise_spectrum: All eigenvalues of H and of C, descending, where they are dense.
        bounds: None where squares were not measured.
        duality: Only for a fully connected layer of a net with class labels.
        verdict: In words, with the figures that decide it.
        notes: What to know about the numbers.
    """

    block: str
    basis: str
    method: str
    size: int
    samples: int
    held_out: Directions
    in_sample: Directions
    windows: tuple[Window, ...]
    commutator: Estimate
    commutator_baseline: float
    cosine: Estimate
    cosine_baseline: float
    coupling: Array
    coupling_baseline: Array
    curvature_spectrum: Array | None
    noise_spectrum: Array | None
    bounds: Bounds | None
    duality: Duality | None
    verdict: Verdict
    notes: tuple[str, ...]

    figure = "scaling"

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        what = f"block {self.block!r}" if self.block else "the whole model"
        size = f"{self.size:,} parameters, {self.samples:,} samples"
        yield f"C against H in {what}: {size}, {self.basis} basis, {self.method}"
        yield from _table(self.held_out, self.in_sample)
        if self.held_out.left_out:
            share = f"{self.held_out.left_out} of {len(self.held_out.used)} held-out directions"
            yield f"{share} have no positive curvature or noise; the fits end at {self.held_out.reach}"
        yield from self._alignment()
        if self.bounds is not None:
            yield f"bounds: {self.bounds}"
        if self.duality is not None:
            shares = ", ".join(f"{n} {p.trace_ratio:.3g} ({p.cosine:.3g})" for n, p in self.duality.predictions.items())
            yield f"activity-weight duality, predicted trace over tr C (cosine with C): {shares}"
        yield f"verdict: {self.verdict.word}"
        yield from (f"  {reason}" for reason in self.verdict.reasons)
        yield from (f"note: {note}" for note in self.notes)

    def _alignment(self) -> Iterator[str]:
        """One row for the whole matrices and one for each window, with random eigenvectors in brackets."""
        heads = ("commutator", "cosine", "diagonal recovery", "coupling", "rank correlation")
        yield f"{'alignment (random)':>20}  " + "  ".join(f"{head:>22}" for head in heads)
        whole = (
            f"{_number(self.commutator)} ({self.commutator_baseline:.3g})",
            f"{_number(self.cosine)} ({self.cosine_baseline:.3g})",
        )
        yield f"{'all directions':>20}  " + "  ".join(f"{cell:>22}" for cell in whole)
        for window in self.windows:
            names = ("commutator", None, "diagonal_recovery", "coupling_mean", "rank_correlation")
            cells = [
                "" if name is None else f"{getattr(window, name):.3g} ({window.baseline[name]:.3g})" for name in names
            ]
            place = f"{window.name} {window.first + 1} to {window.last}"
            yield f"{place:>20}  " + "  ".join(f"{cell:>22}" for cell in cells)


def _table(held_out: Directions, in_sample: Directions) -> Iterator[str]:
    """The exponents by number of directions: held out with its interval, in sample, and of the squares."""
    level = f"{100 * held_out.level:g} %"
    yield "exponent of C_ii in H_ii by least squares; E[h^2]_ii beside it"
    yield f"{'directions':>12}  {f'held out [{level}]':>24}  {'in sample (biased)':>18}  {'E[h^2], held out':>24}"
    fits = held_out.noise_fits["ols"], in_sample.noise_fits["ols"], held_out.square_fits.get("ols")
    for count in sorted({*fits[0].counts.tolist(), *fits[1].counts.tolist()}):
        cells = [_at(fit, count) for fit in fits]
        yield f"{count:>12,}  {cells[0]:>24}  {cells[1].split(' [')[0]:>18}  {cells[2]:>24}".rstrip()


def _at(fit: PowerLaw | None, count: int) -> str:
    """The exponent on so many directions, with its interval where it has one."""
    if fit is None or count not in fit.counts:
        return "-"
    row = fit.counts.tolist().index(count)
    middle, low, high = (float(part[row]) for part in (fit.exponent, fit.low, fit.high))
    return f"{middle:.3f}" if np.isnan(low) else f"{middle:.3f} [{low:.3f}, {high:.3f}]"


def _number(estimate: Estimate) -> str:
    error: Any = estimate.standard_error
    return f"{estimate.value:.3g}" if estimate.samples == 0 else f"{estimate.value:.3g} ± {error:.2g}"


def _share(holds: Truths) -> str:
    return f"holds in {'all' if holds.all() else f'{int(holds.sum())} of'} {len(holds)} directions"
