"""Norms of per-sample gradients and their products with the mean: all that diversity and noise scale need."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from curvdiag.data import sample_count
from curvdiag.distributed import collectively
from curvdiag.errors import ArgumentError
from curvdiag.noise.moments import GradientMoments, gradient_moments
from curvdiag.objective import Objective
from curvdiag.operators.noise import EmpiricalFisher


@dataclass(frozen=True)
class SampleProducts:
    """Per-sample gradients ``g_i`` as far as two numbers each tell of them.

    Attributes:
        squares: ``||g_i||^2`` ``[N]``, float64.
        dots: ``g_i . g`` with the mean gradient ``g``, ``[N]``, float64.
        mean_square: ``||g||^2``.
        trace: ``tr C``, divided by ``N``.
    """

    squares: np.ndarray
    dots: np.ndarray
    mean_square: float
    trace: float

    @property
    def samples(self) -> int:
        """``N``."""
        return len(self.squares)

    def without_each(self) -> tuple[np.ndarray, np.ndarray]:
        """``||g||^2`` and ``tr C`` of the other ``N - 1`` samples, for each sample in turn, both ``[N]``."""
        others = self.samples - 1
        if others < 2:
            raise ArgumentError(f"a standard error over samples needs three of them, and there are {self.samples}")
        # Leaving out sample i moves the mean by -(g_i - g) / (N - 1).
        distances = np.maximum(self.squares - 2 * self.dots + self.mean_square, 0.0)
        mean_square = self.mean_square - 2 * (self.dots - self.mean_square) / others + distances / others**2
        trace = (self.samples * self.trace - distances * self.samples / others) / others
        return mean_square, trace


@collectively
def sample_products(
    objective: Objective,
    *,
    moments: GradientMoments | None = None,
    dtype: torch.dtype | None = None,
    micro_batch: int | None = None,
) -> SampleProducts:
    """The products at the model's present weights; about four gradients, two with ``moments`` given.

    Args:
        moments: Those of this objective at these weights, where they are known already.
        dtype: Of the computation; the parameters' own by default.
        micro_batch: Cut batches into graphs of at most so many samples.

    Raises:
        LossError: The loss gives only a mean, or BatchNorm in train mode couples the samples.
        ArgumentError: The moments are not of this objective at these weights.
    """
    moments = moments or gradient_moments(objective, dtype=dtype)
    # Cut as they come, and not merged by shape, the batches keep their own order, which is that of the norms.
    if micro_batch is None and objective.can_regroup:
        micro_batch = max(map(sample_count, objective.batches))
    matrix = EmpiricalFisher(objective, dtype=dtype, memory=0, micro_batch=micro_batch)
    if moments.mean.shape != (matrix.size,):
        raise ArgumentError(f"moments= are of {len(moments.mean):,} parameters, and this objective has {matrix.size:,}")
    mean = moments.mean.to(matrix.device, matrix.dtype)
    dots = matrix._engine.sample_dots(mean[None], matrix._positions)[0] * objective.size
    dots = objective.ranks.concatenate(dots, place="products of gradients")
    norms = moments.norms.cpu().double()
    found = SampleProducts(
        squares=norms.square().numpy(),
        dots=dots.cpu().double().numpy(),
        mean_square=float(moments.mean.double().square().sum()),
        trace=float(moments.trace),
    )
    _require_same(found, torch.finfo(matrix.dtype).eps)
    return found


def _require_same(found: SampleProducts, eps: float) -> None:
    """The products with the mean gradient average to its square; those with another vector do not."""
    scale = math.sqrt(found.mean_square * float(found.squares.mean())) if len(found.squares) else 0.0
    if len(found.dots) != len(found.squares) or abs(found.dots.mean() - found.mean_square) > math.sqrt(eps) * scale:
        raise ArgumentError(
            "moments= are not those of this objective at the model's present weights: take gradient_moments again, or "
            "leave them out"
        )
