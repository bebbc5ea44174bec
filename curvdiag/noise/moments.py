"""First and second moments of per-sample gradients, in one pass over the data."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from curvdiag.distributed import collectively
from curvdiag.errors import NonFiniteError
from curvdiag.modes import outside_modes
from curvdiag.objective import Objective
from curvdiag.results import Result
from curvdiag.samples.streaming import Room, all_totals, require_samples, result_dtype
from curvdiag.samples.totals import Totals
from curvdiag.spectrum.vectors import row_dots
from curvdiag.weights import Weights


@dataclass(frozen=True)
class BlockMoments(Result):
    """Of the parameters of one layer.

    Attributes:
        mean_norm: Norm of the mean gradient.
        trace: Trace of the covariance of per-sample gradients.
        norms: Norms ``[N]`` of the per-sample gradients.
    """

    mean_norm: float
    trace: float
    norms: Tensor


@dataclass(frozen=True)
class GradientMoments(Result):
    """Moments of the per-sample gradients ``g_i``, whose covariance is ``C = (1/N) sum_i g_i g_i^T - g g^T``.

    Attributes:
        mean: The gradient ``g`` ``[P]``.
        diagonal: The diagonal of C ``[P]``, of single samples.
        trace: ``tr C``.
        norms: ``||g_i||`` ``[N]``, in the order of the objective's samples.
        samples: N.
        blocks: The same by layer.
        ways: How each parameter was computed, by name: ``"rule"``, or the slower ``"vmap"`` or ``"backward"``.
    """

    mean: Tensor
    diagonal: Tensor
    trace: float
    norms: Tensor
    samples: int
    blocks: dict[str, BlockMoments]
    ways: dict[str, str]

    def __str__(self) -> str:
        mean, root = float(self.mean.double().norm()), max(self.trace, 0.0) ** 0.5
        lines = [f"gradients of {self.samples:,} samples: norm of the mean {mean:.4g}, root of tr C {root:.4g}"]
        lines += [
            f"{name}: mean {block.mean_norm:.4g}, root of trace {max(block.trace, 0.0) ** 0.5:.4g}"
            for name, block in self.blocks.items()
        ]
        return "\n".join(lines)


@outside_modes
@collectively
def gradient_moments(objective: Objective, *, dtype: torch.dtype | None = None) -> GradientMoments:
    """Mean, diagonal of the covariance, its trace, and norms of per-sample gradients at the present weights.

    One forward and one backward pass over the data. For linear layers and convolutions, embeddings and norms the sums
    over samples follow from activations and output gradients (Goodfellow, 2015, arXiv:1510.01799; Dangel et al., 2020,
    arXiv:1912.10985); no per-sample gradient is kept. The rules are checked against single backward passes on the
    objective's first use, and what they do not cover is computed in slower ways: see ``ways``.

    Variances are differences of mean squares and squared means. In single precision an entry of the diagonal whose
    mean is ``r`` of its standard deviations is off by about ``5e-6 (1 + r^2)`` of itself (4,096 samples; measured up
    to ``r = 1000``), and the trace by no more; where ``r`` is large take ``dtype=torch.float64``.

    On several ranks the sums over their samples take one reduction, of ``[2, P]``.

    Args:
        objective: Its losses must be known for each sample.
        dtype: To compute in.

    Raises:
        LossError: The loss gives only a mean, or BatchNorm in train mode couples the samples.
        NonFiniteError: The loss or a gradient is NaN or infinite.
    """
    require_samples(objective, "gradient moments")
    scale = objective.size / objective.total_weight
    weights, layout = objective.weights(dtype=dtype, share=dtype is None), objective.parameters
    mean, diagonal, whole = _vectors(objective, result_dtype(objective, dtype))
    room = list(zip(layout.views(mean), layout.views(diagonal), strict=True))
    sums, ways = _added_up(objective, weights, dtype, room)
    squares = torch.stack([t.norms.double() for t in sums]) * scale**2
    if whole is None:
        lengths = _finish(sums, room, objective)
    else:
        squares = objective.ranks.concatenate(squares, place="norms of gradients")
        lengths = _finish_together(sums, room, whole, objective)
    traces = squares.mean(1) - lengths
    length, trace = (dict(zip(layout.names, each.tolist(), strict=True)) for each in (lengths, traces))
    bad = [name for name in layout.names if not math.isfinite(trace[name])]
    if bad:
        raise NonFiniteError(f"the loss is finite and its gradient in {bad[0]!r} is not for some sample")
    blocks = {}
    for name, members in layout.layers().items():
        rows = [squares[layout.names.index(member)] for member in members]
        blocks[name] = BlockMoments(
            math.sqrt(sum(length[member] for member in members)),
            max(0.0, sum(trace[member] for member in members)),
            functools.reduce(torch.add, rows).sqrt().to(mean.dtype),
        )
    return GradientMoments(
        mean,
        diagonal,
        max(0.0, sum(trace.values())),
        squares.sum(0).sqrt().to(mean.dtype),
        objective.size,
        blocks,
        dict(zip(layout.names, ways, strict=True)),
    )


_ORDER = ("rule", "vmap", "backward")


def _vectors(objective: Objective, kind: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
    """Where mean and diagonal are written; on several ranks in one tensor ``[2, P]`` that is reduced."""
    size, device = objective.parameters.size, objective.device
    if objective.ranks.alone:
        return torch.empty(size, dtype=kind, device=device), torch.empty(size, dtype=kind, device=device), None
    whole = torch.empty(2, size, dtype=kind, device=device)
    return whole[0], whole[1], whole


def _added_up(
    objective: Objective, weights: Weights, dtype: torch.dtype | None, room: Room
) -> tuple[list[Totals], list[str]]:
    """The sums over the samples held here, by parameter, and how they were computed, the slowest way of all ranks.

    Sums within a group are in the working precision, sums over groups in double.
    """
    sums: list[Totals] = []
    ways = ["rule"] * len(room)
    for group, (_, found, plan) in enumerate(all_totals(objective, weights, dtype, room)):
        sums = (
            found
            if group == 0
            else [(one.double() if group == 1 else one) + new for one, new in zip(sums, found, strict=True)]
        )
        ways = [max(a, b, key=_ORDER.index) for a, b in zip(ways, plan.ways, strict=True)]
    everywhere = objective.ranks.gather(ways, "ways to the gradients of samples")
    return sums, [max(each, key=_ORDER.index) for each in zip(*everywhere, strict=True)]


def _finish(sums: list[Totals], room: Room, objective: Objective) -> Tensor:
    """Write means and variances, a parameter at a time; returns the squared norms of the means."""
    count, scale = objective.size, objective.size / objective.total_weight
    lengths = []
    for own, (mean, diagonal) in zip(sums, room, strict=True):
        if own.first.dtype == mean.dtype:  # written where it belongs: on a fast net every pass over P numbers counts
            first = torch.mul(own.first, scale / count, out=mean)
            second = torch.mul(own.second, scale**2 / count, out=diagonal)
            second.addcmul_(first, first, value=-1).clamp_(min=0.0)
        else:
            first, second = own.first * (scale / count), own.second * (scale**2 / count)
            mean.copy_(first)
            diagonal.copy_(second.addcmul_(first, first, value=-1).clamp_(min=0.0))
        lengths.append(_square(first))
    return torch.stack(lengths)


def _finish_together(sums: list[Totals], room: Room, whole: Tensor, objective: Objective) -> Tensor:
    """The same over all ranks, which first put their shares of both moments into ``whole`` ``[2, P]``."""
    count, scale = objective.size, objective.size / objective.total_weight
    for own, (mean, diagonal) in zip(sums, room, strict=True):
        torch.mul(own.first, scale / count, out=mean)
        torch.mul(own.second, scale**2 / count, out=diagonal)
    objective.ranks.sum_(whole, "moments of gradients")
    whole[1].addcmul_(whole[0], whole[0], value=-1).clamp_(min=0.0)
    return torch.stack([_square(mean) for mean, _ in room])


def _square(tensor: Tensor) -> Tensor:
    """Its squared norm, in double precision."""
    flat = tensor.reshape(1, -1)
    return row_dots(flat, flat)[0].double()
