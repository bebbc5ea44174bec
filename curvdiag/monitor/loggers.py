"""Whom a monitor tells of its run: loggers, which may fail without harm to the training."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch

from curvdiag.errors import ArgumentError
from curvdiag.sandbox import random_states

if TYPE_CHECKING:
    from curvdiag.monitor.clock import Clock
    from curvdiag.monitor.measurement import Measurement
    from curvdiag.record import Run


@runtime_checkable
class Logger(Protocol):
    """What is told of a run while it lasts. The run file stays the truth: nothing is ever read from a logger.

    A logger that also has ``resume(step, run)`` is told when the training goes on from a checkpoint, also before
    ``begin``: what it holds beyond ``step`` was measured on a path that the training has left; ``run`` is the
    :class:`~curvdiag.record.Run` that goes on in the run file, or None.

    One that raises is closed and told no more.
    """

    def begin(self, name: str, config: Mapping[str, Any]) -> None:
        """The run begins, just before the first of the other calls. ``config`` is plain, as JSON has it."""

    def log(self, measurement: Measurement) -> None:
        """Something was measured: numbers, and densities, at ``measurement.step``."""

    def numbers(self, step: int, scalars: Mapping[str, float]) -> None:
        """What :meth:`~curvdiag.monitor.CurvatureMonitor.record` was given at ``step``."""

    def close(self) -> None:
        """The run ends, or one of the other calls has raised. Called once, and only after ``begin``."""


class CallableLogger:
    """A logger that hands all numbers to a function.

    Args:
        function: Called as ``function(step, scalars)`` with a dictionary of floats by key: once for each measurement,
            and once for each call of the monitor's ``record``.
    """

    def __init__(self, function: Callable[[int, dict[str, float]], object]) -> None:
        self.function = function

    def begin(self, name: str, config: Mapping[str, Any]) -> None:
        pass

    def log(self, measurement: Measurement) -> None:
        self.function(measurement.step, {key: float(value) for key, value in measurement.scalars.items()})

    def numbers(self, step: int, scalars: Mapping[str, float]) -> None:
        self.function(step, dict(scalars))

    def close(self) -> None:
        pass

    def __repr__(self) -> str:
        return f"CallableLogger({getattr(self.function, '__name__', repr(self.function))})"


class Loggers:
    """The loggers of one monitor. What they draw from random generators is put back, and their time is counted.

    Args:
        given: Loggers, or functions of a step and a dictionary.
        clock: Counts the time they take as measuring.
        introduce: Gives the run's name and configuration when it begins.
        failed: Called with a logger and its error, after which the logger is told no more.
        strict: Raise the error instead.

    Raises:
        ArgumentError: One of ``given`` is neither.
    """

    def __init__(
        self,
        given: Iterable[Logger | Callable[[int, dict[str, float]], object]],
        clock: Clock,
        introduce: Callable[[], tuple[str, Mapping[str, Any]]],
        failed: Callable[[Logger, Exception], None],
        *,
        strict: bool,
    ) -> None:
        if isinstance(given, str | bytes | Mapping) or not isinstance(given, Iterable):
            raise ArgumentError(f"loggers= is a list of loggers and functions of (step, dict), not {given!r}")
        self._told = [_Told(as_logger(one)) for one in given]
        self._clock, self._introduce, self._failed, self.strict = clock, introduce, failed, strict

    def log(self, measurement: Measurement) -> None:
        """Tell of a measurement; the time counts as a part of it."""
        self._begin()
        self._tell(self._told, lambda logger: logger.log(measurement), of_last=True)

    def numbers(self, step: int, scalars: Mapping[str, float]) -> None:
        """Tell of numbers that stand beside what was measured."""
        self._begin()
        self._tell(self._told, lambda logger: logger.numbers(step, scalars))

    def resume(self, step: int, run: Run | None) -> None:
        """Tell that training goes on from ``step``."""
        self._tell(self._told, lambda logger: getattr(logger, "resume", lambda *_: None)(step, run))

    def close(self) -> None:
        """Close those that have begun; they are told no more."""
        told, self._told = self._told, []
        self._tell([one for one in told if one.begun], lambda logger: logger.close())

    def _begin(self) -> None:
        waiting = [one for one in self._told if not one.begun]
        if waiting:
            name, config = self._introduce()
            config = plain(config)
            for one in waiting:
                one.begun = True
            self._tell(waiting, lambda logger: logger.begin(name, config))

    def _tell(self, told: Sequence[_Told], tell: Callable[[Logger], object], *, of_last: bool = False) -> None:
        if not told:
            return
        failed: list[tuple[Logger, Exception]] = []
        # What a logger draws or switches is not to reach the training.
        grad_mode = torch.set_grad_enabled(torch.is_grad_enabled())
        with self._clock.logging_time(of_last=of_last), random_states(), grad_mode:
            for one in tuple(told):
                try:
                    tell(one.logger)
                except Exception as error:
                    failed.append((one.logger, error))
                    self._drop(one)
        for logger, reason in failed:
            if self.strict:
                raise reason
            self._failed(logger, reason)

    def _drop(self, one: _Told) -> None:
        if one in self._told:
            self._told.remove(one)
            if one.begun:
                with contextlib.suppress(Exception):  # it may hold files and threads; its first error is what counts
                    one.logger.close()


@dataclass(eq=False)
class _Told:
    logger: Logger
    begun: bool = False


def as_logger(given: Any) -> Logger:
    """A logger as it is, a function as a :class:`CallableLogger`.

    Raises:
        ArgumentError: It is neither.
    """
    if isinstance(given, type):
        raise ArgumentError(f"loggers= takes loggers, not classes: {given.__name__}(...) makes one")
    if isinstance(given, Logger):
        return given
    if callable(given):
        return CallableLogger(given)
    raise ArgumentError(
        f"a logger has begin(), log(), numbers() and close(), or is a function of (step, dict); {given!r} is neither"
    )


def plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration as JSON has it; what JSON does not know becomes text."""
    found = {}
    for key, value in config.items():
        try:
            found[str(key)] = json.loads(json.dumps(value, default=str))
        except (TypeError, ValueError):
            found[str(key)] = repr(value)
    return found
