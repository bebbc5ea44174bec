"""Stacey in its fixed-p form: the whole l_p step with its dual norm."""

from __future__ import annotations

from torch import Tensor
from torch.optim.optimizer import ParamsT

from curvdiag.optim.lpsgd import LPSGD


class Stacey(LPSGD):
    """``theta <- (1 - lr weight_decay) theta - lr ||g||_q^rho g / (|g| + eps)^rho``, ``1/p + 1/q = 1``.

    The step of STACEY at one fixed ``p``, without its acceleration, as Xu and Yang (arXiv:2606.02078) restate it: the
    exact minimiser of ``<lr g, d> + 1/2 ||d||_p^2``. The norm is that of all gradients of a parameter group together.
    It is :class:`LPSGD` with ``dual_norm=True``, which says the rest. The ``p`` of its authors is not known here, so
    the default of 3 is ours.

    Raises:
        ArgumentError: An option is out of range, or a parameter is complex.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        p: float = 3.0,
        *,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
    ) -> None:
        super().__init__(
            params,
            lr,
            p,
            eps=eps,
            weight_decay=weight_decay,
            dual_norm=True,
            foreach=foreach,
            maximize=maximize,
            differentiable=differentiable,
        )
