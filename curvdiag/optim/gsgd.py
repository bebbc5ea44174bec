"""GSGD: from signSGD to SGD over a run of known length."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from curvdiag.errors import ArgumentError
from curvdiag.optim.base import DirectionOptimizer
from curvdiag.optim.direction import LpDirection


class GSGD(DirectionOptimizer):
    """``theta <- (1 - lr weight_decay) theta - lr sign(g) |g|^((t-1)/T)`` at step ``t`` of ``T = total_steps``.

    The baseline of Xu and Yang, arXiv:2606.02078: signSGD at the first step, and by the formula ``|g|^((T-1)/T)``, SGD
    but for ``1/T`` in the exponent, at the last. Steps beyond ``T`` are SGD. ``t`` counts the steps of a parameter
    group and is kept in it, as ``steps_taken``.

    Args:
        params: Parameters, named parameters, or groups.
        lr: A number, or a tensor of one.
        total_steps: ``T``, the number of steps of the run.
        weight_decay: Decoupled.
        foreach: In parts that stay in cache; on by default.
        maximize: Ascend.
        differentiable: Refused: a power below one has no derivative at zero.

    Raises:
        ArgumentError: An option is out of range, or a parameter is complex.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        *,
        total_steps: int,
        weight_decay: float = 0.0,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
    ) -> None:
        flags = {"foreach": foreach, "maximize": maximize, "differentiable": differentiable}
        counts = {"total_steps": total_steps, "steps_taken": 0}
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, **counts, **flags})

    def _direction(self, group: dict[str, Any], gradients: list[Tensor]) -> LpDirection:
        return LpDirection(max(0.0, 1 - group["steps_taken"] / group["total_steps"]))

    def _advance(self, group: dict[str, Any]) -> None:
        group["steps_taken"] += 1

    def _check(self, options: dict[str, Any], where: str) -> None:
        super()._check(options, where)
        total = options["total_steps"]
        if isinstance(total, bool) or not isinstance(total, int) or total < 1:
            raise ArgumentError(f"GSGD{where}: total_steps must be a whole number of at least 1, not {total!r}")
