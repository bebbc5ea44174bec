"""What a monitor can see of the training around it, at no cost to it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from curvdiag.estimate import Estimate


def was_skipped(optimizer: Optimizer) -> bool:
    """Whether GradScaler found infinite gradients in this very step, and the optimizer therefore did nothing.

    GradScaler does not call most optimizers then; fused ones it calls, with what it found as an attribute.
    """
    found = getattr(optimizer, "found_inf", None)
    return isinstance(found, Tensor) and bool(found.item() > 0)


def optimizer_scalars(optimizer: Optimizer) -> dict[str, float]:
    """Learning rate, momentum and p of each parameter group, by key.

    Groups are named by their ``name`` where they have one, else by number. Momentum is ``momentum``, the first of
    ``betas``, or ``beta``.
    """
    scalars: dict[str, float] = {}
    for index, group in enumerate(optimizer.param_groups):
        name = group.get("name", index)
        betas = group.get("betas")
        beta = betas[0] if isinstance(betas, tuple | list) and betas else group.get("beta")
        momentum = group.get("momentum", beta)
        for key, value in (("lr", group.get("lr")), ("momentum", momentum), ("p", group.get("p"))):
            number = as_number(value)
            if number is not None:
                scalars[f"train/{key}/{name}"] = number
    return scalars


def as_number(value: Any) -> float | None:
    """A Python number, or a tensor of one element, as a float; None for anything else."""
    if isinstance(value, Tensor) and value.numel() == 1:
        return float(value.detach())
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    return None


def numbers_in(given: Any) -> tuple[dict[str, float], list[str]]:
    """The numbers of a mapping by name, as floats; and in words what of it is none."""
    if not isinstance(given, Mapping):
        return {}, [f"a {type(given).__name__} instead of a dict"]
    numbers: dict[str, float] = {}
    refused = []
    for name, value in given.items():
        if not isinstance(name, str) or not name:
            refused.append(f"the name {name!r}")
            continue
        try:
            number = isinstance(value, Real | Estimate) or (isinstance(value, Tensor | np.ndarray) and _single(value))
            if not number:
                raise TypeError
            numbers[name] = float(value.detach() if isinstance(value, Tensor) else value)
        except (TypeError, ValueError, ArithmeticError, RuntimeError):
            refused.append(f"{name!r}: {_shortly(value)}")
    return numbers, refused


def synchronize(device: torch.device) -> None:
    """Wait for the device, so that a clock on the host measures its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _single(array: Tensor | np.ndarray) -> bool:
    return math.prod(array.shape) == 1 and "complex" not in str(array.dtype)


def _shortly(value: Any) -> str:
    if isinstance(value, Tensor | np.ndarray):
        return f"{type(value).__name__} of {math.prod(value.shape)} entries, {value.dtype}"
    return text if len(text := repr(value)) <= 40 else f"{text[:37]}..."
