"""Arithmetic with long vectors: products with an operator, inner products, and the precision that they are kept in."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from curvdiag.errors import ArgumentError
from curvdiag.operators.base import LinearMap

if TYPE_CHECKING:
    from curvdiag.operators.blocks import Blocks

# On a CPU torch.dot of long float32 vectors has an error that grows with their length (about 1e-5 at 8e6 numbers,
# and vector_norm's square 5e-4); over pieces of this length it stays at rounding level.
PIECE = 1 << 18

NON_FINITE = (
    "a product of the operator with a finite vector holds NaN or infinite numbers; look at the loss, the weights "
    "and the gradient of the probe batch for NaN, infinity or overflow"
)


def working_dtype(operator: LinearMap | Blocks) -> torch.dtype:
    """Vectors are never kept in less than single precision, whatever the operator computes in."""
    return operator.dtype if operator.dtype in (torch.float32, torch.float64) else torch.float32


def wide_dtype(device: torch.device) -> torch.dtype:
    """What sums over long vectors are kept in: float64 wherever there is one."""
    return torch.float32 if device.type == "mps" else torch.float64


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


def row_dots(x: Tensor, y: Tensor) -> Tensor:
    """Inner products ``[k]`` of corresponding rows, without temporaries, added up in float64."""
    wide = wide_dtype(x.device)
    piece = PIECE if x.device.type == "cpu" and x.dtype == torch.float32 else max(1, x.shape[1])
    return torch.stack([_dot(x[i], y[i], piece, wide) for i in range(len(x))])


def remove_components(vector: Tensor, basis: Tensor) -> Tensor:
    """Subtract from ``vector`` ``[P]``, in place, its components along the rows of ``basis``; returns them."""
    components = torch.mv(basis, vector)
    vector.addmv_(basis.T, components, alpha=-1)
    return components


def _dot(x: Tensor, y: Tensor, piece: int, wide: torch.dtype) -> Tensor:
    if len(x) <= piece:
        return torch.dot(x, y).to(wide)
    parts = [torch.dot(a, b) for a, b in zip(x.split(piece), y.split(piece), strict=True)]
    return torch.stack(parts).sum(dtype=wide)
