"""What is left of process groups when a process ends: nothing, whatever the user still holds."""

from __future__ import annotations

import gc
import weakref

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as functional
from torch import nn

from curvdiag import Hessian, Objective
from curvdiag.distributed import ranks


def test_a_kept_operator_does_not_keep_its_group_until_the_interpreter_is_taken_apart() -> None:
    """Where it does, gloo's threads are not joined, and the process is aborted in three of four runs."""
    defaults = functional.broadcast.__defaults__
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        group = weakref.ref(dist.group.WORLD)
        functional.broadcast.__defaults__ = (dist.group.WORLD,)  # as when it is first imported now
        batch = torch.randn(4, 3), torch.randint(2, (4,))
        kept = Hessian(Objective(nn.Linear(3, 2), nn.CrossEntropyLoss(), batch, group="world"))
    finally:
        dist.destroy_process_group()
    ranks._let_go()  # as at the end of the process
    gc.collect()
    assert group() is None
    assert functional.broadcast.__defaults__ == defaults == (None,)
    assert kept.objective.ranks.rank == 0
