"""This rank's part of data that all ranks have."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import torch

from curvdiag.data import Batch, can_cut, read_batches, sample_count, take, tensors_of
from curvdiag.distributed.ranks import Group, ranks_of
from curvdiag.errors import DataError

SEEN = 4096
"""Entries of each tensor, evenly spread, by which data of different ranks are told apart."""


def shard(
    data: Any = None,
    group: Group = "world",
    *,
    batch: Any = None,
    batches: Any = None,
    cut: bool = True,
    keep_bytes: int | None = None,
) -> Any:
    """The contiguous part of ``data`` that belongs to this rank, for an objective with the same ``group``.

    ``Objective(model, criterion, shard(data), group="world")`` measures on several ranks what
    ``Objective(model, criterion, data)`` measures on one, whatever the number of ranks: every sample is on one rank,
    in the order of ``data``, and numbers of samples differ by one at most.

    A ``DistributedSampler`` does not do this: by default it repeats samples until all shards are equally long, and
    those would count twice. Shards of different lengths are weighted exactly, so that there is no need for it.

    Args:
        data: The same on every rank: one batch, or a re-iterable of batches, as for an objective. A DataLoader that
            shuffles must do so alike on all of them.
        group: ``"world"``, a process group, or None for this process alone, which gets everything.
        batch, batches: Say outright which of the two ``data`` is.
        cut: Cut the batches at the ends of a shard. With False whole batches are dealt out, as evenly as their order
            allows: for BatchNorm in train mode and for losses that only give a mean, which depend on the batches.
        keep_bytes: Most bytes of data to read; a quarter of the free memory by default.

    Returns:
        A batch where ``data`` is one, and a list of batches otherwise.

    Raises:
        DataError: A rank would be left without a sample, or a batch cannot be cut by sample.
        DistributedError: The ranks were given different data.
    """
    ranks = ranks_of(group)
    with ranks.together("sharding"):
        kept, _ = read_batches(data, batch=batch, batches=batches, pairs=False, keep_bytes=keep_bytes)
        one = batch is not None or isinstance(data, torch.Tensor | Mapping | tuple)
        if ranks.alone:
            return kept[0] if one else kept
        ranks.agree("data", _in_short(kept), "shard() cuts data that all of them have; a shuffling loader needs a seed")
        counts = [sample_count(own) for own in kept]
        ends = [0, *torch.tensor(counts).cumsum(0).tolist()]
        edges = [ends[-1] * rank // ranks.count for rank in range(ranks.count + 1)]
        if not cut:
            edges = [min(ends, key=lambda end: abs(end - edge)) for edge in edges]
        if empty := [rank for rank in range(ranks.count) if edges[rank] == edges[rank + 1]]:
            what = f"{ends[-1]} samples" if cut else f"{len(kept)} whole batches"
            raise DataError(f"{what} are too few for {ranks.count} ranks: rank {empty[0]} would have none")
        parts = list(_between(kept, ends, edges[ranks.rank], edges[ranks.rank + 1]))
    return parts[0] if one else parts


def _between(batches: list[Batch], ends: list[int], first: int, last: int) -> list[Batch]:
    found = []
    for index, (one, start) in enumerate(zip(batches, ends, strict=False)):
        size = ends[index + 1] - start
        low, high = max(first - start, 0), min(last - start, size)
        if low >= high:
            continue
        if (low, high) != (0, size):
            if not can_cut(one):
                raise DataError(
                    f"the tensors of batch {index} do not all have the samples as first dimension, so that it cannot "
                    "be cut: give cut=False, which deals out whole batches"
                )
            one = take(one, slice(low, high))
        found.append(one)
    return found


def _in_short(batches: list[Batch]) -> str:
    """What data these are, in a few words that differ where they do."""
    word = 0
    for tensor in (tensor for batch in batches for tensor in tensors_of(batch)):
        flat = tensor.reshape(-1)
        some = flat[:: max(1, -(-len(flat) // SEEN))].contiguous().cpu()
        word = zlib.crc32(repr((tuple(tensor.shape), tensor.dtype)).encode(), word)
        word = zlib.crc32(some.view(torch.uint8).numpy().tobytes() if len(some) else b"", word)
    return f"{sum(map(sample_count, batches)):,} samples in {len(batches)} batches ({word:08x})"
