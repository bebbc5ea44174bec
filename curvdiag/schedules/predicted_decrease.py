"""How far the loss would fall along a direction, by its slope and its curvature there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from curvdiag.distributed import collectively
from curvdiag.errors import ArgumentError
from curvdiag.operators.base import linear_map
from curvdiag.space import Space


@collectively
def predicted_decrease(operator: Any, gradient: Tensor, directions: Tensor) -> Tensor:
    """``(g . d)^2 / (2 d^T A d)`` for each direction, ``[k]`` in double precision.

    It is what the quadratic model with slope ``g`` and curvature ``A`` loses in its best step along ``-d``. It does
    not depend on the length of ``d``, so that directions of different units can be compared. No direction has more
    than Newton's, ``A^-1 g``. All products are made in one call.

    Args:
        operator: Any square symmetric object with ``shape`` and ``@``.
        gradient: ``g``, ``[P]``; ``[local]`` where each rank holds a part of it.
        directions: As columns, ``[P, k]`` or ``[local, k]``. The transpose of contiguous rows is not copied.

    Returns:
        NaN where there is no such step: ``d^T A d`` is not positive beyond rounding, ``d`` leads uphill
        (``g . d < 0``), or something is not finite.

    Raises:
        ArgumentError: The shapes do not agree.
    """
    matrix = linear_map(operator)
    space, local = matrix.space, matrix.space.local
    if gradient.shape != (local,) or directions.ndim != 2 or len(directions) != local:
        raise ArgumentError(
            f"beside an operator of order {matrix.size} the gradient has shape ({local},) and the directions "
            f"have ({local}, k), not {tuple(gradient.shape)} and {tuple(directions.shape)}"
        )
    rows = directions.detach().to(device=matrix.device, dtype=matrix.dtype).T.contiguous()
    products = matrix.apply(rows)
    slopes = _sums(space, rows * gradient.detach().to(rows))
    curvatures = _sums(space, rows * products)
    # Where positive and negative parts cancel, what is left below this is the rounding of the sum, of either sign.
    rounding = torch.finfo(matrix.dtype).eps * _norms(space, rows) * _norms(space, products)
    kept = (curvatures > rounding) & (slopes >= 0)
    return torch.where(kept, slopes.square() / (2 * curvatures), torch.nan)


def candidates(p_max: float) -> tuple[float, ...]:
    """2, 3, 4, 6, 8, 12, 16, ... (half octaves) below ``p_max``, and ``p_max``."""
    found, octave = [], 2.0
    while octave < p_max:
        found += [p for p in (octave, 1.5 * octave) if p < p_max]
        octave *= 2
    return (*found, float(p_max))


def _sums(space: Space, rows: Tensor) -> Tensor:
    return space.complete(space.counted(rows).sum(1, dtype=torch.float64))


def _norms(space: Space, rows: Tensor) -> Tensor:
    if space.whole:
        return torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
    return space.dots(rows, rows).sqrt()
