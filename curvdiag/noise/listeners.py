"""Which listener goes with a model, and which parameters it counts."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from curvdiag.errors import ArgumentError
from curvdiag.noise.backward_passes import BackwardPass, BackwardPasses


def listen(model: nn.Module, optimizers: list[Optimizer], heard: Callable[[BackwardPass], None]) -> BackwardPasses:
    """Call ``heard`` at the end of each backward pass of a model under DDP or FSDP2.

    Raises:
        ArgumentError: The model is under neither, or does not average all parameters of the optimizers.
    """
    model = getattr(model, "_orig_mod", model)
    given = {id(p): p for one in optimizers for group in one.param_groups for p in group["params"]}
    if isinstance(model, DistributedDataParallel):
        from curvdiag.noise.ddp_passes import DDPPasses, averaged_parameters

        averaged = averaged_parameters(model)
        return DDPPasses(model, _chosen(model, given, averaged), heard)
    if dist.is_available() and dist.is_initialized():
        from torch.distributed.fsdp import FSDPModule

        if any(isinstance(module, FSDPModule) for module in model.modules()):
            from curvdiag.noise.fsdp_passes import FSDPPasses, sharded_parameters

            return FSDPPasses(model, _chosen(model, given, sharded_parameters(model)), heard)
    raise ArgumentError(
        f"RankNoiseScale listens to the ranks' averaging, and this {type(model).__name__} is neither in "
        "DistributedDataParallel nor under fully_shard (wrap it first; FSDP1 is not known). In one process "
        "RunningNoiseScale gets the noise scale from micro-batches: observe() after each backward pass, step() where "
        "the optimizer steps"
    )


def several(optimizer: Optimizer | Iterable[Optimizer]) -> list[Optimizer]:
    """One optimizer or more, without the wrappers of accelerate, whose hooks are not called."""
    given: list[Any] = [optimizer] if hasattr(optimizer, "param_groups") else list(optimizer)
    inner = [getattr(one, "optimizer", one) for one in given]
    return [within if isinstance(within, Optimizer) else one for one, within in zip(given, inner, strict=True)]


def _chosen(model: nn.Module, given: dict[int, nn.Parameter], averaged: list[nn.Parameter]) -> list[nn.Parameter]:
    """The optimizer's parameters, in the model's order."""
    chosen = [p for p in averaged if id(p) in given]
    missing = {key for key, p in given.items() if p.requires_grad} - {id(p) for p in chosen}
    if missing or not chosen:
        names = [name for name, p in model.named_parameters() if id(p) in missing]
        raise ArgumentError(
            f"{len(missing) or 'all'} parameters of the optimizer are not averaged over ranks by this model"
            f"{': ' + ', '.join(names[:3]) if names else ''}; make the optimizer from model.parameters() after the "
            "model was wrapped or sharded, without those that it ignores"
        )
    return chosen
