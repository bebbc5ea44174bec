"""Inner products of long vectors, added up so that their error does not grow with the length."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# On a CPU torch.dot of long float32 vectors has an error that grows with their length (about 1e-5 at 8e6 numbers,
# and vector_norm's square 5e-4); over pieces of this length it stays at rounding level.
PIECE = 1 << 18


def wide_dtype(device: torch.device) -> torch.dtype:
    """What sums over long vectors are kept in: float64 wherever there is one."""
    return torch.float32 if device.type == "mps" else torch.float64


def row_dots(x: Tensor, y: Tensor) -> Tensor:
    """Inner products ``[k]`` of corresponding rows, without temporaries, added up in float64."""
    wide = wide_dtype(x.device)
    piece = PIECE if x.device.type == "cpu" and x.dtype == torch.float32 else max(1, x.shape[1])
    return torch.stack([_dot(x[i], y[i], piece, wide) for i in range(len(x))])


def cross_products(x: Tensor, y: Tensor) -> Tensor:
    """Inner products ``[p, k]`` of all rows of ``x`` ``[p, P]`` with all of ``y`` ``[k, P]``, as :func:`row_dots`."""
    piece = PIECE if x.device.type == "cpu" else max(1, x.shape[1])
    parts = [torch.mm(some, known.T) for some, known in zip(x.split(piece, 1), y.split(piece, 1), strict=True)]
    return torch.stack(parts).sum(0, dtype=wide_dtype(x.device))


def dots_of_parts(pairs: Sequence[tuple[Tensor | None, Tensor | None]], *, batched: bool = False) -> Tensor:
    """The inner product, in float64, of two vectors that come in pairs of tensors, not all None; a None is zero.

    Args:
        batched: The tensors hold parts of several vectors, along a first dimension more, and so does the result.
    """
    some = next(one for pair in pairs for one in pair if one is not None)
    count = len(some) if batched else 1
    total = torch.zeros(count, dtype=wide_dtype(some.device), device=some.device)
    for x, y in pairs:
        if x is not None and y is not None:
            # The inner product of half precision would be rounded to it.
            exact = x.dtype if x.dtype in (torch.float32, torch.float64) else torch.float32
            total += row_dots(x.reshape(count, -1).to(exact), y.reshape(count, -1).to(exact))
    return total if batched else total[0]


def _dot(x: Tensor, y: Tensor, piece: int, wide: torch.dtype) -> Tensor:
    if len(x) <= piece:
        return torch.dot(x, y).to(wide)
    parts = [torch.dot(a, b) for a, b in zip(x.split(piece), y.split(piece), strict=True)]
    return torch.stack(parts).sum(dtype=wide)
