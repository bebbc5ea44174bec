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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("samples", [1, 3])
def test_a_kinked_net_is_refused_also_where_the_vectors_of_a_check_meet_no_kink(samples, dtype):
    """On few samples most products are exact, and up to a quarter of the others wrong by more than a twentieth."""
    for seed in range(4):
        torch.manual_seed(seed)
        model, (x, y) = mlp(nn.ReLU, sizes=(4, 7, 3)).to(dtype), vectors(samples)
        with pytest.raises(SecondDerivativeError, match="ReLU '1'"):
            Hessian(Objective(model, F.cross_entropy, (x.to(dtype), y)), method="finite-difference")


SLOPES = {
    "relu": (F.relu, "Relu"),
    "leaky": (F.leaky_relu, "LeakyRelu"),
    "prelu": (lambda x: F.prelu(x, x.new_full((1,), 0.2)), "Prelu"),
    "selu": (F.selu, "Elu"),
    "hardswish": (F.hardswish, "Hardswish"),
    "relu times another": (lambda x: F.relu(x) * (1 + x), "Relu"),
    "relu squared": (lambda x: F.relu(x).square(), None),
    "relu times itself": (lambda x: (lambda z: z * z)(F.relu(x)), None),
    "relu cubed": (lambda x: F.relu(x) ** 3, None),
    "elu": (F.elu, None),
    "celu": (lambda x: F.celu(x, 2.0), None),
    "normalize": (lambda x: F.normalize(x, dim=1), None),
}


class Bent(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.first, self.second, self.function = nn.Linear(4, 6), nn.Linear(6, 3), function

    def forward(self, x):
        return self.second(self.function(self.first(x)))


@pytest.mark.parametrize("name", SLOPES)
def test_what_counts_is_whether_the_gradient_jumps(name):
    torch.manual_seed(0)
    function, node = SLOPES[name]
    objective = Objective(Bent(function).double(), F.cross_entropy, (vectors(2)[0].double(), vectors(2)[1]))
    if node is not None:
        with pytest.raises(SecondDerivativeError, match=f"kinks .{node}"):
            Hessian(objective, method="finite-difference")
        return
    v = directions(objective.parameters.size, torch.float64)[:, 0]
    products = [Hessian(objective, method=method) @ v for method in ("finite-difference", "exact")]
    assert relative(*products) < 1e-3


def test_a_kink_that_the_chosen_parameters_do_not_pass_is_none():
    torch.manual_seed(0)
    objective = Objective(mlp(nn.ReLU, sizes=(4, 40, 3)), F.cross_entropy, vectors(64), params="2.*")
    v = directions(objective.parameters.size, torch.float32)[:, 0]
    products = [Hessian(objective, method=method) @ v for method in ("finite-difference", "exact")]
    assert relative(*products) < 1e-3


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
