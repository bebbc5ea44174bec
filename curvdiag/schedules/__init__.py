"""Schedules of p and of the learning rate, open-loop and measured.

In the loop ``optimizer.step()`` comes first, after which an attached monitor measures, and then the ``step()`` of each
schedule. A checkpoint holds the states of the optimizer, the monitor and every schedule.

With several ranks all must choose alike, or their weights drift apart. They do where all measure together, with
``Objective(..., group="world")``: then every monitor holds the same numbers. Otherwise each has a monitor with the same
probe batches and a cadence in steps; or one of them measures, and a function gives its measurement to all::

    def measured():  # on every rank
        box = [monitor.latest if rank == 0 else None]
        torch.distributed.broadcast_object_list(box)
        return box[0]

    schedule = AnisotropyP(optimizer, measured, refresh=100)

A schedule sees to it that the monitor it follows measures the same after a resume. It cannot where a function stands
between them: make such a monitor with ``warm=False``.
"""

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
