"""Schedules of p and of the learning rate, open-loop and measured."""

from curvdiag.schedules.anisotropy_lr import AnisotropyLR
from curvdiag.schedules.anisotropy_p import AnisotropyP
from curvdiag.schedules.constant_p import ConstantP
from curvdiag.schedules.cosine_p import CosineP
from curvdiag.schedules.cwgd_cosine_lr import CWGDCosineLR
from curvdiag.schedules.noise_curvature_lr import NoiseCurvatureLR
from curvdiag.schedules.p_scheduler import PScheduler
from curvdiag.schedules.predicted_decrease_p import PredictedDecreaseP
from curvdiag.schedules.sharpness_capped_lr import SharpnessCappedLR
from curvdiag.schedules.source import Choice
from curvdiag.schedules.stability import StabilityLimit, stability_limit

__all__ = [
    "AnisotropyLR",
    "AnisotropyP",
    "CWGDCosineLR",
    "Choice",
    "ConstantP",
    "CosineP",
    "NoiseCurvatureLR",
    "PScheduler",
    "PredictedDecreaseP",
    "SharpnessCappedLR",
    "StabilityLimit",
    "stability_limit",
]
