"""Matrices in layers: those of small nets, and a quadratic whose blocks are known."""

from __future__ import annotations

from typing import Any

import torch
from nets import cut, make
from torch import Tensor, nn

from curvdiag import Hessian, Objective
from curvdiag.operators.objective_operator import ObjectiveOperator

NETS = ("mlp-tanh", "conv-batchnorm", "transformer-tied")


def hessian(net: str = "mlp-tanh", **options: Any) -> Hessian:
    model, batch = make(net)
    return Hessian(Objective(model, nn.CrossEntropyLoss(), cut(batch, (7, 3))), **options)


def block(op: ObjectiveOperator, layer: str) -> ObjectiveOperator:
    inside = set(op.parameters.layers()[layer])
    return op.block(lambda name, _: name in inside)


def dense_block(op: ObjectiveOperator, layer: str) -> Tensor:
    dense = block(op, layer).dense()
    return (dense + dense.T) / 2


class Quadratic(nn.Module):
    """``x^2 . d / 2`` by layer: its Hessian is diagonal, and known."""

    def __init__(self, **diagonals: Tensor) -> None:
        super().__init__()
        for name, diagonal in diagonals.items():
            setattr(self, name, nn.Module())
            getattr(self, name).x = nn.Parameter(torch.ones_like(diagonal))
            getattr(self, name).register_buffer("d", diagonal)

    def forward(self, inputs: Tensor) -> Tensor:
        return sum((part.d * part.x**2).sum() / 2 for part in self.children()) * inputs.sum(1)


def quadratic(**diagonals: Tensor) -> Hessian:
    batch = torch.ones(3, 1, dtype=torch.float64), torch.zeros(3)
    return Hessian(Objective(Quadratic(**diagonals), lambda outputs, _: outputs.mean(), batch))
