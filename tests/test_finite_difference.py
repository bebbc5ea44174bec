"""Finite differences: close to the exact Hessian on smooth nets, refused where they would not be."""

from __future__ import annotations

import pytest
import torch
from nets import Checkpointed, Recurrent, cut, make, mlp, sequences, vectors
from oracles import criterion_loss, dense_hessian, relative
from torch import nn
from torch.nn import functional as F

from curvdiag.errors import CurvdiagError, SecondDerivativeError
from curvdiag.objective import Objective
from curvdiag.operators import Hessian


def directions(size, dtype):
    generator = torch.Generator().manual_seed(2)
    return torch.randn(size, 4, generator=generator, dtype=torch.float64).to(dtype)


SMOOTH = {
    "tanh": (lambda: mlp(nn.Tanh), vectors),
    "GELU": (lambda: mlp(nn.GELU), vectors),
    "average pooling": (
        lambda: nn.Sequential(nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 3, 3), nn.SiLU(), nn.AvgPool1d(4), nn.Flatten()),
        lambda: vectors(features=6),
    ),
    "LSTM": (Recurrent, sequences),
}


def smooth(net, dtype):
    build, data = SMOOTH[net]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, (x, y) = build().to(dtype), data()
    return model, (x.to(dtype), y)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("net", SMOOTH)
def test_smooth_nets_agree_with_the_exact_hessian(net, dtype):
    model, batch = smooth(net, dtype)
    truth = dense_hessian(model, criterion_loss(F.cross_entropy, batch))
    op = Hessian(Objective(model, F.cross_entropy, cut(batch, (4, 5, 1))), method="finite-difference")
    v = directions(op.size, dtype)
    for scale in (1.0, 1e-6, 1e6):
        for column in v.T:
            assert relative(op @ (scale * column), truth @ (scale * column.double())) < 1e-3
    assert relative(op @ v, truth @ v.double()) < 1e-3
    assert relative(op @ v[:, 0], truth @ v[:, 0].double()) < 1e-3


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_weights_of_any_size_agree(size):
    torch.manual_seed(0)
    model, (x, _) = nn.Sequential(nn.Linear(4, 3), nn.Softplus(), nn.Linear(3, 2)), vectors()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(size)
    x, y = x / size, torch.randn(10, 2)
    truth = dense_hessian(model, criterion_loss(F.mse_loss, (x, y)))
    op = Hessian(Objective(model, F.mse_loss, (x, y)), method="finite-difference")
    v = directions(op.size, torch.float32)[:, 0]
    assert relative(op @ v, truth @ v.double()) < 1e-3


def test_a_zero_vector_gives_a_zero_product():
    model, batch = smooth("tanh", torch.float32)
    op = Hessian(Objective(model, F.cross_entropy, batch), method="finite-difference")
    assert not (op @ torch.zeros(op.size)).any()
    mixed = op @ torch.stack([torch.zeros(op.size), torch.ones(op.size)], 1)
    assert not mixed[:, 0].any()
    assert mixed.isfinite().all()


def test_a_block_by_finite_differences():
    model, batch = smooth("tanh", torch.float64)
    names = ["2.weight", "2.bias"]
    truth = dense_hessian(model, criterion_loss(F.cross_entropy, batch), names)
    block = Hessian(Objective(model, F.cross_entropy, batch), method="finite-difference").block("2.*")
    assert relative(block.dense(), truth) < 1e-3


def test_the_model_moves_neither_during_nor_after():
    model, batch = smooth("tanh", torch.float32)
    before = [p.detach().clone() for p in model.parameters()]
    op = Hessian(Objective(model, F.cross_entropy, batch), method="finite-difference")
    first = op @ torch.ones(op.size)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert torch.equal(op @ torch.ones(op.size), first)


def test_they_serve_where_the_exact_method_cannot():
    torch.manual_seed(0)
    model, (x, y) = Checkpointed(reentrant=True), vectors()
    truth = dense_hessian(model, criterion_loss(F.cross_entropy, (x, y)))
    op = Hessian(Objective(model, F.cross_entropy, (x, y)), method="finite-difference")
    v = directions(op.size, torch.float32)[:, 0]
    assert relative(op @ v, truth @ v.double()) < 1e-3


KINKED = {
    "ReLU": lambda: mlp(nn.ReLU, sizes=(4, 40, 40, 3)),
    "LeakyReLU": lambda: mlp(nn.LeakyReLU, sizes=(4, 40, 40, 3)),
    "MaxPool1d": lambda: nn.Sequential(
        nn.Linear(4, 80), nn.Unflatten(1, (1, 80)), nn.MaxPool1d(4), nn.Flatten(), nn.Linear(20, 3)
    ),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kink", KINKED)
def test_nets_with_kinks_are_refused_by_name(kink, dtype):
    torch.manual_seed(0)
    model, (x, y) = KINKED[kink]().to(dtype), vectors(64)
    where = "2" if kink == "MaxPool1d" else "1, 3"
    with pytest.raises(SecondDerivativeError, match=rf"{kink}|\({where}\)"):
        op = Hessian(Objective(model, F.cross_entropy, (x.to(dtype), y)), method="finite-difference")
        op @ directions(op.size, dtype)[:, 0]


def test_kinks_in_functional_form_are_refused_too():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 60), nn.Linear(60, 3)

        def forward(self, x):
            return self.second(F.relu(self.first(x)))

    torch.manual_seed(0)
    model, batch = Functional(), vectors(64)
    with pytest.raises(SecondDerivativeError, match=r"(?i)kink|relu|converge"):
        op = Hessian(Objective(model, F.cross_entropy, batch), method="finite-difference")
        op @ directions(op.size, torch.float32)[:, 0]


def test_bfloat16_forward_passes_are_refused():
    model, (x, y) = smooth("tanh", torch.bfloat16)
    with pytest.raises(CurvdiagError, match="bfloat16"):
        op = Hessian(Objective(model, F.cross_entropy, (x, y)), method="finite-difference")
        op @ directions(op.size, torch.bfloat16)[:, 0]


def test_bfloat16_weights_work_in_a_float32_copy():
    model, (x, y) = smooth("tanh", torch.bfloat16)
    truth = dense_hessian(model, criterion_loss(F.cross_entropy, (x, y)))
    for method in ("finite-difference", "exact"):
        op = Hessian(Objective(model, F.cross_entropy, (x, y)), method=method, dtype=torch.float32)
        v = directions(op.size, torch.float32)[:, 0]
        assert relative(op @ v, truth @ v.double()) < 1e-3


def test_an_error_above_the_tolerance_asked_for_is_refused():
    """No central difference in single precision is good to twelve digits."""
    model, batch = smooth("tanh", torch.float32)
    with pytest.raises(SecondDerivativeError, match="rtol"):
        op = Hessian(Objective(model, F.cross_entropy, batch), method="finite-difference", rtol=1e-12)
        op @ directions(op.size, torch.float32)[:, 0]


def test_a_kinked_net_is_refused_also_where_one_vector_happens_to_meet_no_kink():
    """In double precision the step is short: most products are exact, the others fifty times too large."""
    torch.manual_seed(0)
    model, batch = (
        mlp(nn.ReLU, sizes=(50, 100, 100, 5)).double(),
        (torch.randn(256, 50).double(), torch.arange(256) % 5),
    )
    try:
        op = Hessian(Objective(model, F.cross_entropy, batch), method="finite-difference")
    except SecondDerivativeError:
        return
    exact = Hessian(Objective(model, F.cross_entropy, batch))
    v = torch.randn(op.size, 40, generator=torch.Generator().manual_seed(1)).double()
    errors = (op @ v - exact @ v).norm(dim=0) / (exact @ v).norm(dim=0)
    assert float(errors.max()) < 0.05


def test_autocast_inside_the_model_is_refused():
    class Inside(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp(nn.Tanh)

        def forward(self, x):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return self.net(x).float()

    torch.manual_seed(0)
    with pytest.raises(SecondDerivativeError, match="bfloat16"):
        op = Hessian(Objective(Inside(), F.cross_entropy, vectors()), method="finite-difference")
        op @ directions(op.size, torch.float32)[:, 0]


def test_conv_net_with_relu_is_refused_and_exact_is_not():
    model, batch = make("conv-batchnorm")
    Hessian(Objective(model, F.cross_entropy, batch)).dense()
    with pytest.raises(SecondDerivativeError):
        op = Hessian(Objective(model, F.cross_entropy, batch), method="finite-difference")
        op @ directions(op.size, torch.float64)[:, 0]
