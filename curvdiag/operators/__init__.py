"""Matrix-free symmetric matrices over a model's parameters."""

from curvdiag.operators.base import Cost, LinearMap, SymmetricOperator, linear_map
from curvdiag.operators.hessian import Hessian

__all__ = ["Cost", "Hessian", "LinearMap", "SymmetricOperator", "linear_map"]
