"""At which learning rate an optimizer stops being stable: the edge of stability, by the kind of its momentum.

A limit is what ``lr * sharpness`` must stay below on a quadratic; the sharpness is the largest eigenvalue of the
Hessian, seen through what the optimizer divides its steps by.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch.optim import SGD, Adam, AdamW, Optimizer

from curvdiag.errors import ArgumentError
from curvdiag.monitor.scaling import steps_as
from curvdiag.optim import LPSGD, LPSGDM
from curvdiag.results import Result

GRADIENT_DESCENT = 2.0
"""``theta <- theta - lr g``."""


def heavy_ball_limit(momentum: float, dampening: float = 0.0) -> float:
    """``m <- momentum m + (1 - dampening) g``, ``theta <- theta - lr m``: ``2 (1 + momentum) / (1 - dampening)``."""
    return 2 * (1 + _require_fraction("momentum", momentum)) / (1 - _require_fraction("dampening", dampening))


def nesterov_limit(momentum: float) -> float:
    """``m <- momentum m + g``, ``theta <- theta - lr (g + momentum m)``: ``2 (1 + momentum) / (1 + 2 momentum)``."""
    return 2 * (1 + _require_fraction("momentum", momentum)) / (1 + 2 * momentum)


def averaged_momentum_limit(beta: float) -> float:
    """``m <- beta m + (1 - beta) g``, ``theta <- theta - lr m``: ``2 (1 + beta) / (1 - beta)``."""
    return heavy_ball_limit(beta, beta)


@dataclass(frozen=True)
class StabilityLimit(Result):
    """What keeps the steps of one parameter group stable on a quadratic.

    Attributes:
        limit: ``lr * sharpness`` must stay below it, but for weight decay.
        preconditioned: Whether the sharpness is that of ``D^(-1/2) H D^(-1/2)``, with ``D`` what the optimizer divides
            its steps by, and not of ``H``.
        coupled_decay: Weight decay that is added to the gradient, and so to ``H``.
        decoupled_decay: Weight decay as in AdamW: ``theta <- (1 - lr decay) theta``.
    """

    limit: float
    preconditioned: bool = False
    coupled_decay: float = 0.0
    decoupled_decay: float = 0.0

    def rate(self, sharpness: float) -> float:
        """The learning rate below which steps are stable; infinite where the sharpness is not positive."""
        if not sharpness > 0:
            return math.inf
        return 1 / ((sharpness + self.coupled_decay) / self.limit + self.decoupled_decay / GRADIENT_DESCENT)


def stability_limit(optimizer: Optimizer, group: Mapping[str, Any] | None = None) -> StabilityLimit:
    """The limit of a parameter group, from the optimizer's type and the group's present settings.

    - ``torch.optim.SGD``: plain, heavy ball with its dampening, or Nesterov; coupled weight decay.
    - ``LPSGD``: gradient descent; ``LPSGDM``, ``torch.optim.Adam`` and ``AdamW``: averaged momentum. All of them
      preconditioned, with decoupled weight decay. Adam's first steps, up to about ``1 / (1 - beta1)``, are larger than
      its rate says by the bias correction ``1 / (1 - beta1^t)``.

    Args:
        optimizer: One of these.
        group: One of its parameter groups; the only one if not given.

    Raises:
        ArgumentError: The limit of this optimizer is not known; there are several groups and none is given; momentum is
            out of range; Adam has coupled weight decay, whose curvature is divided by ``D`` as well, and which a
            measured sharpness leaves out.
    """
    group = _only_group(optimizer) if group is None else group
    decay = float(group.get("weight_decay", 0.0))
    if steps_as(optimizer, SGD):
        momentum = float(group["momentum"])
        limit = nesterov_limit(momentum) if group["nesterov"] else heavy_ball_limit(momentum, _dampening(group))
        return StabilityLimit(limit, coupled_decay=decay)
    if steps_as(optimizer, LPSGD):
        return StabilityLimit(GRADIENT_DESCENT, True, decoupled_decay=decay)
    if steps_as(optimizer, LPSGDM):
        return StabilityLimit(averaged_momentum_limit(float(group["beta"])), True, decoupled_decay=decay)
    if steps_as(optimizer, Adam) or steps_as(optimizer, AdamW):
        decoupled = isinstance(optimizer, AdamW) or group.get("decoupled_weight_decay", False)
        if decay and not decoupled:
            raise ArgumentError(
                f"the weight decay of Adam ({decay:g}) adds to the gradient and is divided by D too, which the "
                "measured sharpness leaves out: use AdamW, or give limit="
            )
        return StabilityLimit(averaged_momentum_limit(float(group["betas"][0])), True, decoupled_decay=decay)
    raise ArgumentError(
        f"the stability limit of {type(optimizer).__name__} is not known: torch.optim.SGD, Adam and AdamW, LPSGD and "
        "LPSGDM are. Give limit=, what lr * lambda_max must stay below (2 for gradient descent)"
    )


def _dampening(group: Mapping[str, Any]) -> float:
    return float(group["dampening"]) if group["momentum"] else 0.0  # without momentum SGD does not look at it


def _only_group(optimizer: Optimizer) -> Mapping[str, Any]:
    if len(optimizer.param_groups) != 1:
        raise ArgumentError(
            f"{type(optimizer).__name__} has {len(optimizer.param_groups)} parameter groups, each with a limit of its "
            "own: stability_limit(optimizer, optimizer.param_groups[0])"
        )
    return optimizer.param_groups[0]


def _require_fraction(name: str, value: float) -> float:
    if not 0 <= value < 1:
        raise ArgumentError(f"{name} is at least 0 and below 1 where there is a limit, not {value}")
    return value
