"""How far the loss would fall along a direction, by its slope and its curvature there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from curvdiag.errors import ArgumentError
from curvdiag.operators.base import linear_map


def predicted_decrease(operator: Any, gradient: Tensor, directions: Tensor) -> Tensor:
    """``(g . d)^2 / (2 d^T A d)`` for each direction, ``[k]`` in double precision.

    It is what the quadratic model with slope ``g`` and curvature ``A`` loses in its best step along ``-d``. It does
    not depend on the length of ``d``, so that directions of different units can be compared. No direction has more
    than Newton's, ``A^-1 g``. All products are made in one call.

    Args:
        operator: Any square symmetric object with ``shape`` and ``@``.
        gradient: ``g``, ``[P]``.
        directions: As columns, ``[P, k]``. The transpose of contiguous rows is not copied.

    Returns:
        NaN where there is no such step: ``d^T A d`` is not positive beyond rounding, ``d`` leads uphill
        (``g . d < 0``), or something is not finite.

    Raises:
        ArgumentError: The shapes do not agree.
    """
    matrix = linear_map(operator)
    if gradient.shape != (matrix.size,) or directions.ndim != 2 or len(directions) != matrix.size:
        raise ArgumentError(
            f"beside an operator of order {matrix.size} the gradient has shape ({matrix.size},) and the directions "
            f"have ({matrix.size}, k), not {tuple(gradient.shape)} and {tuple(directions.shape)}"
        )
    rows = directions.detach().to(device=matrix.device, dtype=matrix.dtype).T.contiguous()
    products = matrix.apply(rows)
    slopes = (rows * gradient.detach().to(rows)).sum(1, dtype=torch.float64)
    curvatures = (rows * products).sum(1, dtype=torch.float64)
    # Where positive and negative parts cancel, what is left below this is the rounding of the sum, of either sign.
    rounding = torch.finfo(matrix.dtype).eps * _norms(rows) * _norms(products)
    kept = (curvatures > rounding) & (slopes >= 0)
    return torch.where(kept, slopes.square() / (2 * curvatures), torch.nan)


def candidates(p_max: float) -> tuple[float, ...]:
    """2, 3, 4, 6, 8, 12, 16, ... (half octaves) below ``p_max``, and ``p_max``."""
    found, octave = [], 2.0
    while octave < p_max:
        found += [p for p in (octave, 1.5 * octave) if p < p_max]
        octave *= 2
    return (*found, float(p_max))


def _norms(rows: Tensor) -> Tensor:
    return torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
