"""Any schedule, kept below the edge of stability."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch.optim import Adam, Optimizer

from curvdiag.errors import ArgumentError
from curvdiag.monitor import CurvatureMonitor
from curvdiag.schedules.following import Following
from curvdiag.schedules.measured_lr import WrappedLR, optimizer_of
from curvdiag.schedules.p_scheduler import group_names
from curvdiag.schedules.source import Measured
from curvdiag.schedules.stability import StabilityLimit, stability_limit
from curvdiag.spectrum import Eigenpairs


class SharpnessCappedLR(WrappedLR):
    """The rate of any schedule, but at most ``fraction * limit / lambda_max``, with the limit of the optimizer's steps.

    The limit is 2 for gradient descent, 3.8 for SGD with momentum 0.9, 38 for LPSGDM and Adam with 0.9; see
    :func:`~curvdiag.schedules.stability.stability_limit`. It is worked out anew at each step from the settings of each
    parameter group (momentum, dampening, Nesterov, weight decay), which other schedules may move. ``lambda_max`` is of
    the Hessian for SGD, and of ``D^(-1/2) H D^(-1/2)`` for LPSGD, LPSGDM, Adam and AdamW, with ``D`` what the optimizer
    divided its last step by. For these it is a local statement: ``D`` moves with the gradients, for LPSGD and LPSGDM
    with ``p`` as well, and for ``p > 2`` it vanishes where they do, near a minimum. It is the sharpness of all the
    objective's parameters together, and caps each group by itself: groups with the same momentum are then stable
    together, whatever their rates.

    A sharpness that has fallen lets the rate rise again, up to what the wrapped schedule asks for; where the cap is not
    reached the rates are the wrapped schedule's own, bit for bit. No cap where ``lambda_max`` is not positive, and none
    before the first measurement: make one before the training (``monitor.measure()``), or, since ``D`` is known only
    after the first step, warm the rate up. A measurement that is NaN, or fails, is logged, and the last one held.

    The edge is that of the quadratic at the present weights. A net that is driven close to it can be thrown out to
    where the loss is flat, the sharpness next to nothing, and the cap gone. Small nets bore 0.9 of the edge with
    gradient descent, and needed 0.3 with heavy-ball momentum of 0.9.

    What multiplies the rate after this schedule is not capped: in ``ChainedScheduler`` it comes last.

    With a monitor whose cadence reads the clock (``OverheadBudget``, its default) two runs differ, and a resumed one is
    not bit-identical: give it ``every=``.

    Args:
        scheduler: Any learning-rate schedule. It is stepped by this one; do not step it yourself.
        source: A monitor that measures ``"lambda_max"`` (``"preconditioned_lambda_max"`` for the optimizers that divide
            their steps), or a function that gives the number or :class:`~curvdiag.spectrum.Eigenpairs`.
        fraction: Of the edge, positive; above 1 it lies beyond the edge. See above before going near 1 with momentum.
        limit: What ``lr * lambda_max`` must stay below, for an optimizer whose limit is not known, or in place of the
            known one with its weight decay; one number, or one for each parameter group.
        refresh: Call a function every so many steps; a monitor has a cadence of its own.

    Raises:
        ArgumentError: An argument is out of its range; ``scheduler`` is none; the optimizer's limit is not known and
            none is given; the monitor does not measure the sharpness; a group has ``maximize=True`` and ``source`` is a
            monitor, since such a group needs the largest eigenvalue of minus the objective's Hessian: give a function.

    Attributes:
        sharpness: The measurement that it goes by; None before the first.
    """

    remembered = ("sharpness",)

    def __init__(
        self,
        scheduler: Any,
        source: Measured,
        *,
        fraction: float = 0.5,
        limit: float | Sequence[float] | None = None,
        refresh: int = 1,
    ) -> None:
        optimizer = optimizer_of(scheduler, "SharpnessCappedLR")
        if not (fraction > 0 and math.isfinite(fraction)):
            raise ArgumentError(f"SharpnessCappedLR: fraction is a positive share of the edge, not {fraction}")
        self.fraction = float(fraction)
        self.sharpness: float | None = None
        self._given = None if limit is None else _limits(optimizer, limit)
        self._limits = self._given or [stability_limit(optimizer, group) for group in optimizer.param_groups]
        preconditioned = _divides(optimizer) if self._given else any(one.preconditioned for one in self._limits)
        key = "curv/preconditioned/lambda_max" if preconditioned else "curv/hessian/lambda_max"
        following = Following(
            source,
            {"lambda_max": key},
            needs=["preconditioned_lambda_max" if preconditioned else "lambda_max"],
            refresh=refresh,
            owner="SharpnessCappedLR",
            name="sharpness_capped",
            inside=lambda answer: answer.values.max() if isinstance(answer, Eigenpairs) else answer,
        )
        if isinstance(source, CurvatureMonitor) and any(group.get("maximize") for group in optimizer.param_groups):
            raise ArgumentError(
                "SharpnessCappedLR: with maximize=True the steps descend minus the loss, and the sharpness is the "
                "largest eigenvalue of minus its Hessian, which a monitor of the loss does not measure: give a function"
            )
        super().__init__(scheduler, following)

    @property
    def caps(self) -> list[float]:
        """The highest rate of each group; infinite where nothing is known, or no curvature is positive."""
        if self.sharpness is None:
            return [math.inf] * len(self._limits)
        return [self.fraction * one.rate(self.sharpness) for one in self._limits]

    def take(self, numbers: dict[str, float]) -> str:
        self.sharpness = numbers["lambda_max"]
        return ""

    def change(self, rates: list[float]) -> list[float]:
        self._work_out_limits()
        return [min(rate, cap) for rate, cap in zip(rates, self.caps, strict=True)]

    def choice(self) -> dict[str, float]:
        return {f"cap/{name}": cap for name, cap in zip(group_names(self.optimizer), self.caps, strict=True)}

    def _work_out_limits(self) -> None:
        """The limits as the groups are set now; a setting without a limit keeps what there was, and stops nothing."""
        groups = self.optimizer.param_groups
        if self._given is None:
            try:
                self._limits = [stability_limit(self.optimizer, group) for group in groups]
            except ArgumentError as error:
                self.following.complain("limit", f"{error}; the last limits are held")
        lowest = min(self._limits, key=lambda one: one.limit)
        self._limits = [*self._limits, *[lowest] * (len(groups) - len(self._limits))]  # groups that were added since


def _limits(optimizer: Optimizer, limit: float | Sequence[float]) -> list[StabilityLimit]:
    groups = len(optimizer.param_groups)
    found = [float(one) for one in limit] if isinstance(limit, Sequence) else [float(limit)] * groups
    if len(found) != groups:
        raise ArgumentError(f"SharpnessCappedLR: {len(found)} limits for {groups} parameter groups")
    if not all(one > 0 and math.isfinite(one) for one in found):
        raise ArgumentError(f"SharpnessCappedLR: a limit is a positive number, not {limit}")
    return [StabilityLimit(one) for one in found]


def _divides(optimizer: Optimizer) -> bool:
    """Whether the sharpness of an optimizer whose limit was given is to be seen through its ``D``."""
    return isinstance(optimizer, Adam) or callable(getattr(optimizer, "preconditioner", None))
