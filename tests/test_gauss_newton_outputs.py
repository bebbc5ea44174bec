"""Where the Gauss-Newton matrix splits a loss: the model's outputs, and what does not pass through them."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from jacobians import dense_gauss_newton
from nets import Checkpointed, OnceDifferentiable, cut, make
from oracles import relative
from torch import Tensor, nn
from torch.nn import functional as F

from curvdiag import GaussNewton, Hessian, Objective
from curvdiag.errors import LossError, SecondDerivativeError

NETS = ["mlp-tanh", "mlp-relu", "conv-batchnorm", "transformer-tied", "lstm"]
LAYOUTS = [{}, {"memory": 0, "micro_batch": 7}, {"micro_batch": 3}]


class Wrapped(nn.Module):
    """Returns its logits inside something else."""

    def __init__(self, net: nn.Module, kind: str) -> None:
        super().__init__()
        self.net, self.kind = net, kind

    def forward(self, x: Tensor) -> Any:
        logits = self.net(x)
        if self.kind == "dict":
            return {"hidden": 2 * logits, "logits": logits}
        if self.kind == "object":
            return SimpleNamespace(logits=logits)
        return (x, logits)


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("kind", ["dict", "object", "tuple"])
def test_logits_inside_what_the_model_returns(kind: str, reduction: str) -> None:
    net, batch = make("mlp-tanh")
    model = Wrapped(net, kind)
    pick: dict[str, Callable[[Any], Tensor]] = {
        "dict": lambda out: out["logits"],
        "object": lambda out: out.logits,
        "tuple": lambda out: out[1],
    }

    def loss(m: nn.Module, b: tuple) -> Tensor:
        return F.cross_entropy(pick[kind](m(b[0])), b[1], reduction=reduction)

    objective = Objective.from_loss(model, loss, batches=cut(batch, (7, 3)))
    op = GaussNewton(objective, outputs=pick[kind] if kind == "tuple" else None)
    assert relative(op.dense(), dense_gauss_newton(net, nn.CrossEntropyLoss(), batch)) < 1e-10
    if kind == "tuple":
        with pytest.raises(LossError, match="outputs="):
            GaussNewton(objective)


def test_what_does_not_pass_through_the_outputs_is_refused() -> None:
    net, (x, y) = make("mlp-tanh")

    def refused(model: nn.Module, loss: Callable[..., Tensor], match: str, **options: Any) -> None:
        with pytest.raises(LossError, match=match):
            GaussNewton(Objective.from_loss(model, loss, batch=(x, y)), **options)

    def cross(z: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy(z, t, reduction="none")

    refused(net, lambda m, b: cross(m(b[0]), b[1]) + 1e-9 * m[0].weight.square().sum(), "'0.weight'")
    refused(net, lambda m, b: cross(m(b[0]) + m(2 * b[0]), b[1]), "called 2 times")
    refused(net, lambda m, b: cross(m.forward(b[0]), b[1]), "not called")
    two = Wrapped(net, "dict")
    refused(two, lambda m, b: cross(m(b[0])["hidden"], b[1]), "other ways", outputs=lambda out: out["logits"] * 1)
    split = nn.Sequential(net, nn.Linear(3, 6).double())
    refused(split, lambda m, b: cross(m(b[0]).chunk(2, 1)[0], b[1]), "tensor", outputs=lambda out: None)
    # Both halves come from one function of the graph, and only one of them is what was picked.
    halves = nn.Module()
    halves.body = split
    halves.forward = lambda v: halves.body(v).unbind(1)  # type: ignore[method-assign]
    refused(
        halves,
        lambda m, b: (lambda z: z[0].square() + z[1].square())(m(b[0])),
        "other ways",
        outputs=lambda out: out[0],
    )


def test_a_loss_that_is_linear_in_the_outputs_is_refused_and_says_why() -> None:
    model, batch = make("mlp-tanh")
    model = nn.Sequential(model, nn.LogSoftmax(1))
    with pytest.raises(LossError, match="log-probabilities"):
        GaussNewton(Objective(model, nn.NLLLoss(), batch))
    with pytest.raises(LossError, match="linear"):
        GaussNewton(Objective(model, lambda z, t: (z * z.detach().sin()).sum(1), batch))


def test_each_tensor_that_is_picked_is_looked_at() -> None:
    """That logits were fine says nothing of the log-probabilities beside them, in which the loss is linear."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.own = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            logits = self.own(x)
            return logits, logits.log_softmax(1)

    x, y = make("mlp-tanh")[1]
    loss = lambda m, b: F.nll_loss(m(b[0])[1], b[1], reduction="none")  # noqa: E731
    objective = Objective.from_loss(Both().double(), loss, (x, y))
    op = GaussNewton(objective, outputs=lambda returned: returned[0])
    assert relative(op.dense(), Hessian(objective).dense()) < 1e-10
    with pytest.raises(LossError, match="linear"):
        GaussNewton(objective, outputs=lambda returned: returned[1])


class Detached(torch.autograd.Function):
    """Twice its input; nothing that happens before it is seen by a second backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad.detach()


class HalfHidden(torch.autograd.Function):
    """``x^4`` whose second derivative is taken for a third of what it is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**4

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 4 * x * x.detach() ** 2 * grad


class Apply(nn.Module):
    def __init__(self, function: Any, around: bool = False) -> None:
        super().__init__()
        self.function, self.around = function, around

    def forward(self, x: Tensor) -> Tensor:
        return self.function.apply(x) + x if self.around else self.function.apply(x)


@pytest.mark.parametrize("memory", [None, 0], ids=["kept", "rebuilt"])
@pytest.mark.parametrize("around", [False, True], ids=["alone", "with a way around it"])
def test_a_function_of_the_model_that_hides_its_derivative_is_an_error(around: bool, memory: int | None) -> None:
    _, batch = make("mlp-tanh")
    model = nn.Sequential(nn.Linear(4, 5), Apply(Detached, around), nn.Linear(5, 3)).double()
    with pytest.raises(SecondDerivativeError, match="backward pass"):
        GaussNewton(Objective(model, nn.CrossEntropyLoss(), batch), memory=memory).dense()


def test_functions_without_a_second_derivative_are_errors() -> None:
    _, batch = make("mlp-tanh")
    for middle in (OnceDifferentiable(), Checkpointed(reentrant=True)):
        layers = [nn.Linear(4, 4), middle] if isinstance(middle, OnceDifferentiable) else [middle, nn.Linear(3, 3)]
        model = nn.Sequential(*layers).double()
        with pytest.raises(SecondDerivativeError):
            GaussNewton(Objective(model, nn.CrossEntropyLoss(), batch)).dense()


def test_a_model_whose_own_second_derivative_is_wrong_is_served_without_a_warning() -> None:
    """Only the Hessian takes it; ``x^4`` is right once, and linear in what flows back."""
    _, batch = make("mlp-tanh")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), Apply(HalfHidden)).double()
    truth = dense_gauss_newton(model, nn.CrossEntropyLoss(), batch)
    assert relative(GaussNewton(Objective(model, nn.CrossEntropyLoss(), batch)).dense(), truth) < 1e-10


@pytest.mark.parametrize("kind", ["tensor", "dict", "object"])
def test_a_loss_that_hides_a_part_of_its_second_derivative_is_an_error(kind: str) -> None:
    net, (x, y) = make("mlp-tanh")
    model: nn.Module = net if kind == "tensor" else Wrapped(net, kind)

    def loss(function: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
        def of(m: nn.Module, b: tuple) -> Tensor:
            z = m(b[0])
            return function(z if kind == "tensor" else z["logits"] if kind == "dict" else z.logits).mean(1)

        return of

    with pytest.raises(SecondDerivativeError, match="HalfHidden"):
        GaussNewton(Objective.from_loss(model, loss(HalfHidden.apply), batch=(x, y)))
    whole = GaussNewton(Objective.from_loss(model, loss(lambda z: z**4), batch=(x, y))).dense()
    assert relative(whole, dense_gauss_newton(net, lambda z, t: (z**4).mean(), (x, y))) < 1e-10


def test_a_hook_of_the_user_that_changes_the_outputs_is_seen() -> None:
    net, batch = make("mlp-tanh")
    scaled = nn.Sequential(*make("mlp-tanh")[0], _Twice())
    truth = dense_gauss_newton(scaled, nn.CrossEntropyLoss(), batch)
    net.register_forward_hook(lambda module, inputs, out: 2 * out)
    assert relative(GaussNewton(Objective(net, nn.CrossEntropyLoss(), batch)).dense(), truth) < 1e-10


class _Twice(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def test_a_parameter_that_is_returned_as_it_is() -> None:
    class Direct(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.free = nn.Parameter(torch.arange(1.0, 4.0, dtype=torch.float64))

        def forward(self) -> Tensor:
            return self.free

    objective = Objective.from_loss(Direct(), lambda m, b: (m() ** 4 * b.sum()).sum(), batch=torch.ones(1).double())
    assert relative(GaussNewton(objective).dense(), torch.diag(12 * torch.arange(1.0, 4.0).double() ** 2)) < 1e-12


def test_an_output_that_the_loss_does_not_use_gives_zero() -> None:
    model, (x, y) = make("mlp-tanh")
    objective = Objective.from_loss(model, lambda m, b: (0 * m(b[0]) ** 2).sum(1) + 1.0, batch=(x, y))
    assert not GaussNewton(objective).dense().any()
