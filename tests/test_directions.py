"""Slopes, curvatures and squares along directions against one gradient and one dense Hessian for each sample."""

from __future__ import annotations

import functools

import pytest
import torch
from nets import NETS, Checkpointed, OnceDifferentiable, cut, make, mlp, vectors
from oracles import criterion_loss, dense_gradient, dense_hessian, relative
from torch import Tensor, nn
from torch.nn import functional as F

from curvdiag import Hessian, Objective
from curvdiag.errors import ArgumentError, LossError, SecondDerivativeError
from curvdiag.scaling import directions as module
from curvdiag.scaling.directions import direction_samples


def oracle(model: nn.Module, criterion: nn.Module, batch: tuple, names: list[str] | None = None):
    """``g_i`` ``[N, P]`` and ``h_i`` ``[N, P, P]``, sample by sample."""
    losses = [criterion_loss(criterion, (batch[0][i : i + 1], batch[1][i : i + 1])) for i in range(len(batch[1]))]
    gradients = torch.stack([dense_gradient(model, loss, names) for loss in losses])
    return gradients, torch.stack([dense_hessian(model, loss, names) for loss in losses])


def random_directions(size: int, count: int = 3) -> Tensor:
    return torch.randn(size, count, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def check(found, gradients: Tensor, hessians: Tensor, v: Tensor, tolerance: float = 1e-10) -> None:
    products = torch.einsum("npq,qk->npk", hessians, v)
    assert relative(found.slopes, gradients @ v) < tolerance
    assert relative(found.curvatures, (products * v).sum(1)) < tolerance
    if found.squares is not None:
        assert relative(found.squares, products.square().sum(1)) < tolerance


@pytest.mark.parametrize("net", [net for net in NETS if net != "gru"])  # like the LSTM, and ten times slower
def test_they_equal_the_definition_for_every_sample_of_ragged_batches(net: str) -> None:
    model, batch = make(net, samples=7)
    objective = Objective(model, nn.CrossEntropyLoss(), cut(batch, (4, 2, 1)))
    v = random_directions(objective.parameters.size)
    found = direction_samples(objective, v, squares=True)
    check(found, *oracle(model, nn.CrossEntropyLoss(), batch), v)


@pytest.mark.parametrize("closure", [False, True])
def test_checkpointing_takes_part(closure: bool) -> None:
    torch.manual_seed(0)
    model = Checkpointed(reentrant=False, closure=closure).double()
    x, y = vectors(6)
    batch = (x.double(), y)
    v = random_directions(Objective(model, nn.CrossEntropyLoss(), batch).parameters.size)
    found = direction_samples(Objective(model, nn.CrossEntropyLoss(), batch), v, squares=True)
    check(found, *oracle(model, nn.CrossEntropyLoss(), batch), v)


class Cubed(torch.autograd.Function):
    """A function without forward mode."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, grad):
        return 3 * ctx.saved_tensors[0] ** 2 * grad


class WithCubes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.plain = nn.Linear(4, 5), nn.Linear(5, 3), False

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        return self.last(hidden**3 if self.plain else Cubed.apply(hidden))


@pytest.mark.filterwarnings("ignore::curvdiag.errors.CurvdiagWarning")
def test_a_custom_function_without_forward_mode_goes_through_reverse_mode() -> None:
    torch.manual_seed(0)
    model = WithCubes().double()
    x, y = vectors(6)
    batch = (x.double(), y)
    objective = Objective(model, nn.CrossEntropyLoss(), batch)
    v = random_directions(objective.parameters.size)
    check(direction_samples(objective, v, squares=True), *oracle(model, nn.CrossEntropyLoss(), batch), v)


def normalised() -> nn.Sequential:
    """Operations that PyTorch 2.13 differentiates wrongly, or not at all, by forward over forward mode."""
    convolution = nn.Sequential(nn.Unflatten(1, (1, 4)), nn.Conv1d(1, 4, 2), nn.GroupNorm(2, 4), nn.GLU(1))
    instance = nn.Sequential(nn.InstanceNorm1d(2, affine=True), nn.Flatten())
    return nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), convolution, instance, nn.Linear(6, 3))


def test_a_wrong_forward_mode_is_never_believed() -> None:
    """Instance norm's is wrong without an error; the comparison on a few samples must see it."""
    torch.manual_seed(0)
    model = normalised().double()
    x, y = vectors(6)
    batch = (x.double(), y)
    objective = Objective(model, nn.CrossEntropyLoss(), batch)
    v = random_directions(objective.parameters.size)
    check(direction_samples(objective, v, squares=True), *oracle(model, nn.CrossEntropyLoss(), batch), v)


WAYS = ("by_layers", "forward_mode", "reverse_mode")


@pytest.mark.parametrize("without", [1, 2, 3])
def test_every_way_gives_the_same(without: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = make("transformer-tied", samples=5)
    objective = Objective(model, nn.CrossEntropyLoss(), batch)
    v = random_directions(objective.parameters.size)
    first = direction_samples(objective, v, squares=True)

    def fail(*args, **kwargs):
        raise NotImplementedError

    for way in WAYS[:without]:
        monkeypatch.setattr(module, way, fail)
    other = direction_samples(objective, v, squares=True)
    assert relative(other.slopes, first.slopes) < 1e-12
    assert relative(other.curvatures, first.curvatures) < 1e-12
    assert relative(other.squares, first.squares) < 1e-12


@pytest.mark.parametrize("net", ["mlp-tanh", "conv-batchnorm", "transformer-tied", "in-place"])
def test_layers_are_what_common_nets_use(net: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = make(net, samples=5)
    objective = Objective(model, nn.CrossEntropyLoss(), batch)

    def fail(*args, **kwargs):
        raise AssertionError("another way was used")

    for way in (*WAYS[1:], "squares_by_vmap"):
        monkeypatch.setattr(module, way, fail)
    found = direction_samples(objective, random_directions(objective.parameters.size), squares=True)
    assert found.squares is not None
    monkeypatch.setattr(module, "by_layers", fail)
    monkeypatch.setattr(module, "one_by_one", fail)
    with pytest.raises(AssertionError):
        direction_samples(objective, random_directions(objective.parameters.size), squares=True)


class TimeFirst(nn.Module):
    """Samples are the second dimension inside."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(x.transpose(0, 1)).tanh().mean(0))


@pytest.mark.parametrize("sizes", [(1, 4, 3), (1, 1, 6), (8,)])
def test_samples_that_come_second_are_told_apart(sizes: tuple[int, ...]) -> None:
    """Four positions: a batch of one sample, or of four, must not make them look like samples."""
    torch.manual_seed(0)
    model, x, y = TimeFirst().double(), torch.randn(8, 4, 3).double(), torch.randint(3, (8,))
    objective = Objective(model, nn.CrossEntropyLoss(), cut((x, y), sizes))
    v = random_directions(objective.parameters.size)
    batch = x[: sum(sizes)], y[: sum(sizes)]
    check(direction_samples(objective, v, squares=True), *oracle(model, nn.CrossEntropyLoss(), batch), v)


def test_samples_carry_the_weights_that_make_the_mean() -> None:
    model, (x, y) = make("mlp-tanh")
    weight = torch.tensor([1.0, 3.0, 0.5], dtype=torch.float64)
    objective = Objective(model, nn.CrossEntropyLoss(weight=weight), cut((x, y), (6, 4)))
    gradients, hessians = oracle(model, nn.CrossEntropyLoss(), (x, y))
    scale = weight[y] / weight[y].mean()
    v = random_directions(objective.parameters.size)
    found = direction_samples(objective, v, squares=True)
    check(found, gradients * scale[:, None], hessians * scale[:, None, None], v)
    h = Hessian(objective)
    assert relative(found.curvatures.mean(0), (v * (h @ v)).sum(0)) < 1e-10
    assert relative(found.slopes.mean(0), objective.gradient() @ v) < 1e-10


def test_padded_texts_count_by_their_tokens() -> None:
    model, (x, y) = make("transformer-tied", samples=6)
    y[1, 2:], y[4, 1:] = -100, -100
    objective = Objective(model, nn.CrossEntropyLoss(), cut((x, y), (4, 2)))
    v = random_directions(objective.parameters.size)
    found = direction_samples(objective, v, squares=True)
    gradients, hessians = oracle(model, nn.CrossEntropyLoss(reduction="sum"), (x, y))
    scale = len(y) / float((y != -100).sum())
    check(found, gradients * scale, hessians * scale, v)


def test_a_block_is_an_objective_over_its_parameters() -> None:
    model, batch = make("conv-batchnorm", samples=6)
    objective = Objective(model, nn.CrossEntropyLoss(), batch).restricted_to(["conv2.*", "head.bias"])
    assert objective.parameters.names == ("conv2.weight", "conv2.bias", "head.bias")
    v = random_directions(objective.parameters.size)
    found = direction_samples(objective, v, squares=True)
    check(found, *oracle(model, nn.CrossEntropyLoss(), batch, list(objective.parameters.names)), v)


def test_a_loss_of_its_own_with_weights_and_mappings() -> None:
    torch.manual_seed(0)
    model = mlp().double()
    x, y = vectors(8)
    batches = [{"x": x[:5].double(), "y": y[:5]}, {"x": x[5:].double(), "y": y[5:]}]

    def loss(model: nn.Module, batch: dict) -> Tensor:
        return F.cross_entropy(model(batch["x"]), batch["y"], reduction="none")

    objective = Objective.from_loss(model, loss, batches=batches, weight=lambda b: b["x"].abs().sum(1) + 1)
    counts = x.double().abs().sum(1) + 1
    gradients, hessians = oracle(model, nn.CrossEntropyLoss(), (x.double(), y))
    scale = counts / counts.mean()
    v = random_directions(objective.parameters.size)
    found = direction_samples(objective, v, squares=True)
    check(found, gradients * scale[:, None], hessians * scale[:, None, None], v)


def test_many_directions_and_samples_keep_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECE", 7)
    model, batch = make("mlp-tanh", samples=20)
    objective = Objective(model, nn.CrossEntropyLoss(), cut(batch, (3, 3, 9, 5)))
    v = random_directions(objective.parameters.size, 70)
    found = direction_samples(objective, v)
    check(found, *oracle(model, nn.CrossEntropyLoss(), batch), v)


def test_another_type_and_a_picture_of_other_weights() -> None:
    model, batch = make("mlp-tanh", dtype=torch.float32)
    objective = Objective(model, nn.CrossEntropyLoss(), batch)
    weights = objective.weights(dtype=torch.float64)
    v = random_directions(objective.parameters.size)
    truth = oracle(model, nn.CrossEntropyLoss(), batch)
    check(direction_samples(objective, v, dtype=torch.float64), *truth, v)
    check(direction_samples(objective, v, squares=True), *truth, v, tolerance=1e-5)
    with torch.no_grad():
        model[0].weight.zero_()
    check(direction_samples(objective, v, weights=weights, dtype=torch.float64), *truth, v)


def test_progress_and_the_model_is_left_alone() -> None:
    model, batch = make("conv-batchnorm")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    objective = Objective(model, nn.CrossEntropyLoss(), cut(batch, (6, 4)))
    seen: list[tuple[int, int]] = []
    direction_samples(objective, random_directions(objective.parameters.size, 2), progress=lambda *n: seen.append(n))
    assert seen[-1] == (20, 20)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert model.training
    assert all(p.grad is None for p in model.parameters())


def test_refusals() -> None:
    model, batch = make("conv-batchnorm")
    objective = Objective(model, nn.CrossEntropyLoss(), batch, mode="train")
    v = random_directions(objective.parameters.size)
    with pytest.raises(LossError, match="BatchNorm"):
        direction_samples(objective, v)
    mean = functools.partial(lambda m, b: F.cross_entropy(m(b[0]), b[1]))
    with pytest.raises(LossError, match="mean"):
        direction_samples(Objective.from_loss(model, mean, batch), v)
    with pytest.raises(ArgumentError, match="rows"):
        direction_samples(Objective(model, nn.CrossEntropyLoss(), batch), v[1:])
    once = nn.Sequential(nn.Linear(4, 3), OnceDifferentiable()).double()
    x, y = vectors(5)
    objective = Objective(once, nn.CrossEntropyLoss(), (x.double(), y))
    with pytest.raises(SecondDerivativeError):
        direction_samples(objective, random_directions(objective.parameters.size))
