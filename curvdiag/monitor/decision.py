"""Whether to measure at a step, decided alike on all ranks."""

from __future__ import annotations

from typing import Any

from curvdiag.distributed import Ranks
from curvdiag.monitor.cadence import Cadence
from curvdiag.monitor.clock import Clock

AHEAD = 0.5
"""Share of the steps until a measurement may be due that pass before the ranks look again, if steps get no slower."""


class Decision:
    """Asks a cadence after each step.

    A function of the step gives every rank the same answer. One that reads the clock is asked on the first rank, which
    tells the others; and also at which step they look again, so that most steps need no word. A cadence that has
    ``seconds_left()`` is looked at as often as the remaining steps can be halved, any other at each step.

    Args:
        cadence: When to measure.
        clock: Of the run.
        ranks: Those that measure together.

    Attributes:
        looks: How often the ranks have met to decide.
    """

    def __init__(self, cadence: Cadence, clock: Clock, ranks: Ranks) -> None:
        self.cadence, self._clock, self._ranks = cadence, clock, ranks
        self.looks = 0
        self.renew()

    @property
    def reads_clock(self) -> bool:
        return getattr(self.cadence, "observe", None) is not None

    def renew(self) -> None:
        """Look at the next step, whatever was said before; after a return to a checkpoint, say."""
        self._next = 0
        self._seen: tuple[int, float] | None = None

    def due(self, step: int) -> bool:
        """Whether to measure at ``step``, the same on all ranks.

        Raises:
            RankFailedError: The cadence failed on the first rank.
            RankLostError: A rank is gone.
        """
        if self.reads_clock:
            observed: Any = self.cadence
            observed.observe(elapsed=self._clock.elapsed, measuring=self._clock.measuring, last=self._clock.last)
            if not self._ranks.alone:
                return self._told(step)
        return bool(self.cadence(step))

    def _told(self, step: int) -> bool:
        """The first rank's answer; False where it has said that none is due yet."""
        if step < self._next:
            return False
        self.looks += 1
        place, told = f"decision at step {step}", None
        try:
            if self._ranks.first:
                told = bool(self.cadence(step)), step + self._wait(step)
        except Exception:
            with self._ranks.together(place):  # which tells the others
                raise
        due, self._next = self._ranks.of_first(told, place)  # type: ignore[misc]
        return due

    def _wait(self, step: int) -> int:
        """Steps until the next look, at least one."""
        trained = self._clock.elapsed - self._clock.measuring
        seen, self._seen = self._seen, (step, trained)
        left = getattr(self.cadence, "seconds_left", None)
        if left is None or seen is None or step <= seen[0] or trained <= seen[1]:
            return 1
        pace = (trained - seen[1]) / (step - seen[0])
        return max(1, int(AHEAD * left() / pace))
