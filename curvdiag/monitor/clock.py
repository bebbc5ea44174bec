"""How long a run has lasted, and how much of it went into measuring."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Clock:
    """Seconds of wall time since the start, carried over restarts.

    Attributes:
        measuring: Seconds that went into measurements and their loggers.
        last: Seconds that the last one took.
    """

    def __init__(self) -> None:
        self.measuring = 0.0
        self.last = 0.0
        self._before = 0.0
        self._started: float | None = None

    def start(self) -> None:
        """Begin to count; without effect when it has begun."""
        if self._started is None:
            self._started = time.perf_counter()

    @property
    def elapsed(self) -> float:
        """Seconds since the start, those before a restart included."""
        return self._before + (0.0 if self._started is None else time.perf_counter() - self._started)

    @contextmanager
    def measuring_time(self) -> Iterator[None]:
        """Count what happens inside as measuring, also when it fails."""
        self.start()
        began = time.perf_counter()
        try:
            yield
        finally:
            self.last = time.perf_counter() - began
            self.measuring += self.last

    @contextmanager
    def logging_time(self, *, of_last: bool = False) -> Iterator[None]:
        """Count what happens inside as measuring: with ``of_last`` as a part of the last measurement."""
        self.start()
        began = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - began
            self.measuring += seconds
            self.last += seconds if of_last else 0.0

    def state_dict(self) -> dict[str, Any]:
        return {"elapsed": self.elapsed, "measuring": self.measuring, "last": self.last}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._before, self.measuring, self.last = state["elapsed"], state["measuring"], state["last"]
        self._started = None
