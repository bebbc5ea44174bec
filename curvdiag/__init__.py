"""curvdiag: curvature and noise diagnostics for PyTorch.

An :class:`Objective` is a model with its loss and data. A :class:`Hessian` is its curvature as an operator.
:func:`spectral_density`, :func:`top_eigenpairs`, :func:`trace` and :func:`anisotropy` say what it looks like. A
:class:`NoiseCovariance` is the covariance of per-sample gradients; :func:`gradient_moments`, :func:`noise_scale`,
:func:`gradient_diversity` and :func:`cwgd` measure it, and :func:`scaling_test` asks whether it is proportional to the
Hessian. A :class:`CurvatureMonitor` watches all this while the model trains. :mod:`curvdiag.optim` has the optimizers
in the l_p geometry, :mod:`curvdiag.schedules` the schedules that read what the monitor measured.
"""

from importlib.metadata import PackageNotFoundError, version

from curvdiag import optim, schedules
from curvdiag.errors import CurvdiagError, CurvdiagWarning
from curvdiag.estimate import Estimate
from curvdiag.monitor import CurvatureMonitor, Every, LogSpaced, Measurement, OverheadBudget
from curvdiag.noise import (
    CWGD,
    GradientMoments,
    NoiseScale,
    RankNoiseScale,
    RunningNoiseScale,
    cwgd,
    gradient_diversity,
    gradient_moments,
    noise_scale,
)
from curvdiag.objective import Objective
from curvdiag.operators import EmpiricalFisher, Fisher, GaussNewton, Hessian, NoiseCovariance, SymmetricOperator
from curvdiag.record import RunStore
from curvdiag.samples import per_sample_gradients
from curvdiag.scaling import ScalingResult, scaling_test
from curvdiag.spectrum import (
    Eigenpairs,
    LayerSpectra,
    SpectralDensity,
    SpectrumMeasurement,
    anisotropy,
    diagonal,
    frobenius_norm,
    layer_spectra,
    measure_spectrum,
    power_iteration,
    spectral_density,
    top_eigenpairs,
    trace,
)

try:
    __version__ = version("curvdiag")
except PackageNotFoundError:  # run from a folder, not installed
    __version__ = "unknown"

__all__ = [
    "CWGD",
    "CurvatureMonitor",
    "CurvdiagError",
    "CurvdiagWarning",
    "Eigenpairs",
    "EmpiricalFisher",
    "Estimate",
    "Every",
    "Fisher",
    "GaussNewton",
    "GradientMoments",
    "Hessian",
    "LayerSpectra",
    "LogSpaced",
    "Measurement",
    "NoiseCovariance",
    "NoiseScale",
    "Objective",
    "OverheadBudget",
    "RankNoiseScale",
    "RunStore",
    "RunningNoiseScale",
    "ScalingResult",
    "SpectralDensity",
    "SpectrumMeasurement",
    "SymmetricOperator",
    "anisotropy",
    "cwgd",
    "diagonal",
    "frobenius_norm",
    "gradient_diversity",
    "gradient_moments",
    "layer_spectra",
    "measure_spectrum",
    "noise_scale",
    "optim",
    "per_sample_gradients",
    "power_iteration",
    "scaling_test",
    "schedules",
    "spectral_density",
    "top_eigenpairs",
    "trace",
]
