"""Sums over samples of what a per-sample gradient gives: itself, its squares, its squared norm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

CACHE = 1 << 18
"""Entries of per-sample gradients that are made at a time: what stays in the cache of one core."""


@dataclass
class Totals:
    """Of one parameter's per-sample gradients ``g_i`` over a group of samples.

    Attributes:
        first: ``sum_i g_i`` in the parameter's shape.
        second: ``sum_i g_i^2``, entry by entry.
        norms: ``||g_i||^2`` ``[B]``.
    """

    first: Tensor
    second: Tensor
    norms: Tensor

    def double(self) -> Totals:
        return Totals(self.first.double(), self.second.double(), self.norms.double())

    def __add__(self, other: Totals) -> Totals:
        """Of both groups, one after the other."""
        norms = torch.cat([self.norms, other.norms])
        return Totals(self.first + other.first, self.second + other.second, norms)


def of_rows(rows: Tensor) -> Totals:
    """From all per-sample gradients ``[B, ...]`` at once."""
    squares = rows.square()
    return Totals(rows.sum(0), squares.sum(0), squares.reshape(len(rows), -1).sum(1))


def in_pieces(rows: Callable[[slice], Tensor], samples: int, shape: torch.Size) -> Totals:
    """From per-sample gradients that are made a few samples at a time, and never kept.

    Args:
        rows: ``rows(some samples)`` gives theirs, ``[b, ...]``; it may write over the last ones.
        samples: How many there are in all.
        shape: Of the parameter.
    """
    piece = max(1, CACHE // max(1, shape.numel()))
    if piece >= samples:
        return of_rows(rows(slice(0, samples)).reshape(samples, *shape))
    first: Tensor | None = None
    for start in range(0, samples, piece):
        some = rows(slice(start, min(start + piece, samples)))
        some = some.reshape(len(some), -1)
        if first is None:
            first, second = some.new_zeros(shape.numel()), some.new_zeros(shape.numel())
            norms = some.new_empty(samples)
        if len(some) == 1:
            row = some[0]
            first.add_(row)
            second.addcmul_(row, row)
            # The error of a dot product in single precision grows with its length.
            norms[start] = torch.stack([part.dot(part) for part in row.split(CACHE)]).sum()
        else:
            first.add_(some.sum(0))
            squares = some.square()
            second.add_(squares.sum(0))
            norms[start : start + len(some)] = squares.sum(1)
    assert first is not None
    return Totals(first.view(shape), second.view(shape), norms)
