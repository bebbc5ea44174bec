"""Randomness in the loss is found once, at the start, and its cause is named."""

from __future__ import annotations

import pytest
import torch
from nets import Drop, make
from oracles import criterion_loss, dense_hessian, relative
from torch import nn
from torch.nn import functional as F

from curvdiag.errors import NotDeterministicError
from curvdiag.objective import Objective
from curvdiag.operators import Hessian


class Inner(nn.Module):
    def __init__(self, step):
        super().__init__()
        self.first, self.step, self.last = nn.Linear(4, 40), step, nn.Linear(40, 3)

    def forward(self, x):
        return self.last(self.step(self.first(x)))


class Functional(nn.Module):
    def forward(self, x):
        return F.dropout(x, 0.5, training=self.training)


class Noise(nn.Module):
    def forward(self, x):
        return x + torch.randn_like(x)


@pytest.mark.parametrize(
    ("step", "mode", "cause"),
    [
        (nn.Dropout(0.5), "train", r"encoder\.step"),
        (nn.AlphaDropout(0.5), "train", r"encoder\.step"),
        (nn.RReLU(), "train", r"(?i)encoder\.step|random"),
        (Functional(), "train", r"(?i)dropout|random"),
        (Noise(), "eval", "(?i)random"),
    ],
    ids=["Dropout", "AlphaDropout", "RReLU", "functional dropout", "noise"],
)
def test_randomness_is_refused_with_its_cause(step, mode, cause):
    model = nn.Sequential()
    model.add_module("encoder", Inner(step))
    _, (x, y) = make("mlp-tanh")
    with pytest.raises(NotDeterministicError, match=cause):
        Hessian(Objective(model, F.cross_entropy, (x.float(), y), mode=mode))


def test_dropout_of_recurrent_and_attention_layers_is_found():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.memory, self.head = (
                nn.GRU(3, 8, num_layers=2, dropout=0.5, batch_first=True),
                nn.Linear(8, 3),
            )

        def forward(self, x):
            return self.head(self.memory(x)[0][:, -1])

    x, y = make("lstm", dtype=torch.float32)[1]
    with pytest.raises(NotDeterministicError, match="memory"):
        Hessian(Objective(Recurrent(), F.cross_entropy, (x, y), mode="train"))


def test_a_random_loss_is_refused():
    model, batch = make("mlp-tanh")
    with pytest.raises(NotDeterministicError):
        Hessian(Objective(model, lambda o, t: F.cross_entropy(o + torch.rand_like(o), t), batch))


def test_dropout_is_no_obstacle_in_eval_mode_nor_at_rate_zero():
    torch.manual_seed(0)
    model, (x, y) = Drop().double().train(), make("mlp-tanh")[1]
    truth = dense_hessian(model, criterion_loss(F.cross_entropy, (x, y)))
    assert relative(Hessian(Objective(model, F.cross_entropy, (x, y))).dense(), truth) < 1e-10
    model.body[3].p = 0.0
    coupled = dense_hessian(model, criterion_loss(F.cross_entropy, (x, y)), mode="train")
    op = Hessian(Objective(model, F.cross_entropy, (x, y), mode="train"))
    assert relative(op.dense(), coupled) < 1e-10


def test_batchnorm_in_train_mode_is_deterministic():
    """Its running statistics move with each pass; the loss does not."""
    model, batch = make("conv-batchnorm")
    Hessian(Objective(model, F.cross_entropy, batch, mode="train"))


def test_an_unknown_mode_is_refused():
    model, batch = make("mlp-tanh")
    with pytest.raises(ValueError, match="eval"):
        Objective(model, F.cross_entropy, batch, mode="test")
