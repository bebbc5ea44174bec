"""How the shards of a model's parameters lie in the vectors of a rank."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate
from math import prod

import torch
from torch import Tensor

from curvdiag.distributed.boxes import Box, box, counted_here
from curvdiag.distributed.ranks import Ranks
from curvdiag.space import Piece, ShardedSpace


class Shards:
    """The layout of a vector of this rank's numbers of some parameters; made by all ranks together.

    Attributes:
        space: Where such vectors live.
        shapes: Of what is held here of each parameter; of one that is held elsewhere, without numbers.
        slices: Where that lies in a vector.
        counted: Whether it counts here in inner products.
    """

    def __init__(self, names: Sequence[str], parameters: Sequence[Tensor], ranks: Ranks) -> None:
        self._wholes = [p.shape for p in parameters]
        self._boxes: list[Box] = []
        with ranks.together("layout of shards"):
            self._boxes = [box(name, p) for name, p in zip(names, parameters, strict=True)]
        self._ranks, self.counted = ranks, counted_here(self._boxes, ranks)
        self._lay_out()

    def subset(self, positions: Sequence[int]) -> Shards:
        """The layout of a vector over the parameters at ``positions`` alone; made by all ranks together."""
        some = object.__new__(Shards)
        some._ranks = self._ranks
        some._wholes = [self._wholes[i] for i in positions]
        some._boxes = [self._boxes[i] for i in positions]
        some.counted = [self.counted[i] for i in positions]
        some._lay_out()
        return some

    def _lay_out(self) -> None:
        ends = list(accumulate(shape.numel() for shape in self._wholes))
        offsets = [end - shape.numel() for end, shape in zip(ends, self._wholes, strict=True)]
        self.shapes = [torch.Size(extent) for _, extent in self._boxes]
        pieces = [
            Piece(offset, whole, start, torch.Size(extent), counted)
            for offset, whole, (start, extent), counted in zip(
                offsets, self._wholes, self._boxes, self.counted, strict=True
            )
            if prod(extent)
        ]
        self.space = ShardedSpace(pieces, ends[-1] if ends else 0, self._ranks)
        begins = dict(
            zip(
                (piece.offset for piece in self.space.pieces),
                accumulate((piece.size for piece in self.space.pieces), initial=0),
                strict=False,
            )
        )
        self.slices = [
            slice(begins[offset], begins[offset] + shape.numel()) if shape.numel() else slice(0, 0)
            for offset, shape in zip(offsets, self.shapes, strict=True)
        ]

    def parts(self, vector: Tensor) -> list[Tensor]:
        """The shards of a vector ``[local]``, parameter by parameter, as views."""
        return [vector[place].view(shape) for place, shape in zip(self.slices, self.shapes, strict=True)]

    def flatten(self, tensors: Iterable[Tensor], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A vector ``[local]`` of the shards of all parameters."""
        vector = torch.empty(self.space.local, dtype=dtype, device=device)
        for part, tensor in zip(self.parts(vector), tensors, strict=True):
            part.copy_(tensor)
        return vector

    def squares(self, parts: Sequence[Tensor]) -> Tensor:
        """Square norms ``[n]`` of whole parameters, or parts of vectors, from the shards of all ranks; on the CPU."""
        device = parts[0].device
        own = torch.zeros(len(parts), dtype=torch.float64, device=device)
        for i, part in enumerate(parts):
            if self.counted[i]:
                own[i] = part.detach().double().square().sum()
        return self.space.complete(own).cpu()
