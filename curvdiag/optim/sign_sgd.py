"""SignSGD: one length for every coordinate."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from curvdiag.optim.base import DirectionOptimizer
from curvdiag.optim.direction import LpDirection


class SignSGD(DirectionOptimizer):
    """``theta <- (1 - lr weight_decay) theta - lr sign(g)``, without momentum; ``sign(0) = 0``.

    Bernstein et al., "signSGD: Compressed Optimisation for Non-Convex Problems", 2018.

    Args:
        params: Parameters, named parameters, or groups.
        lr: A number, or a tensor of one.
        weight_decay: Decoupled.
        foreach: In parts that stay in cache; on by default.
        maximize: Ascend.
        differentiable: Refused: the derivative of a sign is zero.

    Raises:
        ArgumentError: An option is out of range, or a parameter is complex.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        *,
        weight_decay: float = 0.0,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
    ) -> None:
        flags = {"foreach": foreach, "maximize": maximize, "differentiable": differentiable}
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, **flags})

    def _direction(self, group: dict[str, Any], gradients: list[Tensor]) -> LpDirection:
        return LpDirection(1.0)
