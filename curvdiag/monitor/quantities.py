"""The quantities of a measurement, by name. What several of them need is worked out once."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property

from curvdiag.estimate import Estimate
from curvdiag.monitor.settings import Settings
from curvdiag.noise.cwgd import cwgd
from curvdiag.noise.noise_scale import NoiseScale, noise_scale
from curvdiag.objective import Objective
from curvdiag.operators import Hessian, NoiseCovariance
from curvdiag.scaling.alignment import alignment
from curvdiag.spectrum import (
    MEASURES,
    Eigenpairs,
    SpectralDensity,
    anisotropy,
    spectral_density,
    top_eigenpairs,
    trace,
)

Scalars = dict[str, Estimate | float]

LAYER_STEPS = 20
"""Lanczos steps for the density of one layer: its trace and outliers, at a price that many layers allow."""

STARTS = 8
"""Random-sign sums for ``tr(H C)``: one product each."""

CWGD_STARTS = 4
"""Each with the Lanczos steps of the density. These are not doubled; where they are too few a note says so."""

ALIGNMENT_PROBES = 6
"""Four products each, two of them with C."""


class Workbench:
    """One measurement under way: what its quantities share, and what they have found.

    Attributes:
        scalars: Numbers by key.
        densities: Spectral densities by operator and block.
        notes: What a reader should know.
    """

    def __init__(self, objective: Objective, settings: Settings, quantities: tuple[str, ...]) -> None:
        self.objective, self.settings, self.quantities = objective, settings, quantities
        self.scalars: Scalars = {}
        self.densities: dict[tuple[str, str], SpectralDensity] = {}
        self.notes: list[str] = []
        self._blocks: list[Hessian] = []

    @cached_property
    def hessian(self) -> Hessian:
        return Hessian(self.objective, **self.settings.hessian)

    @cached_property
    def covariance(self) -> NoiseCovariance:
        """C on the graphs of H."""
        return NoiseCovariance(self.objective, graphs=self.hessian)

    def block(self, names: list[str]) -> Hessian:
        """The Hessian of one layer, on the same graphs."""
        inside = frozenset(names)
        self._blocks.append(self.hessian.block(lambda name, _: name in inside))
        return self._blocks[-1]

    @property
    def matvecs(self) -> int:
        """Products so far, with H, with its blocks and with C."""
        made = [vars(self).get("hessian"), vars(self).get("covariance"), *self._blocks]
        return sum(operator.cost.matvecs for operator in made if operator is not None)

    @cached_property
    def top(self) -> Eigenpairs:
        settings, count = self.settings, 5 if "anisotropy" in self.quantities else 1
        top = top_eigenpairs(self.hessian, min(count, self.hessian.size), tol=settings.tol, seed=settings.seed)
        if not bool(top.converged[0]):
            self.notes.append(
                f"lambda_max has not converged: residual {float(top.residuals[0]):.3g} after {top.matvecs} products"
            )
        return top

    @cached_property
    def density(self) -> SpectralDensity:
        settings = self.settings
        density = spectral_density(self.hessian, steps=settings.steps, probes=settings.probes, seed=settings.seed)
        if density.note:
            self.notes.append(density.note)
        return density

    @cached_property
    def noise(self) -> NoiseScale:
        """With its curvature where that is asked for; the norms of single gradients need a pass of their own."""
        settings = self.settings
        found = noise_scale(
            self.objective,
            curvature="noise_scale" in self.quantities,
            starts=STARTS,
            seed=settings.seed,
            hessian=self.hessian if "noise_scale" in self.quantities else None,
            dtype=settings.hessian.get("dtype"),
            micro_batch=settings.hessian.get("micro_batch"),
        )
        if "noise_scale" in self.quantities:
            self.notes += [f"noise scale: {note}" for note in found.notes]
        return found


def _lambda_max(work: Workbench) -> None:
    work.scalars["curv/hessian/lambda_max"] = float(work.top.values[0])
    work.scalars["curv/hessian/lambda_max_residual"] = float(work.top.residuals[0])


def _trace(work: Workbench) -> None:
    settings = work.settings
    if {"density", "anisotropy"} & set(work.quantities):
        found = work.density.trace()
    else:
        found = trace(work.hessian, probes=settings.probes, seed=settings.seed)
    work.scalars["curv/hessian/trace"] = found


def _density(work: Workbench) -> None:
    work.densities["hessian", ""] = work.density
    work.scalars["curv/hessian/lambda_min"] = work.density.lambda_min
    work.scalars["curv/hessian/frobenius_norm"] = work.density.frobenius_norm()


def _anisotropy(work: Workbench) -> None:
    measures = anisotropy(work.density, work.top)
    for name in MEASURES:
        value: Estimate = getattr(measures, name)
        if not math.isnan(value.value):
            work.scalars[f"curv/anisotropy/{name}"] = value


def _layers(work: Workbench) -> None:
    settings = work.settings
    steps = min(LAYER_STEPS, settings.steps)
    for layer, names in work.objective.parameters.layers().items():
        block = work.block(names)
        top = top_eigenpairs(block, 1, tol=settings.tol, seed=settings.seed)
        density = spectral_density(block, steps=steps, probes=settings.probes, seed=settings.seed)
        work.scalars[f"curv/layer/{layer}/lambda_max"] = float(top.values[0])
        work.scalars[f"curv/layer/{layer}/trace"] = density.trace()
        work.densities["hessian", layer] = density
        if not bool(top.converged[0]):
            work.notes.append(f"lambda_max of {layer} has not converged after {top.matvecs} products")


def _noise_scale(work: Workbench) -> None:
    work.scalars["noise/scale"] = work.noise.b_simple
    if work.noise.b_noise is not None:
        work.scalars["noise/scale_curvature"] = work.noise.b_noise


def _noise_trace(work: Workbench) -> None:
    work.scalars["noise/trace"] = work.noise.trace


def _cwgd(work: Workbench) -> None:
    steps, seed = max(2, work.settings.steps), work.settings.seed
    found = cwgd(work.objective, starts=CWGD_STARTS, steps=steps, max_steps=steps, seed=seed, hessian=work.hessian)
    work.scalars["noise/cwgd"] = found.value
    work.notes += [f"CWGD: {note}" for note in found.notes]


def _alignment(work: Workbench) -> None:
    found = alignment(work.hessian, work.covariance, probes=ALIGNMENT_PROBES, seed=work.settings.seed)
    work.scalars["align/cosine"] = found.cosine
    work.scalars["align/cosine_baseline"] = found.cosine_baseline
    work.scalars["align/commutator"] = found.commutator
    work.scalars["align/commutator_baseline"] = found.commutator_baseline


QUANTITIES: dict[str, Callable[[Workbench], None]] = {
    "lambda_max": _lambda_max,
    "trace": _trace,
    "density": _density,
    "anisotropy": _anisotropy,
    "layers": _layers,
    "noise_scale": _noise_scale,
    "noise_trace": _noise_trace,
    "cwgd": _cwgd,
    "alignment": _alignment,
}
