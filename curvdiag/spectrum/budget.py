"""One Krylov budget: eigenpairs, density, trace, norms and anisotropy from products that are made once."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from curvdiag.distributed import collectively
from curvdiag.estimate import Estimate
from curvdiag.memory import free_bytes
from curvdiag.modes import outside_modes
from curvdiag.operators.base import LinearMap, linear_map
from curvdiag.results import Result
from curvdiag.seeds import Seed, resolve_seed
from curvdiag.spectrum.anisotropy import Anisotropy, anisotropy
from curvdiag.spectrum.deflation import Deflate, Deflation, check_deflate, deflation_of
from curvdiag.spectrum.density import SpectralDensity, check_counts, density_outside
from curvdiag.spectrum.eigen import Eigenpairs, check_wanted, search_eigenpairs
from curvdiag.spectrum.first_run import FirstRun, settled_pairs
from curvdiag.spectrum.krylov import Subspace
from curvdiag.spectrum.lanczos import Progress
from curvdiag.spectrum.vectors import working_dtype

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Vectors beyond those of the first run that the search for the eigenpairs may need before it restarts.
ROOM = 24


@dataclass(frozen=True)
class SpectrumMeasurement(Result):
    """What one Krylov budget says of a matrix.

    Attributes:
        eigenpairs: The largest ones, with their residuals, and which have converged.
        density: The density, its trace and its norms; what the search for the eigenpairs has found is deflated.
        matvecs: All products: those of the eigenpairs and those of the density's probes; so is ``density.matvecs``.
        note: What differs from what was asked, if anything.
    """

    eigenpairs: Eigenpairs
    density: SpectralDensity
    matvecs: int
    note: str = ""

    def plot(self, ax: Axes | None = None, **options: Any) -> Axes:
        """Draw the density."""
        return self.density.plot(ax, **options)

    @property
    def lambda_max(self) -> float:
        """The largest eigenvalue, within its residual."""
        return float(self.eigenpairs.values[0])

    @property
    def trace(self) -> Estimate:
        """``tr(H)``."""
        return self.density.trace()

    @property
    def frobenius_norm(self) -> Estimate:
        """``||H||_F``."""
        return self.density.frobenius_norm()

    @cached_property
    def anisotropy(self) -> Anisotropy:
        """Every measure of the spectrum, from these eigenpairs and this density."""
        return anisotropy(self.density, self.eigenpairs)

    def __str__(self) -> str:
        lines = [str(self.eigenpairs), f"tr H     {self.trace}", f"||H||_F  {self.frobenius_norm}"]
        lines.append(f"{self.matvecs} products, {len(self.density.deflated)} eigenvalues deflated")
        return "\n".join([*lines, self.note] if self.note else lines)


@outside_modes
@collectively
def measure_spectrum(
    op: Any,
    k: int = 5,
    *,
    steps: int = 40,
    probes: int = 3,
    tol: float = 1e-2,
    deflate: Deflate = "auto",
    start: Tensor | None = None,
    seed: Seed = 0,
    progress: Progress | None = None,
) -> SpectrumMeasurement:
    """The ``k`` largest eigenpairs and the density, at the products of one search and ``steps * probes``.

    The subspace in which the eigenpairs were found knows more pairs, those of the lower end among them. Whatever in it
    is good enough enters the density for itself, so that the probes see only the rest. With ``deflate="auto"`` and
    without ``start`` the search begins with a first run of at most ``steps`` products, for as long as what it finds
    takes more off the errors of ``tr H`` and ``tr H^2`` than its products would, spent on probes; otherwise it is that
    of :func:`top_eigenpairs`.

    Args:
        op: Any square symmetric object with ``shape`` and ``@``.
        k: How many eigenpairs; more than ``P`` are clipped to ``P``.
        steps: Lanczos steps of each probe.
        probes: Random vectors of the density. At least 3 for intervals.
        tol: Of the eigenpairs, as in :func:`top_eigenpairs`.
        deflate: The most eigenvalues that are deflated, 0 for none, ``"auto"`` for all that are good enough.
        start: Start vectors ``[P]`` or ``[P, j]`` of the search, say the eigenvectors of an earlier measurement.
        seed: An integer, or a generator that advances.
        progress: Called with (products done, products planned) of the density, after those of the eigenpairs.

    Raises:
        ArgumentError: An argument is out of range or of the wrong shape.
        NonFiniteError: A product held NaN or infinite numbers.
    """
    check_counts(steps, probes)
    check_deflate(deflate)
    operator, seed = linear_map(op), resolve_seed(seed)
    k = check_wanted(k, tol, operator.size)
    run = None if start is not None or deflate != "auto" else _first_run(operator, k, steps, probes, seed)
    space = None if run is None else run.space
    search = search_eigenpairs(operator, k, tol=tol, start=start, seed=seed, space=space)
    pairs = search.result()
    # The seed's first probe made the first run, or it made the earlier measurement that a start comes from.
    deflation = _deflation(operator, search.space, deflate, used=0 if run is None and start is None else 1)
    del run, space, search  # the basis makes room for the probes
    density = density_outside(operator, deflation, steps=steps, probes=probes, seed=seed, progress=progress)
    missing = int((~pairs.converged).sum())
    notes = [f"{missing} of {len(pairs.values)} eigenpairs have not converged after {pairs.matvecs} products"] * bool(
        missing
    )
    notes += [density.note] if density.note else []
    return SpectrumMeasurement(pairs, density, density.matvecs, "; ".join(notes))


def _first_run(operator: LinearMap, k: int, steps: int, probes: int, seed: int) -> FirstRun | None:
    """A run for as long as deflating what it finds pays, with room to search on; ``None`` where that does not fit."""
    space, dtype = operator.space, working_dtype(operator)
    limit = min(steps, operator.size)
    length = max(limit, 2 * k) + k + ROOM
    need = length * 3 // 2 * space.longest * dtype.itemsize
    if space.fitting(free_bytes(operator.device), 2 * need, operator.device) < 1:
        return None
    run = FirstRun(operator, space.rademacher(1, seed=seed, dtype=dtype, device=operator.device), length)
    run.go_on_while_it_pays(limit, steps * probes, None)
    return run


def _deflation(operator: LinearMap, space: Subspace, deflate: Deflate, used: int) -> Deflation:
    chosen, note = settled_pairs(space)[: None if deflate == "auto" else deflate], ""
    vector = operator.space.longest * working_dtype(operator).itemsize
    room = operator.space.fitting(free_bytes(operator.device), 2 * vector, operator.device)
    if len(chosen) > room:
        note = f"{room} of {len(chosen)} known eigenvalues deflated, for want of memory"
        chosen = chosen[:room]
    if not len(chosen):
        return Deflation(np.empty(0), None, space.matvecs, used=used, note=note)
    return deflation_of(space, chosen, used=used, note=note)
