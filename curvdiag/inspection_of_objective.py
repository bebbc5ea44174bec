"""What a new objective finds out about its loss, wherever its weights and its data are."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from curvdiag.criterion import Loss
from curvdiag.inspection import inspect_loss
from curvdiag.inspection_of_ranks import compare_with_others, heads_to_compare, share_what_is_known

if TYPE_CHECKING:
    from curvdiag.objective import Objective
    from curvdiag.weights import Weights


def inspected(objective: Objective) -> Loss:
    """The loss on the model's device, after a few forward passes that told what it is; the same on all ranks."""
    seen, ranks, device = objective.loss(), objective.ranks, objective.device
    model, batches, coupled = objective.model, objective.batches, objective.couples_samples
    weights = None if objective.shards is not None else objective.weights()
    look = functools.partial(inspect_loss, seen, model, batches, device, coupled=coupled, several=not ranks.alone)
    _in_passes(objective, weights, look)
    if not ranks.alone:
        share_what_is_known(seen, ranks, batches)
        heads = heads_to_compare(seen, batches, ranks, coupled=coupled)
        _in_passes(objective, weights, functools.partial(compare_with_others, seen, model, heads, ranks.rank, device))
    return seen


def _in_passes(objective: Objective, weights: Weights | None, function: Callable[[], None]) -> None:
    """``function()``, which makes forward passes; with sharded weights, where they are."""
    if objective.shards is not None:
        objective.shards.look(objective.mode, function, lambda: objective.totals(objective.batches[0]))
    elif weights is not None:
        objective.inside(weights, torch.no_grad()(function), twice=False)
