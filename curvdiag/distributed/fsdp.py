"""PyTorch's engine of sharded weights (FSDP2, ``fully_shard``): what it is asked and told around a measurement.

What PyTorch shows by no public name (settings of a gradient accumulation, precision, how gradients are averaged) is
read here and nowhere else. Where another version hides it, the checks of the finite differences notice what is wrong.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from curvdiag.errors import ArgumentError


def units(model: nn.Module) -> list[Any]:
    """The modules that ``fully_shard`` was called on."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # without it there is none, and importing it takes time
    kind = getattr(fsdp, "FSDPModule", ())
    return [module for module in model.modules() if isinstance(module, kind)]


def refuse_older(model: nn.Module) -> None:
    """Refuse FSDP's first version, whose flattened weights have no names.

    Raises:
        ArgumentError
    """
    kind = getattr(sys.modules.get("torch.distributed.fsdp"), "FullyShardedDataParallel", ())
    found = next(
        (name or type(module).__name__ for name, module in model.named_modules() if isinstance(module, kind)), ""
    )
    if found:
        raise ArgumentError(
            f"{found!r} is wrapped in FullyShardedDataParallel, which flattens its weights: use fully_shard (FSDP2), "
            "or measure a checkpoint on one device with `curvdiag scan`"
        )


def reshard(model: nn.Module) -> None:
    """Free what was gathered for the last forward pass, so that the model's parameters are its shards again."""
    for unit in units(model):
        unit.reshard()


def settle(model: nn.Module) -> None:
    """Have the engine forget passes that were not finished by a backward pass, or by an exception."""
    for unit in _roots(model):
        if getattr(_state(unit), "_is_root", None) and hasattr(unit, "reset_iter_state"):
            unit.reset_iter_state()
    reshard(model)


@contextmanager
def own_passes(model: nn.Module) -> Iterator[None]:
    """Passes that average gradients over ranks, whatever the training is about to do, and leave no trace in it.

    Gradients that a training accumulates without exchanging them lie with the engine; they are put aside and back.
    """
    reshard(model)
    kept = [(owner, name, getattr(owner, name)) for owner, name in _settings(model) if hasattr(owner, name)]
    try:
        for unit in units(model):
            unit.set_requires_gradient_sync(True, recurse=False)
            if hasattr(unit, "set_reshard_after_backward"):
                unit.set_reshard_after_backward(True, recurse=False)
        for owner, name, _ in kept:
            if name in _PENDING:
                setattr(owner, name, None)
            elif name == "is_last_backward":
                owner.is_last_backward = True
        yield
    finally:
        settle(model)
        for owner, name, value in kept:
            if name != "post_optim_event":  # without it the next forward pass waits for everything, this one included
                setattr(owner, name, value)


_PENDING = ("grad", "unsharded_accumulated_grad", "_partial_reduce_output", "post_optim_event")


def _settings(model: nn.Module) -> Iterator[tuple[Any, str]]:
    """What the passes of a training leave with the engine, or tell it."""
    for unit in units(model):
        context = getattr(_state(unit), "_state_ctx", None)
        yield context, "is_last_backward"
        yield context, "post_optim_event"
    for group in _groups(model):
        for name in ("reduce_grads", "all_reduce_grads", "reshard_after_backward", "_partial_reduce_output"):
            yield group, name
        for one in getattr(group, "fsdp_params", ()):
            yield one, "unsharded_accumulated_grad"
            yield getattr(one, "_unsharded_param", None), "grad"


def divisors(model: nn.Module, ranks: int) -> dict[int, float]:
    """What the engine divides the sum of all ranks' gradients by, by the identity of each parameter it averages."""
    found = {id(p): float(ranks) for unit in units(model) for p in unit.parameters() if is_sharded(p)}
    for group in _groups(model):
        factor = getattr(group, "gradient_divide_factor", None)
        for one in getattr(group, "fsdp_params", ()):
            if factor is not None:
                found[id(one.sharded_param)] = float(factor)
    return found


def averaged_over(model: nn.Module) -> list[int] | None:
    """The ranks whose gradients the engine averages, in order; None where it does not say, or averages none."""
    for group in _groups(model):
        mesh = getattr(getattr(group, "mesh_info", None), "mesh", None)
        if mesh is not None:
            return sorted(mesh.mesh.flatten().tolist())
    return None


def coarse_type(model: nn.Module) -> torch.dtype | None:
    """A type coarser than float32 in which the engine computes or adds up, by its mixed-precision policy."""
    for unit in units(model):
        policy = getattr(_state(unit), "_mp_policy", None)
        for name in ("param_dtype", "reduce_dtype", "output_dtype"):
            dtype = getattr(policy, name, None)
            if dtype is not None and torch.finfo(dtype).eps > torch.finfo(torch.float32).eps:
                return dtype
    return None


def is_sharded(tensor: Any) -> bool:
    """Whether it is a DTensor."""
    kind = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", ())
    return isinstance(tensor, kind)


def _roots(model: nn.Module) -> list[Any]:
    """Units that lie in no other."""
    found = units(model)
    inner = {id(below) for unit in found for below in unit.modules() if below is not unit}
    return [unit for unit in found if id(unit) not in inner]


def _state(unit: Any) -> Any:
    return unit._get_fsdp_state() if hasattr(unit, "_get_fsdp_state") else None


def _groups(model: nn.Module) -> list[Any]:
    """The groups of parameters that the engine gathers together; a group may belong to several modules."""
    found: dict[int, Any] = {}
    for unit in units(model):
        state = _state(unit)
        several = getattr(state, "_fsdp_param_groups", None)
        for group in several if several is not None else [getattr(state, "_fsdp_param_group", None)]:
            if group is not None:
                found[id(group)] = group
    return list(found.values())
