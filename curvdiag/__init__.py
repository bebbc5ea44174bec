"""curvdiag: curvature and noise diagnostics for PyTorch.

An :class:`Objective` is a model with its loss and data. A :class:`Hessian` is its curvature as an operator.
:func:`spectral_density`, :func:`top_eigenpairs`, :func:`trace` and :func:`anisotropy` say what it looks like, and a
:class:`CurvatureMonitor` asks them while the model trains.
"""

from importlib.metadata import PackageNotFoundError, version

from curvdiag.errors import CurvdiagError, CurvdiagWarning
from curvdiag.estimate import Estimate
from curvdiag.monitor import CurvatureMonitor, Every, LogSpaced, Measurement, OverheadBudget
from curvdiag.noise import ScalingResult, scaling_test
from curvdiag.objective import Objective
from curvdiag.operators import EmpiricalFisher, Fisher, GaussNewton, Hessian, NoiseCovariance, SymmetricOperator
from curvdiag.record import RunStore
from curvdiag.spectrum import (
    Eigenpairs,
    SpectralDensity,
    anisotropy,
    diagonal,
    frobenius_norm,
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
    "CurvatureMonitor",
    "CurvdiagError",
    "CurvdiagWarning",
    "Eigenpairs",
    "EmpiricalFisher",
    "Estimate",
    "Every",
    "Fisher",
    "GaussNewton",
    "Hessian",
    "LogSpaced",
    "Measurement",
    "NoiseCovariance",
    "Objective",
    "OverheadBudget",
    "RunStore",
    "ScalingResult",
    "SpectralDensity",
    "SymmetricOperator",
    "anisotropy",
    "diagonal",
    "frobenius_norm",
    "power_iteration",
    "scaling_test",
    "spectral_density",
    "top_eigenpairs",
    "trace",
]
