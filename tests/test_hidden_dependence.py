"""What PyTorch or the model makes hard to differentiate twice: the right number, or an error that says so."""

from __future__ import annotations

import pytest
import torch
from nets import make, vectors
from oracles import criterion_loss, dense_hessian, relative
from torch import nn
from torch.nn import functional as F

from curvdiag.errors import CurvdiagError, SecondDerivativeError
from curvdiag.objective import Objective
from curvdiag.operators import Hessian


class Bag(nn.Module):
    def __init__(self):
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(7, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.bag(x).tanh())


class Margin(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 3)

    def forward(self, x):
        margins = F.multi_margin_loss(self.net(x), torch.zeros(len(x)).long(), reduction="none")
        return margins[:, None].expand(-1, 3)


@pytest.mark.parametrize(
    ("build", "inputs"),
    [(Bag, torch.arange(40).view(10, 4) % 7), (Margin, vectors()[0])],
    ids=["bag", "margin"],
)
def test_an_operation_that_pytorch_cannot_differentiate_twice_is_our_error(build, inputs):
    with pytest.raises(SecondDerivativeError, match="finite-difference"):
        Hessian(Objective(build(), F.cross_entropy, (inputs, vectors()[1]))).dense()


class Referring(nn.Module):
    """Uses a weight through a plain list, which no copy of the parameters replaces."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 3), nn.Linear(3, 3)
        self.tied = [self.first.weight]

    def forward(self, x):
        return self.last(self.first(x).tanh()) + (x @ self.tied[0].T).sin()


def live_hessian(model, value):
    """By double backward through the model's own parameters."""
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(value, parameters, create_graph=True)
    rows = []
    for entry in torch.cat([g.flatten() for g in gradients]):
        row = torch.autograd.grad(entry, parameters, retain_graph=True, materialize_grads=True)
        rows.append(torch.cat([r.flatten() for r in row]))
    return torch.stack(rows)


@pytest.mark.parametrize("case", ["in the model", "in the loss"])
def test_a_dependence_on_weights_held_elsewhere_is_right_or_refused(case):
    """A weight decay over ``list(model.parameters())`` taken beforehand is the common form."""
    torch.manual_seed(0)
    model = Referring().double() if case == "in the model" else nn.Linear(4, 3).double()
    held = list(model.parameters()) if case == "in the loss" else []
    x, y = make("mlp-tanh")[1]

    def criterion(outputs, targets):
        return F.cross_entropy(outputs, targets) + sum(0.1 * p.pow(2).sum() for p in held)

    truth = live_hessian(model, criterion(model(x), y))
    try:
        dense = Hessian(Objective(model, criterion, (x, y))).dense()
    except CurvdiagError:
        return
    assert relative(dense, truth) < 1e-10


def test_sparse_gradients_are_right_or_refused():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 4, sparse=True), nn.Flatten(), nn.Tanh(), nn.Linear(20, 3)).double()
    batch = (torch.arange(50).view(10, 5) % 7, torch.arange(10) % 3)
    try:
        dense = Hessian(Objective(model, F.cross_entropy, batch)).dense()
    except CurvdiagError:
        return
    model[0].sparse = False
    assert relative(dense, dense_hessian(model, criterion_loss(F.cross_entropy, batch))) < 1e-10
