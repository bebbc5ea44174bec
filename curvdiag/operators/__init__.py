"""Matrix-free symmetric matrices over a model's parameters."""

from curvdiag.operators.base import Cost, LinearMap, SymmetricOperator, linear_map
from curvdiag.operators.fisher import Fisher
from curvdiag.operators.gauss_newton import GaussNewton
from curvdiag.operators.hessian import Hessian
from curvdiag.operators.noise import EmpiricalFisher, NoiseCovariance
from curvdiag.operators.scaled import Scaled

__all__ = [
    "Cost",
    "EmpiricalFisher",
    "Fisher",
    "GaussNewton",
    "Hessian",
    "LinearMap",
    "NoiseCovariance",
    "Scaled",
    "SymmetricOperator",
    "linear_map",
]
