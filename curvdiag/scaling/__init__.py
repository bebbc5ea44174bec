"""The test of C against H: is gradient noise shaped like curvature, and if not, how?"""

from curvdiag.scaling.measure import scaling_test
from curvdiag.scaling.result import ScalingResult

__all__ = ["ScalingResult", "scaling_test"]
