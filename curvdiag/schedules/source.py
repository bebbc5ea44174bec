"""What a schedule reads: a monitor's newest measurement, or a callable's answer; never an exception to the training."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from curvdiag.distributed import Ranks
from curvdiag.errors import ArgumentError, out_of_step
from curvdiag.estimate import Estimate
from curvdiag.monitor import CurvatureMonitor, Measurement

log = logging.getLogger(__name__)

Measured: TypeAlias = CurvatureMonitor | Callable[[], Any]
"""A monitor, or a function that gives a number, an Estimate, a mapping or a result; None where there is nothing new.

A measurement of a monitor that a function gives again, by its step, is nothing new either.
"""

KEPT = 10_000
"""Choices that a schedule remembers."""


@dataclass(frozen=True)
class Choice:
    """What a schedule saw and what it chose.

    Attributes:
        step: Of the schedule.
        seen: Numbers by name; empty where there was nothing to see.
        chosen: Numbers by name.
        note: Why the last value was held, if it was.
    """

    step: int
    seen: Mapping[str, float]
    chosen: Mapping[str, float]
    note: str = ""


class Source:
    """The numbers that a schedule follows, when there are new ones.

    What is missing, fails, is NaN or infinite is logged, and nothing new is reported; the schedule then holds what it
    had. Each kind of complaint is logged once, as a warning, and again only after a success in between.

    Args:
        source: A monitor or a callable.
        keys: The schedule's name of each number it needs, and the monitor's key for it.
        needs: Quantities of the monitor that measure these keys.
        refresh: Call a callable every so many steps; a monitor has a cadence of its own.
        owner: Name of the schedule, for messages.
        pick: Takes the numbers by the schedule's names out of a callable's answer; by default the answer itself, its
            items or its attributes, by :func:`as_float`.
        partial: Report the numbers there are, where some are missing, NaN or infinite.
        monitor: In whose run what is logged is an event too; the source, if it is a monitor.

    Raises:
        ArgumentError: ``source`` is neither; the monitor does not measure what is needed; ``refresh`` is below 1.

    Attributes:
        read_at: The step of the last success, or None.
        complaint: Why the last reading gave nothing, or not everything; empty after a success.
        noticed: The same where it is news: where it was logged at the last reading.
    """

    def __init__(
        self,
        source: Measured,
        keys: Mapping[str, str],
        *,
        needs: Sequence[str],
        refresh: int = 1,
        owner: str,
        pick: Callable[[Any], Mapping[str, float]] | None = None,
        partial: bool = False,
        monitor: CurvatureMonitor | None = None,
    ) -> None:
        if not isinstance(source, CurvatureMonitor) and not callable(source):
            given = "None; where one rank alone measures, give every rank a function that broadcasts its number"
            raise ArgumentError(
                f"{owner} follows a CurvatureMonitor or a function without arguments, not "
                f"{given if source is None else type(source).__name__}"
            )
        if isinstance(refresh, bool) or not (isinstance(refresh, int) and refresh >= 1):
            raise ArgumentError(f"{owner}: refresh is a number of steps, at least 1, not {refresh!r}")
        self.source, self.keys, self.refresh, self.owner = source, dict(keys), refresh, owner
        self.read_at: int | None = None
        self.complaint = self.noticed = ""
        self._pick = self._by_name if pick is None else pick
        self._partial = partial
        self._monitor = source if isinstance(source, CurvatureMonitor) else monitor
        self._taken: int | None = None
        self._given: int | None = None  # the step of the last measurement of a monitor that a function gave
        self._waiting: tuple[int, dict[str, float]] | None = None
        self._complained: set[str] = set()
        if isinstance(source, CurvatureMonitor):
            self._inspect(source, needs)

    def read(self, step: int) -> dict[str, float] | None:
        """The numbers by the schedule's names where there are new ones at this step; None where there are not."""
        self.noticed = ""
        try:
            found = self._from_monitor() if isinstance(self.source, CurvatureMonitor) else self._from_call(step)
        except Exception as error:
            if out_of_step(error):  # no choice would be that of the other ranks
                raise
            self.hold(type(error).__name__, f"the measurement failed: {type(error).__name__}: {error}", step)
            return None
        if found is None:
            return None
        good = {name: value for name, value in found.items() if math.isfinite(value)}
        bad = ", ".join(f"{self.keys.get(name, name)} = {value}" for name, value in found.items() if name not in good)
        if bad:
            self.hold(f"not finite {bad}", f"{bad} (missing, or not finite)", step)
            if not (self._partial and good):
                return None
        else:
            self.succeed()
        self.read_at = step
        return good

    def hold(self, kind: str, why: str, step: int) -> None:
        """Complain, once for each kind until something succeeds, that nothing can be made of the measurement."""
        since = (
            "what there was before is held"
            if self.read_at is None
            else (f"the last measurement, of {step - self.read_at} steps ago, is held")
        )
        self.complain(kind, f"{why}; {since}")

    def complain(self, kind: str, message: str) -> None:
        """Log a warning, and record it as an event of the run, once for each kind until something succeeds."""
        self.complaint = message
        if kind not in self._complained:
            self._complained.add(kind)
            self.noticed = message
            if self._monitor is None or self._monitor.ranks.first:  # one rank speaks for all that measure together
                log.warning("%s: %s", self.owner, message)
            if self._monitor is not None and not self._monitor.closed:
                self._monitor.event("schedule", f"{self.owner}: {message}")

    def succeed(self) -> None:
        """Forget all complaints."""
        self.complaint = ""
        self._complained.clear()

    def record(self, scalars: Mapping[str, float]) -> None:
        """Put numbers of the schedule beside the monitor's measurements, if a monitor is what it follows."""
        if not isinstance(self.source, CurvatureMonitor):
            return
        try:
            self.source.record(scalars)
        except Exception as error:
            if self.source.strict:
                raise
            self.complain("record", f"its choice was not recorded: {type(error).__name__}: {error}")

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs, a measurement that the monitor has made and nobody has read yet included."""
        unread = self._unread()
        return {
            "read_at": self.read_at,
            "taken": self._taken,
            "given": self._given,
            "waiting": None if unread is None else [unread[0], unread[1]],
            "complaint": self.complaint,
            "complained": sorted(self._complained),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.read_at, self._taken, self._given = state["read_at"], state["taken"], state["given"]
        self.complaint = state["complaint"]
        self._waiting = None if state["waiting"] is None else (state["waiting"][0], dict(state["waiting"][1]))
        self._complained = set(state["complained"])

    def _inspect(self, monitor: CurvatureMonitor, needs: Sequence[str]) -> None:
        missing = [name for name in needs if name not in monitor.settings.quantities]
        if missing:
            have = ", ".join(monitor.settings.quantities)
            raise ArgumentError(
                f"{self.owner} needs a monitor that measures {', '.join(missing)}; this one measures {have}: "
                f"CurvatureMonitor(..., measure={[*monitor.settings.quantities, *missing]})"
            )
        if monitor.depends_on_clock and monitor.ranks.first:
            log.warning(
                "%s follows a monitor whose cadence reads the clock, so that two runs differ and a resumed one is "
                "not bit-identical; give the monitor every= or another cadence in steps",
                self.owner,
            )
        monitor.measure_cold()  # a resumed run must read the same numbers
        warn_of_ranks(self.owner, monitor.ranks)

    def _unread(self) -> tuple[int, dict[str, float]] | None:
        """The monitor's last measurement, if it was not read yet: its step, and the numbers."""
        if not isinstance(self.source, CurvatureMonitor):
            return None
        latest = self.source.latest
        # After a return to an earlier checkpoint the monitor still holds measurements of later steps; and a script that
        # measures before its training does so again, with its first weights, before it loads a checkpoint.
        known = max(-1 if self._taken is None else self._taken, -1 if self._waiting is None else self._waiting[0])
        if latest is None or not known < latest.step <= self.source.steps_done:
            return self._waiting
        return latest.step, {
            name: latest[key] if key in latest.scalars else math.nan for name, key in self.keys.items()
        }

    def _from_monitor(self) -> dict[str, float] | None:
        unread, self._waiting = self._unread(), None
        if unread is None:
            assert isinstance(self.source, CurvatureMonitor)
            done = self.source.steps_done
            if self.source.closed:
                self.complain("closed", "the monitor is closed, and no measurement will follow; what there is, is held")
            elif self._taken is not None and done < self._taken:  # its measurements would be skipped without a word
                self.complain(
                    "behind",
                    f"the monitor counts step {done}, and its measurement of step {self._taken} was read: load the "
                    "state of the monitor too; until it has passed that step what there is, is held",
                )
            return None
        self._taken = unread[0]
        return unread[1]

    def _from_call(self, step: int) -> Mapping[str, float] | None:
        if self._taken is not None and 0 <= step - self._taken < self.refresh:
            return None
        self._taken = step
        assert callable(self.source)
        answer = self.source()
        if isinstance(answer, Measurement):
            if answer.step == self._given:
                return None
            self._given = answer.step
        return None if answer is None else self._pick(answer) or None

    def _by_name(self, answer: Any) -> dict[str, float]:
        if isinstance(answer, Mapping):
            return {name: as_float(answer[name]) for name in self.keys}
        if len(self.keys) == 1:
            return {name: as_float(answer) for name in self.keys}
        return {name: as_float(getattr(answer, name)) for name in self.keys}


class Followed:
    """A measured quantity as a schedule keeps it: smoothed, with a history of choices.

    Args:
        smoothing: Weight of the old value, in [0, 1): ``new = smoothing * old + (1 - smoothing) * measured``. The
            first measurement is taken as it is.

    Attributes:
        values: The smoothed numbers by name.
        history: The last :data:`KEPT` choices, oldest first.
    """

    def __init__(self, smoothing: float) -> None:
        if not 0 <= smoothing < 1:
            raise ArgumentError(f"smoothing is the weight of the old value, at least 0 and below 1, not {smoothing}")
        self.smoothing = smoothing
        self.values: dict[str, float] = {}
        self.history: deque[Choice] = deque(maxlen=KEPT)

    def take(self, measured: Mapping[str, float]) -> dict[str, float]:
        """Smooth the numbers, and give them."""
        for name, new in measured.items():
            if name in self.values:
                self.values[name] = self.smoothing * self.values[name] + (1 - self.smoothing) * new
            else:
                self.values[name] = float(new)
        return dict(self.values)

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, the history included."""
        history = [[one.step, dict(one.seen), dict(one.chosen), one.note] for one in self.history]
        return {"values": dict(self.values), "history": history}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.values = dict(state["values"])
        self.history = deque((Choice(*one) for one in state["history"]), maxlen=KEPT)


def warn_of_ranks(owner: str, ranks: Ranks) -> None:
    """Say that every rank must measure the same, where there are several that do not all measure together."""
    distributed = torch.distributed
    count = distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1
    if count > ranks.count and ranks.alone:
        log.warning(
            "%s chooses on each of %d ranks by that rank's own measurement, and the weights drift apart where these "
            'differ: let all of them measure together, with Objective(..., group="world"); or give all the same probe '
            "batches and a cadence in steps, or a function that broadcasts the measurement of one rank",
            owner,
            count,
        )


def as_float(value: Any) -> float:
    """A number, a tensor of one element or an Estimate as a float."""
    if isinstance(value, Estimate):
        value = value.value
    return float(value.detach() if isinstance(value, Tensor) else value)
