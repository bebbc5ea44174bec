"""How the data are laid out in graphs: what is merged, what is kept, what is rebuilt at each product."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import floor

from curvdiag.data import Batch, can_cut, merge, sample_count, signature, take, tensors_of
from curvdiag.memory import human_bytes
from curvdiag.operators.live_bytes import LiveBytes

CALIBRATION = (8, 32)
"""Samples in the two small graphs from which the memory of a large one is foretold."""
SHARE = 8
"""A rebuilt graph may take one part in so many of the memory for kept graphs, or of all that is free without these."""


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
            f"{len(self.kept)} graph{'s' * (len(self.kept) != 1)} kept ({sum(self.kept):,} samples, about "
            f"{human_bytes(self.bytes_kept)} of {human_bytes(self.budget)}), "
            f"{len(self.rebuilt)} rebuilt at each product ({sum(self.rebuilt):,} samples)"
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
    pieces: Sequence[Batch], size: GraphBytes, budget: int, free: int, *, regroup: bool
) -> tuple[Plan, list[Batch], list[list[Batch]]]:
    """The plan, the batches whose graphs are kept within ``budget`` bytes, and those that are rebuilt in groups.

    With ``regroup`` all pieces that differ in nothing but their samples are merged, since fewer graphs make
    cheaper products, and cut again to what fits. Where not all fit, room is left for the largest graph that is
    rebuilt. Groups to be rebuilt are merged when their turn comes, so that no copy of the data stays.
    """
    kept: list[Batch] = []
    rebuilt = [[piece] for piece in pieces]
    if budget > 0 and not regroup:
        kept, rebuilt = _fill(list(pieces), size, budget)
    elif budget > 0:
        kept, rebuilt = _fit(
            [merge(alike) for alike in alike_pieces(pieces)], max(map(sample_count, pieces)), size, budget
        )
    elif regroup:
        rebuilt = _gather(pieces, size.samples(free / SHARE))
    counts, again = [sample_count(batch) for batch in kept], [sum(map(sample_count, group)) for group in rebuilt]
    return Plan(tuple(counts), tuple(again), int(sum(map(size, counts))), budget), kept, rebuilt


def _fill(pieces: list[Batch], size: GraphBytes, budget: float) -> tuple[list[Batch], list[list[Batch]]]:
    """As many whole pieces as fit."""
    needs = [size(sample_count(piece)) for piece in pieces]
    room = budget if sum(needs) <= budget else budget - max(needs)
    kept: list[Batch] = []
    rebuilt: list[list[Batch]] = []
    for piece, need in zip(pieces, needs, strict=True):
        if need <= room:
            kept.append(piece)
            room -= need
        else:
            rebuilt.append([piece])
    return kept, rebuilt


def _fit(batches: list[Batch], at_once: int, size: GraphBytes, budget: float) -> tuple[list[Batch], list[list[Batch]]]:
    """As many samples as fit, and the rest in pieces that fit as well, one by one."""
    if sum(size(sample_count(batch)) for batch in batches) <= budget:
        return batches, []
    # A rebuilt graph may take its share of the budget; twice that to hold a whole batch of the user's.
    rebuilt_samples = max(1, min(at_once, size.samples(2 * budget / SHARE)), size.samples(budget / SHARE))
    room = budget - size(rebuilt_samples)
    kept: list[Batch] = []
    rebuilt: list[list[Batch]] = []
    for batch in batches:
        count = sample_count(batch)
        fitting = min(count, size.samples(room))
        if fitting > 0:
            kept.append(take(batch, slice(0, fitting)))
            room -= size(fitting)
        rebuilt += [
            [take(batch, slice(start, min(start + rebuilt_samples, count)))]
            for start in range(fitting, count, rebuilt_samples)
        ]
    return kept, rebuilt


def _gather(pieces: Sequence[Batch], at_most: int) -> list[list[Batch]]:
    """Whole pieces in groups of at most so many samples; one that has more stays by itself."""
    groups: list[list[Batch]] = []
    for alike in alike_pieces(pieces):
        room = 0
        for piece in alike:
            room -= sample_count(piece)
            if room < 0:
                groups.append([])
                room = at_most - sample_count(piece)
            groups[-1].append(piece)
    return groups


def alike_pieces(pieces: Sequence[Batch]) -> list[list[Batch]]:
    """Pieces that can be merged, together, in order of first appearance."""
    groups: dict[str, list[Batch]] = {}
    for index, piece in enumerate(pieces):
        groups.setdefault(signature(piece) if can_cut(piece) else f"piece {index}", []).append(piece)
    return list(groups.values())


def upper_bound(few: int, little: float) -> GraphBytes:
    """The most that graphs can take where one of ``few`` samples takes ``little``: none of it belongs to a sample."""
    return GraphBytes(little, little / few)


def all_fit(pieces: Sequence[Batch], size: GraphBytes, room: int) -> bool:
    """Whether the graphs of all pieces, merged or not, take at most ``room`` bytes."""
    return sum(size(sample_count(piece)) for piece in pieces) <= room


def foretell(
    pieces: Sequence[Batch], build: Callable[[Batch], object], *, cut: bool, little: float | None = None
) -> GraphBytes:
    """Memory of graphs, from small ones built for the purpose and dropped.

    Where pieces differ in more than their number of samples (texts of several lengths) the largest sample is
    taken for all, which is an upper bound.

    Args:
        build: Builds the graph of a batch.
        cut: Whether pieces may be cut by sample; if not, whole pieces are built.
        little: What the smaller one takes, where that is known.
    """
    piece = largest(pieces)
    few, many = calibration(sample_count(piece), cut=cut)
    much = live_bytes(lambda: build(first_samples(piece, many)))
    if few == many:
        return GraphBytes(0.0, much / many)
    little = live_bytes(lambda: build(first_samples(piece, few))) if little is None else little
    return through(few, little, many, much)


def with_merged(size: GraphBytes, pieces: Sequence[Batch]) -> GraphBytes:
    """The same with the samples themselves, which are copied where pieces are merged."""
    if all(len(alike) == 1 for alike in alike_pieces(pieces)):
        return size
    piece = largest(pieces)
    return GraphBytes(size.fixed, size.per_sample + sum(t.nbytes for t in tensors_of(piece)) / sample_count(piece))


def largest(pieces: Sequence[Batch]) -> Batch:
    """The piece with the largest samples."""
    return max(pieces, key=lambda piece: sum(t.numel() for t in tensors_of(piece)) / sample_count(piece))


def first_samples(piece: Batch, count: int) -> Batch:
    """The first ``count`` samples of a piece; the piece itself if it has no more."""
    return piece if count == sample_count(piece) else take(piece, slice(0, count))


def calibration(count: int, *, cut: bool) -> tuple[int, int]:
    """Samples in the smaller and the larger graph from which that of ``count`` samples is foretold."""
    if not cut:
        return count, count
    many = min(CALIBRATION[1], count)
    # A single sample may lose its dimension on the way; where halves of a batch were one, it is known not to.
    return (max(2, min(CALIBRATION[0], many // 4)) if many > 3 else 1), many


def through(few: int, little: float, many: int, much: float) -> GraphBytes:
    """The straight line through the memory of two graphs."""
    slope = max(0.0, (much - little) / (many - few))
    return GraphBytes(max(0.0, much - slope * many), slope)


def live_bytes(make: Callable[[], object]) -> int:
    """Memory that what ``make`` returns keeps alive in tensors."""
    with LiveBytes(recording=False) as counter:
        made = make()
        found = counter.now()
        del made
    return found
