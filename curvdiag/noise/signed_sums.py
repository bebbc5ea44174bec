"""Random vectors whose covariance is exactly C: random-sign sums of centred per-sample gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from curvdiag.distributed import collectively
from curvdiag.errors import ArgumentError, StaleWeightsError
from curvdiag.objective import Objective
from curvdiag.operators.hessian import Hessian
from curvdiag.operators.noise import NoiseCovariance
from curvdiag.seeds import Seed, resolve_seed
from curvdiag.space.probes import rademacher


@collectively
def signed_sums(hessian: Hessian, count: int, seed: Seed, first: int = 0) -> Tensor:
    """Rows ``b = N^(-1/2) sum_i e_i (g_i - g)`` ``[count, P]`` for random signs ``e``; ``E[b b^T] = C``, divided by N.

    One backward pass each through the Hessian's own graphs, with no per-sample gradient in memory. Differences of
    single pairs, ``g_i - g_j``, have the covariance ``2 C`` too, but one pair shows two samples and a sum shows all.
    A sign belongs to the place of its sample among those of all ranks, whose sums are added in one reduction.

    Args:
        hessian: Its graphs hold the samples.
        count: How many rows.
        seed: An integer, or a generator that advances.
        first: Skip so many rows of the seed.

    Raises:
        LossError: The loss gives only a mean, or BatchNorm in train mode couples the samples.
        ArgumentError: The Hessian takes finite differences, and keeps no graph of the samples.
    """
    objective = hessian.objective
    engine = NoiseCovariance(objective, graphs=hessian)._engine
    signs = rademacher(count, objective.size, seed=resolve_seed(seed), first=first, dtype=torch.float64)
    # sum_i e_i (g_i - g) = sum_i (e_i - mean e) g_i, and g_i is N / Z times the gradient of sample i's total.
    scale = objective.size**0.5 / objective.total_weight
    coefficients = scale * (signs - signs.mean(dim=1, keepdim=True))
    own = coefficients[:, objective.first_sample :][:, : objective.local_size].contiguous()
    own = own.to(hessian.device, _width(hessian.dtype))
    return objective.ranks.sum(
        f"{count} sums of gradients", lambda: engine.gather(own, hessian._positions, _width(hessian.dtype))
    )


def hessian_of(objective: Objective, hessian: Hessian | None, **options: object) -> Hessian:
    """``hessian`` if it is one of this very objective, or a new one.

    Raises:
        ArgumentError: It belongs to another objective.
    """
    if hessian is None:
        return Hessian(objective, **options)  # type: ignore[arg-type]
    if hessian.objective is not objective:
        raise ArgumentError(
            "the Hessian belongs to another objective: give hessian=Hessian(objective), or leave it out"
        )
    hessian.refresh()
    return hessian


@collectively
def require_present_weights(hessian: Hessian) -> None:
    """Refuse a Hessian that moments at the model's present weights do not belong to.

    Raises:
        ArgumentError: It is a block.
        StaleWeightsError: The model's weights have changed since it was made.
    """
    objective, weights = hessian.objective, hessian._weights
    if hessian.size != objective.parameters.size:
        raise ArgumentError("the Hessian is a block of the objective's: give the whole one, or leave it out")
    live = dict(objective.model.named_parameters(remove_duplicate=False))
    pairs = ((live[name].detach(), own) for name, own in zip(weights.names, weights.chosen, strict=True))
    if not all(torch.equal(now.to(own.device, own.dtype), own) for now, own in pairs):
        raise StaleWeightsError(
            "the model's weights changed since the Hessian was made, and the moments of its gradients would be of "
            "other weights: give a new one, or leave it out"
        )


def _width(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype in (torch.float32, torch.float64) else torch.float32
