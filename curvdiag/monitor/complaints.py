"""What went wrong beside a training: warned about once, on the rank that speaks for all."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable

from curvdiag.distributed import Ranks
from curvdiag.errors import CurvdiagWarning, RankFailedError

log = logging.getLogger(__name__)


class Complaints:
    """Warnings and events of one monitor.

    Args:
        ranks: Those that measure together; the first one warns.
        event: Writes a kind and a message into the run.
    """

    def __init__(self, ranks: Ranks, event: Callable[[str, str], None]) -> None:
        self._ranks, self._event = ranks, event
        self._made: set[str] = set()

    def warn(self, kind: str, message: str) -> None:
        """Warn, once for each kind."""
        if kind not in self._made and self._ranks.first:
            self._made.add(kind)
            warnings.warn(message, CurvdiagWarning, stacklevel=6)

    def failed(self, what: str, step: int, error: Exception) -> None:
        """Warn of a failure, which may have been that of another rank, and record it."""
        message = self._in_words(error)
        if not self._ranks.first and not isinstance(error, RankFailedError):  # said where it happened, too
            log.warning("the %s at step %d failed: %s", what, step, message)
        self.warn(what, f"the {what} at step {step} failed and training goes on. {message}")
        self._event("error", message)

    def logger_failed(self, logger: object, step: int, error: Exception) -> None:
        """Warn that a logger is told no more."""
        message = f"the logger {logger!r} failed and is left out from now on. {type(error).__name__}: {error}"
        self.warn(message, f"at step {step} {message}; training goes on")
        self._event("error", message)

    def _in_words(self, error: Exception) -> str:
        if isinstance(error, RankFailedError):  # which names the rank and its error
            return str(error)
        rank = "" if self._ranks.alone else f"rank {self._ranks.rank} failed: "
        return f"{rank}{type(error).__name__}: {error}"
