"""Products through activations that are straight between kinks: the same bits, and no zeros for them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from fnmatch import fnmatch
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from oracles import dense_hessian, relative
from torch import Tensor, nn

from curvdiag import GaussNewton, Hessian, Objective
from curvdiag.operators import gradient_graph
from curvdiag.operators.watching import Watching

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "relu_": lambda: nn.ReLU(inplace=True),
    "leaky_relu": lambda: nn.LeakyReLU(0.3),
    "leaky_relu_": lambda: nn.LeakyReLU(0.3, inplace=True),
    "relu6": nn.ReLU6,
    "hardtanh": lambda: nn.Hardtanh(-0.4, 0.7),
    "max_pool": lambda: nn.MaxPool2d(3, stride=2, padding=1),
    "max_pool_dilated": lambda: nn.MaxPool2d(2, stride=1, dilation=2, ceil_mode=True),
}
SIDE = 8


def net(activation: str) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 3, 3, padding=1), nn.SiLU(), ACTIVATIONS[activation](), nn.Flatten(), nn.LazyLinear(4)]
    model = nn.Sequential(*layers)
    x = torch.randn(6, 1, SIDE, SIDE)
    model(x)
    return model.double(), x.double(), torch.randint(4, (6,))


def with_zeros() -> Any:
    """Graphs as PyTorch makes them."""
    return mock.patch.object(gradient_graph, "masked", return_value=[])


class Zeros(Watching):
    """Counts tensors of zeros that are as large as some activation."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function in (torch.ops.aten.zeros_like.default, torch.ops.aten.zeros.default) and result.ndim == 4:
            self.count += 1
        return result


@pytest.mark.parametrize("memory", [None, 0], ids=["kept", "rebuilt"])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_hessian_is_the_dense_one_and_its_products_have_the_bits_of_graphs_with_zeros(name, memory):
    model, x, y = net(name)
    truth = dense_hessian(model, lambda m: F.cross_entropy(m(x), y))
    hessian = Hessian(Objective(model, nn.CrossEntropyLoss(), (x, y)), memory=memory)
    assert relative(hessian.dense(), truth) < 1e-12
    vector = torch.randn(hessian.size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with with_zeros():
        plain = Hessian(Objective(model, nn.CrossEntropyLoss(), (x, y)), memory=memory)
        assert torch.equal(hessian @ vector, plain @ vector)
        assert float(hessian.quadratic_form(vector)) == pytest.approx(float(vector @ (plain @ vector)), rel=1e-12)


@pytest.mark.parametrize("name", [name for name in ACTIVATIONS if name != "leaky_relu_"])
def test_a_product_makes_no_zeros_for_them(name):
    model, x, y = net(name)
    made = []
    for context in (with_zeros(), nullcontext()):
        with context:
            hessian = Hessian(Objective(model, nn.CrossEntropyLoss(), (x, y)))
            vector = torch.ones(hessian.size, dtype=torch.float64)
            hessian @ vector
            with Zeros() as zeros:
                hessian @ vector
            made.append(zeros.count)
    assert made[0] > made[1] == 0


SAMPLES = 4000
"""So many that a step of any parameter takes some of them over a kink."""


def critic() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 1)).double()
    return model, torch.randn(SAMPLES, 5).double(), torch.randn(SAMPLES).sign().double()


@pytest.mark.parametrize("memory", [None, 0], ids=["kept", "rebuilt"])
@pytest.mark.parametrize("params", ["*", "0.*", "0.bias", "2.*", "4.*"])
@pytest.mark.parametrize("loss", ["sum", "hinge"])
def test_what_depends_on_a_parameter_through_masks_alone_has_no_derivative_and_none_is_missing(loss, params, memory):
    model, x, y = critic()

    def criterion(outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs[:, 0] if loss == "sum" else F.relu(1 - targets * outputs[:, 0])

    names = [name for name, _ in model.named_parameters() if fnmatch(name, params)]
    truth = dense_hessian(model, lambda m: criterion(m(x), y).mean(), names)
    hessian = Hessian(Objective(model, criterion, (x, y), params=params), memory=memory)
    assert float((hessian.dense() - truth).norm()) <= 1e-12 * max(1.0, float(truth.norm()))
    assert bool(truth.any()) is (params == "*")
    assert hessian.unreached == []
    vector = torch.ones(hessian.size, dtype=torch.float64)
    assert float(hessian.quadratic_form(vector)) == pytest.approx(float(vector @ truth @ vector), rel=1e-11, abs=1e-12)


def test_a_linear_classifier_under_a_hinge_and_a_penalty_with_a_kink() -> None:
    _, x, y = critic()
    torch.manual_seed(0)
    linear = nn.Linear(5, 1).double()
    assert not Hessian(Objective(linear, lambda o, t: F.relu(1 - t * o[:, 0]).mean(), (x, y))).dense().any()

    def loss(m: Any, batch: Any) -> Tensor:
        return F.softplus(-batch[1] * m(batch[0])[:, 0]) + F.relu(m.weight).sum()

    truth = dense_hessian(linear, lambda m: loss(m, (x, y)).mean())
    assert relative(Hessian(Objective.from_loss(linear, loss, (x, y))).dense(), truth) < 1e-12


def test_blocks_behind_masks_are_those_of_the_dense_hessian():
    model, x, _ = critic()
    truth = dense_hessian(model, lambda m: m(x).mean())
    hessian = Hessian(Objective(model, lambda o, t: o.mean(1), (x, x)))
    assert not hessian.block("0.*").dense().any()
    assert relative(hessian.block(["0.weight", "2.weight"]).dense(), _part(truth, model, [0, 2])) < 1e-12


@pytest.mark.parametrize("own", [False, True])
def test_the_gauss_newton_matrix_of_a_hinge_is_zero_on_either_graph(own):
    model, x, y = critic()
    objective = Objective(model, lambda o, t: F.relu(1 - t * o[:, 0]), (x, y))
    matrix = GaussNewton(objective) if own else GaussNewton(objective, graphs=Hessian(objective))
    assert not (matrix @ torch.ones(matrix.size, dtype=torch.float64)).any()


class Hooked(nn.Module):
    """Doubles what goes back through its ReLU, by a hook on its node."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.first(x))
        if y.grad_fn is not None:
            y.grad_fn.register_hook(lambda made, slopes: (2 * made[0],))
        return self.last(y)


def test_a_hook_of_the_users_on_such_a_node_is_heard():
    torch.manual_seed(0)
    model, x, y = Hooked().double(), torch.randn(9, 5).double(), torch.randint(4, (9,))
    objective = Objective(model, nn.CrossEntropyLoss(), (x, y), params="first.*")
    vector = torch.ones(objective.parameters.size, dtype=torch.float64)
    product = Hessian(objective) @ vector
    with with_zeros():
        plain = Hessian(Objective(model, nn.CrossEntropyLoss(), (x, y), params="first.*"))
        assert torch.equal(plain @ vector, product)


def _part(matrix: Tensor, model: nn.Module, wanted: list[int]) -> Tensor:
    places = torch.arange(len(matrix)).split([p.numel() for p in model.parameters()])
    inside = torch.cat([places[i] for i in wanted])
    return matrix[inside][:, inside]


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.utils.checkpoint.checkpoint(lambda z: F.relu(self.first(z)), x, use_reentrant=False))


def test_what_a_checkpoint_makes_again_is_left_alone():
    torch.manual_seed(0)
    model, x, y = Checkpointed().double(), torch.randn(8, 5).double(), torch.randint(4, (8,))
    truth = dense_hessian(model, lambda m: F.cross_entropy(m(x), y))
    assert relative(Hessian(Objective(model, nn.CrossEntropyLoss(), (x, y))).dense(), truth) < 1e-12


def test_saved_activations_that_lie_elsewhere_are_left_alone():
    model, x, y = net("relu")
    truth = dense_hessian(model, lambda m: F.cross_entropy(m(x), y))

    def criterion(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets)

    class Moved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Tensor:
            with torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone):
                return self.inner(x)

    assert relative(Hessian(Objective(Moved(), criterion, (x, y))).dense(), truth) < 1e-12
