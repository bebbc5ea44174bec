"""The quantities of a measurement, by name. What several of them need is worked out once."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import torch
from torch.optim import Optimizer

from curvdiag.errors import ArgumentError
from curvdiag.estimate import Estimate
from curvdiag.monitor.scaling import optimizer_scaling
from curvdiag.monitor.settings import Settings
from curvdiag.monitor.warm import WarmStarts
from curvdiag.noise.cwgd import DiagonalCWGD, cwgd
from curvdiag.noise.moments import GradientMoments, gradient_moments
from curvdiag.noise.noise_scale import NoiseScale, noise_scale
from curvdiag.objective import Objective
from curvdiag.operators import Hessian, NoiseCovariance, Scaled
from curvdiag.scaling.alignment import alignment
from curvdiag.spectrum import (
    Anisotropy,
    Eigenpairs,
    LayerSpectra,
    SpectralDensity,
    SpectrumMeasurement,
    anisotropy,
    layer_spectra,
    measure_spectrum,
    trace,
)

Scalars = dict[str, Estimate | float]

LAYER_STEPS = 20
"""Lanczos steps for the density of one layer: its trace and outliers, at a price that many layers allow."""

PAIRS = 5
"""Largest eigenpairs that are found with a density: what ``top_ratio`` takes, and deflated they sharpen the rest."""

STARTS = 8
"""Random-sign sums for ``tr(H C)``: one product each."""

CWGD_STARTS = 4
"""Each with the Lanczos steps of the density. These are not doubled; where they are too few a note says so."""

ALIGNMENT_PROBES = 6
"""Four products each, two of them with C."""

LOST = 0.1
"""Share of the diagonal CWGD that may come from entries lost in the noise of the probes before a note says so."""


class Workbench:
    """One measurement under way: what its quantities share, and what they have found.

    Attributes:
        scalars: Numbers by key.
        densities: Spectral densities by operator and block.
        notes: What a reader should know.
    """

    def __init__(
        self,
        objective: Objective,
        settings: Settings,
        quantities: tuple[str, ...],
        optimizer: Optimizer | None = None,
        warm: WarmStarts | None = None,
    ) -> None:
        self.objective, self.settings, self.quantities = objective, settings, quantities
        self.optimizer = optimizer
        self.warm = WarmStarts(enabled=False) if warm is None else warm
        self.scalars: Scalars = {}
        self.densities: dict[tuple[str, str], SpectralDensity] = {}
        self.notes: list[str] = []

    def content(self) -> dict[str, Any]:
        """What is there by now, for :meth:`restore`."""
        found = {"scalars": dict(self.scalars), "densities": dict(self.densities), "notes": list(self.notes)}
        return {**vars(self), **found}

    def restore(self, content: Mapping[str, Any]) -> None:
        """Forget what has come since, and what the next measurement was to start from."""
        vars(self).clear()
        vars(self).update(content)
        self.warm.forget()

    @cached_property
    def hessian(self) -> Hessian:
        return Hessian(self.objective, **self.settings.hessian)

    @cached_property
    def covariance(self) -> NoiseCovariance:
        """C on the graphs of H."""
        return NoiseCovariance(self.objective, graphs=self.hessian)

    @cached_property
    def layers(self) -> LayerSpectra:
        """Density and largest eigenvalue of each layer, on the same graphs."""
        settings = self.settings
        found = layer_spectra(
            self.hessian,
            steps=min(LAYER_STEPS, settings.steps),
            probes=settings.probes,
            tol=settings.tol,
            seed=settings.seed,
        )
        for name, layer in found.layers.items():
            if not layer.converged:
                short = f"residual {layer.residual:.3g} after {layer.matvecs} products"
                self.notes.append(f"lambda_max of {name} has not converged: {short}")
        return found

    @property
    def matvecs(self) -> int:
        """Products so far, with H, with its blocks and with C."""
        made, layers = [vars(self).get("hessian"), vars(self).get("covariance")], vars(self).get("layers")
        spent = 0 if layers is None else layers.matvecs
        return spent + sum(operator.cost.matvecs for operator in made if operator is not None)

    @cached_property
    def spectrum(self) -> SpectrumMeasurement:
        """The largest eigenpairs and the density, from products that are made once; its start is a cold one."""
        settings = self.settings
        found = measure_spectrum(
            self.hessian, PAIRS, steps=settings.steps, probes=settings.probes, tol=settings.tol, seed=settings.seed
        )
        if found.density.note:
            self.notes.append(found.density.note)
        return found

    @cached_property
    def top(self) -> Eigenpairs:
        settings = self.settings
        if {"density", "anisotropy"} & set(self.quantities):
            top = self.spectrum.eigenpairs
        else:
            top = self.warm.largest("hessian", self.hessian, self.objective, tol=settings.tol, seed=settings.seed)
        if not bool(top.converged[0]):
            self.notes.append(
                f"lambda_max has not converged: residual {float(top.residuals[0]):.3g} after {top.matvecs} products"
            )
        return top

    @property
    def density(self) -> SpectralDensity:
        return self.spectrum.density

    @cached_property
    def moments(self) -> GradientMoments:
        """Means and variances of the gradients of single samples."""
        return gradient_moments(self.objective, dtype=self.settings.hessian.get("dtype"))

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
            moments=self.moments if "cwgd_diagonal" in self.quantities else None,
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
    _record_measures(work, "curv/anisotropy", anisotropy(work.density, work.top))


def _record_measures(work: Workbench, room: str, found: Anisotropy) -> None:
    """Those that have a value."""
    for name, value in found.measures.items():
        if not math.isnan(value.value):
            work.scalars[f"{room}/{name}"] = value


def _layers(work: Workbench) -> None:
    for name, layer in work.layers.layers.items():
        work.scalars[f"curv/layer/{name}/lambda_max"] = layer.lambda_max
        work.scalars[f"curv/layer/{name}/trace"] = layer.trace
        work.densities["hessian", name] = layer.density


def _layer_anisotropy(work: Workbench) -> None:
    """One eigenvalue sharpens ``lambda_max``; ``top_ratio``, which takes five, is left out."""
    for name, layer in work.layers.layers.items():
        _record_measures(work, f"curv/layer/{name}/anisotropy", anisotropy(layer.density, layer.top))


def _preconditioned_lambda_max(work: Workbench) -> None:
    if work.optimizer is None:
        raise ArgumentError(
            "preconditioned_lambda_max is that of an optimizer's steps, and the monitor follows none: attach(optimizer)"
        )
    settings, scaling = work.settings, optimizer_scaling(work.objective, work.optimizer)
    work.notes += [f"preconditioned_lambda_max: {note}" for note in scaling.notes]
    root = scaling.inverse_root(torch.promote_types(work.hessian.dtype, torch.float32))
    if not bool(root.any()):
        return  # a note says why
    scaled = Scaled(work.hessian, root)
    top = work.warm.largest("preconditioned", scaled, work.objective, tol=settings.tol, seed=settings.seed)
    if not bool(top.converged[0]):
        work.notes.append(
            f"preconditioned_lambda_max has not converged: residual {float(top.residuals[0]):.3g} after "
            f"{top.matvecs} products"
        )
    work.scalars["curv/preconditioned/lambda_max"] = float(top.values[0])
    work.scalars["curv/preconditioned/lambda_max_residual"] = float(top.residuals[0])


def _noise_scale(work: Workbench) -> None:
    noise, found = work.noise, work.scalars
    found["noise/scale"] = noise.b_simple
    found["noise/gradient_square"] = noise.gradient_square
    found["noise/gradient_square_probe"] = noise.probe_square
    assert noise.population_curvature is not None
    assert noise.gradient_curvature is not None
    assert noise.b_noise is not None
    assert noise.trace_hc is not None
    found["noise/gradient_curvature"] = noise.population_curvature
    found["noise/gradient_curvature_probe"] = noise.gradient_curvature
    found["noise/scale_curvature"] = noise.b_noise
    found["noise/trace_hc"] = noise.trace_hc


def _noise_trace(work: Workbench) -> None:
    work.scalars["noise/trace"] = work.noise.trace


def _cwgd(work: Workbench) -> None:
    steps, seed = max(2, work.settings.steps), work.settings.seed
    found = cwgd(work.objective, starts=CWGD_STARTS, steps=steps, max_steps=steps, seed=seed, hessian=work.hessian)
    work.scalars["noise/cwgd"] = found.value
    work.notes += [f"CWGD: {note}" for note in found.notes]


def _cwgd_diagonal(work: Workbench) -> None:
    settings = work.settings
    found = cwgd(
        work.objective,
        "diagonal",
        probes=settings.probes,
        seed=settings.seed,
        hessian=work.hessian,
        moments=work.moments,
    )
    work.scalars["noise/cwgd_diagonal"] = found.value
    work.notes += [f"diagonal CWGD: {note}" for note in found.notes]
    assert isinstance(found, DiagonalCWGD)
    if found.lost_share > LOST:
        work.notes.append(
            f"diagonal CWGD: {found.lost_share:.0%} of it comes from entries of the diagonal that the noise of "
            f"{found.probes} probes hides; take more"
        )


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
    "layer_anisotropy": _layer_anisotropy,
    "preconditioned_lambda_max": _preconditioned_lambda_max,
    "noise_scale": _noise_scale,
    "noise_trace": _noise_trace,
    "cwgd": _cwgd,
    "cwgd_diagonal": _cwgd_diagonal,
    "alignment": _alignment,
}
