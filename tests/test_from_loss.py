"""Objectives from ``loss(model, batch)``: dict batches, weights, models that return their own loss."""

from __future__ import annotations

import contextlib

import pytest
import torch
from nets import cut, make
from oracles import criterion_loss, dense_hessian, relative
from torch import nn
from torch.nn import functional as F

from curvdiag.errors import CurvdiagError, LossError
from curvdiag.objective import Objective
from curvdiag.operators import Hessian

SIZES = (4, 5, 1)


def as_dicts(parts):
    return [{"x": inputs, "y": targets} for inputs, targets in parts]


FROM_LOSS = {
    "mean": lambda model, b: F.cross_entropy(model(b["x"]), b["y"]),
    "[B]": lambda model, b: F.cross_entropy(model(b["x"]), b["y"], reduction="none"),
    "[B, T]": lambda model, b: F.cross_entropy(model(b["x"]), b["y"], reduction="none")[:, None].expand(-1, 3),
}


@pytest.mark.parametrize("form", FROM_LOSS)
@pytest.mark.parametrize("several", [False, True])
def test_from_loss_takes_dict_batches(form, several):
    model, batch = make("mlp-tanh")
    truth = dense_hessian(model, criterion_loss(F.cross_entropy, batch))
    data = as_dicts(cut(batch, SIZES)) if several else as_dicts([batch])[0]
    objective = Objective.from_loss(model, FROM_LOSS[form], data)
    assert objective.size == 10
    assert relative(Hessian(objective).dense(), truth) < 1e-10


@pytest.mark.parametrize("form", ["count", "per sample"])
def test_from_loss_weighs_batches_and_samples(form):
    model, (inputs, targets) = make("mlp-tanh")
    counts = torch.tensor([1, 5, 2, 0, 3, 1, 1, 4, 2, 2]).double()
    parts = [
        {"x": x, "y": y, "n": n} for (x, y), n in zip(cut((inputs, targets), SIZES), counts.split(SIZES), strict=True)
    ]

    def per_sample(model, b):
        return F.cross_entropy(model(b["x"]), b["y"], reduction="none")

    def mean(model, b):
        return (per_sample(model, b) * b["n"]).sum() / b["n"].sum()

    truth = dense_hessian(model, lambda m: mean(m, {"x": inputs, "y": targets, "n": counts}))
    loss, weight = (mean, lambda b: float(b["n"].sum())) if form == "count" else (per_sample, lambda b: b["n"])
    objective = Objective.from_loss(model, loss, parts, weight=weight)
    assert relative(Hessian(objective).dense(), truth) < 1e-10


def test_a_model_that_returns_its_own_loss():
    class Own(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, x, y):
            return {"loss": F.cross_entropy(self.net(x), y)}

    net, batch = make("mlp-tanh")
    truth = dense_hessian(net, criterion_loss(F.cross_entropy, batch))
    op = Hessian(Objective.from_loss(Own(net), lambda m, b: m(**b)["loss"], as_dicts(cut(batch, SIZES))))
    assert relative(op.dense(), truth) < 1e-10


def test_a_sum_over_samples_is_refused_in_a_loss_of_model_and_batch():
    model, batch = make("mlp-tanh")
    with pytest.raises(LossError, match=r"(?s)sum.*mean|mean.*sum"):
        Objective.from_loss(model, lambda m, b: F.cross_entropy(m(b[0]), b[1], reduction="sum"), batch)


def test_samples_along_another_dimension_are_counted_right_or_refused():
    """Sequence-first data: the first dimension is time, and the batches differ in the second."""

    class SequenceFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.head = nn.LSTM(3, 4), nn.Linear(4, 3)

        def forward(self, x):
            return self.head(self.lstm(x)[0][-1])

    torch.manual_seed(0)
    model, x, y = SequenceFirst().double(), torch.randn(5, 10, 3).double(), torch.arange(10) % 3
    parts = [{"x": x[:, :7], "y": y[:7]}, {"x": x[:, 7:], "y": y[7:]}]
    truth = dense_hessian(model, lambda m: F.cross_entropy(m(x), y))

    def loss(m, b):
        return F.cross_entropy(m(b["x"]), b["y"])

    weighted = Objective.from_loss(model, loss, parts, weight=lambda b: len(b["y"]))
    assert relative(Hessian(weighted).dense(), truth) < 1e-10
    with contextlib.suppress(CurvdiagError):
        assert relative(Hessian(Objective.from_loss(model, loss, parts)).dense(), truth) < 1e-10
