"""What the ranks of an objective find out about its loss together, each of which sees its own batches alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from curvdiag.criterion import Loss
from curvdiag.data import Batch, can_cut, can_merge, place, sample_count, take
from curvdiag.distributed import Ranks
from curvdiag.errors import DataError, LossError
from curvdiag.inspection import UNKNOWN_WEIGHTS, compare_batches

HEAD = 8
"""Samples of each rank that others compare with their own, where a loss gives only a mean."""


def share_what_is_known(loss: Loss, ranks: Ranks, batches: Sequence[Batch]) -> None:
    """Where one rank cannot tell its samples apart none does; one whose samples all count for nothing learns it here.

    Raises:
        DataError: The samples of no rank count.
    """
    counts = any(loss.has_weight(batch) for batch in batches)
    found = [known for known in ranks.gather(loss.known() if counts else None, "comparison of losses") if known]
    if not found:
        raise DataError("the weights of all samples add up to zero: every target is ignored or has class weight 0")
    coarsest = min(found, key=lambda known: known[0])
    if not counts or not coarsest[0]:
        loss.adopt(coarsest)


def heads_to_compare(loss: Loss, batches: Sequence[Batch], ranks: Ranks, *, coupled: bool) -> list[Batch | None]:
    """The first samples of the first batch of each rank that counts; none where nothing is left to compare.

    A loss that gives only a mean, without weights, is to weigh the batches of different ranks by their samples.
    """
    if loss.per_sample or coupled or getattr(loss, "weight", None) is not None:
        return []
    first = next((batch for batch in batches if loss.has_weight(batch)), None)
    if first is not None and can_cut(first):
        first = take(first, slice(0, min(HEAD, sample_count(first))))
    return ranks.gather(None if first is None else place(first, torch.device("cpu"), None), "comparison of samples")


def compare_with_others(
    loss: Loss, model: nn.Module, heads: Sequence[Batch | None], rank: int, device: torch.device
) -> None:
    """Compare a rank's own samples with those of the first rank that has some, and that one with the next.

    To be called in the sandbox, with gradients off.

    Raises:
        LossError: The mean over both is not that of their means, weighted by samples.
    """
    own = heads[rank] if heads else None
    other = next((head for i, head in enumerate(heads) if i != rank and head is not None), None)
    if own is None or other is None:
        return
    here, there = place(own, device, None), place(other, device, None)
    if can_merge(here, there):
        compare_batches(loss, model, here, there)
    elif not loss.counts_alike(here, there):
        raise LossError(UNKNOWN_WEIGHTS)
