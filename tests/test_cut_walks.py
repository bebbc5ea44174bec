"""Where the second backward pass of a quadratic form can be cut half way, and where products are taken instead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from curvdiag import Hessian, Objective
from curvdiag.errors import SecondDerivativeError
from curvdiag.operators.gradient_graph import GradientGraph
from curvdiag.operators.meeting import Meeting


@pytest.fixture
def halves() -> Any:
    """Counts passes that stop half way."""
    with mock.patch.object(Meeting, "form", autospec=True, side_effect=Meeting.form) as counted:
        yield counted


class Cube(torch.autograd.Function):
    """Its backward pass can be differentiated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * slope * x**2


class Custom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(Cube.apply(torch.tanh(self.first(x))))  # type: ignore[no-untyped-call]


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.utils.checkpoint.checkpoint(lambda y: torch.tanh(self.first(y)), x, use_reentrant=False))


class Complex(nn.Module):
    """A small branch through complex numbers, whose products of gradients would need a conjugate."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.branch = nn.Linear(5, 6), nn.Linear(6, 4), nn.Linear(5, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)) + 1e-3 * torch.fft.fft(torch.sin(self.branch(x))).abs())


class Hooked(nn.Module):
    """A hook on a tensor that expects a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        if y.requires_grad:
            y.register_hook(lambda slope: slope.clone())
        return self.last(torch.tanh(y))


def grouped() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 6), nn.GroupNorm(2, 6), nn.Linear(6, 4))


def logged() -> nn.Module:
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4))
    model[1].register_full_backward_hook(lambda module, inner, outer: (inner[0] + 0 * outer[0].norm(),))
    return model


@pytest.mark.parametrize("make", [Custom, Checkpointed, Complex, Hooked, grouped, logged])
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.filterwarnings("ignore:the custom function")
def test_where_walks_cannot_be_cut_products_are_taken(
    make: Callable[[], nn.Module], dtype: torch.dtype, rtol: float, halves: mock.Mock
) -> None:
    """In single precision a small part that is wrong would not show in the check of symmetry."""
    torch.manual_seed(0)
    batch = torch.randn(7, 5, dtype=dtype), torch.randint(4, (7,))
    operator = Hessian(Objective(make().to(dtype), nn.CrossEntropyLoss(), batches=[batch]), batched=False)
    vectors = torch.randn(operator.size, 3, dtype=dtype)
    truth = ((operator.dense() @ vectors) * vectors).sum(0).double()
    torch.testing.assert_close(operator.quadratic_form(vectors), truth, rtol=rtol, atol=rtol / 10)
    assert not halves.called


class HookedWhereLong(nn.Module):
    """A hook that is not on the few samples of the check."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        if y.requires_grad and len(x) > 8:
            y.register_hook(lambda slope: slope.clone())
        return self.last(torch.tanh(y))


def test_a_graph_whose_walk_cannot_be_cut_after_all_takes_products() -> None:
    torch.manual_seed(0)
    batch = torch.randn(40, 5, dtype=torch.float64), torch.randint(4, (40,))
    operator = Hessian(Objective(HookedWhereLong().double(), nn.CrossEntropyLoss(), batches=[batch]), batched=False)
    vectors = torch.randn(operator.size, 3, dtype=torch.float64)
    truth = ((operator.dense() @ vectors) * vectors).sum(0)
    torch.testing.assert_close(operator.quadratic_form(vectors), truth, rtol=1e-9, atol=1e-10)


class Solved(nn.Module):
    """One gradient that is handed to one input and enters that of another."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix, self.right, self.last = nn.Linear(5, 9), nn.Linear(5, 3), nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        matrix = torch.tanh(self.matrix(x)).view(-1, 3, 3) + 3 * torch.eye(3, dtype=x.dtype)
        return self.last(torch.linalg.solve(matrix, torch.sin(self.right(x)) ** 2))


def test_a_gradient_that_enters_another_one_is_told_apart_from_it(halves: mock.Mock) -> None:
    torch.manual_seed(0)
    batch = torch.randn(7, 5, dtype=torch.float64), torch.randint(4, (7,))
    operator = Hessian(Objective(Solved().double(), nn.CrossEntropyLoss(), batches=[batch]), batched=False)
    vectors = torch.randn(operator.size, 3, dtype=torch.float64)
    operator @ vectors
    truth = ((operator.dense() @ vectors) * vectors).sum(0)
    torch.testing.assert_close(operator.quadratic_form(vectors), truth, rtol=1e-9, atol=1e-10)
    assert halves.call_count == 3


@pytest.fixture
def products() -> Any:
    """Counts products in graphs."""
    with mock.patch.object(GradientGraph, "multiply", autospec=True, side_effect=GradientGraph.multiply) as counted:
        yield counted


def test_a_graph_like_the_checked_one_takes_no_product_before_its_first_form(halves: Any, products: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 4)).double()
    x, y = torch.randn(40, 5).double(), torch.randint(4, (40,))
    hessian = Hessian(Objective(model, nn.CrossEntropyLoss(), (x, y)))
    vector = torch.ones(hessian.size, dtype=torch.float64)
    form = float(hessian.quadratic_form(vector))
    assert (halves.call_count, products.call_count) == (1, 0)
    assert form == pytest.approx(float(vector @ (hessian @ vector)), rel=1e-12)


class Switching(nn.Module):
    """Hides a derivative, but not in batches as small as that of the checks."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.shift = nn.Linear(5, 4), nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        cube = self.shift**3 if len(x) < 9 else self.shift.detach() ** 2 * self.shift
        return self.layer(x) + cube


def test_a_graph_of_other_operations_is_looked_at_before_its_first_form(products: Any) -> None:
    torch.manual_seed(0)
    model, x = Switching().double(), torch.randn(40, 5).double()
    hessian = Hessian(Objective(model, lambda outputs, targets: outputs.sum(1), (x, x)))
    with pytest.raises(SecondDerivativeError, match="shift"):
        hessian.quadratic_form(torch.ones(hessian.size, dtype=torch.float64))
    assert products.called


def test_a_parameter_without_a_gradient_in_the_checked_samples_is_looked_at_in_the_others() -> None:
    """A hidden derivative, where the first input of a sample is not zero."""
    torch.manual_seed(0)
    model, x = nn.Linear(5, 1).double(), torch.randn(40, 5).double()
    model.shift = nn.Parameter(torch.ones(1).double())
    x[:8, 0] = 0

    def loss(m: Any, batch: Tensor) -> Tensor:
        return nn.functional.softplus(m(batch))[:, 0] + batch[:, 0] * m.shift.detach() ** 2 * m.shift

    hessian = Hessian(Objective.from_loss(model, loss, x))
    with pytest.raises(SecondDerivativeError, match="shift"):
        hessian.quadratic_form(torch.ones(hessian.size, dtype=torch.float64))
