"""Measuring one objective again and again: what each measurement takes, and leaves for the next."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

import torch
from torch.optim import Optimizer

from curvdiag.monitor.clock import Clock
from curvdiag.monitor.measurement import Found, measure
from curvdiag.monitor.price import Price
from curvdiag.monitor.settings import Settings
from curvdiag.monitor.training import synchronize
from curvdiag.monitor.warm import WarmStarts
from curvdiag.objective import Objective

log = logging.getLogger(__name__)


class Survey:
    """The measurements of one objective.

    Args:
        objective, settings: What is measured, and how.
        clock: Of the run.
        notes: What was chosen for the user, to be said with the first measurement.
        strict: Raise the first failure of a quantity.
        warm: Search from what the last measurement found.

    Attributes:
        price: What measurements cost.
        warm: What the last one left.
    """

    def __init__(
        self,
        objective: Objective,
        settings: Settings,
        clock: Clock,
        notes: Sequence[str] = (),
        *,
        strict: bool,
        warm: bool,
    ) -> None:
        self.settings, self.strict = settings, strict
        self.price, self.warm = Price(objective, clock), WarmStarts(warm)
        self._clock, self._notes = clock, notes

    def take(self, objective: Objective, optimizer: Optimizer | None, *, first: bool) -> tuple[Found, float]:
        """One measurement with its costs among the numbers, and its seconds; what is said once is said of the first."""
        started, gradient = time.perf_counter(), self.price.gradient_seconds
        # The autocast of the training would also round the vectors of Lanczos.
        with torch.inference_mode(False), torch.autocast(objective.device.type, enabled=False):
            found = measure(objective, self.settings, strict=self.strict, optimizer=optimizer, warm=self.warm)
        synchronize(objective.device)
        seconds = time.perf_counter() - started
        found.scalars["curv/cost/seconds"] = seconds
        found.scalars["curv/cost/gradients"] = seconds / gradient
        found.scalars["curv/cost/matvecs"] = float(found.matvecs)
        found.scalars["curv/overhead"] = (self._clock.measuring + seconds) / max(self._clock.elapsed, seconds)
        if first:
            found.notes += [*objective.notes, *self._notes]
            if (obstacle := self.settings.obstacle(objective)) is not None:
                found.notes.append(f"left out: {obstacle}")
            found.notes.append(f"a measurement takes {seconds:.3g} s, as much as {seconds / gradient:.0f} gradients")
            log.info("the first %s", found.notes[-1].removeprefix("a "))
        return found, seconds
