"""Parts of an objective's samples: halves, and batches cut into pieces."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from curvdiag.data import Batch, can_cut, sample_count, take, tensors_of
from curvdiag.errors import ArgumentError, DataError, LossError

if TYPE_CHECKING:
    from curvdiag.objective import Objective


def halves(objective: Objective, seed: int) -> tuple[Objective, Objective]:
    """See :meth:`curvdiag.Objective.split`."""
    ranks = objective.ranks
    with ranks.together("splitting"):
        if objective.size < 2 or not all(can_cut(batch) for batch in objective.batches):
            raise DataError("splitting needs two samples, and tensors that have the samples as first dimension")
        if not objective.loss().per_sample:
            raise LossError(f"splitting needs a loss for each sample: {objective.loss().note}")
        order = torch.randperm(objective.size, generator=torch.Generator().manual_seed(seed))
        first = torch.zeros(objective.size, dtype=torch.bool)
        first[order[: (objective.size + 1) // 2]] = True
        own = first[objective.first_sample :][: objective.local_size]
        if not ranks.alone and (bool(own.all()) or not bool(own.any())):
            raise DataError(f"rank {ranks.rank} would have no sample in one half: give each rank more of them")
        return _restricted(objective, own), _restricted(objective, ~own)


def cut_batches(objective: Objective, micro_batch: int | None) -> Iterator[Batch]:
    """See :meth:`curvdiag.Objective.micro_batches`."""
    if micro_batch is None:
        yield from objective.batches
        return
    if not isinstance(micro_batch, int) or micro_batch < 1:
        raise ArgumentError(f"micro_batch is a number of samples, at least 1, not {micro_batch}")
    if not objective.can_regroup:
        raise LossError(f"micro_batch cuts batches by sample, which this objective does not allow: {objective.why()}")
    for batch in objective.batches:
        for start in range(0, sample_count(batch), micro_batch):
            yield take(batch, slice(start, start + micro_batch))


def _restricted(objective: Objective, kept: Tensor) -> Objective:
    half = copy.copy(objective)
    half.batches = []
    parts = kept.split([sample_count(batch) for batch in objective.batches])
    for batch, part in zip(objective.batches, parts, strict=True):
        if part.any():
            device = tensors_of(batch)[0].device
            half.batches.append(take(batch, part.nonzero().squeeze(1).to(device)))
    half._count()
    return half
