"""Statistics of gradient noise: moments, diversity, noise scale, and noise in units of curvature."""

from curvdiag.noise.cwgd import CWGD, cwgd
from curvdiag.noise.diversity import gradient_diversity
from curvdiag.noise.moments import GradientMoments, gradient_moments
from curvdiag.noise.noise_scale import NoiseScale, noise_scale
from curvdiag.noise.rank_noise_scale import RankNoiseScale
from curvdiag.noise.running import RunningNoiseScale

__all__ = [
    "CWGD",
    "GradientMoments",
    "NoiseScale",
    "RankNoiseScale",
    "RunningNoiseScale",
    "cwgd",
    "gradient_diversity",
    "gradient_moments",
    "noise_scale",
]
