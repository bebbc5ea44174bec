"""LPSGD: stochastic steepest descent in the l_p norm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from curvdiag.optim.base import DirectionOptimizer
from curvdiag.optim.direction import LpDirection, dual_norm, exponent


class LPSGD(DirectionOptimizer):
    """``theta <- (1 - lr weight_decay) theta - lr g / (|g| + eps)^rho``, ``rho = (p-2)/(p-1)``.

    Xu and Yang, arXiv:2606.02078. ``p = 2`` is SGD bit for bit (with weight decay in single and double precision only);
    ``p = inf`` is signSGD. Each parameter group has its own ``p``, which a schedule may change.

    Arithmetic is in the gradients' dtype, and in single precision for half-precision ones, since 1e-8 is zero in
    float16: the direction is rounded only when it is added to the weights. See :func:`lp_direction` for
    how exact they are.

    Args:
        params: Parameters, named parameters, or groups.
        lr: A number, or a tensor of one.
        p: From 2 to infinity.
        eps: Entries of the gradient below it count as zeros.
        weight_decay: Decoupled, as in AdamW.
        dual_norm: The whole step that minimises ``<lr g, d> + 1/2 ||d||_p^2``: the direction times ``||g||_q^rho``
            with ``1/p + 1/q = 1``, the norm over all gradients of the parameter group together. (The paper drops the
            factor into the learning rate.) Of a ``DTensor`` the whole counts; where plain tensors are shards (ZeRO,
            the first FSDP) each process would take the norm of its own, so leave the factor out there.
        foreach: In parts that stay in cache; on by default.
        maximize: Ascend.
        differentiable: Let autograd pass through the step; not with ``dual_norm``.

    Raises:
        ArgumentError: An option is out of range, or a parameter is complex.
    """

    differentiates = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        p: float = 6.0,
        *,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        dual_norm: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
    ) -> None:
        defaults = {"lr": lr, "p": p, "eps": eps, "weight_decay": weight_decay, "dual_norm": dual_norm}
        flags = {"foreach": foreach, "maximize": maximize, "differentiable": differentiable}
        super().__init__(params, {**defaults, **flags})

    def _direction(self, group: dict[str, Any], gradients: list[Tensor]) -> LpDirection:
        rho = exponent(group["p"])
        scaled = group["dual_norm"] and rho and gradients
        return LpDirection(rho, group["eps"], dual_norm(gradients, group["p"]) ** rho if scaled else None)

    @torch.no_grad()
    def preconditioner(self) -> dict[Tensor, Tensor]:
        """``D`` for each parameter with a gradient, such that the step is ``-lr grad / D``: ``(|grad| + eps)^rho``.

        With ``dual_norm`` that is divided by ``||g||_q^rho``. ``grad`` is the gradient that the parameter holds, so
        call it before ``zero_grad``; ``p`` is that of the group now. The tensors are new ones, in single precision for
        half-precision parameters.
        """
        found = {}
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            direction = self._direction(group, [parameter.grad for parameter in parameters])
            found.update({parameter: direction.preconditioner(parameter.grad) for parameter in parameters})
        return found
