"""Small smooth nets and uneven data for tests of sharded weights; the same on every rank, and in one process."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from curvdiag import Objective

WEIGHTED = torch.tensor([1.0, 0.5, 2.0])
BATCHES = {0: (6, 5), 1: (4,), 2: (3,)}
"""Sizes of the batches of each rank: neither their numbers nor their samples are the same."""


def net(dtype: torch.dtype) -> nn.Sequential:
    """Layers whose rows neither two nor three ranks share evenly."""
    torch.manual_seed(0)
    layers = nn.Linear(4, 7), nn.Tanh(), nn.LayerNorm(7), nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3)
    return nn.Sequential(*layers).to(dtype)


def kinked(dtype: torch.dtype, seed: int) -> nn.Sequential:
    """The same with ReLU; for seeds 2 to 4 the steps of a few vectors cross no kink."""
    torch.manual_seed(seed)
    layers = nn.Linear(4, 7), nn.ReLU(), nn.LayerNorm(7), nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 3)
    return nn.Sequential(*layers).to(dtype)


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.two(torch.tanh(self.one(x)))))


def tied(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return Tied().to(dtype)


def normed(dtype: torch.dtype) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)


def sharded(model: nn.Sequential, **options: object) -> nn.Module:
    """Two layers are units of their own, the rest is the root's."""
    for layer in (model[0], model[3]):
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def data(rank: int, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(10 + rank)
    batches = []
    for count in BATCHES[rank]:
        labels = torch.randint(0, 3, (count,), generator=generator)
        labels[0] = -100  # ignored
        batches.append((torch.randn(count, 4, generator=generator).to(dtype), labels))
    return batches


def criterion(dtype: torch.dtype) -> nn.Module:
    """Class weights and ignored labels, so that a sample's weight is not 1."""
    return nn.CrossEntropyLoss(weight=WEIGHTED.to(dtype))


def of_all(world: int, dtype: torch.dtype, model: nn.Module | None = None, **options: object) -> Objective:
    """One process with the data of all ranks."""
    whole = [batch for rank in range(world) for batch in data(rank, dtype)]
    return Objective(net(dtype) if model is None else model, criterion(dtype), whole, **options)


def of_rank(model: nn.Module, rank: int, dtype: torch.dtype, **options: object) -> Objective:
    options.setdefault("group", "world")
    return Objective(model, criterion(dtype), data(rank, dtype), **options)


def wide(dtype: torch.dtype) -> nn.Sequential:
    """The same with even layers, which tensor parallelism cuts: the first by rows, the second by columns."""
    torch.manual_seed(0)
    layers = (nn.Linear(4, 8), nn.Tanh(), nn.Identity(), nn.Linear(8, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 3))
    return nn.Sequential(*layers).to(dtype)
