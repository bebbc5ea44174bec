"""How the data are laid out in graphs: what is merged, what is kept, what is rebuilt at each product."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import floor

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from curvdiag.data import Batch, can_cut, merge, sample_count, signature, take, tensors_of
from curvdiag.memory import human_bytes

CALIBRATION = (8, 32)
"""Samples in the two small graphs from which the memory of a large one is foretold."""


@dataclass(frozen=True)
class Plan:
    """How the data are laid out in graphs.

    Attributes:
        kept: Samples in each kept graph.
        rebuilt: Samples in each group whose graph is built anew at each product.
        bytes_kept: Estimated memory of the kept graphs.
        budget: Bytes that kept graphs may take.
    """

    kept: tuple[int, ...]
    rebuilt: tuple[int, ...]
    bytes_kept: int
    budget: int

    def __str__(self) -> str:
        return (
            f"{len(self.kept)} graphs kept ({sum(self.kept):,} samples, about {human_bytes(self.bytes_kept)} of "
            f"{human_bytes(self.budget)}), {len(self.rebuilt)} rebuilt at each product ({sum(self.rebuilt):,} samples)"
        )


@dataclass(frozen=True)
class GraphBytes:
    """Memory that a kept graph holds: so much for itself, and so much for each sample."""

    fixed: float
    per_sample: float

    def __call__(self, samples: float) -> float:
        return self.fixed + self.per_sample * samples

    def samples(self, room: float) -> int:
        """The most samples whose graph takes at most ``room`` bytes."""
        return max(0, floor((room - self.fixed) / self.per_sample)) if self.per_sample > 0 else 1 << 60


def lay_out(
    pieces: Sequence[Batch], size: GraphBytes, budget: int, *, regroup: bool
) -> tuple[Plan, list[Batch], list[Batch]]:
    """The plan, the batches whose graphs are kept within ``budget`` bytes, and those that are rebuilt.

    With ``regroup`` all pieces that differ in nothing but their samples are merged, since fewer graphs make
    cheaper products, and cut again to what fits. Where not all fit, room is left for the largest graph that is
    rebuilt.
    """
    if budget <= 0:
        kept: list[Batch] = []
        rebuilt = list(pieces)
    elif not regroup:
        kept, rebuilt = _fill(list(pieces), size, budget)
    else:
        kept, rebuilt = _fit([merge(alike) for alike in _alike(pieces)], max(map(sample_count, pieces)), size, budget)
    counts = [sample_count(batch) for batch in kept]
    plan = Plan(tuple(counts), tuple(map(sample_count, rebuilt)), int(sum(map(size, counts))), budget)
    return plan, kept, rebuilt


def _fill(pieces: list[Batch], size: GraphBytes, budget: float) -> tuple[list[Batch], list[Batch]]:
    """As many whole pieces as fit."""
    needs = [size(sample_count(piece)) for piece in pieces]
    room = budget if sum(needs) <= budget else budget - max(needs)
    kept: list[Batch] = []
    rebuilt: list[Batch] = []
    for piece, need in zip(pieces, needs, strict=True):
        (kept if need <= room else rebuilt).append(piece)
        room -= need if need <= room else 0
    return kept, rebuilt


def _fit(batches: list[Batch], at_once: int, size: GraphBytes, budget: float) -> tuple[list[Batch], list[Batch]]:
    """As many samples as fit, and the rest in pieces of at most ``at_once`` samples that fit as well, one by one."""
    if sum(size(sample_count(batch)) for batch in batches) <= budget:
        return batches, []
    # A quarter of the budget, or the user's own batch where that is less, is what one rebuilt graph may take.
    rebuilt_samples = max(1, min(at_once, size.samples(budget / 4)))
    room = budget - size(rebuilt_samples)
    kept: list[Batch] = []
    rebuilt: list[Batch] = []
    for batch in batches:
        count = sample_count(batch)
        fitting = min(count, size.samples(room))
        if fitting > 0:
            kept.append(take(batch, slice(0, fitting)))
            room -= size(fitting)
        rebuilt += [
            take(batch, slice(start, min(start + rebuilt_samples, count)))
            for start in range(fitting, count, rebuilt_samples)
        ]
    return kept, rebuilt


def _alike(pieces: Sequence[Batch]) -> list[list[Batch]]:
    """Pieces that can be merged, together, in order of first appearance."""
    groups: dict[str, list[Batch]] = {}
    for index, piece in enumerate(pieces):
        groups.setdefault(signature(piece) if can_cut(piece) else f"piece {index}", []).append(piece)
    return list(groups.values())


def foretell(
    pieces: Sequence[Batch], build: Callable[[Batch], object], own: Sequence[Tensor], *, cut: bool
) -> GraphBytes:
    """Memory of graphs, from small ones built for the purpose and dropped.

    Where pieces differ in more than their number of samples (texts of several lengths) the largest sample is
    taken for all, which is an upper bound.

    Args:
        build: Builds the graph of a batch.
        own: Tensors that are there anyway, such as the weights.
        cut: Whether pieces may be cut by sample; if not, whole pieces are built.
    """
    largest = max(pieces, key=lambda piece: sum(t.numel() for t in tensors_of(piece)) / sample_count(piece))
    count = sample_count(largest)
    few, many = (min(n, count) for n in CALIBRATION) if cut else (0, count)
    much = _saved_bytes(take(largest, slice(0, many)) if cut else largest, build, own)
    if few == many or not cut:
        return GraphBytes(0.0, much / many)
    little = _saved_bytes(take(largest, slice(0, few)), build, own)
    slope = max(0.0, (much - little) / (many - few))
    return GraphBytes(max(0.0, much - slope * many), slope)


def _saved_bytes(batch: Batch, build: Callable[[Batch], object], own: Sequence[Tensor]) -> int:
    known = {t.untyped_storage().data_ptr() for t in own}
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.layout == torch.strided and tensor.untyped_storage().data_ptr() not in known:
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor.detach()  # a node that held its own output would keep the graph alive for ever

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        graph = build(batch)  # held until all is counted: freed storages would be counted twice
        del graph
    return sum(seen.values())
