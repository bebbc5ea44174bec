"""Statistics of gradient noise: moments, diversity, noise scale, and the covariance against the Hessian."""

from curvdiag.noise.scaling import scaling_test
from curvdiag.noise.scaling_result import ScalingResult

__all__ = [
    "ScalingResult",
    "scaling_test",
]
