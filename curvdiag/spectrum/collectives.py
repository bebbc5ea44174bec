"""What collectives on a ring send, and what FSDP2 sends for a gradient: numbers of bytes, from shapes alone.

Every rank sends as much as it receives; the figures are what one rank sends (Patarasuk and Yuan 2009 for all-reduce).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod

Shape = tuple[int, ...]


def all_reduced(size: float, ranks: int) -> float:
    """Bytes that a rank sends where all sum ``size`` bytes: a reduce-scatter, then an all-gather."""
    return 2 * (ranks - 1) / ranks * size


def gathered(size: float, ranks: int) -> float:
    """Bytes that a rank sends in an all-gather that makes ``size`` bytes, or a reduce-scatter of so many."""
    return (ranks - 1) / ranks * size


def ring_steps(ranks: int) -> int:
    """Steps of an all-gather or a reduce-scatter, one after the other; an all-reduce has twice as many."""
    return ranks - 1


def padded(shapes: Iterable[Shape], ranks: int) -> int:
    """Numbers of tensors that are cut along their first dimension into equal shards, the last ones filled up."""
    return sum(-(-shape[0] // ranks) * ranks * prod(shape[1:]) for shape in shapes if shape)


@dataclass(frozen=True)
class Units:
    """The groups of tensors that FSDP2 gathers together, as ``fully_shard`` made them or would.

    Attributes:
        root: Shapes in the outermost group: what is in no other. By default it stays whole from forward to backward.
        others: Shapes in each other group, gathered for forward and once more for backward.
    """

    root: tuple[Shape, ...]
    others: tuple[tuple[Shape, ...], ...]

    @property
    def size(self) -> int:
        """Numbers in all of them, as if on one rank."""
        return padded((shape for group in (self.root, *self.others) for shape in group), 1)

    def numbers(self, ranks: int) -> int:
        """Numbers in all of them, filled up."""
        return padded(self.root, ranks) + sum(padded(group, ranks) for group in self.others)

    def largest(self, ranks: int) -> int:
        """Numbers in the largest group but the root."""
        return max((padded(group, ranks) for group in self.others), default=0)

    def gathers(self, *, reshard: bool = True) -> int:
        """All-gathers of a gradient."""
        return bool(self.root) + (2 if reshard else 1) * len(self.others)

    def scatters(self) -> int:
        """Reduce-scatters of a gradient."""
        return bool(self.root) + len(self.others)

    def sent(self, ranks: int, itemsize: int, *, reshard: bool = True) -> float:
        """Bytes that a rank sends for a gradient.

        Args:
            reshard: Whether groups but the root are given back after forward (FSDP2's ``reshard_after_forward``).
        """
        root, others = padded(self.root, ranks), sum(padded(group, ranks) for group in self.others)
        passes = 2 * root + (3 if reshard else 2) * others
        return gathered(passes * itemsize, ranks)


def units_of(shapes: Sequence[tuple[str, Shape]], owners: Sequence[str]) -> Units:
    """The groups of named tensors where the modules ``owners`` are sharded, the innermost one counting."""
    found: dict[str, list[Shape]] = {owner: [] for owner in owners}
    root: list[Shape] = []
    for name, shape in shapes:
        inside = [owner for owner in owners if name.startswith(f"{owner}.")]
        (found[max(inside, key=len)] if inside else root).append(shape)
    return Units(tuple(root), tuple(tuple(group) for group in found.values() if group))
