"""What one measurement leaves for the next: the top eigenvectors, from which the search then starts."""

from __future__ import annotations

import torch
from torch import Tensor

from curvdiag.distributed import Ranks
from curvdiag.memory import free_bytes
from curvdiag.objective import Objective
from curvdiag.operators.base import SymmetricOperator
from curvdiag.spectrum import Eigenpairs, top_eigenpairs

SPARE = 16
"""A vector is kept where this many like it still fit into the free memory."""


class WarmStarts:
    """Largest eigenvalues of matrices that change little from one measurement to the next.

    One vector of ``P`` numbers is kept for each matrix, on its device; not where memory is short, nor where the pair
    has not converged. It is given up when a search begins, so that one that fails leaves none behind. The random
    vector that a warm start is mixed with is another one each time: what escapes one measurement shows in the next.

    Args:
        enabled: Without it every search is a cold one, from the same random vector.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self._kept: dict[str, tuple[object, Tensor]] = {}
        self._turns: dict[str, int] = {}

    def largest(
        self, name: str, operator: SymmetricOperator, objective: Objective, *, tol: float, seed: int
    ) -> Eigenpairs:
        """The largest eigenvalue of ``operator``, from the vector that the last search under ``name`` left.

        A vector of other parameters, or of another precision or device, is not used.
        """
        parameters = objective.parameters
        layout = (tuple(parameters.names), tuple(parameters.shapes), operator.dtype, operator.device)
        known, vector = self._kept.pop(name, (None, None))
        start = vector if known == layout else None
        turn = 0 if start is None else self._turns.get(name, 0) + 1
        pairs = top_eigenpairs(operator, 1, tol=tol, start=start, seed=seed + turn)
        del start, vector
        found = pairs.vectors[:, 0]
        if self.enabled and bool(pairs.converged[0]) and _fits(found, objective.holders):
            self._kept[name], self._turns[name] = (layout, found.clone()), turn
        return pairs

    def forget(self) -> None:
        """Start cold next time."""
        self._kept.clear()
        self._turns.clear()


def _fits(vector: Tensor, ranks: Ranks) -> bool:
    free = ranks.least(free_bytes(vector.device), "free memory")
    return free > SPARE * vector.numel() * torch.finfo(vector.dtype).bits // 8
