"""One layer's exact moments from its factors, against gradients and Hessians sample by sample."""

from __future__ import annotations

import pytest
import torch
from nets import cut, make, mlp, vectors
from oracles import relative
from test_directions import oracle, random_directions
from torch import Tensor, nn
from torch.nn import functional as F

from curvdiag import Hessian, NoiseCovariance, Objective
from curvdiag.errors import ArgumentError, LossError
from curvdiag.scaling.kronecker import KroneckerLayer


def problem(activation, samples: int = 9, **loss) -> tuple[nn.Module, tuple, Objective]:
    torch.manual_seed(1)
    model = mlp(activation).double()
    x, y = vectors(samples)
    batch = (x.double(), y)
    return model, batch, Objective(model, nn.CrossEntropyLoss(**loss), cut(batch, (4, 4, samples - 8)))


ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh, "in-place": lambda: nn.ReLU(inplace=True)}


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("name", ["0.weight", "2.weight", "4.weight"])
def test_the_factors_give_the_dense_moments(name: str, activation: str) -> None:
    _, batch, objective = problem(ACTIVATIONS[activation])
    plain = problem(nn.Tanh if activation == "tanh" else nn.ReLU)[0]
    layer = KroneckerLayer.of(objective.restricted_to(name))
    gradients, hessians = oracle(plain, nn.CrossEntropyLoss(), batch, [name])
    centred = gradients - gradients.mean(0)
    assert relative(layer.hessian(), hessians.mean(0)) < 1e-10
    assert relative(layer.squared(), (hessians @ hessians).mean(0)) < 1e-10
    assert relative(layer.covariance(), centred.T @ centred / len(centred)) < 1e-10
    assert relative(layer.gradient(), gradients.mean(0)) < 1e-10
    v = random_directions(layer.size, 70)
    found, products = layer.along(v), torch.einsum("npq,qk->npk", hessians, v)
    assert relative(found.slopes, gradients @ v) < 1e-10
    assert relative(found.curvatures, (products * v).sum(1)) < 1e-10
    assert relative(found.squares, products.square().sum(1)) < 1e-10
    assert layer.along(v, squares=False).squares is None
    values = torch.linalg.eigvalsh(hessians)
    largest = layer.largest_curvature()
    if float(values.min()) < -1e-12:
        assert largest is None
    else:
        assert largest == pytest.approx(float(values.max()), rel=1e-10)


def test_both_answers_about_definiteness_occur() -> None:
    """Behind ReLU cross-entropy is convex in a layer's output, behind tanh it is not."""
    assert KroneckerLayer.of(problem(nn.ReLU)[2].restricted_to("0.weight")).largest_curvature() is not None
    assert KroneckerLayer.of(problem(nn.Tanh)[2].restricted_to("0.weight")).largest_curvature() is None


def test_samples_carry_their_weights() -> None:
    weight = torch.tensor([1.0, 3.0, 0.5], dtype=torch.float64)
    block = problem(nn.ReLU, weight=weight)[2].restricted_to("2.weight")
    layer = KroneckerLayer.of(block)
    assert relative(layer.hessian(), Hessian(block).dense()) < 1e-10
    assert relative(layer.covariance(), NoiseCovariance(block).dense()) < 1e-10


def test_small_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    block = problem(nn.Tanh)[2].restricted_to("2.weight")
    layer = KroneckerLayer.of(block)
    whole = layer.hessian(), layer.covariance(), layer.squared()
    monkeypatch.setattr("curvdiag.scaling.kronecker.CHUNK", 64)
    for one, other in zip(whole, (layer.hessian(), layer.covariance(), layer.squared()), strict=True):
        assert relative(one, other) < 1e-12


def test_float32_models_are_measured_in_float64() -> None:
    model, (x, y), _ = problem(nn.ReLU)
    objective = Objective(model.float(), nn.CrossEntropyLoss(), (x.float(), y)).restricted_to("2.weight")
    layer = KroneckerLayer.of(objective)
    assert layer.hessian().dtype == torch.float64
    assert relative(layer.hessian(), Hessian(objective, dtype=torch.float64).dense()) < 1e-10
    assert not model[2]._forward_hooks


class Twice(nn.Module):
    """A layer called twice, or whose weight is also used behind its back."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.layer, self.head = how, nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        z = self.layer(x).tanh()
        if self.how == "twice":
            z = self.layer(z)
        if self.how == "weight":
            z = z + F.linear(z, self.layer.weight)
        if self.how == "penalty":
            z = z + self.layer.weight.square().sum()
        return self.head(z)


@pytest.mark.parametrize(
    ("how", "message"), [("twice", "called"), ("weight", "another way"), ("penalty", "another way")]
)
def test_a_layer_used_in_another_way_is_refused(how: str, message: str) -> None:
    torch.manual_seed(0)
    x, y = vectors(6)
    block = Objective(Twice(how).double(), nn.CrossEntropyLoss(), (x.double(), y)).restricted_to("layer.weight")
    with pytest.raises(ArgumentError, match=message):
        KroneckerLayer.of(block)


def test_refusals() -> None:
    _, _, objective = problem(nn.ReLU)
    for selection in ("2.*", ["0.weight", "2.weight"], "2.bias"):
        with pytest.raises(ArgumentError, match=r"nn\.Linear"):
            KroneckerLayer.of(objective.restricted_to(selection))
    model, batch = make("transformer-tied")
    tokens = Objective(model, nn.CrossEntropyLoss(), batch)
    with pytest.raises(ArgumentError, match="one vector for each sample"):
        KroneckerLayer.of(tokens.restricted_to("mlp.0.weight"))
    with pytest.raises(ArgumentError, match=r"nn\.Linear"):
        KroneckerLayer.of(tokens.restricted_to("head.weight"))
    model, batch = make("conv-batchnorm")
    coupled = Objective(model, nn.CrossEntropyLoss(), batch, mode="train").restricted_to("head.weight")
    with pytest.raises(LossError, match="BatchNorm"):
        KroneckerLayer.of(coupled)
