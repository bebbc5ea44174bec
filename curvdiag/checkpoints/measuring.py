"""One measurement of an objective as its model is now, outside a training run."""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch

from curvdiag.errors import ArgumentError
from curvdiag.monitor.clock import Clock
from curvdiag.monitor.measurement import Measurement, measure
from curvdiag.monitor.price import Price
from curvdiag.monitor.settings import Settings
from curvdiag.monitor.training import synchronize
from curvdiag.objective import Objective


class Measurer:
    """Measures what a :class:`~curvdiag.CurvatureMonitor` with the same settings does, under the same keys.

    Left out is what belongs to a training run: ``curv/overhead``, and the preconditioned largest eigenvalue. Each
    measurement starts cold, so that its numbers depend on the weights alone and not on what was measured before.

    Raises:
        ArgumentError: The settings name what needs an optimizer.
        LossError: They name gradient noise, which this objective does not have.
    """

    def __init__(self, objective: Objective, settings: Settings) -> None:
        if "preconditioned_lambda_max" in settings.quantities:
            raise ArgumentError(
                "preconditioned_lambda_max is that of an optimizer's steps, and outside a training run there is none: "
                "measure it with CurvatureMonitor.attach(optimizer)"
            )
        self.obstacle = settings.obstacle(objective)
        if self.obstacle is not None and settings.measure is not None:
            raise self.obstacle
        self.objective, self.settings = objective, settings
        self._price = Price(objective, Clock())

    def __call__(
        self, step: int = 0, epoch: float | None = None, beside: Mapping[str, float] | None = None
    ) -> tuple[Measurement, dict[str, Exception]]:
        """The measurement, and what failed of it by quantity.

        Args:
            beside: Further numbers of the step, such as its learning rate.

        Raises:
            Exception: Nothing could be measured; the first failure.
        """
        synchronize(self.objective.device)
        started = time.perf_counter()
        with torch.inference_mode(False), torch.autocast(self.objective.device.type, enabled=False):
            found = measure(self.objective, self.settings)
        synchronize(self.objective.device)
        seconds = time.perf_counter() - started
        scalars = {**found.scalars, **(beside or {})}
        scalars["curv/cost/seconds"] = seconds
        scalars["curv/cost/gradients"] = seconds / self._price.gradient_seconds
        scalars["curv/cost/matvecs"] = float(found.matvecs)
        return Measurement(step, epoch, scalars, found.densities, seconds, tuple(found.notes)), found.failures

    @property
    def notes(self) -> list[str]:
        """What a reader of all its measurements should know."""
        left_out = [] if self.obstacle is None else [f"left out: {self.obstacle}"]
        return [*self.objective.notes, *left_out]
