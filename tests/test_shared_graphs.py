"""One set of kept graphs serves the Hessian and the matrices of per-sample gradients."""

from __future__ import annotations

import pytest
import torch
from nets import cut, make
from oracles import relative
from torch import nn

from curvdiag import EmpiricalFisher, GaussNewton, Hessian, NoiseCovariance, Objective
from curvdiag.errors import ArgumentError, LossError, StaleWeightsError


def objective(net: str = "conv-batchnorm") -> Objective:
    model, batch = make(net)
    return Objective(model, nn.CrossEntropyLoss(), cut(batch, (7, 3)))


@pytest.mark.parametrize(
    "options", [{}, {"memory": 0, "micro_batch": 7}, {"micro_batch": 3}, {"dtype": torch.float32}], ids=str
)
def test_products_are_the_same_on_borrowed_graphs(options: dict) -> None:
    problem = objective()
    hessian = Hessian(problem, **options)
    built = hessian.cost.graphs
    for kind in (NoiseCovariance, EmpiricalFisher):
        own, borrowed = kind(problem, **options), kind(problem, graphs=hessian)
        assert borrowed.dtype == own.dtype
        vector = torch.ones(own.size, dtype=own.dtype)
        assert torch.equal(borrowed @ vector, own @ vector)
        assert borrowed.cost.matvecs == 1
        assert borrowed.plan is hessian.plan
        if "memory" not in options:
            assert borrowed.cost.graphs == 0
    assert hessian.cost.matvecs == 0
    assert hessian.cost.graphs == built


def test_a_block_or_another_covariance_lends_its_graphs_too() -> None:
    problem = objective()
    whole = NoiseCovariance(problem).dense()
    block = Hessian(problem).block("head.*")
    assert torch.equal(NoiseCovariance(problem, graphs=block).dense(), whole)
    assert relative(NoiseCovariance(problem, 5, graphs=EmpiricalFisher(problem)).dense(), whole / 5) < 1e-12


def test_borrowed_graphs_are_at_the_weights_of_their_owner() -> None:
    problem = objective()
    hessian = Hessian(problem)
    before = NoiseCovariance(problem).dense()
    with torch.no_grad():
        problem.model.head.weight.mul_(2)
    assert torch.equal(NoiseCovariance(problem, graphs=hessian).dense(), before)
    shared = NoiseCovariance(problem, graphs=Hessian(problem, share=True))
    shared.dense()
    with torch.no_grad():
        problem.model.head.weight.mul_(2)
    with pytest.raises(StaleWeightsError):
        shared.dense()


def test_graphs_of_something_else_are_refused() -> None:
    problem, other = objective("mlp-tanh"), objective("mlp-tanh")
    with pytest.raises(ArgumentError, match="another objective"):
        NoiseCovariance(problem, graphs=Hessian(other))
    for wrong in (Hessian(problem, method="finite-difference"), GaussNewton(problem)):
        with pytest.raises(ArgumentError, match="exact"):
            EmpiricalFisher(problem, graphs=wrong)
    hessian = Hessian(problem)
    for options in ({"dtype": torch.float32}, {"share": True}, {"memory": 0}, {"micro_batch": 2}):
        with pytest.raises(ArgumentError, match="leave these out"):
            NoiseCovariance(problem, graphs=hessian, **options)
    model, batch = make("conv-batchnorm")
    coupled = Objective(model, nn.CrossEntropyLoss(), batch, mode="train")
    with pytest.raises(LossError, match="BatchNorm"):
        NoiseCovariance(coupled, graphs=Hessian(coupled))
