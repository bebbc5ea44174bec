"""Arithmetic with long vectors: products with an operator, inner products, and the precision that they are kept in."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from curvdiag.errors import ArgumentError
from curvdiag.operators.base import LinearMap
from curvdiag.space import Space
from curvdiag.space.inner_products import PIECE, row_dots, wide_dtype

if TYPE_CHECKING:
    from curvdiag.operators.blocks import Blocks

__all__ = ["NON_FINITE", "PIECE", "forms", "product", "remove_components", "row_dots", "wide_dtype", "working_dtype"]

NON_FINITE = (
    "a product of the operator with a finite vector holds NaN or infinite numbers; look at the loss, the weights "
    "and the gradient of the probe batch for NaN, infinity or overflow"
)


def working_dtype(operator: LinearMap | Blocks) -> torch.dtype:
    """Vectors are never kept in less than single precision, whatever the operator computes in."""
    return operator.dtype if operator.dtype in (torch.float32, torch.float64) else torch.float32


def product(operator: LinearMap, rows: Tensor) -> Tensor:
    """``operator.apply(rows)`` as fresh contiguous rows that the caller may overwrite."""
    result = operator.apply(rows.to(operator.dtype)).detach()
    if result.shape != rows.shape:
        raise ArgumentError(
            f"the operator turns vectors of shape {tuple(rows.shape)} into {tuple(result.shape)}; "
            "a square operator keeps the shape"
        )
    result = result.to(device=rows.device, dtype=rows.dtype).contiguous()
    # An identity-like operator may hand its argument back.
    return result.clone() if result.data_ptr() == rows.data_ptr() else result


def forms(operator: LinearMap, rows: Tensor) -> Tensor:
    """``v^T H v`` ``[k]`` of rows ``[k, local]``, in float64."""
    if operator.forms is None:
        return operator.space.dots(rows, product(operator, rows))
    return operator.forms(rows.to(operator.dtype)).detach()


def remove_components(space: Space, vector: Tensor, basis: Tensor) -> Tensor:
    """Subtract from ``vector`` ``[local]``, in place, its components along the rows of ``basis``; returns them."""
    components = space.components(basis, vector)
    vector.addmv_(basis.T, components, alpha=-1)
    return components
