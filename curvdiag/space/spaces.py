"""Where the vectors of an operator live: whole on every rank, or each rank with pieces of its own.

Everything that an algorithm asks of a vector besides arithmetic entry by entry goes through here: inner products,
random numbers, how long it is, and how many fit.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence

import torch
from torch import Tensor

from curvdiag import memory
from curvdiag.distributed import ALONE, Ranks
from curvdiag.errors import ArgumentError, DistributedError
from curvdiag.seeds import Seed
from curvdiag.space.inner_products import cross_products, row_dots
from curvdiag.space.pieces import Piece
from curvdiag.space.probes import gaussian, gaussian_pieces, rademacher, rademacher_pieces


class Space(abc.ABC):
    """The space ``R^P`` of an operator's vectors, of which each rank holds ``local`` numbers.

    Attributes:
        size: Order ``P`` of the matrix.
        local: Numbers of each vector held here.
        owned: The first so many of them count in inner products; the rest are copies of what another rank counts.
        longest: The most that any rank holds: what memory is planned for, alike on all of them.
        ranks: The processes that hold a vector together.
    """

    size: int
    local: int
    owned: int
    longest: int
    ranks: Ranks

    @property
    def whole(self) -> bool:
        """Whether every rank holds whole vectors."""
        return self.local == self.size

    def dots(self, x: Tensor, y: Tensor) -> Tensor:
        """Inner products ``[k]`` of corresponding rows ``[k, local]``, in float64, the same on all ranks."""
        return self.complete(row_dots(self.counted(x), self.counted(y)))

    def cross(self, x: Tensor, y: Tensor) -> Tensor:
        """Inner products ``[p, k]`` of all rows ``[p, local]`` with all rows ``[k, local]``, in float64."""
        return self.complete(cross_products(self.counted(x), self.counted(y)))

    def components(self, basis: Tensor, vectors: Tensor) -> Tensor:
        """Inner products with the rows of ``basis`` ``[n, local]``, in their type: ``[n]`` of one vector ``[local]``.

        Of several as rows ``[p, local]``: ``[p, n]``.
        """
        if self.whole:
            return torch.mv(basis, vectors) if vectors.ndim == 1 else vectors @ basis.T
        rows = vectors if vectors.ndim == 2 else vectors[None]
        found = self.cross(rows, basis).to(vectors.dtype)
        return found if vectors.ndim == 2 else found[0]

    def counted(self, vectors: Tensor) -> Tensor:
        """Those of the numbers ``[..., local]`` that inner products count here, as a view."""
        return vectors if self.owned == self.local else vectors[..., : self.owned]

    @abc.abstractmethod
    def complete(self, partial: Tensor) -> Tensor:
        """A few sums over the numbers counted here, replaced by those over all numbers."""

    @abc.abstractmethod
    def rademacher(
        self, count: int, *, seed: Seed, dtype: torch.dtype, device: torch.device | str, first: int = 0
    ) -> Tensor:
        """``[count, local]`` of :func:`curvdiag.space.probes.rademacher`: the same numbers however they are held."""

    @abc.abstractmethod
    def gaussian(
        self, count: int, *, seed: Seed, dtype: torch.dtype, device: torch.device | str, first: int = 0
    ) -> Tensor:
        """``[count, local]`` of :func:`curvdiag.space.probes.gaussian`: the same numbers however they are held."""

    @abc.abstractmethod
    def gathered(self, rows: Tensor) -> Tensor:
        """Whole vectors ``[k, P]``, on every rank: for small models."""

    @abc.abstractmethod
    def part(self, whole: Tensor) -> Tensor:
        """What is held here ``[k, local]`` of whole vectors ``[k, P]``."""

    def fitting(self, free: int, each: int, device: torch.device) -> int:
        """How many things of ``each`` bytes fit into the ``free`` bytes of a device, on every rank: all decide alike.

        Ranks on one machine share the memory of its CPU.
        """
        if self.ranks.alone:
            return free // max(each, 1)
        if device.type == "cpu":
            free //= self.ranks.neighbours
        return int(self.ranks.least(free // max(each, 1), "what fits into memory"))

    def free_bytes(self, device: torch.device | str) -> int:
        """What every rank can still allocate."""
        return self.fitting(memory.free_bytes(device), 1, torch.device(device))


class WholeSpace(Space):
    """Every rank holds whole vectors, with the same numbers."""

    def __init__(self, size: int, ranks: Ranks = ALONE) -> None:
        self.size = self.local = self.owned = self.longest = size
        self.ranks = ranks

    def complete(self, partial: Tensor) -> Tensor:
        return partial

    def rademacher(
        self, count: int, *, seed: Seed, dtype: torch.dtype, device: torch.device | str, first: int = 0
    ) -> Tensor:
        return rademacher(count, self.size, seed=seed, dtype=dtype, device=device, first=first)

    def gaussian(
        self, count: int, *, seed: Seed, dtype: torch.dtype, device: torch.device | str, first: int = 0
    ) -> Tensor:
        return gaussian(count, self.size, seed=seed, dtype=dtype, device=device, first=first)

    def gathered(self, rows: Tensor) -> Tensor:
        return rows

    def part(self, whole: Tensor) -> Tensor:
        return whole


class ShardedSpace(Space):
    """Each rank holds pieces of the vectors: first those that it counts, by their offsets, then its copies.

    Args:
        pieces: Those of this rank. Every number of the whole vector is counted by one rank.
        size: Order ``P`` of the matrix.
        ranks: Those that hold a vector together.

    Attributes:
        pieces: In the order in which a vector holds them.

    Raises:
        ArgumentError: A piece lies outside the vector.
        DistributedError: The ranks do not count every number once.
    """

    def __init__(self, pieces: Sequence[Piece], size: int, ranks: Ranks) -> None:
        self.pieces = tuple(sorted(pieces, key=lambda one: (not one.counted, one.offset, one.start)))
        self.size, self.ranks = size, ranks
        self.local = sum(piece.size for piece in self.pieces)
        self.owned = sum(piece.size for piece in self.pieces if piece.counted)
        for piece in self.pieces:
            if piece.offset < 0 or piece.offset + piece.shape.numel() > size:
                raise ArgumentError(
                    f"a parameter of {piece.shape.numel():,} numbers from {piece.offset:,} on lies outside a vector "
                    f"of {size:,}"
                )
        held = ranks.gather((self.owned, self.local), "counting of shards")
        counts, self.longest = [owned for owned, _ in held], max(local for _, local in held)
        if not ranks.alone and sum(counts) != size:
            raise DistributedError(
                f"the ranks hold {counts} numbers of vectors of {size:,}, {sum(counts):,} in all: the shards overlap "
                "without being marked as copies, or some are missing"
            )

    @property
    def whole(self) -> bool:
        return False

    def complete(self, partial: Tensor) -> Tensor:
        return self.ranks.complete_(partial)

    def rademacher(
        self, count: int, *, seed: Seed, dtype: torch.dtype, device: torch.device | str, first: int = 0
    ) -> Tensor:
        return rademacher_pieces(count, self.pieces, seed=seed, dtype=dtype, device=device, first=first)

    def gaussian(
        self, count: int, *, seed: Seed, dtype: torch.dtype, device: torch.device | str, first: int = 0
    ) -> Tensor:
        return gaussian_pieces(count, self.pieces, seed=seed, dtype=dtype, device=device, first=first)

    def gathered(self, rows: Tensor) -> Tensor:
        whole = torch.zeros(len(rows), self.size, dtype=rows.dtype, device=rows.device)
        for i, row in enumerate(rows):
            for piece, own in zip(self.pieces, self.parts(row), strict=True):
                if piece.counted:
                    piece.of(whole[i]).copy_(own)
        return self.ranks.sum_(whole, "gathering of vectors")

    def part(self, whole: Tensor) -> Tensor:
        rows = whole.new_empty(len(whole), self.local)
        for i, row in enumerate(rows):
            for piece, own in zip(self.pieces, self.parts(row), strict=True):
                own.copy_(piece.of(whole[i]))
        return rows

    def parts(self, vector: Tensor) -> list[Tensor]:
        """The pieces of a vector ``[local]``, each of its own shape, as views."""
        split = vector.split([piece.size for piece in self.pieces])
        return [own.view(piece.extent) for piece, own in zip(self.pieces, split, strict=True)]
