"""The exponential moving average of gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from curvdiag.optim.direction import HALVES


def average_(moment: Tensor, gradient: Tensor, beta: float) -> Tensor:
    """``moment <- beta moment + (1 - beta) gradient`` in place, with the two roundings of SGD, not those of ``lerp``.

    Half precision is computed in single and rounded once.
    """
    if moment.dtype in HALVES:
        return moment.copy_(moment.float().mul_(beta).add_(gradient.float(), alpha=1 - beta))
    return moment.mul_(beta).add_(gradient, alpha=1 - beta)


def averages_(moments: list[Tensor], gradients: list[Tensor], beta: float) -> None:
    """The same for lists of one dtype."""
    working = [moment.float() for moment in moments] if moments[0].dtype in HALVES else moments
    torch._foreach_mul_(working, beta)
    torch._foreach_add_(working, [gradient.to(working[0].dtype) for gradient in gradients], alpha=1 - beta)
    if working is not moments:
        torch._foreach_copy_(moments, working)
