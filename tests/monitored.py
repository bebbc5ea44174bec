"""Trainings that several ranks share, watched or not: for the tests of monitors on ranks."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

SAMPLES, STEPS = 36, 6
CLOCKED = ("curv/cost/seconds", "curv/cost/gradients", "curv/overhead")


def shard(rank: int, world: int) -> tuple[Tensor, Tensor]:
    """A rank's share of 36 samples, one rank's after the other's; in double precision."""
    inputs = torch.randn(SAMPLES, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    targets = inputs[:, :3].argmax(1)
    own = slice(rank * SAMPLES // world, (rank + 1) * SAMPLES // world)
    return inputs[own], targets[own]


def noisy() -> nn.Module:
    """Dropout, which draws, and BatchNorm, whose statistics are each rank's own."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 3)).double()


def smooth() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


class Branching(nn.Module):
    """A layer that no loss reaches, which DDP has to be told."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.spare = noisy(), nn.Linear(4, 3).double()

    def forward(self, inputs: Tensor) -> Tensor:
        return self.used(inputs)


def trained(
    data: tuple[Tensor, Tensor],
    model: nn.Module,
    *,
    watch: Callable[[nn.Module, torch.optim.Optimizer], Any] | None = None,
    after_step: Callable[[int], object] = lambda step: None,
    optimizer: Callable[..., torch.optim.Optimizer] = lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    steps: int = STEPS,
    micro_batches: int = 2,
    seed: int = 7,
    **ddp: Any,
) -> dict[str, Any]:
    """Train in the present process, with DDP where there is a group; what is left, bit for bit."""
    several = torch.distributed.is_initialized()
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    wrapped = DistributedDataParallel(model, **ddp) if several else model
    made = optimizer(model.parameters())
    if watch is not None:
        watch(wrapped, made)
    for step in range(1, steps + 1):
        made.zero_grad()
        parts = list(zip(*(tensor.chunk(micro_batches) for tensor in data), strict=True))
        for index, (inputs, targets) in enumerate(parts):
            waits = wrapped.no_sync() if several and index < len(parts) - 1 else contextlib.nullcontext()
            with waits:
                (F.cross_entropy(wrapped(inputs), targets) / len(parts)).backward()
        made.step()
        after_step(step)
    return {
        "weights": [tensor.detach().clone() for tensor in model.parameters()],
        "left": [
            [buffer.clone() for buffer in model.buffers()],
            [value for state in made.state.values() for value in state.values()],
            [torch.get_rng_state(), torch.tensor(np.random.get_state()[1]), torch.tensor(random.getstate()[1])],  # noqa: NPY002
        ],
    }


def same(one: Any, other: Any) -> bool:
    """Bit for bit, through lists and dictionaries."""
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return bool(one == other)


def numbers(monitor: Any) -> list[tuple[int, dict[str, float], tuple[str, ...]]]:
    """Steps, all numbers and notes of a monitor's measurements."""
    return [(one.step, {key: float(value) for key, value in one.scalars.items()}, one.notes) for one in monitor.history]
