"""What a Lightning trainer and its module are asked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from curvdiag.errors import ArgumentError
from curvdiag.objective import Objective


def optimizer_to_follow(optimizers: Sequence[Optimizer], objective: Objective, wanted: int | None) -> int | None:
    """Number of the optimizer whose steps count: ``wanted``, or that with most of the objective's parameters.

    None where there is none.

    Raises:
        ArgumentError: There is no such number.
    """
    if wanted is not None:
        if not 0 <= wanted < len(optimizers):
            raise ArgumentError(f"optimizer={wanted}, and the module has {len(optimizers)} optimizers")
        return wanted
    named = dict(objective.model.named_parameters(remove_duplicate=False))
    chosen = {id(named[name]): named[name].numel() for name in objective.parameters.names}
    held = [
        sum(chosen.get(id(parameter), 0) for group in optimizer.param_groups for parameter in group["params"])
        for optimizer in optimizers
    ]
    real = [index for index, optimizer in enumerate(optimizers) if optimizer.param_groups]
    return max(real, key=lambda index: held[index], default=None)


def batches_that_stepped(trainer: Any) -> int:
    """The step axis of the trainer's loggers."""
    return int(getattr(trainer.fit_loop.epoch_loop, "_batches_that_stepped", trainer.global_step))


def synchronizes(model: nn.Module) -> bool:
    """Whether it has layers that wait for all processes in each forward pass."""
    return any(isinstance(module, nn.SyncBatchNorm) for module in model.modules())
