"""Boxes of parameters: where in the whole vector the numbers stand that a rank holds."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from curvdiag.errors import ArgumentError


@dataclass(frozen=True)
class Piece:
    """A box of one parameter, held by this rank.

    Attributes:
        offset: Where the parameter begins in the whole vector ``[P]``.
        shape: Of the whole parameter.
        start: Corner of the box.
        extent: Shape of the box.
        counted: Whether inner products count it here, or on another rank, which has a copy.
    """

    offset: int
    shape: torch.Size
    start: tuple[int, ...]
    extent: torch.Size
    counted: bool = True

    def __post_init__(self) -> None:
        sides = zip(self.start, self.extent, self.shape, strict=True)
        if any(low < 0 or n < 0 or low + n > whole for low, n, whole in sides):
            raise ArgumentError(
                f"the box {tuple(self.start)} + {tuple(self.extent)} does not lie in a parameter of shape "
                f"{tuple(self.shape)}"
            )

    @property
    def size(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.extent)

    def of(self, whole: Tensor) -> Tensor:
        """Its numbers, of shape ``extent``, as a view of a whole vector ``[P]``."""
        parameter = whole[self.offset : self.offset + math.prod(self.shape)].view(self.shape)
        return parameter[tuple(slice(low, low + n) for low, n in zip(self.start, self.extent, strict=True))]


@dataclass(frozen=True)
class Block:
    """A stretch of the whole vector, few enough numbers to draw at once, and what of it a piece holds.

    Attributes:
        begin: Where it begins in the whole vector. Stretches of pieces of one parameter are the same, or apart.
        shape: Rows and what each of them holds.
        rows: Which rows the piece has a part of.
        inside: Which part.
    """

    begin: int
    shape: tuple[int, ...]
    rows: slice
    inside: tuple[slice, ...]

    @property
    def row(self) -> int:
        """Numbers of a row."""
        return math.prod(self.shape[1:])

    @property
    def length(self) -> int:
        return math.prod(self.shape)

    @property
    def kept(self) -> int:
        """How many of its numbers the piece holds."""
        return (self.rows.stop - self.rows.start) * math.prod(part.stop - part.start for part in self.inside)


def blocks(piece: Piece, most: int) -> Iterator[Block]:
    """The stretches that hold a piece, of at most ``most`` numbers each, in the order of its numbers."""
    if not piece.size:
        return
    shape, start, extent = tuple(piece.shape) or (1,), tuple(piece.start) or (0,), tuple(piece.extent) or (1,)
    # Rows along the first dimension below which everything fits.
    depth = next(d for d in range(len(shape)) if math.prod(shape[d + 1 :]) <= most)
    row, length = math.prod(shape[depth + 1 :]), shape[depth]
    several = max(1, most // row)
    inside = tuple(slice(low, low + n) for low, n in zip(start[depth + 1 :], extent[depth + 1 :], strict=True))
    low, high = start[depth], start[depth] + extent[depth]
    outer = [range(first, first + n) for first, n in zip(start[:depth], extent[:depth], strict=True)]
    for above in itertools.product(*outer):
        base = 0
        for index, n in zip(above, shape, strict=False):
            base = base * n + index
        for first in range(low - low % several, high, several):
            rows = slice(max(low, first) - first, min(high, first + several) - first)
            count = min(several, length - first)
            yield Block(piece.offset + (base * length + first) * row, (count, *shape[depth + 1 :]), rows, inside)
