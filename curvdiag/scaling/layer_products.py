"""Per-sample Hessian products by their factors, and the inner products that are wanted of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from curvdiag.samples.calls import NotCovered

Halves = tuple[Tensor, Tensor | None]


def dual(tensor: Tensor) -> Halves:
    """A tensor and its derivative along the direction, None for zero."""
    primal, tangent = forward_ad.unpack_dual(tensor)
    return primal.detach(), None if tangent is None else tangent.detach()


class Product:
    """``h_i v`` of one parameter, for every sample: rows ``[B, ...]`` and outer products ``left^T right``.

    ``left`` is ``[B, R, out]``; ``right`` is ``[B, R, in]``, or for a table the rows of it that are meant, ``[B, R]``.
    """

    def __init__(self, direction: Tensor | None) -> None:
        """``direction`` is the part of ``v`` that belongs to the parameter; None for zero."""
        self.direction = direction
        self.rows: Tensor | None = None
        self.pairs: list[tuple[Tensor, Tensor]] = []

    def add_rows(self, rows: Tensor) -> None:
        self.rows = rows if self.rows is None else self.rows + rows

    def dot(self) -> Tensor | Any:
        """``v^T h_i v`` ``[B]``."""
        found: Any = 0
        direction = self.direction
        if direction is None:
            return found
        if self.rows is not None:
            found = self.rows.flatten(1) @ direction.reshape(-1)
        for left, right in self.pairs:
            if right.dtype.is_floating_point:
                found = found + ((left @ direction.reshape(left.shape[2], -1)) * right).sum((1, 2))
            else:
                found = found + (left * direction[right]).sum((1, 2))
        return found

    def square(self) -> Tensor | Any:
        """``||h_i v||^2`` ``[B]``."""
        if self.rows is not None and self.pairs:
            raise NotCovered("a parameter that is a matrix here and spread there")
        if self.rows is not None:
            return self.rows.square().flatten(1).sum(1)
        matrices = _joined([pair for pair in self.pairs if pair[1].dtype.is_floating_point])
        tables = _joined([pair for pair in self.pairs if not pair[1].dtype.is_floating_point])
        found: Any = 0
        if matrices is not None:
            found = _square(*matrices)
        if tables is not None:
            left, entries = tables
            found = found + ((left @ left.mT) * (entries[:, :, None] == entries[:, None])).sum((1, 2))
        if matrices is not None and tables is not None:  # the table of tokens is also the last layer
            entries = entries[:, None].expand(-1, matrices[0].shape[1], -1)
            found = found + 2 * (matrices[0].gather(2, entries) * (matrices[1] @ left.mT)).sum((1, 2))
        return found


def _joined(pairs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor] | None:
    if len(pairs) <= 1:
        return pairs[0] if pairs else None
    left, right = (torch.cat(parts, 1) for parts in zip(*pairs, strict=True))
    return left, right


def _square(left: Tensor, right: Tensor) -> Tensor:
    """``||left^T right||_F^2`` ``[B]``, in the cheapest of three ways."""
    count, outputs, inputs = left.shape[1], left.shape[2], right.shape[2]
    if count == 2:
        (p, q), (a, b) = left.unbind(1), right.unbind(1)
        return _dots(p, p) * _dots(a, a) + _dots(q, q) * _dots(b, b) + 2 * _dots(p, q) * _dots(a, b)
    if count * (outputs + inputs) < outputs * inputs:
        return ((left @ left.mT) * (right @ right.mT)).sum((1, 2))
    return (left.mT @ right).square().sum((1, 2))


def _dots(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum(1)
