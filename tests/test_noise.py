"""Covariance and empirical Fisher matrix against one backward pass for each sample."""

from __future__ import annotations

import functools

import pytest
import torch
from nets import cut, make
from oracles import relative
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from curvdiag import EmpiricalFisher, Hessian, NoiseCovariance, Objective, spectral_density, top_eigenpairs
from curvdiag.errors import ArgumentError, LossError

NETS = ["mlp-tanh", "mlp-relu", "conv-batchnorm", "transformer-tied", "lstm"]


def gradients(model: nn.Module, batch: tuple) -> torch.Tensor:
    """Per-sample gradients ``[N, P]``, one backward pass each, in eval mode."""
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    flags = [(m, m.training) for m in model.modules()]
    model.eval()
    rows = []
    for i in range(len(batch[1])):
        leaves = {n: dict(model.named_parameters())[n].detach().clone().requires_grad_() for n in names}
        loss = F.cross_entropy(functional_call(model, leaves, (batch[0][i : i + 1],)), batch[1][i : i + 1])
        found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        parts = zip(found, leaves.values(), strict=True)
        rows.append(torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in parts]))
    for module, flag in flags:
        module.training = flag
    return torch.stack(rows)


def covariance(rows: torch.Tensor) -> torch.Tensor:
    centred = rows - rows.mean(0)
    return centred.T @ centred / len(rows)


@pytest.mark.parametrize("options", [{}, {"memory": 0, "micro_batch": 7}, {"micro_batch": 3}], ids=str)
@pytest.mark.parametrize("net", NETS)
def test_both_equal_their_definitions(net: str, options: dict) -> None:
    model, batch = make(net)
    rows = gradients(model, batch)
    objective = Objective(model, nn.CrossEntropyLoss(), cut(batch, (len(batch[1]) - 3, 3)))
    assert relative(NoiseCovariance(objective, **options).dense(), covariance(rows)) < 1e-10
    assert relative(EmpiricalFisher(objective, **options).dense(), rows.T @ rows / len(rows)) < 1e-10


def test_samples_carry_the_weights_that_make_the_mean() -> None:
    """``g_i`` is weighted by the class weight over the mean class weight: then the mean of g_i is the gradient."""
    model, (x, y) = make("mlp-tanh")
    weight = torch.tensor([1.0, 3.0, 0.5], dtype=torch.float64)
    objective = Objective(model, nn.CrossEntropyLoss(weight=weight), (x, y))
    rows = gradients(model, (x, y)) * (weight[y] / weight[y].mean())[:, None]
    assert relative(rows.mean(0), objective.gradient()) < 1e-10
    assert relative(NoiseCovariance(objective).dense(), covariance(rows)) < 1e-10


@pytest.mark.parametrize(("replacement", "population"), [(True, None), (False, 40)])
def test_the_mini_batch_scale_is_that_of_drawn_batches(replacement: bool, population: int | None) -> None:
    model, batch = make("mlp-tanh")
    rows = gradients(model, batch)
    size, n = 4, len(rows)
    objective = Objective(model, nn.CrossEntropyLoss(), batch)
    op = NoiseCovariance(objective, size, replacement, population=population and n)
    vector = torch.randn(op.size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    dots, generator = rows @ vector, torch.Generator().manual_seed(1)
    draws = 20_000
    if replacement:
        drawn = torch.randint(n, (draws, size), generator=generator)
    else:
        drawn = torch.rand(draws, n, generator=generator).argsort(1)[:, :size]
    variance = dots[drawn].mean(1).var()
    assert float(vector @ (op @ vector)) == pytest.approx(float(variance), rel=5 * (2 / draws) ** 0.5)


def test_a_block_and_one_product_for_many_vectors() -> None:
    model, batch = make("conv-batchnorm")
    rows = gradients(model, batch)
    op = NoiseCovariance(Objective(model, nn.CrossEntropyLoss(), batch))
    block = op.block(lambda name, _: name.endswith("bias"))
    layout = op.parameters
    index = torch.cat([torch.arange(layout.size)[layout.slices[layout.names.index(n)]] for n in block.parameters.names])
    assert relative(block.dense(), covariance(rows[:, index])) < 1e-10
    vectors = torch.randn(op.size, 5, dtype=torch.float64)
    assert relative(op @ vectors, covariance(rows) @ vectors) < 1e-10


def test_the_algorithms_take_it() -> None:
    model, batch = make("mlp-tanh")
    truth = torch.linalg.eigvalsh(covariance(gradients(model, batch)))
    op = NoiseCovariance(Objective(model, nn.CrossEntropyLoss(), batch))
    assert float(top_eigenpairs(op, 3, tol=1e-8).values[2]) == pytest.approx(float(truth[-3]), rel=1e-8)
    trace = spectral_density(op, steps=20, probes=60).trace()
    assert abs(trace.value - float(truth.sum())) < 4 * trace.standard_error


def test_c_is_h_where_theory_says_so() -> None:
    """Well-specified logistic regression at the weights that drew its labels: both are the Fisher matrix."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(40_000, 3, generator=generator, dtype=torch.float64)
    model = nn.Linear(3, 2, bias=False).double()
    nn.init.normal_(model.weight, generator=generator)
    labels = torch.multinomial(model(inputs).softmax(1).detach(), 1, generator=generator).squeeze(1)
    objective = Objective(model, nn.CrossEntropyLoss(), (inputs, labels))
    assert relative(NoiseCovariance(objective).dense(), Hessian(objective).dense()) < 0.03


def test_what_needs_single_samples_is_refused_without_them() -> None:
    model, batch = make("conv-batchnorm")
    with pytest.raises(LossError, match="BatchNorm"):
        NoiseCovariance(Objective(model, nn.CrossEntropyLoss(), batch, mode="train"))
    mean = functools.partial(lambda m, b: F.cross_entropy(m(b[0]), b[1]))
    with pytest.raises(LossError, match="one loss for each sample"):
        EmpiricalFisher(Objective.from_loss(model, mean, batch))
    objective = Objective(model, nn.CrossEntropyLoss(), batch)
    with pytest.raises(ArgumentError, match="population"):
        NoiseCovariance(objective, 4, replacement=False)
    with pytest.raises(ArgumentError):
        NoiseCovariance(objective, 0)
    with pytest.raises(ArgumentError):
        NoiseCovariance(objective, 50, replacement=False, population=40)
