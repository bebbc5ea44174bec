"""Timing beside a unit: every figure is a ratio to the user's own gradient loop, measured next to it.

Candidates take turns (A B C A B C ...), and a block of gradients stands before and after each turn, so that whatever
the machine does meanwhile hits the candidate and its unit alike.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

Call = Callable[[], object]

SETTLING = 0.1
"""Seconds."""


@dataclass(frozen=True)
class Timing:
    """Ratios to the unit, one for each turn."""

    ratios: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.ratios)

    @property
    def mean(self) -> float:
        return statistics.fmean(self.ratios)

    @property
    def quartiles(self) -> tuple[float, float]:
        if len(self.ratios) < 2:
            return self.ratios[0], self.ratios[0]
        low, _, high = statistics.quantiles(self.ratios, n=4, method="inclusive")
        return low, high

    def __sub__(self, other: Timing) -> Timing:
        """Turn by turn."""
        return Timing(tuple(a - b for a, b in zip(self.ratios, other.ratios, strict=True)))

    def __truediv__(self, count: float) -> Timing:
        return Timing(tuple(ratio / count for ratio in self.ratios))


def seconds(call: Call, repeats: int = 2, *, warm_up: bool = True) -> float:
    """Time of one call, the mean of ``repeats`` after one that does not count."""
    if warm_up:
        call()
    started = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - started) / repeats


def alternate(unit: Call, candidates: Mapping[str, Call], *, rounds: int, repeats: int = 2) -> dict[str, Timing]:
    """Time short calls in turns, each between two blocks of ``unit``."""
    for call in candidates.values():
        call()
    ratios: dict[str, list[float]] = {name: [] for name in candidates}
    with NoCollection():
        before = seconds(unit, repeats)
        for _ in range(rounds):
            for name, call in candidates.items():
                taken = seconds(call, repeats)
                after = seconds(unit, repeats)
                ratios[name].append(2 * taken / (before + after))
                before = after
    return {name: Timing(tuple(values)) for name, values in ratios.items()}


def paired(one: Call, other: Call, *, budget: float, least: int = 9, most: int = 101) -> Timing:
    """``one`` in units of ``other``, turn by turn, for about ``budget`` seconds: enough turns to tell 5 % apart.

    Within a turn each comes first as often as the other (one, other, other, one), so that a machine that slows down
    or speeds up on the way favours neither.
    """
    one(), other()
    turn = 2 * (seconds(one, 1, warm_up=False) + seconds(other, 1, warm_up=False))
    ratios = []
    with NoCollection():
        for _ in range(min(most, max(least, round(budget / turn)))):
            times = [seconds(call, 1, warm_up=False) for call in (one, other, other, one)]
            ratios.append((times[0] + times[3]) / (times[1] + times[2]))
    return Timing(tuple(ratios))


def once(unit: Call, call: Call, count: int, *, repeats: int = 4) -> float:
    """The ratio of one long call, as a share of ``count`` steps, between two blocks of ``unit``."""
    with NoCollection():
        before = seconds(unit, repeats)
        taken = seconds(call, 1, warm_up=False)
        _settle(unit)
        after = seconds(unit, repeats)
    return 2 * taken / (before + after) / count


def _settle(unit: Call) -> None:
    """Let the machine come to rest: after seconds at full load, calls are slow for some tens of milliseconds."""
    until = time.perf_counter() + SETTLING
    while time.perf_counter() < until:
        unit()


class Pauses:
    """Takes a long call apart: at every ``every``-th call of :meth:`tick` its clock stops for the ``units``.

    The stretches between pauses are then compared with units timed at both of their ends.
    """

    def __init__(self, units: Sequence[Call], every: int) -> None:
        self.units, self.every = units, every
        self.stretches: list[float] = []
        self.at_ends: list[list[float]] = []
        self.ticks = 0

    def run(self, call: Callable[[Callable[..., None]], object]) -> None:
        """Call with :meth:`tick`, from the first pause to the last."""
        with NoCollection():
            self._pause()
            call(self.tick)
            self.stretches.append(time.perf_counter() - self._resumed)
            self._pause()

    def tick(self, *_: object) -> None:
        self.ticks += 1
        if self.ticks % self.every == 0:
            self.stretches.append(time.perf_counter() - self._resumed)
            self._pause()

    def _pause(self) -> None:
        self.at_ends.append([seconds(unit) for unit in self.units])
        self._resumed = time.perf_counter()

    def ratios(self, count: int) -> tuple[Timing, Timing]:
        """Ratios to the first unit, by stretch: of one of ``count`` steps in all, and of the second unit.

        The steps fill the stretches; what comes after the last step belongs to the last stretch, as what comes
        before the first step belongs to the first.
        """
        if self.ticks % self.every or len(self.stretches) < 2:
            raise ValueError(f"{self.ticks} ticks do not fill stretches of {self.every}")
        stretches = [*self.stretches[:-2], sum(self.stretches[-2:])]
        ends = [*self.at_ends[:-2], self.at_ends[-1]]
        per_step = len(stretches) / count
        step, other = [], []
        for taken, before, after in zip(stretches, ends, ends[1:], strict=False):
            unit = (before[0] + after[0]) / 2
            step.append(taken * per_step / unit)
            other.append((before[1] + after[1]) / 2 / unit)
        return Timing(tuple(step)), Timing(tuple(other))


class NoCollection:
    """The garbage collector would strike whom it pleases; it runs before and after instead."""

    def __enter__(self) -> None:
        gc.collect()
        self.was = gc.isenabled()
        gc.disable()

    def __exit__(self, *_: object) -> None:
        if self.was:
            gc.enable()
        gc.collect()


def relative(one: Tensor, other: Tensor) -> float:
    """Relative difference of two vectors, as a share of the second."""
    return float((one.double() - other.double()).norm() / other.double().norm())
