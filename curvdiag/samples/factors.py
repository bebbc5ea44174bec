"""Per-sample gradients of linear layers as outer products, whose inner products need none of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from curvdiag.objective import Objective
from curvdiag.samples.linear import Linear
from curvdiag.samples.passes import simple
from curvdiag.samples.streaming import Group
from curvdiag.weights import Weights


@dataclass(frozen=True)
class Factors:
    """One parameter's gradients ``g_i = left_i right_i^T``, or ``left_i`` alone for a bias.

    Attributes:
        left: ``[N, out]``.
        right: ``[N, in]``; None for a bias.
    """

    left: Tensor
    right: Tensor | None

    @property
    def width(self) -> int:
        """Numbers for each sample."""
        return self.left.shape[1] + (0 if self.right is None else self.right.shape[1])

    def products(self) -> Tensor:
        """``g_i . g_j`` ``[N, N]`` in double precision."""
        left = self.left.double()
        found = left @ left.T
        if self.right is not None:
            right = self.right.double()
            found *= right @ right.T
        return found


def factors(
    objective: Objective, weights: Weights, dtype: torch.dtype | None, positions: Sequence[int], numbers: int
) -> dict[int, Factors]:
    """The factors of those parameters that have them, by position: in one call of a linear layer, one row a sample.

    Args:
        numbers: Most entries that they may hold in all; where they are more there are none.
    """
    scale = objective.size / objective.total_weight
    parts: dict[int, list[Factors]] = {position: [] for position in positions}
    for batch in objective.batches:
        group = Group(objective, weights, batch, dtype, positions)
        group.run(keep=True)
        found = {position: _of_group(group, position, scale) for position in parts}
        parts = {p: [*parts[p], own] for p, own in found.items() if own is not None}
        if not parts or objective.local_size * sum(own[0].width for own in parts.values()) > numbers:
            return {}
    return {position: _joined(own) for position, own in parts.items()}


def _of_group(group: Group, position: int, scale: float) -> Factors | None:
    if group.passed is None or group.plan.ways[position] != "rule" or not simple(group.uses[position]):
        return None
    (use,) = group.uses[position]
    if not isinstance(use.call, Linear) or not use.call.reached:
        return None
    (layout,) = group.plan.laid_out([use])
    pair = use.call.factors(use.role, layout)
    return None if pair is None else Factors(pair[0] * scale, pair[1])


def _joined(parts: list[Factors]) -> Factors:
    right = [part.right for part in parts if part.right is not None]
    return Factors(torch.cat([part.left for part in parts]), torch.cat(right) if right else None)
