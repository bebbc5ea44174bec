"""The exponential moving average of gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from curvdiag.optim.direction import HALVES


def average_(moments: list[Tensor], gradients: list[Tensor], beta: float) -> None:
    """``moment <- beta moment + (1 - beta) gradient`` in place, with the two roundings of SGD, not those of ``lerp``.

    The moments have one dtype. Half precision is computed in single and rounded once.
    """
    working = [moment.float() for moment in moments] if moments[0].dtype in HALVES else moments
    torch._foreach_mul_(working, beta)
    torch._foreach_add_(working, [gradient.to(working[0].dtype) for gradient in gradients], alpha=1 - beta)
    if working is not moments:
        torch._foreach_copy_(moments, working)
