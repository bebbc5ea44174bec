"""Curvature over a training run."""

from curvdiag.monitor.cadence import Cadence, Every, LogSpaced, OverheadBudget
from curvdiag.monitor.measurement import Measurement
from curvdiag.monitor.monitor import CurvatureMonitor

__all__ = ["Cadence", "CurvatureMonitor", "Every", "LogSpaced", "Measurement", "OverheadBudget"]
