"""LPSGDM: LPSGD along an average of the gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from curvdiag.optim.average import average_
from curvdiag.optim.base import DirectionOptimizer
from curvdiag.optim.direction import LpDirection, exponent


class LPSGDM(DirectionOptimizer):
    """``m <- beta m + (1 - beta) g``, ``theta <- (1 - lr weight_decay) theta - lr m / (|m| + eps)^rho``.

    ``rho = (p-2)/(p-1)``, ``m`` starts at zero, and its bias is not corrected: Xu and Yang, arXiv:2606.02078. The state
    of a parameter is ``momentum_buffer``, ``m``, in the parameter's dtype. Each parameter group has its own ``p``,
    which a schedule may change.

    Without weight decay, ``p = 2`` is bit for bit SGD with momentum and dampening ``beta`` whose buffer starts at zero
    (torch's starts at the first gradient), in single and double precision. Half-precision arithmetic is single, since
    1e-8 is zero in float16: ``m`` is rounded when it is stored, the direction when it is added to the weights.

    Args:
        params: Parameters, named parameters, or groups.
        lr: A number, or a tensor of one.
        p: From 2 to infinity.
        beta: In [0, 1).
        eps: Entries of ``m`` below it count as zeros.
        weight_decay: Decoupled, as in AdamW.
        foreach: In parts that stay in cache; on by default.
        maximize: Ascend.
        differentiable: Let autograd pass through the step.

    Raises:
        ArgumentError: An option is out of range, or a parameter is complex.
    """

    moment = "momentum_buffer"
    differentiates = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        p: float = 6.0,
        beta: float = 0.9,
        *,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
    ) -> None:
        defaults = {"lr": lr, "p": p, "beta": beta, "eps": eps, "weight_decay": weight_decay}
        flags = {"foreach": foreach, "maximize": maximize, "differentiable": differentiable}
        super().__init__(params, {**defaults, **flags})

    def _direction(self, group: dict[str, Any], gradients: list[Tensor]) -> _AveragedDirection:
        return _AveragedDirection(group["beta"], LpDirection(exponent(group["p"]), group["eps"]))

    @torch.no_grad()
    def preconditioner(self) -> dict[Tensor, Tensor]:
        """``D`` for each parameter that has taken a step, such that the step is ``-lr m / D``: ``(|m| + eps)^rho``.

        ``p`` is that of the group now. The tensors are new ones, in single precision for half-precision parameters.
        """
        found = {}
        for group in self.param_groups:
            direction = LpDirection(exponent(group["p"]), group["eps"])
            for parameter in group["params"]:
                if self.moment in self.state.get(parameter, {}):
                    found[parameter] = direction.preconditioner(self.state[parameter][self.moment])
        return found


@dataclass(frozen=True)
class _AveragedDirection:
    beta: float
    lp: LpDirection

    def __call__(self, gradients: list[Tensor], moments: list[Tensor]) -> list[Tensor]:
        average_(moments, gradients, self.beta)
        return self.lp(moments)
