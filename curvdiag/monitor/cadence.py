"""When to measure.

A cadence is any function ``step -> bool``. One that also has ``observe`` is told what time went where, and one
that also has ``state_dict`` and ``load_state_dict`` continues after a restart. On several ranks that measure together
one that has ``observe`` is asked on the first rank, which tells the others: at each step, or where it also has
``seconds_left()``, at few of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from curvdiag.errors import ArgumentError

Cadence = Callable[[int], bool]


@dataclass(frozen=True)
class Every:
    """Measure at every ``steps``-th step: ``steps``, ``2 * steps``, ..."""

    steps: int

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ArgumentError(f"every= is a number of steps, at least 1, not {self.steps}")

    def __call__(self, step: int) -> bool:
        return step % self.steps == 0


@dataclass(frozen=True)
class LogSpaced:
    """Measure at steps evenly spaced in their logarithm: often early, when curvature changes fast, then rarely.

    Args:
        per_decade: Measurements from one power of ten to the next.
    """

    per_decade: int = 8

    def __post_init__(self) -> None:
        if self.per_decade < 1:
            raise ArgumentError(f"LogSpaced needs at least one measurement a decade, not {self.per_decade}")

    def __call__(self, step: int) -> bool:
        if step < 1:
            return False
        k = 0
        while (due := round(10 ** (k / self.per_decade))) < step:
            k += 1
        return due == step


@dataclass
class OverheadBudget:
    """Measure as often as a share of the run's time allows: at the first step, then whenever one more fits.

    After each measurement the share of all time so far that went into measuring is at most ``fraction``, the
    first measurement excepted: the run must last ``1 / fraction`` times as long as that one took to catch up.
    Time saved up is not spent at once: since the last measurement the share is never above twice ``fraction``.

    Args:
        fraction: Between 0 and 1.
    """

    fraction: float = 0.1
    measuring: float = field(default=0.0, init=False, repr=False)
    elapsed: float = field(default=0.0, init=False, repr=False)
    expected: float = field(default=0.0, init=False, repr=False)
    ended: float = field(default=0.0, init=False, repr=False)

    def __post_init__(self) -> None:
        if not 0 < self.fraction < 1:
            raise ArgumentError(f"OverheadBudget takes a fraction between 0 and 1, not {self.fraction}")

    def __call__(self, step: int) -> bool:
        if self.expected == 0:
            return True
        since = self.elapsed - self.ended + self.expected
        in_all = self.measuring + self.expected <= self.fraction * (self.elapsed + self.expected)
        return in_all and self.expected <= 2 * self.fraction * since

    def seconds_left(self) -> float:
        """Seconds of training until the next measurement may be due; zero where it is due."""
        in_all = (self.measuring + self.expected) / self.fraction - self.expected - self.elapsed
        since = self.expected / (2 * self.fraction) - self.expected - (self.elapsed - self.ended)
        return max(0.0, in_all, since) if self.expected else 0.0

    def observe(self, *, elapsed: float, measuring: float, last: float) -> None:
        """Learn how long the run has lasted, how much of it went into measuring, and what the last one took.

        All in seconds. The next measurement is expected to take as long as the dearer of the last and the mean of
        the two before it, so that one slow measurement does not stop all others. Less time than the last one took is
        what loggers needed for numbers between two: it counts, but is no measurement.
        """
        grown, self.measuring = measuring - self.measuring, measuring
        if last > 0 and grown >= 0.99 * last:
            self.expected = max(last, (self.expected + last) / 2)
            self.ended = min(elapsed, self.elapsed + last)
        self.elapsed = elapsed

    def state_dict(self) -> dict[str, float]:
        return {name: getattr(self, name) for name in ("measuring", "elapsed", "expected", "ended")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in self.state_dict():
            setattr(self, name, state[name])
