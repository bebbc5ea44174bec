"""What each sample's gradient and Hessian do along given directions, without a matrix."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from curvdiag.data import Batch, can_cut, can_merge, merge, sample_count, take
from curvdiag.distributed import ALONE
from curvdiag.errors import ArgumentError, LossError, NonFiniteError, SecondDerivativeError
from curvdiag.objective import Objective
from curvdiag.operators.gradient_graph import GradientGraph
from curvdiag.operators.graphs import GraphEngine
from curvdiag.scaling.alike import along_same, free_here, of_all
from curvdiag.scaling.layer_derivatives import by_layers
from curvdiag.scaling.power_law import DirectionSamples
from curvdiag.scaling.sample_derivatives import (
    Direction,
    Pair,
    Place,
    forward_mode,
    one_by_one,
    reverse_mode,
    squares_by_vmap,
)
from curvdiag.spectrum.lanczos import Progress
from curvdiag.weights import Weights

# Samples on which the fast ways are compared with the definition, once for each call.
TRIAL = 6

# Samples taken at once where memory allows: enough to fill the matrix products, few enough for the caches.
PIECE = 1024


def direction_samples(
    objective: Objective,
    vectors: Tensor,
    *,
    squares: bool = False,
    weights: Weights | None = None,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> DirectionSamples:
    """``v_k . g_i``, ``v_k^T h_i v_k`` and with ``squares`` ``||h_i v_k||^2``, for each sample i and direction k.

    On several ranks each looks at its own samples, and all of them get the numbers of all.

    ``g_i`` and ``h_i`` carry the weight ``N / Z`` that makes their plain means the objective's gradient and Hessian.
    All three come from what layers see, at the price of a few forward passes a direction for all samples together.
    Where a parameter is used in a way that is not known, slopes and curvatures come from nested forward mode, and
    squares from the Hessian product of each sample; where an operation has no forward mode, or a wrong one, from
    reverse mode, and where that fails from one graph a sample. What is used was compared with the definition on a few
    samples first.

    Args:
        objective: Its losses must be known for each sample.
        vectors: Directions as columns ``[P, n]``.
        squares: Whether to take the Hessian products of single samples.
        weights: A picture of the weights (its type is then what counts); by default one is taken now.
        dtype: Compute in another type than the model's.
        progress: Called with (samples times directions done, planned), of the samples held here.

    Raises:
        LossError: The loss gives only a mean, or BatchNorm in train mode couples the samples.
        ArgumentError: The vectors do not have ``P`` rows.
        SecondDerivativeError: A second derivative is missing or wrong.
        NonFiniteError: A derivative is NaN or infinite.
        DistributedError: Another rank failed, or has other directions.
    """
    if not objective.per_sample:
        raise LossError(f"derivatives along directions need the loss of each sample: {objective.why()}")
    if vectors.ndim != 2 or vectors.shape[0] != objective.parameters.size or not vectors.shape[1]:
        raise ArgumentError(
            f"directions are the columns of a tensor with {objective.parameters.size:,} rows, not of one of shape "
            f"{tuple(vectors.shape)}"
        )
    place = Place(objective, weights or objective.weights(dtype=dtype), dtype)
    with along_same(objective.ranks, vectors):
        own = _of_these_samples(place, vectors, squares, progress)
    return of_all(objective.ranks, own, objective.device)


def _of_these_samples(place: Place, vectors: Tensor, squares: bool, progress: Progress | None) -> DirectionSamples:
    """For the samples that this process holds."""
    objective, ways, directions = place.objective, _Ways.tried(place, squares=squares), place.directions(vectors)
    parts: list[list[Tensor]] = []
    done, planned = 0, objective.local_size * len(directions)
    for piece in _pieces(objective, ways.at_once):
        for group in _groups(directions):
            parts.append(ways(place, piece, group))
            done += sample_count(piece) * len(group)
            if progress is not None:
                progress(done, planned)
    return _joined(parts, len(directions), objective)


@dataclass(frozen=True)
class _Ways:
    """How slopes and curvatures are computed, and how squares are; None takes all three from one graph a sample.

    Attributes:
        whole: All that is wanted together; None where this fails.
        pair: Slopes and curvatures.
        square: Squares from the Hessian products of several samples at once.
        squares: Whether squares are wanted.
        at_once: Samples that a piece may hold.
    """

    whole: Callable[..., list[Tensor]] | None
    pair: Callable[[Place, Batch, Sequence[Direction]], Pair] | None
    square: Callable[[Place, Batch, Sequence[Direction]], Tensor] | None
    squares: bool
    at_once: int

    @classmethod
    def tried(cls, place: Place, *, squares: bool) -> _Ways:
        """The fastest ways that agree with the definition on a few samples and a random direction."""
        objective = place.objective
        batch = max(itertools.islice(_pieces(objective, TRIAL), 2), key=sample_count)
        few = take(batch, slice(0, TRIAL)) if can_cut(batch) else batch
        generator = torch.Generator().manual_seed(0)
        random = torch.randn(objective.parameters.size, 1, generator=generator, dtype=torch.float64)
        trial = place.directions(random)
        truth = one_by_one(place, few, trial)
        at_once = _check_against_engine(place, few, random, truth)
        wanted = truth if squares else truth[:2]
        # One sample does not tell where in a tensor the samples lie.
        if sample_count(few) > 1 and all(
            _agree(functools.partial(by_layers, squares=squares), place, few, trial, wanted)
        ):
            return cls(by_layers, None, None, squares, at_once)
        pair = None
        for way in (forward_mode, reverse_mode):
            if all(_agree(way, place, few, trial, truth[:2])):
                pair = way
                break

        def square(place: Place, batch: Batch, directions: Sequence[Direction]) -> Tensor:
            return squares_by_vmap(place, batch, directions, _chunk(place))

        fast = squares and can_cut(batch)
        fast = fast and all(_agree(lambda *args: (square(*args),), place, few, trial, truth[2:]))
        return cls(None, pair, square if fast else None, squares, at_once)

    def __call__(self, place: Place, piece: Batch, directions: Sequence[Direction]) -> list[Tensor]:
        if self.whole is not None:
            return self.whole(place, piece, directions, squares=self.squares)
        if self.pair is None or (self.squares and self.square is None):
            found = one_by_one(place, piece, directions)
            return list(found if self.squares else found[:2])
        pair = self.pair(place, piece, directions)
        return [*pair, self.square(place, piece, directions)] if self.square is not None else list(pair)


def _agree(
    way: Callable[..., Sequence[Tensor]],
    place: Place,
    batch: Batch,
    directions: Sequence[Direction],
    truth: Sequence[Tensor],
) -> list[bool]:
    """Whether each part of what ``way`` finds is the truth up to rounding; it may also fail altogether."""
    try:
        found = way(place, batch, directions)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception:  # an operation without forward mode, without a batching rule, with hooks: there are many
        return [False]
    eps = torch.finfo(truth[0].dtype).eps
    scale = float(truth[0].norm())
    return [
        float((f - t).norm()) <= eps**0.5 * float(t.norm()) + 1e3 * eps * scale
        for f, t in zip(found, truth, strict=True)
    ]


def _check_against_engine(place: Place, few: Batch, random: Tensor, truth: Sequence[Tensor]) -> int:
    """The same few samples through the operators' own graphs, which find missing second derivatives.

    Returns:
        How many samples a piece may hold: what a quarter of the free memory takes, by the size of these graphs.

    Raises:
        SecondDerivativeError: One is missing, or the samples' curvatures do not add up to a Hessian product.
    """
    objective = copy.copy(place.objective)
    objective.batches, objective.ranks = [few], ALONE  # each rank tries its own samples
    objective.__dict__.pop("_graph_bytes", None)  # what so few samples tell is kept from the others
    engine: GraphEngine[GradientGraph] = GraphEngine(objective, place.weights, place.dtype, None, None)
    everything = range(len(objective.parameters))
    rows = random.T.to(objective.device, place.dtype or objective.dtype).contiguous()
    slopes = engine.sample_dots(rows, everything)[0] * objective.total_weight
    curvature = float((engine.multiply(rows, everything)[0] * rows[0]).sum()) * objective.total_weight
    eps = torch.finfo(rows.dtype).eps
    # Sums of curvatures of both signs cancel: what they are compared with is the sum of their sizes.
    scale = float(truth[1].abs().sum()) + eps * float(truth[0].abs().sum())
    off = max(
        float((slopes - truth[0][0]).norm()) / max(float(slopes.norm()), 1e-300),
        abs(float(truth[1].sum()) - curvature) / max(scale, 1e-300),
    )
    if off > eps**0.4:
        raise SecondDerivativeError(
            f"the derivatives of single samples along a random direction do not add up to those of their mean (they "
            f"are off by {off:.2g}): an operation of the model or the loss has a wrong second derivative"
        )
    held = engine.plan.bytes_kept / max(1, sum(engine.plan.kept))
    return max(1, min(PIECE, int(free_here(place.objective) / 4 / held))) if held else PIECE


def _pieces(objective: Objective, at_once: int) -> Iterator[Batch]:
    """The batches in their order, merged with their neighbours and cut, towards ``at_once`` samples."""
    if not objective.can_regroup:
        yield from objective.batches
        return
    waiting: list[Batch] = []
    for batch in objective.micro_batches(at_once):
        full = sum(map(sample_count, waiting)) + sample_count(batch) > at_once
        if waiting and (full or not can_merge(waiting[-1], batch)):
            yield merge(waiting)
            waiting = []
        waiting.append(batch)
    yield merge(waiting)


def _groups(directions: Sequence[Direction], size: int = 64) -> Iterator[Sequence[Direction]]:
    for start in range(0, len(directions), size):
        yield directions[start : start + size]


def _chunk(place: Place) -> int:
    """Samples whose Hessian products are taken at once: a few copies of their parameters must fit."""
    each = 8 * sum(t.nbytes for t in place.weights.chosen)
    return max(1, min(PIECE, free_here(place.objective) // 4 // max(each, 1)))


def _joined(parts: Sequence[Sequence[Tensor]], count: int, objective: Objective) -> DirectionSamples:
    """One ``[N, n]`` tensor for each quantity, from rows ``[few, B]`` piece by piece and group by group."""
    groups = -(-count // 64)
    scale = objective.size / objective.total_weight
    joined = []
    for which, factor in zip(range(len(parts[0])), (scale, scale, scale**2), strict=False):
        cells = [part[which].double().cpu() for part in parts]
        rows = [torch.cat(cells[start : start + groups]) for start in range(0, len(cells), groups)]
        joined.append(torch.cat(rows, dim=1).T.contiguous() * factor)
    if not all(bool(torch.isfinite(part).all()) for part in joined):
        raise NonFiniteError("a derivative along a direction is not finite: the loss overflows nearby")
    return DirectionSamples(joined[0], joined[1], joined[2] if len(joined) == 3 else None)
