"""An operator is a picture of the weights at which it was made; one that shares them notices a change."""

from __future__ import annotations

import copy

import pytest
import torch
from nets import make
from oracles import criterion_loss, dense_hessian, relative
from torch.nn import functional as F

from curvdiag.errors import StaleWeightsError
from curvdiag.objective import Objective
from curvdiag.operators import Hessian
from curvdiag.operators.base import linear_map


def optimizer_step(kind, **options):
    def change(model, batch):
        optimizer = kind(model.parameters(), lr=0.05, **options)
        F.cross_entropy(model(batch[0]), batch[1]).backward()
        optimizer.step()

    return change


def load(**options):
    def change(model, batch):
        state = {k: v + 0.3 if v.is_floating_point() else v for k, v in copy.deepcopy(model).state_dict().items()}
        model.load_state_dict(state, **options)

    return change


def data_add(model, batch):
    for parameter in model.parameters():
        parameter.data.add_(0.1)


def data_swap(model, batch):
    for parameter in model.parameters():
        parameter.data = parameter.data + 0.1


def one_number(model, batch):
    """The smallest change: one number of one parameter, behind autograd's back."""
    next(iter(model.parameters())).data.view(-1)[3] += 1e-3


def swap_two(model, batch):
    """A change that leaves sums and norms of the weights as they were."""
    flat = next(iter(model.parameters())).data.view(-1)
    flat[[0, 1]] = flat[[1, 0]]


def fresh_parameter(model, batch):
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.bias = torch.nn.Parameter(module.bias.detach() + torch.linspace(0, 1, len(module.bias)))


CHANGES = {
    "SGD": optimizer_step(torch.optim.SGD, momentum=0.9),
    "fused AdamW": optimizer_step(torch.optim.AdamW, fused=True),
    "foreach AdamW": optimizer_step(torch.optim.AdamW, foreach=True),
    "load_state_dict": load(),
    "load_state_dict, assign": load(assign=True),
    "data.add_": data_add,
    "data = ...": data_swap,
    "one number": one_number,
    "two numbers swapped": swap_two,
    "a new Parameter": fresh_parameter,
}


@pytest.mark.parametrize("memory", [None, 0], ids=["kept", "rebuilt"])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("net", ["mlp-tanh", "conv-batchnorm"])
def test_products_stay_those_of_the_weights_at_which_the_operator_was_made(net, change, memory):
    model, batch = make(net)
    truth = dense_hessian(model, criterion_loss(F.cross_entropy, batch))
    op = Hessian(Objective(model, F.cross_entropy, batch), memory=memory)
    v = torch.ones(op.size, dtype=torch.float64)
    CHANGES[change](model, batch)
    after = dense_hessian(model, criterion_loss(F.cross_entropy, batch))
    assert relative(after @ v, truth @ v) > 1e-8
    assert relative(op @ v, truth @ v) < 1e-10
    model.train()(batch[0])  # Moves running statistics.
    assert relative(op @ v, truth @ v) < 1e-10
    again = Hessian(Objective(model, F.cross_entropy, batch), memory=memory)
    now = dense_hessian(model, criterion_loss(F.cross_entropy, batch))
    assert relative(again @ v, now @ v) < 1e-10


@pytest.mark.parametrize("memory", [None, 0], ids=["kept", "rebuilt"])
@pytest.mark.parametrize("change", CHANGES)
def test_shared_weights_that_changed_raise(change, memory):
    model, batch = make("mlp-tanh")
    truth = dense_hessian(model, criterion_loss(F.cross_entropy, batch))
    op = Hessian(Objective(model, F.cross_entropy, batch), memory=memory, share=True)
    assert relative(op.dense(), truth) < 1e-10
    model(batch[0])
    assert relative(op.dense(), truth) < 1e-10
    CHANGES[change](model, batch)
    v = torch.ones(op.size, dtype=torch.float64)
    with pytest.raises(StaleWeightsError):
        op @ v
    with pytest.raises(StaleWeightsError):
        linear_map(op)
    with pytest.raises(StaleWeightsError):
        op.dense()


@pytest.mark.parametrize("memory", [None, 0], ids=["kept", "rebuilt"])
def test_shared_buffers_that_changed_are_not_silently_used(memory):
    model, batch = make("conv-batchnorm")
    truth = dense_hessian(model, criterion_loss(F.cross_entropy, batch))
    op = Hessian(Objective(model, F.cross_entropy, batch), memory=memory, share=True)
    assert relative(op.dense(), truth) < 1e-10
    model.train()(batch[0])
    try:
        dense = op.dense()
    except StaleWeightsError:
        return
    assert relative(dense, truth) < 1e-10


def test_an_objective_follows_the_weights_that_an_operator_does_not():
    """The objective is the risk at the weights of the moment; each operator made from it is a picture."""
    model, batch = make("mlp-tanh")
    objective = Objective(model, F.cross_entropy, batch)
    first = Hessian(objective)
    value = objective.value()
    data_add(model, batch)
    truth = dense_hessian(model, criterion_loss(F.cross_entropy, batch))
    assert objective.value() != value
    assert relative(Hessian(objective).dense(), truth) < 1e-10
    assert relative(first.dense(), truth) > 1e-6


def test_a_block_is_a_picture_too():
    model, batch = make("mlp-tanh")
    truth = dense_hessian(model, criterion_loss(F.cross_entropy, batch), ["2.weight", "2.bias"])
    op = Hessian(Objective(model, F.cross_entropy, batch))
    early = op.block("2.*")
    data_add(model, batch)
    assert relative(early.dense(), truth) < 1e-10
    assert relative(op.block("2.*").dense(), truth) < 1e-10
    shared = Hessian(Objective(model, F.cross_entropy, batch), share=True).block("2.*")
    shared.dense()
    data_add(model, batch)
    with pytest.raises(StaleWeightsError):
        shared.dense()
