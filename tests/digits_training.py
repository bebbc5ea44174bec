"""Small nets that are trained on digits, seen at checkpoints fifty steps apart."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import cache

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from curvdiag import Objective
from curvdiag.operators import Hessian

NETS: dict[str, tuple[type[nn.Module], tuple[int, ...], dict[str, float], int]] = {
    "relu-sgd": (nn.ReLU, (64, 24, 16, 10), {"lr": 0.1}, 400),
    "tanh-momentum": (nn.Tanh, (64, 20, 10), {"lr": 0.05, "momentum": 0.9}, 300),
}
"""Activation, widths, options of SGD, and how many steps come before the first checkpoint."""


def digits() -> tuple[Tensor, Tensor]:
    data = load_digits()
    return torch.tensor(data.data / 16, dtype=torch.float32), torch.tensor(data.target)


def checkpoints(name: str, count: int, apart: int = 50, seed: int = 1) -> Iterator[nn.Sequential]:
    """The net at ``count`` checkpoints; it is the same object each time, trained on between them."""
    activation, widths, options, before = NETS[name]
    inputs, targets = digits()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = [part for pair in itertools.pairwise(widths) for part in (nn.Linear(*pair), activation())]
    model, generator = nn.Sequential(*layers[:-1]), torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), **options)  # type: ignore[arg-type]
    for index in range(count):
        for _ in range(apart if index else before):
            batch = torch.randint(256, len(inputs), (64,), generator=generator)
            optimizer.zero_grad()
            F.cross_entropy(model(inputs[batch]), targets[batch]).backward()
            optimizer.step()
        yield model


def probe_set(samples: int = 256) -> tuple[Tensor, Tensor]:
    """Samples that are not trained on."""
    inputs, targets = digits()
    return inputs[:samples], targets[:samples]


def hessian_of(model: nn.Module, criterion: Callable[..., Tensor] = F.cross_entropy) -> Hessian:
    return Hessian(Objective(model, criterion, probe_set()))


@cache
def trained(name: str) -> Hessian:
    """The Hessian at the first checkpoint, on a net of its own."""
    return hessian_of(next(checkpoints(name, 1)))
