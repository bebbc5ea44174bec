"""What a measured schedule of the learning rate follows: a source, smoothed, with the history of what came of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from curvdiag.monitor import CurvatureMonitor, Measurement
from curvdiag.schedules.source import Choice, Followed, Measured, Source


class Following(Source):
    """What a schedule follows: the source, the smoothed numbers, and the history of what was made of them.

    Args:
        source, keys, needs, refresh, owner: As in :class:`~curvdiag.schedules.source.Source`.
        name: Of the schedule in the keys of a run: ``"schedule/<name>/..."``.
        smoothing: Weight of the old value, in [0, 1).
        inside: Takes a number out of a result that a callable may give instead of it; leaves anything else alone.

    Attributes:
        news: What was read and not yet chosen by: the step, the numbers, and why they cannot be used; else None.
    """

    def __init__(
        self,
        source: Measured,
        keys: Mapping[str, str],
        *,
        needs: Sequence[str],
        owner: str,
        name: str,
        refresh: int = 1,
        smoothing: float = 0.0,
        inside: Callable[[Any], Any] = lambda answer: answer,
    ) -> None:
        self._inside = inside
        super().__init__(source, keys, needs=needs, refresh=refresh, owner=owner)
        self.name, self.followed = name, Followed(smoothing)
        self._held = ""
        self.news: tuple[int, dict[str, float], str] | None = None

    def look(self, step: int, take: Callable[[dict[str, float]], str]) -> None:
        """Read, and hand what is new to ``take``, which says why it cannot be used, or nothing."""
        before = self.read_at, self.complaint, set(self._complained)
        self._held = ""
        found = self.read(step)
        if found is not None and (why := take(found)):
            self.read_at, self.complaint, self._complained = before  # it was no success
            self.hold("unusable", why, step)
        if found is not None or self._held:
            self.news = step, found or {}, self._held

    def chose(self, chosen: Mapping[str, float]) -> None:
        """Remember and record what was chosen after the last :attr:`news`."""
        assert self.news is not None
        (step, seen, held), self.news = self.news, None
        self.followed.history.append(Choice(step, seen, dict(chosen), held))
        self.record({f"schedule/{self.name}/{key}": value for key, value in {**seen, **chosen}.items()})

    def _by_name(self, answer: Any) -> dict[str, float]:
        if isinstance(answer, Measurement):
            return {name: answer[key] for name, key in self.keys.items()}
        return super()._by_name(self._inside(answer))

    def hold(self, kind: str, why: str, step: int) -> None:
        self._held = why
        super().hold(kind, why, step)

    def renew(self) -> None:
        """Call a callable at the next look, however recent its last answer is by the count of steps."""
        if not isinstance(self.source, CurvatureMonitor):
            self._taken = None

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "followed": self.followed.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(dict(state))
        self.followed.load_state_dict(state["followed"])
        self.news = None
