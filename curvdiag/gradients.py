"""Gradients of an objective, or of a share of it, at given weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from curvdiag.data import Batch
from curvdiag.errors import NonFiniteError
from curvdiag.weights import Weights

if TYPE_CHECKING:
    from curvdiag.objective import Objective


def gradient(
    objective: Objective,
    weights: Weights,
    batches: list[Batch],
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Gradient ``[P]`` of the objective's share that ``batches`` make up, at ``weights``."""
    wanted = dtype or objective.dtype
    parts = zip(gradients(objective, weights, batches, dtype), weights.chosen, strict=True)
    return objective.parameters.flatten((torch.zeros_like(w) if g is None else g).to(wanted) for g, w in parts)


def gradients(
    objective: Objective, weights: Weights, batches: list[Batch], dtype: torch.dtype | None = None
) -> list[Tensor | None]:
    """The same by parameter; None where the loss does not reach it.

    They are collected by ``backward``, which reentrant checkpointing needs, in leaves of our own.
    """
    leaves = weights.replaced(weights.chosen)

    def add_up() -> None:
        for index, batch in enumerate(batches):
            loss = objective.totals(batch, dtype).sum() / objective.total_weight
            if not bool(torch.isfinite(loss)):
                raise NonFiniteError(f"the loss on batch {index} is {float(loss.detach())}; there is no curvature here")
            if loss.requires_grad:
                loss.backward()

    objective.inside(leaves, add_up, twice=False)
    return [t.grad for t in leaves.chosen]
