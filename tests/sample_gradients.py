"""Per-sample gradients by one backward pass each, and what a result must have in common with them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracles import relative
from torch import Tensor, nn
from torch.nn import functional as F

from curvdiag import Objective
from curvdiag.noise.moments import GradientMoments
from curvdiag.samples import per_sample_gradients

TOLERANCE = 1e-10


def one_by_one(model: nn.Module, loss: Callable[[Any, int], Tensor], count: int) -> Tensor:
    """``[N, P]``: one backward pass of ``loss(model, i)`` each, on a twin in eval mode."""
    twin = copy.deepcopy(model).eval()
    parameters = [p for p in twin.parameters() if p.requires_grad]
    rows = []
    for i in range(count):
        twin.zero_grad()
        value = loss(twin, i)
        if value.requires_grad:
            value.backward()
        rows.append(torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters]))
    return torch.stack(rows)


def classification(model: nn.Module, batch: tuple) -> Tensor:
    return one_by_one(model, lambda m, i: F.cross_entropy(m(batch[0][i : i + 1]), batch[1][i : i + 1]), len(batch[1]))


def check(found: GradientMoments, rows: Tensor, objective: Objective) -> None:
    centred = rows - rows.mean(0)
    assert found.samples == len(rows)
    assert relative(found.mean, rows.mean(0)) < TOLERANCE
    assert relative(found.diagonal, centred.square().mean(0)) < TOLERANCE
    assert found.trace == pytest.approx(float(centred.square().sum() / len(rows)), rel=TOLERANCE)
    assert relative(found.norms, rows.norm(dim=1)) < TOLERANCE
    layout = objective.parameters
    for name, members in layout.layers().items():
        own = torch.cat([rows[:, layout.slices[layout.names.index(m)]] for m in members], dim=1)
        block = found.blocks[name]
        size = float(own.norm(dim=1).max())
        assert block.mean_norm == pytest.approx(float(own.mean(0).norm()), rel=TOLERANCE, abs=1e-12 * size)
        spread = float((own - own.mean(0)).square().sum() / len(own))
        assert block.trace == pytest.approx(spread, rel=TOLERANCE, abs=1e-12 * size**2)
        assert float((block.norms - own.norm(dim=1)).abs().max()) <= TOLERANCE * size
    parts = torch.cat(list(per_sample_gradients(objective, chunk=4)))
    assert relative(parts, rows) < TOLERANCE


def ways(found: GradientMoments) -> dict[str, str]:
    """What did not take a rule."""
    return {name: way for name, way in found.ways.items() if way != "rule"}


class Net(nn.Module):
    """Modules and a function of them."""

    def __init__(self, forward: Callable[..., Tensor], **modules: Any) -> None:
        super().__init__()
        self.function = forward
        for name, one in modules.items():
            setattr(self, name, one)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def on(data: Callable[[], tuple], forward: Callable[..., Tensor], **modules: Callable[[], Any]) -> Callable[[], tuple]:
    return lambda: (Net(forward, **{name: build() for name, build in modules.items()}), data())


PARAMETER = {"shift": lambda: nn.Parameter(torch.randn(5)), "gain": lambda: nn.Parameter(torch.tensor(0.7))}
LINEARS = {"own": lambda: nn.Linear(4, 5), "head": lambda: nn.Linear(5, 3)}


def prepared(build: Callable[[], tuple]) -> tuple[nn.Module, tuple]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, (x, y) = build()
    if hasattr(model, "mask"):
        mask = model.mask
        del model.mask
        model.register_buffer("mask", mask)
    return model.double(), (x.double() if x.is_floating_point() else x, y)
