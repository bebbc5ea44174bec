"""Gradient diversity: how far the gradients of single samples differ from each other."""

from __future__ import annotations

import math

import torch

from curvdiag.distributed import collectively
from curvdiag.estimate import Estimate
from curvdiag.noise.jackknife import jackknife
from curvdiag.noise.moments import GradientMoments
from curvdiag.noise.sample_products import SampleProducts, sample_products
from curvdiag.objective import Objective


@collectively
def gradient_diversity(
    objective: Objective,
    *,
    moments: GradientMoments | None = None,
    dtype: torch.dtype | None = None,
    micro_batch: int | None = None,
) -> Estimate:
    """``D = sum_i ||g_i||^2 / ||sum_i g_i||^2`` over the ``N`` samples of the objective.

    Mini-batches up to ``N D`` samples (``objective.size * D.value``) speed SGD up about in proportion (Yin et al.
    2018, arXiv:1706.05699). ``N D = 1 + tr(C) / ||g||^2``, so it lies between 1, all gradients equal, and infinity.

    The value is exact for these samples. Its standard error is the jackknife's over samples: how much the value would
    differ on another set of ``N`` drawn alike. ``D`` depends on ``N``, and ``||g||^2`` of few samples is too large by
    ``tr(C) / N``, so that ``N D`` approaches its limit from below; ``noise_scale`` removes that bias.

    Args:
        objective: Its losses must be known for each sample; at least three samples.
        moments: Those of this objective at these weights, where they are known already.
        dtype: Of the computation; the parameters' own by default.
        micro_batch: Cut batches into graphs of at most so many samples.

    Raises:
        LossError: The loss gives only a mean, or BatchNorm in train mode couples the samples.
        ArgumentError: There are fewer than three samples.
    """
    return diversity(sample_products(objective, moments=moments, dtype=dtype, micro_batch=micro_batch))


def diversity(products: SampleProducts) -> Estimate:
    """Gradient diversity from the norms and products of per-sample gradients; infinite where the mean is zero."""
    mean_square, trace = products.without_each()
    n = products.samples
    if not products.mean_square > 0:
        return Estimate(math.inf, math.nan, n)
    # N D settles as N grows, and D does not: the jackknife is applied to N D.
    bound = jackknife(1 + products.trace / products.mean_square, 1 + trace / mean_square)
    return Estimate(bound.value / n, bound.standard_error / n, n)
