"""``v^T H v`` without the product, against the dense Hessian and against products."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.autograd.functional import hessian
from torch.func import functional_call

from curvdiag import GaussNewton, Hessian, NoiseCovariance, Objective, trace
from curvdiag.errors import ArgumentError
from curvdiag.operators import EmpiricalFisher
from curvdiag.operators.gradient_graph import GradientGraph
from curvdiag.operators.meeting import Meeting


class Residual(nn.Module):
    """Additions that hand one gradient to several activations, a saved result, a tensor used three times."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.one, self.other, self.leave = (nn.Linear(5, 5) for _ in range(4))
        self.norm, self.shift = nn.LayerNorm(5), nn.Parameter(torch.randn(5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x) + self.shift
        x = x + torch.tanh(self.one(self.norm(x))) + x.square()
        x = x + self.other(F.gelu(x)) * torch.sigmoid(x)
        return self.leave(x)


class Attention(nn.Module):
    """Views, chunks of one tensor, a softmax, an embedding tied to the last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.qkv = nn.Embedding(6, 4), nn.Linear(4, 12)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens)
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        x = x + (q @ k.transpose(-2, -1)).softmax(-1) @ v
        return (x @ self.tokens.weight.T).mean(1)


class InPlace(nn.Module):
    """Results overwritten in place, and a parameter that enters through its square."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.scale = nn.Linear(5, 8), nn.Parameter(torch.rand(8) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).add_(self.scale**2).tanh_()
        z = y.clone()
        z[:, 0] = y[:, 1] * y[:, 2]
        return z[:, :4]


def conv() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, stride=2), nn.BatchNorm2d(3), nn.SiLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(3, 4)
    )


def inputs_of(name: str) -> Tensor:
    return {
        "attention": torch.randint(6, (7, 5)),
        "conv": torch.randn(7, 1, 6, 6, dtype=torch.float64),
        "conv in train mode": torch.randn(7, 1, 6, 6, dtype=torch.float64),
    }.get(name, torch.randn(7, 5, dtype=torch.float64))


NETS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 4)),
    "linear": lambda: nn.Linear(5, 4),
    "residual": Residual,
    "attention": Attention,
    "in place": InPlace,
    "conv": conv,
    "conv in train mode": conv,
}


def case(name: str, **options: Any) -> tuple[nn.Module, Objective, Tensor]:
    """A net in double precision, its objective over two batches, and the dense Hessian."""
    torch.manual_seed(0)
    model, inputs = NETS[name]().double(), inputs_of(name)
    mode = "train" if name.endswith("train mode") else "eval"
    targets = torch.randint(4, (7,))
    batches = [(inputs[:3], targets[:3]), (inputs[3:], targets[3:])]
    objective = Objective(model, nn.CrossEntropyLoss(), batches=batches, mode=mode, **options)  # type: ignore[arg-type]
    twin = copy.deepcopy(model).train(mode == "train")
    for module in twin.modules():
        if isinstance(module, nn.BatchNorm2d) and mode == "train":
            module.track_running_stats, module.running_mean, module.running_var = False, None, None
    layout, flat = objective.parameters, nn.utils.parameters_to_vector(twin.parameters()).detach()

    def loss(vector: Tensor) -> Tensor:
        weights = dict(zip(layout.names, layout.views(vector), strict=True))
        parts = [F.cross_entropy(functional_call(twin, weights, (x,)), y, reduction="sum") for x, y in batches]
        return sum(parts) / 7  # type: ignore[return-value]

    return model, objective, hessian(loss, flat)


@pytest.fixture
def halves() -> Any:
    """Counts passes that stop half way."""
    with mock.patch.object(Meeting, "form", autospec=True, side_effect=Meeting.form) as counted:
        yield counted


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("memory", [None, 0])
def test_forms_are_those_of_the_dense_matrix(name: str, memory: int | None, halves: mock.Mock) -> None:
    _, objective, dense = case(name)
    operator = Hessian(objective, memory=memory, batched=False)
    vectors = torch.randn(operator.size, 5, dtype=torch.float64)
    truth = ((dense @ vectors) * vectors).sum(0)
    for _ in range(2):
        torch.testing.assert_close(operator.quadratic_form(vectors), truth, rtol=1e-9, atol=1e-10)
    assert halves.call_count >= 5, "the forms were taken from whole products"


@pytest.mark.parametrize("name", NETS)
def test_forms_of_blocks_are_those_of_their_part_of_the_dense_matrix(name: str, halves: mock.Mock) -> None:
    _, objective, dense = case(name)
    whole = Hessian(objective, batched=False)
    for place, inside in zip(objective.parameters.names, objective.parameters.slices, strict=True):
        block = whole.block([place])
        vectors = torch.randn(block.size, 3, dtype=torch.float64)
        truth = ((dense[inside, inside] @ vectors) * vectors).sum(0)
        torch.testing.assert_close(block.quadratic_form(vectors), truth, rtol=1e-9, atol=1e-10)
    # The first vector of each block is a product, which shows that no derivative is missing there.
    assert halves.call_count >= 2 * len(objective.parameters)


@pytest.mark.parametrize("name", ["mlp", "residual", "attention"])
def test_batched_forms_are_those_taken_one_by_one(name: str, halves: mock.Mock) -> None:
    _, objective, dense = case(name)
    vectors = torch.randn(len(dense), 70, dtype=torch.float64)
    found = Hessian(objective, batched=True).quadratic_form(vectors)
    torch.testing.assert_close(found, ((dense @ vectors) * vectors).sum(0), rtol=1e-9, atol=1e-10)
    assert halves.call_args.kwargs["batched"]


@pytest.mark.parametrize("kind", [GaussNewton, EmpiricalFisher, NoiseCovariance])
@pytest.mark.parametrize("borrowed", [False, True])
@pytest.mark.parametrize("batched", [False, True])
def test_forms_of_the_other_matrices_are_those_of_their_products(
    kind: type[GaussNewton] | type[EmpiricalFisher], borrowed: bool, batched: bool
) -> None:
    _, objective, _ = case("residual")
    if borrowed:
        operator = kind(objective, graphs=Hessian(objective, batched=batched))
    else:
        operator = kind(objective, batched=batched)
    vectors = torch.randn(operator.size, 6, dtype=torch.float64)
    truth = ((operator.dense() @ vectors) * vectors).sum(0)
    assert float(truth.min()) > 0
    torch.testing.assert_close(operator.quadratic_form(vectors), truth, rtol=1e-10, atol=0)


def test_forms_of_the_covariance_of_mini_batches_are_scaled_as_the_matrix() -> None:
    _, objective, _ = case("mlp")
    operator = NoiseCovariance(objective, 3, False, population=20)
    vector = torch.randn(operator.size, dtype=torch.float64)
    assert float(operator.quadratic_form(vector)) == pytest.approx(float(vector @ (operator @ vector)), rel=1e-10)


def test_a_trace_is_the_mean_of_the_products_that_it_spares(halves: mock.Mock) -> None:
    _, objective, dense = case("residual")
    operator = Hessian(objective, batched=False)
    for method in ("hutchinson", "hutch++"):
        short = trace(operator, method=method, probes=12, seed=3)  # type: ignore[arg-type]
        long = trace(dense, method=method, probes=12, seed=3)  # type: ignore[arg-type]
        assert short.value == pytest.approx(long.value, rel=1e-9)
        assert short.standard_error == pytest.approx(long.standard_error, rel=1e-7)
    assert halves.call_count >= 12
    assert operator.cost.matvecs == 24


def test_a_block_alone_takes_forms_after_its_first_product(halves: mock.Mock) -> None:
    _, objective, dense = case("residual")
    block, inside = Hessian(objective, batched=False).block(["enter.weight"]), objective.parameters.slices[1]
    assert objective.parameters.names[1] == "enter.weight"
    vectors = torch.randn(block.size, 4, dtype=torch.float64)
    truth = ((dense[inside, inside] @ vectors) * vectors).sum(0)
    torch.testing.assert_close(block.quadratic_form(vectors), truth, rtol=1e-9, atol=1e-10)
    assert halves.call_count >= 3


def test_products_in_one_thread_are_right_while_another_takes_forms() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 60), nn.Tanh(), nn.Linear(60, 60), nn.Tanh(), nn.Linear(60, 4)).double()
    batch = torch.randn(50, 30, dtype=torch.float64), torch.randint(4, (50,))
    operator = Hessian(Objective(model, nn.CrossEntropyLoss(), batches=[batch]), batched=False)
    vector = torch.randn(operator.size, dtype=torch.float64)
    truth, stop = operator @ vector, threading.Event()

    def take() -> None:
        while not stop.is_set():
            operator.quadratic_form(vector)

    other = threading.Thread(target=take)
    other.start()
    try:
        found = [operator @ vector for _ in range(60)]
    finally:
        stop.set()
        other.join()
    assert all(torch.equal(one, truth) for one in found)


def test_a_meeting_that_misses_something_is_noticed_and_not_used(halves: mock.Mock) -> None:
    """Motions that are wrong in one place, as if an operation handed on what it should not."""
    whole = Meeting.product

    def wrong(self: Meeting, *args: Any) -> Any:
        products, motions = whole(self, *args)
        place = next(i for i in motions if self.activations[i].node.name() == "LogSoftmaxBackward0")
        return products, {**motions, place: 1.01 * motions[place]}

    with mock.patch.object(Meeting, "product", wrong):
        _, objective, dense = case("residual")
        operator = Hessian(objective, batched=False)
    vector = torch.randn(operator.size, dtype=torch.float64)
    assert float(operator.quadratic_form(vector)) == pytest.approx(float(vector @ dense @ vector), rel=1e-9)
    assert not halves.called


def test_the_check_of_symmetry_takes_one_product_and_half_of_one() -> None:
    with (
        mock.patch.object(GradientGraph, "whole", autospec=True, side_effect=GradientGraph.whole) as products,
        mock.patch.object(Meeting, "half", autospec=True, side_effect=Meeting.half) as halves,
    ):
        Hessian(case("residual")[1])
    assert (products.call_count, halves.call_count) == (0, 1)


def test_hooks_are_gone_after_a_form_and_after_one_that_fails() -> None:
    """Products after forms are what they were before, bit for bit."""
    _, objective, _ = case("residual")
    operator = Hessian(objective, batched=False)
    vector = torch.randn(operator.size, dtype=torch.float64)
    before = operator @ vector
    operator.quadratic_form(vector)
    assert torch.equal(operator @ vector, before)
    with mock.patch("torch.autograd.grad", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        operator.quadratic_form(vector)
    assert torch.equal(operator @ vector, before)


def test_forms_refuse_vectors_of_another_length() -> None:
    _, objective, _ = case("mlp")
    with pytest.raises(ArgumentError, match="cannot multiply"):
        Hessian(objective).quadratic_form(torch.zeros(3))
