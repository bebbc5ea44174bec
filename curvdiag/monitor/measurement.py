"""What one measurement of a model consists of."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from curvdiag.errors import ArgumentError
from curvdiag.estimate import Estimate
from curvdiag.objective import Objective
from curvdiag.operators import Hessian
from curvdiag.results import Result
from curvdiag.spectrum import MEASURES, SpectralDensity, anisotropy, spectral_density, top_eigenpairs, trace

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Preset = Literal["light", "standard", "full"]
Scalars = dict[str, Estimate | float]

LAYER_STEPS = 20
"""Lanczos steps for the density of one layer: its trace and outliers, at a price that many layers allow."""


@dataclass(frozen=True)
class Settings:
    """How thorough a measurement is.

    Attributes:
        preset: ``"light"``: top eigenvalue and trace. ``"standard"``: density and anisotropy as well. ``"full"``:
            each layer as well.
        steps, probes: Of the density.
        tol: Relative residual at which the top eigenvalue is taken.
        seed: Of the probes, the same at each measurement, so that curves show the model's change and not the probes'.
        hessian: Further arguments of :class:`~curvdiag.operators.Hessian`.
    """

    preset: Preset = "standard"
    steps: int = 40
    probes: int = 3
    tol: float = 1e-2
    seed: int = 0
    hessian: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.preset not in ("light", "standard", "full"):
            raise ArgumentError(f"preset is 'light', 'standard' or 'full', not {self.preset!r}")
        if self.steps < 1 or self.probes < 1:
            raise ArgumentError(f"steps and probes are at least 1, not {self.steps} and {self.probes}")


@dataclass(frozen=True)
class Measurement(Result):
    """What was measured at one step.

    Attributes:
        step: Optimizer step.
        epoch: Epoch, if known.
        scalars: Numbers by key; see :class:`~curvdiag.monitor.CurvatureMonitor` for the keys.
        densities: Spectral densities by operator and block.
        seconds: What it took.
        notes: What a reader should know: eigenpairs that have not converged, parameters without influence.
    """

    step: int
    epoch: float | None
    scalars: Scalars
    densities: dict[tuple[str, str], SpectralDensity]
    seconds: float
    notes: tuple[str, ...] = ()

    def __getitem__(self, key: str) -> float:
        return float(self.scalars[key])

    def plot(self, ax: Axes | None = None, **options: Any) -> Axes:
        """Draw the density of the whole model."""
        if ("hessian", "") not in self.densities:
            raise ArgumentError("this measurement has no density: it was made with preset='light'")
        return self.densities["hessian", ""].plot(ax=ax, **options)


def measure(
    objective: Objective, settings: Settings
) -> tuple[Scalars, dict[tuple[str, str], SpectralDensity], list[str], int]:
    """Scalars, densities, notes and the number of Hessian products of one measurement."""
    operator = Hessian(objective, **settings.hessian)
    scalars: Scalars = {}
    densities: dict[tuple[str, str], SpectralDensity] = {}
    notes: list[str] = []
    matvecs = _whole(operator, settings, scalars, densities, notes)
    if settings.preset == "full":
        for layer, names in objective.parameters.layers().items():
            block = operator.block(lambda name, _, inside=frozenset(names): name in inside)  # type: ignore[misc]
            matvecs += _layer(block, layer, settings, scalars, densities, notes)
    if operator.unreached:
        notes.append(f"the loss does not reach {', '.join(operator.unreached)}: their rows are zero")
    return scalars, densities, notes, matvecs


def _whole(
    operator: Hessian,
    settings: Settings,
    scalars: Scalars,
    densities: dict[tuple[str, str], SpectralDensity],
    notes: list[str],
) -> int:
    light = settings.preset == "light"
    top = top_eigenpairs(operator, 1 if light else min(5, operator.size), tol=settings.tol, seed=settings.seed)
    scalars["curv/hessian/lambda_max"] = float(top.values[0])
    scalars["curv/hessian/lambda_max_residual"] = float(top.residuals[0])
    if not bool(top.converged[0]):
        notes.append(
            f"lambda_max has not converged: residual {float(top.residuals[0]):.3g} after {top.matvecs} products"
        )
    if light:
        scalars["curv/hessian/trace"] = trace(operator, probes=settings.probes, seed=settings.seed)
        return top.matvecs + settings.probes
    density = spectral_density(operator, steps=settings.steps, probes=settings.probes, seed=settings.seed)
    densities["hessian", ""] = density
    if density.note:
        notes.append(density.note)
    scalars["curv/hessian/lambda_min"] = density.lambda_min
    scalars["curv/hessian/trace"] = density.trace()
    scalars["curv/hessian/frobenius_norm"] = density.frobenius_norm()
    measures = anisotropy(density, top)
    for name in MEASURES:
        value: Estimate = getattr(measures, name)
        if not math.isnan(value.value):
            scalars[f"curv/anisotropy/{name}"] = value
    return top.matvecs + density.matvecs


def _layer(
    block: Hessian,
    layer: str,
    settings: Settings,
    scalars: Scalars,
    densities: dict[tuple[str, str], SpectralDensity],
    notes: list[str],
) -> int:
    top = top_eigenpairs(block, 1, tol=settings.tol, seed=settings.seed)
    density = spectral_density(
        block, steps=min(LAYER_STEPS, settings.steps), probes=settings.probes, seed=settings.seed
    )
    scalars[f"curv/layer/{layer}/lambda_max"] = float(top.values[0])
    scalars[f"curv/layer/{layer}/trace"] = density.trace()
    densities["hessian", layer] = density
    if not bool(top.converged[0]):
        notes.append(f"lambda_max of {layer} has not converged after {top.matvecs} products")
    return top.matvecs + density.matvecs
