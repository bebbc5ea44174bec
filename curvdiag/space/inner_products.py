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
    return torch.stack([_sum(_pieces(x[i], y[i])) for i in range(len(x))])


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
    rows = range(len(some) if batched else 1)
    found: list[list[Tensor]] = [[some.new_zeros((), dtype=torch.float32)] for _ in rows]
    for x, y in pairs:
        if x is not None and y is not None:
            # The inner product of half precision would be rounded to it.
            exact = x.dtype if x.dtype in (torch.float32, torch.float64) else torch.float32
            left, right = x.reshape(len(rows), -1).to(exact), y.reshape(len(rows), -1).to(exact)
            for i, pieces in enumerate(found):
                pieces += _pieces(left[i], right[i])
    return torch.stack([_sum(pieces) for pieces in found]) if batched else _sum(found[0])


def _pieces(x: Tensor, y: Tensor) -> list[Tensor]:
    """Inner products of two vectors, piece by piece where that is more exact."""
    if len(x) <= PIECE or x.dtype != torch.float32 or x.device.type != "cpu":
        return [torch.dot(x, y)]
    return [torch.dot(a, b) for a, b in zip(x.split(PIECE), y.split(PIECE), strict=True)]


def _sum(pieces: list[Tensor]) -> Tensor:
    return torch.stack(pieces).sum(dtype=wide_dtype(pieces[0].device))
