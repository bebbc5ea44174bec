"""ConstantP: one p throughout, as in STACEY."""

from __future__ import annotations

from collections.abc import Sequence

from torch.optim import Optimizer

from curvdiag.schedules.p_scheduler import PScheduler


class ConstantP(PScheduler):
    """Sets ``p`` once and leaves it there: 2 is SGD, infinity is signSGD.

    Args:
        optimizer: Every group has a ``"p"``.
        p: From 2 to infinity, above or below the optimizer's own; one number, or one for each group; the groups' own
            if not given.
        last_epoch: -1 to begin.

    Raises:
        ArgumentError: As in :class:`~curvdiag.schedules.PScheduler`.
    """

    infinite = True
    lowers = True

    def __init__(self, optimizer: Optimizer, p: float | Sequence[float] | None = None, last_epoch: int = -1) -> None:
        super().__init__(optimizer, p, last_epoch)

    def factors(self) -> list[float]:
        """One for each group."""
        return [1.0] * len(self.base_ps)
