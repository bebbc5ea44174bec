"""Lion: signs of an interpolation between momentum and gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from curvdiag.errors import ArgumentError
from curvdiag.optim.average import average_
from curvdiag.optim.base import DirectionOptimizer
from curvdiag.optim.direction import widened


class Lion(DirectionOptimizer):
    """``u = sign(beta1 m + (1 - beta1) g)``, ``theta <- (1 - lr weight_decay) theta - lr u``.

    Then ``m <- beta2 m + (1 - beta2) g``, from zero; it is the state ``exp_avg``, in the parameter's dtype. Chen et
    al., "Symbolic Discovery of Optimization Algorithms", 2023; the defaults are the authors'.

    Args:
        params: Parameters, named parameters, or groups.
        lr: A number, or a tensor of one; a third to a tenth of AdamW's.
        betas: Of the interpolation and of the average, in [0, 1).
        weight_decay: Decoupled.
        foreach: In parts that stay in cache; on by default.
        maximize: Ascend.
        differentiable: Refused: the derivative of a sign is zero.

    Raises:
        ArgumentError: An option is out of range, or a parameter is complex.
    """

    moment = "exp_avg"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        *,
        weight_decay: float = 0.0,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
    ) -> None:
        flags = {"foreach": foreach, "maximize": maximize, "differentiable": differentiable}
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay, **flags})

    def _check(self, options: dict[str, Any], where: str) -> None:
        if len(options["betas"]) != 2:
            raise ArgumentError(f"Lion{where}: betas are two numbers, not {options['betas']!r}")
        super()._check(options, where)

    def _direction(self, group: dict[str, Any], gradients: list[Tensor]) -> _LionDirection:
        return _LionDirection(*group["betas"])


@dataclass(frozen=True)
class _LionDirection:
    beta1: float
    beta2: float

    def __call__(self, gradients: list[Tensor], moments: list[Tensor]) -> list[Tensor]:
        found = list(torch._foreach_mul([widened(moment) for moment in moments], self.beta1))
        torch._foreach_add_(found, [widened(gradient) for gradient in gradients], alpha=1 - self.beta1)
        torch._foreach_sign_(found)
        average_(moments, gradients, self.beta2)
        return found
