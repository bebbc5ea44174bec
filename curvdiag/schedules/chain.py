"""One entry of each parameter group, moved by a factor beside schedules that know nothing of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class Chain:
    """Keeps ``group[key] = floor + (base - floor) * factor * (what other schedules made of it)``.

    A schedule that is alone gets its closed form to the last bit. What somebody else did to the entry since it was
    last set is taken for a factor of theirs, as PyTorch's chainable schedules apply one. It is kept while the own
    factor is zero, and found again after theirs was.

    Args:
        optimizer: Its parameter groups hold the entry.
        key: ``"lr"``, or ``"p"``.
        floor: What a factor of zero gives: 0 for a learning rate, 2 for p.
        bases: What a factor of one gives, for each group.
        untouched: What the entries were before any schedule; the bases if not given.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        key: str,
        floor: float,
        bases: Sequence[float],
        untouched: Sequence[float] | None = None,
    ) -> None:
        self.key, self.floor = key, floor
        self.bases = [float(base) for base in bases]
        self.begin(optimizer, self.bases if untouched is None else untouched)

    def begin(self, optimizer: Optimizer, untouched: Sequence[float]) -> None:
        """Take what the entries differ by from ``untouched`` for the work of other schedules."""
        self.others = [1.0] * len(self.bases)
        self.factors = [1.0] * len(self.bases)
        self.left = [float(value) for value in untouched]
        self._notice(optimizer)

    def join(self, base: float) -> None:
        """Take in a parameter group that was added, whose entry is ``base`` now."""
        for kept, value in ((self.bases, base), (self.others, 1.0), (self.factors, 1.0), (self.left, base)):
            kept.append(value)

    def values(self, optimizer: Optimizer, factors: Sequence[float], *, alone: bool = False) -> list[float]:
        """The entries under these factors; :meth:`settle` is to be called once they are set.

        Args:
            optimizer: As at construction.
            factors: One for each group.
            alone: Forget what other schedules did.
        """
        if alone:
            self.others = [1.0] * len(self.bases)
        else:
            self._notice(optimizer)
        self.factors = [float(factor) for factor in factors]
        return [
            self.floor + (base - self.floor) * factor * other
            for base, factor, other in zip(self.bases, self.factors, self.others, strict=True)
        ]

    def settle(self, optimizer: Optimizer) -> None:
        """Remember the entries as they were left, rounded as the groups hold them."""
        self.left = [float(group[self.key]) for group in optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        names = ("bases", "others", "factors", "left")
        return {name: list(getattr(self, name)) for name in names}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in self.state_dict():
            setattr(self, name, list(state[name]))

    def _notice(self, optimizer: Optimizer) -> None:
        """Take what changed since :meth:`settle` for a factor of somebody else's."""
        for index, group in enumerate(optimizer.param_groups[: len(self.left)]):
            now, left = float(group[self.key]), self.left[index]
            if now == left:
                continue
            own = (self.bases[index] - self.floor) * self.factors[index]
            if left != self.floor:
                self.others[index] *= (now - self.floor) / (left - self.floor)
            elif own:  # it was theirs that was zero, and is no more
                self.others[index] = (now - self.floor) / own
            self.left[index] = now


def set_entry(group: dict[str, Any], key: str, value: float) -> None:
    """Set an entry of a parameter group; a tensor is filled, since compiled and captured steps hold on to it."""
    if isinstance(group[key], Tensor):
        with torch.no_grad():
            group[key].fill_(value)
    else:
        group[key] = value
