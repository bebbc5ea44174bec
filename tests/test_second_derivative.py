"""A missing second derivative is never taken for a zero one."""

from __future__ import annotations

import warnings

import pytest
import torch
from nets import Checkpointed, cut, make, vectors
from oracles import criterion_loss, dense_hessian, relative
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from curvdiag.errors import CurvdiagWarning, SecondDerivativeError
from curvdiag.objective import Objective
from curvdiag.operators import Hessian


class Cube(torch.autograd.Function):
    """Its backward pass is made of differentiable operations."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * grad


class OnceCube(Cube):
    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * grad


class PartlyHiddenCube(Cube):
    """Forgets how its derivative depends on its input: silent, and wrong."""

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 3 * x.detach() ** 2 * grad


class HiddenCube(Cube):
    """Hides everything: nothing before it nor after it is seen by a second backward pass."""

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return (3 * x**2 * grad).detach()


class Rectified(torch.autograd.Function):
    """Right, and with a kink, which a comparison with finite differences must not take for a mistake."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * (x > 0)


class Apply(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function.apply(x)


def net_with(function, dtype=torch.float64):
    """A hidden derivative stands next to the weights that it hides: a ``tanh`` between would show a part."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        first = nn.Identity() if function is HiddenCube else nn.Tanh()
        model = nn.Sequential(nn.Linear(4, 5), nn.Sequential(first, Apply(function)), nn.Linear(5, 3))
        x, y = vectors()
    return model.to(dtype), (x.to(dtype), y)


def everything(model, batch, **options):
    op = Hessian(Objective(model, F.cross_entropy, batch), **options)
    return op.dense()


@pytest.mark.parametrize("memory", [None, 0], ids=["kept", "rebuilt"])
@pytest.mark.parametrize("function", [OnceCube, HiddenCube])
def test_a_function_without_a_second_derivative_is_an_error_naming_the_module(function, memory):
    model, batch = net_with(function)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CurvdiagWarning)
        with pytest.raises(SecondDerivativeError, match=rf"(?s)(1\.1|{function.__name__}).*finite"):
            everything(model, batch, memory=memory)


def test_a_hidden_second_derivative_at_the_loss_is_an_error():
    """The loss's own gradient is cut off: no parameter has a second derivative, and all have a gradient."""
    model, (x, _) = make("mlp-tanh")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CurvdiagWarning)
        with pytest.raises(SecondDerivativeError):
            Hessian(Objective(model, lambda o, t: HiddenCube.apply(o).mean(1), (x, x[:, :3]))).dense()


def test_once_differentiable_outside_the_chosen_parameters_does_no_harm():
    """Constant in the chosen parameters, the function's derivative is not asked for."""
    model, batch = net_with(OnceCube)
    truth = dense_hessian(net_with(Cube)[0], criterion_loss(F.cross_entropy, batch), ["2.weight", "2.bias"])
    op = Hessian(Objective(model, F.cross_entropy, batch, params="2.*"))
    assert relative(op.dense(), truth) < 1e-10


@pytest.mark.parametrize("memory", [None, 0], ids=["kept", "rebuilt"])
@pytest.mark.parametrize("function", [Cube, Rectified])
def test_any_other_custom_function_gets_one_warning(function, memory):
    model, batch = net_with(function)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        op = Hessian(Objective(model, F.cross_entropy, cut(batch, (4, 4, 2))), memory=memory, micro_batch=3)
        dense = op.dense()
    ours = [w for w in caught if issubclass(w.category, CurvdiagWarning)]
    assert len(ours) == 1
    assert function.__name__ in str(ours[0].message)
    assert relative(dense, dense_hessian(model, criterion_loss(F.cross_entropy, batch))) < 1e-10


@pytest.mark.parametrize("memory", [None, 0], ids=["kept", "rebuilt"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_function_that_hides_a_part_is_never_silent(memory, dtype):
    """Its Hessian is symmetric and wrong by more than half; a warning is the least, an error is better."""
    model, batch = net_with(PartlyHiddenCube, dtype)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            everything(model, batch, memory=memory)
            said = " ".join(str(w.message) for w in caught if issubclass(w.category, CurvdiagWarning))
        except SecondDerivativeError as error:
            said = str(error)
    assert "PartlyHiddenCube" in said


def test_nets_without_custom_functions_warn_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for net in ("mlp-relu", "conv-batchnorm", "transformer-tied", "lstm"):
            model, batch = make(net)
            assert everything(model, batch).isfinite().all()


@pytest.mark.parametrize("memory", [None, 0], ids=["kept", "rebuilt"])
def test_reentrant_checkpointing_is_an_error_naming_module_and_remedy(memory):
    model = Checkpointed(reentrant=True).double()
    _, batch = make("mlp-tanh")
    with pytest.raises(SecondDerivativeError, match=r"(?s)checkpoint.*use_reentrant=False"):
        everything(model, batch, memory=memory)
    outer = nn.ModuleDict({"encoder": model})
    with pytest.raises(SecondDerivativeError, match="encoder"):
        Hessian(Objective.from_loss(outer, lambda m, b: F.cross_entropy(m["encoder"](b[0]), b[1]), batch)).dense()


@pytest.mark.parametrize("memory", [None, 0], ids=["kept", "rebuilt"])
@pytest.mark.parametrize("change", [False, True], ids=["unchanged", "live weights changed"])
@pytest.mark.parametrize("closure", [False, True], ids=["module", "function"])
def test_non_reentrant_checkpointing_recomputes_at_the_weights_of_the_operator(memory, change, closure):
    torch.manual_seed(0)
    model = Checkpointed(reentrant=False, closure=closure).double()
    batch = make("mlp-tanh")[1]
    truth = dense_hessian(model, criterion_loss(F.cross_entropy, batch))
    op = Hessian(Objective(model, F.cross_entropy, batch), memory=memory)
    if change:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
    assert relative(op.dense(), truth) < 1e-10
    assert relative(op.dense(), truth) < 1e-10


def test_checkpointing_works_with_shared_weights():
    model, batch = Checkpointed(reentrant=False).double(), make("mlp-tanh")[1]
    truth = dense_hessian(model, criterion_loss(F.cross_entropy, batch))
    op = Hessian(Objective(model, F.cross_entropy, batch), share=True)
    assert relative(op.dense(), truth) < 1e-10


class Offset(nn.Module):
    """``tanh`` of a net, plus a parameter that the outputs are linear in."""

    def __init__(self, net):
        super().__init__()
        self.net, self.offset = net, nn.Parameter(torch.ones(3).double())

    def forward(self, x):
        return self.net(x).tanh() + self.offset


@pytest.mark.parametrize("memory", [None, 0], ids=["kept", "rebuilt"])
@pytest.mark.parametrize("form", ["per sample", "mean"])
def test_a_parameter_that_enters_linearly_has_true_zero_rows(memory, form):
    net, (x, y) = make("mlp-tanh")
    model = Offset(net)

    def criterion(outputs, targets):
        return outputs.sum(1) if form == "per sample" else outputs.sum(1).mean()

    truth = dense_hessian(model, lambda m: m(x).sum(1).mean())
    objective = Objective(model, criterion, (x, y))
    op = Hessian(objective, memory=memory)
    assert relative(op.dense(), truth) < 1e-10
    offset = objective.parameters.views(op.dense()[0])[list(objective.parameters.names).index("offset")]
    assert not offset.any()
    assert list(op.unreached) == []


@pytest.mark.parametrize("memory", [None, 0], ids=["kept", "rebuilt"])
def test_a_linear_loss_has_a_zero_hessian(memory):
    model, (x, y) = nn.Linear(4, 3).double(), make("mlp-tanh")[1]
    dense = Hessian(Objective(model, lambda o, t: o.mean(1), (x, y)), memory=memory).dense()
    assert dense.shape == (15, 15)
    assert not dense.any()


def test_a_step_in_the_gradient_is_not_mistaken_for_a_missing_derivative():
    """ReLU and absolute values have zero second derivatives almost everywhere, and are no error."""
    torch.manual_seed(0)
    x, _ = make("mlp-tanh")[1]
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    truth = dense_hessian(model, lambda m: F.l1_loss(m(x), torch.zeros(10, 3).double()))
    targets = torch.zeros(10, 3).double()
    assert relative(Hessian(Objective(model, nn.L1Loss(), (x, targets))).dense(), truth) < 1e-10
    single = Hessian(Objective(nn.Linear(4, 3).double(), nn.L1Loss(), (x, targets))).dense()
    assert not single.any()


def test_an_in_place_or_detached_path_is_right():
    """A detached target of the model's own output: its gradient is not followed, in the oracle neither."""
    model, (x, _) = make("mlp-tanh")

    def criterion(outputs, targets):
        return (outputs.tanh() - outputs.detach().sin()).pow(2).mean(1)

    truth = dense_hessian(model, lambda m: criterion(m(x), None).mean())
    assert relative(Hessian(Objective(model, criterion, (x, x))).dense(), truth) < 1e-10


class SquareByVjp(torch.autograd.Function):
    """A right function whose derivative has PyTorch's other name."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def vjp(ctx, grad):
        (x,) = ctx.saved_tensors
        return 2 * x * grad


class Body(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.enc, self.dec, self.function = nn.Linear(4, 4).double(), nn.Linear(4, 3).double(), function

    def forward(self, x):
        return self.dec(self.function.apply(self.enc(x)))


def test_a_derivative_called_vjp_is_no_false_alarm():
    model, (x, y) = Body(SquareByVjp), make("mlp-tanh")[1]
    with pytest.warns(CurvdiagWarning, match="SquareByVjp"):
        op = Hessian(Objective(model, F.cross_entropy, (x, y)))
    assert relative(op.dense(), dense_hessian(model, criterion_loss(F.cross_entropy, (x, y)))) < 1e-10


def test_a_function_between_two_modules_belongs_to_the_one_around_them():
    model = nn.Sequential(nn.Identity(), Body(OnceCube))
    with pytest.raises(SecondDerivativeError, match="the module '1' "):
        Hessian(Objective(model, F.cross_entropy, make("mlp-tanh")[1]))
