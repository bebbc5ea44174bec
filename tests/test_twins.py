"""Quadratic forms that count one of two equal halves twice: where it may be, and that it is right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from oracles import dense_hessian, relative
from torch import Tensor, nn

from curvdiag import Hessian, Objective
from curvdiag.operators import bilinear
from curvdiag.operators.meeting import Left, Motions

WIDTH = 6


class Twice(nn.Module):
    """The same layer applied two times."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.layer(torch.tanh(self.layer(x)))))


class Forked(nn.Module):
    """An activation that goes to a layer, and around it through a curve."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.first(x))
        return self.last(y) + torch.sin(y)


class Gated(nn.Module):
    """Products of activations with each other, and with themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.value, self.gate, self.last = nn.Linear(WIDTH, 5), nn.Linear(WIDTH, 5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.value(x) * torch.sigmoid(self.gate(x))
        return self.last(y * y + y)


class Attention(nn.Module):
    """One head, with the output layer tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(4, WIDTH)
        self.norm, self.qkv, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v))
        return (F.gelu(x) @ self.embed.weight.T).mean(1)


def convolutions(*, train: bool = False) -> nn.Module:
    norm = nn.BatchNorm2d(3)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5)
        norm.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr]
    layers = [nn.Conv2d(1, 3, 3), norm, nn.ReLU(), nn.Conv2d(3, 2, 3), nn.SiLU(), nn.AdaptiveAvgPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(8, 4)).train(train)


def rows() -> Tensor:
    return torch.randn(7, WIDTH, dtype=torch.float64)


def images() -> Tensor:
    return torch.randn(7, 1, 8, 8, dtype=torch.float64)


def tokens() -> Tensor:
    return torch.randint(4, (7, 5))


NETS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "relu": (lambda: nn.Sequential(nn.Linear(WIDTH, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), rows),
    "tanh": (lambda: nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, 4)), rows),
    "no biases": (lambda: nn.Sequential(nn.Linear(WIDTH, 8, bias=False), nn.GELU(), nn.Linear(8, 4, bias=False)), rows),
    "twice": (Twice, rows),
    "forked": (Forked, rows),
    "gated": (Gated, rows),
    "attention": (Attention, tokens),
    "convolutions": (convolutions, images),
    "batch statistics": (lambda: convolutions(train=True), images),
}


def problem(name: str) -> tuple[nn.Module, Tensor, Tensor, Objective]:
    torch.manual_seed(0)
    make, inputs = NETS[name]
    model, x, y = make().double(), inputs(), torch.randint(4, (7,))
    mode = "train" if name == "batch statistics" else "eval"
    return model, x, y, Objective(model, nn.CrossEntropyLoss(), (x, y), mode=mode)


def check_forms(hessian: Hessian, truth: Tensor) -> None:
    """Single vectors, several at once, and blocks."""
    vectors = torch.randn(hessian.size, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    exact = (vectors * (truth @ vectors)).sum(0)
    for some in (vectors[:, :1], vectors):
        assert relative(hessian.quadratic_form(some), exact[: some.shape[1]]) < 1e-11
    for name in {name.split(".")[0] for name in hessian.parameters.names}:
        block = hessian.block(f"{name}.*")
        row = vectors[: block.size, 0]
        assert float(block.quadratic_form(row)) == pytest.approx(float(row @ (block @ row)), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("name", NETS)
def test_forms_are_those_of_the_dense_hessian(name: str, batched: bool) -> None:
    model, x, y, objective = problem(name)
    truth = dense_hessian(model, lambda m: F.cross_entropy(m(x), y), mode=objective.mode)
    hessian = Hessian(objective, batched=batched)
    check_forms(hessian, truth)
    known = objective.__dict__["_meets"][None]
    assert known is not None
    assert known.sparing


LEFT = {
    "relu": ["LogSoftmaxBackward0", "TBackward0", "TBackward0"],
    "no biases": ["LogSoftmaxBackward0", "MmBackward0", "TBackward0"],
    "tanh": ["LogSoftmaxBackward0", "TBackward0", "TanhBackward0"],
    "forked": ["LogSoftmaxBackward0", "ReluBackward0", "TBackward0"],
    "convolutions": ["ConvolutionBackward0", "LogSoftmaxBackward0", "SiluBackward0", "TBackward0"],
}
"""Where something is left, and motions are kept for it: not at what layers take, unless others leave something too.

GELU and SiLU do at what they take, tanh and softmax at what they give; average pooling leaves zeros.
"""


@pytest.mark.parametrize("name", LEFT)
def test_nothing_is_kept_of_what_only_layers_take(name: str) -> None:
    hessian = Hessian(problem(name)[3])
    (graph,) = hessian._engine.kept  # type: ignore[union-attr]
    kept: list[tuple[Left, set[int]]] = []
    meets = Left.meets

    def recorded(left: Left, motions: Motions, vectors: Sequence[Tensor], **options: Any) -> Tensor | None:
        kept.append((left, set(motions)))
        return meets(left, motions, vectors, **options)

    with mock.patch.object(Left, "meets", recorded):
        hessian.quadratic_form(torch.ones(hessian.size, dtype=torch.float64))
    ((left, moved),) = kept
    names = [graph.meeting.activations[i].node.name() for i in left.met]
    assert sorted(names) == sorted(LEFT[name])
    assert moved <= set(left.met)


def test_a_penalty_on_a_weight_is_counted_once() -> None:
    torch.manual_seed(0)
    model, x, y = NETS["convolutions"][0]().double(), images(), torch.randint(4, (7,))

    def loss(m: Any, batch: Any) -> Tensor:
        return F.cross_entropy(m(batch[0]), batch[1], reduction="none") + (m[3].weight ** 4).sum()

    truth = dense_hessian(model, lambda m: loss(m, (x, y)).mean())
    hessian = Hessian(Objective.from_loss(model, loss, (x, y)))
    check_forms(hessian, truth)
    assert hessian.objective.__dict__["_meets"][None].sparing


def test_an_operation_that_is_taken_for_linear_by_mistake_is_noticed() -> None:
    model, x, y, objective = problem("forked")
    truth = dense_hessian(model, lambda m: F.cross_entropy(m(x), y))
    with mock.patch.object(bilinear, "LINEAR", {*bilinear.LINEAR, "SinBackward0"}):
        check_forms(Hessian(objective), truth)
    assert not objective.__dict__["_meets"][None].sparing
