"""What measurements cost beside the training around them."""

from __future__ import annotations

import time
from functools import cached_property

from curvdiag.monitor.clock import Clock
from curvdiag.monitor.training import synchronize
from curvdiag.objective import Objective


class Price:
    """The price of measurements, in gradients of the objective and as a share of the run's time."""

    def __init__(self, objective: Objective, clock: Clock) -> None:
        self._objective, self._clock = objective, clock
        self._trained, self._measured_at = 0.0, 0

    @cached_property
    def gradient_seconds(self) -> float:
        """What one gradient takes; measured once."""
        times = []
        for _ in range(2):  # the first one warms up
            started = time.perf_counter()
            self._objective.gradient()
            synchronize(self._objective.device)
            times.append(time.perf_counter() - started)
        return min(times)

    def complaint(self, step: int, *, first: bool) -> str | None:
        """To be asked after each measurement: what to say where it took more time than the training before it."""
        clock = self._clock
        trained = clock.elapsed - clock.measuring
        between, self._trained = trained - self._trained, trained
        steps, self._measured_at = step - self._measured_at, step
        share = clock.last / (clock.last + between)
        if share <= 0.5 or not steps or (steps < 5 and first):
            return None
        return (
            f"measuring every {steps} steps takes {share:.0%} of the run: {clock.last:.3g} s for each measurement, "
            f"{between:.3g} s for the training between two. Measure less often, take preset='light' or fewer probes, "
            "or cadence=OverheadBudget(0.1)"
        )
