"""CosineP: the published schedule of p."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch.optim import Optimizer

from curvdiag.errors import ArgumentError
from curvdiag.schedules.p_scheduler import PScheduler


class CosineP(PScheduler):
    """``p_s = 2 + (p_max - 2) (1 + cos(pi (s-1) / (S-1))) / 2`` for the epochs ``s = 1 .. S``.

    From ``p_max`` in the first epoch to 2, plain SGD, in the last: Xu and Yang, arXiv:2606.02078. After epoch ``S``
    it stays at 2. The paper leaves ``S = 1`` undefined; here that epoch has ``p_max``.

    ::

        schedule = CosineP(optimizer, epochs=200)
        for epoch in range(200):
            train_one_epoch()
            schedule.step()

    Args:
        optimizer: Every group has a ``"p"``.
        epochs: ``S``.
        p_max: At least 2, one number or one for each group; the groups' own ``p`` if not given. The paper's are 6 to 9.
        steps_per_epoch: For calls of :meth:`step` after every optimizer step: the same formula, with ``s`` counting
            steps and ``S = epochs * steps_per_epoch``.
        last_epoch: -1 to begin.

    Raises:
        ArgumentError: ``epochs`` or ``steps_per_epoch`` is no whole number of at least 1; and as in
            :class:`~curvdiag.schedules.PScheduler`.

    Attributes:
        total: ``S``, in calls of :meth:`step`.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        epochs: int,
        p_max: float | Sequence[float] | None = None,
        *,
        steps_per_epoch: int | None = None,
        last_epoch: int = -1,
    ) -> None:
        self.total = _count("epochs", epochs) * _count(
            "steps_per_epoch", 1 if steps_per_epoch is None else steps_per_epoch
        )
        super().__init__(optimizer, p_max, last_epoch)

    def factors(self) -> list[float]:
        """``(1 + cos(pi (s-1) / (S-1))) / 2`` for every group, with ``s - 1`` the calls of :meth:`step` so far."""
        return [cosine(self.last_epoch + 1, self.total)] * len(self.base_ps)


def cosine(s: int, total: int) -> float:
    """The factor at ``s = 1 .. total``, and 0 beyond."""
    if s > total:
        return 0.0
    return 1.0 if total == 1 else (1 + math.cos(math.pi * (s - 1) / (total - 1))) / 2


def _count(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ArgumentError(f"CosineP: {name} is a whole number of at least 1, not {value!r}")
    return value
