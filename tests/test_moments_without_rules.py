"""Moments of what no rule covers, or not always: right all the same, in slower ways."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from nets import Checkpointed, cut, make, vectors
from sample_gradients import LINEARS, PARAMETER, check, classification, on, prepared, ways
from torch import Tensor, nn
from torch.nn import functional as F

from curvdiag import NoiseCovariance, Objective
from curvdiag.noise.moments import gradient_moments


class _Double(torch.autograd.Function):
    """A product with a parameter that no rule can see, and that ``vmap`` does not know."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return grad * w, (grad * x).sum(0)


def _experts(m: Any, x: Tensor) -> Tensor:
    """Each sample goes through the first or the second, as its first feature says."""
    chosen, out = x[:, 0] > 0, x.new_zeros(len(x), 3)
    out[chosen] = m.own(x[chosen])
    out[~chosen] = m.other(x[~chosen])
    return out


def _branch(m: Any, x: Tensor) -> Tensor:
    return m.own(x) if len(x) == 1 or x.sum() > 0 else m.own(x) + 0.0 * m.other(x)


def _norm_of_all(m: Any, x: Tensor) -> Tensor:
    w = m.own.weight
    return F.linear(x, w) + x @ (w / (1 + w.square().sum())).T


UNCOVERED: dict[str, tuple[Callable[[], tuple], set[str]]] = {
    "custom function": (
        on(vectors, lambda m, x: m.head(_Double.apply(m.own(x), m.shift)), **LINEARS, shift=PARAMETER["shift"]),
        {"shift"},
    ),
    "checkpointed": (lambda: (Checkpointed(reentrant=False), vectors()), set()),
    "checkpointed, reentrant": (lambda: (Checkpointed(reentrant=True), vectors()), set()),
    "bag of embeddings": (
        on(
            lambda: (torch.randint(4, (10, 6)), torch.randint(3, (10,))),
            lambda m, t: m.head(m.own(t).tanh()),
            own=lambda: nn.EmbeddingBag(4, 5, mode="sum"),
            head=lambda: nn.Linear(5, 3),
        ),
        {"own.weight"},
    ),
    "experts": (on(vectors, _experts, own=lambda: nn.Linear(4, 3), other=lambda: nn.Linear(4, 3)), {"own.weight"}),
    "branches": (on(vectors, _branch, own=lambda: nn.Linear(4, 3), other=lambda: nn.Linear(4, 3)), set()),
    "a function of the weight": (on(vectors, _norm_of_all, own=lambda: nn.Linear(4, 3, bias=False)), set()),
}


@pytest.mark.parametrize("name", UNCOVERED)
def test_what_no_rule_covers_is_right_all_the_same(name: str) -> None:
    build, falls_back = UNCOVERED[name]
    model, batch = prepared(build)
    rows = classification(model, batch)
    objective = Objective(model, nn.CrossEntropyLoss(), batches=cut(batch, (7, 3)))
    found = gradient_moments(objective)
    check(found, rows, objective)
    assert falls_back <= set(ways(found))


def test_gradients_that_are_zero_at_first_are_right_later() -> None:
    """The last layer is all zeros: no other parameter has a gradient when the rules are tried."""
    model, batch = make("mlp-tanh")
    with torch.no_grad():
        model[4].weight.zero_()
    objective = Objective(model, nn.CrossEntropyLoss(), batch)
    assert float(gradient_moments(objective).blocks["0"].norms.max()) == 0.0
    with torch.no_grad():
        model[4].weight.normal_(generator=torch.Generator().manual_seed(0))
    check(gradient_moments(objective), classification(model, batch), objective)


class _Shared(nn.Module):
    """An activation that uses another layer's weight once more."""

    def __init__(self, other: nn.Linear) -> None:
        super().__init__()
        self.others = [other]

    def forward(self, x: Tensor) -> Tensor:
        return x.tanh() + 0.5 * (x @ self.others[0].weight).sum(1, keepdim=True)


def test_a_model_that_changes_is_looked_at_again() -> None:
    model, batch = make("mlp-tanh")
    objective = Objective(model, nn.CrossEntropyLoss(), batch)
    check(gradient_moments(objective), classification(model, batch), objective)
    model[1] = _Shared(model[0])
    check(gradient_moments(objective), classification(model, batch), objective)


def _sorted(m: Any, x: Tensor) -> Tensor:
    """Samples by the size of a feature, as texts are by their length, and back."""
    order = x[:, 0].argsort()
    out = m.head(m.own(x[order]).tanh())
    return out[order.argsort()]


def _sorted_and_not(m: Any, x: Tensor) -> Tensor:
    order = x[:, 0].argsort()
    return m.head(m.own(x.index_select(0, order)).tanh().index_select(0, order.argsort()) + m.own(x))


def _scattered(m: Any, x: Tensor) -> Tensor:
    order, out = x[:, 0].argsort(), x.new_zeros(len(x), 4)
    out[order] = x
    return m.head(m.own(out).tanh())[order]


def _sorted_elsewhere(m: Any, x: Tensor) -> Tensor:
    order = x[:, 0].detach().numpy().argsort()
    return m.head(m.own(x[order]).tanh())[order.argsort()]


def _sorted_in_a_list(m: Any, x: Tensor) -> Tensor:
    order = sorted(range(len(x)), key=lambda i: x[i, 0])
    return m.head(m.own(x[order]).tanh())[torch.tensor(order).argsort()]


def _turned(m: Any, x: Tensor) -> Tensor:
    """Backwards where the batch holds a large number."""
    if x.abs().max() > 100:
        return m.head(m.own(x.flip(0)).tanh()).flip(0)
    return m.head(m.own(x).tanh())


@pytest.mark.parametrize(
    "forward", [_sorted, _sorted_and_not, _sorted_elsewhere, _sorted_in_a_list, _scattered, _turned]
)
@pytest.mark.parametrize("sizes", [(12,), (8, 4)], ids=str)
def test_samples_that_a_batch_moves_about(forward: Callable[..., Tensor], sizes: tuple[int, ...]) -> None:
    """On the samples that the rules are tried on (first, middle, last) nothing shows: they lie in order."""
    model, (x, y) = prepared(on(lambda: vectors(12), forward, **LINEARS))
    x[:, 0] = torch.tensor([0.0, 5, 3, 4, 8, 1, 6, 2, 9, 7, 10, 11])
    if forward is _turned:
        x[4, 1] = 1000.0
    objective = Objective(model, nn.CrossEntropyLoss(), batches=cut((x, y), sizes))
    rows = classification(model, (x, y))
    check(gradient_moments(objective), rows, objective)
    centred = rows - rows.mean(0)
    gram = NoiseCovariance(objective).gram().matrix
    assert float((gram - centred @ centred.T / 12).abs().max()) < 1e-12 * float(gram.max())


def test_the_last_entry_of_each_sample_is_taken_in_order() -> None:
    """An index that leaves every sample in its place costs nothing: the rules stand."""

    def last(m: Any, x: Tensor) -> Tensor:
        ends = (x[:, :, 0] > 0).sum(1)
        return m.head(m.own(x)[torch.arange(len(x)), ends].tanh())

    model, (x, y) = prepared(on(lambda: (torch.randn(10, 6, 4), torch.randint(3, (10,))), last, **LINEARS))
    objective = Objective(model, nn.CrossEntropyLoss(), (x, y))
    found = gradient_moments(objective)
    check(found, classification(model, (x, y)), objective)
    assert ways(found) == {}
