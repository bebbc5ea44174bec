"""The Gauss-Newton matrix against per-sample Jacobians and the dense Hessian of the loss in the outputs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from jacobians import dense_gauss_newton
from nets import Checkpointed, OnceDifferentiable, cut, make, mlp, tokens
from oracles import relative
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from curvdiag import GaussNewton, Hessian, Objective, spectral_density, top_eigenpairs
from curvdiag.errors import CurvdiagWarning, LossError, SecondDerivativeError

NETS = ["mlp-tanh", "mlp-relu", "conv-batchnorm", "transformer-tied", "lstm"]
LAYOUTS = [{}, {"memory": 0}, {"micro_batch": 3}]


def uneven(batch: tuple) -> list[tuple]:
    return cut(batch, (len(batch[1]) - 3, 3))


@pytest.mark.parametrize("options", LAYOUTS, ids=str)
@pytest.mark.parametrize("net", NETS)
def test_it_equals_its_definition(net: str, options: dict) -> None:
    model, batch = make(net)
    op = GaussNewton(Objective(model, nn.CrossEntropyLoss(), uneven(batch)), **options)
    truth, vectors = dense_gauss_newton(model, nn.CrossEntropyLoss(), batch), torch.eye(op.size, dtype=torch.float64)
    if options:  # the whole matrix once, and elsewhere what it does to a few vectors
        vectors = torch.randn(op.size, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert relative(op @ vectors, truth @ vectors) < 1e-10


def soft(shape: Sequence[int]) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5)).softmax(1)


WEIGHT = torch.tensor([1.0, 3.0, 0.5], dtype=torch.float64)
CRITERIA: dict[str, tuple[Callable[..., Tensor], str]] = {
    "class weights": (nn.CrossEntropyLoss(weight=WEIGHT), "labels"),
    "ignored labels": (nn.CrossEntropyLoss(ignore_index=1), "labels"),
    "smoothing": (nn.CrossEntropyLoss(label_smoothing=0.2), "labels"),
    "all three": (nn.CrossEntropyLoss(weight=WEIGHT, ignore_index=1, label_smoothing=0.2), "labels"),
    "function": (F.cross_entropy, "labels"),
    "partial": (functools.partial(F.cross_entropy, weight=WEIGHT, ignore_index=1, label_smoothing=0.1), "labels"),
    "probabilities": (nn.CrossEntropyLoss(), "soft"),
    "weighted probabilities": (nn.CrossEntropyLoss(weight=WEIGHT, label_smoothing=0.2), "soft"),
    "not normalised": (nn.CrossEntropyLoss(weight=WEIGHT), "twice soft"),
    "squares": (nn.MSELoss(), "soft"),
    "squares as a function": (F.mse_loss, "soft"),
    "weighted squares": (functools.partial(F.mse_loss, weight=soft((1, 3)).expand(10, 3)), "soft"),
    "binary": (nn.BCEWithLogitsLoss(), "soft"),
    "weighted binary": (nn.BCEWithLogitsLoss(weight=WEIGHT, pos_weight=WEIGHT + 1), "soft"),
    "smooth and custom": (lambda z, y: (z - y).cosh().log().mean(), "soft"),
    "one loss a sample": (lambda z, y: (z - y).pow(4).sum(1).mul(y[:, 0]), "soft"),
    "coupled samples": (lambda z, y: ((z - y) @ (z - y).T).logsumexp((0, 1)), "soft"),
    "no convexity": (lambda z, y: (z * y).sin().mean(1), "soft"),
    "focal": (lambda z, y: ((1 - (-F.cross_entropy(z, y, reduction="none")).exp()) ** 2).mean(), "labels"),
}


@pytest.mark.parametrize("name", CRITERIA)
def test_it_follows_the_criterion(name: str) -> None:
    model, (x, y) = make("mlp-tanh")
    criterion, kind = CRITERIA[name]
    targets = {"labels": y, "soft": soft((10, 3)), "twice soft": 2 * soft((10, 3))}[kind]
    objective = Objective(model, criterion, (x, targets))
    truth = dense_gauss_newton(model, lambda z, t: criterion(z, t).mean(), (x, targets))
    assert relative(GaussNewton(objective).dense(), truth) < 1e-10


@pytest.mark.parametrize("kind", ["ignored, weighted, smoothed", "probabilities", "squares"])
def test_positions_of_sequences_count_as_the_criterion_counts_them(kind: str) -> None:
    model, (x, y) = make("transformer-tied")
    weight = torch.rand(7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.5
    criterion: Callable[..., Tensor] = nn.CrossEntropyLoss()
    if kind == "ignored, weighted, smoothed":
        criterion, y = nn.CrossEntropyLoss(weight=weight, label_smoothing=0.1), y.clone()
        y[0, 1:], y[8], y[4, :2] = -100, -100, -100
    elif kind == "probabilities":
        y = soft((10, 7, 5))
    else:
        criterion, y = nn.MSELoss(), soft((10, 7, 5))
    objective, truth = Objective(model, criterion, uneven((x, y))), dense_gauss_newton(model, criterion, (x, y))
    assert relative(GaussNewton(objective).dense(), truth) < 1e-10
    few = GaussNewton(objective, micro_batch=3)
    vector = torch.randn(few.size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert relative(few @ vector, truth @ vector) < 1e-10


def test_a_subclass_with_a_forward_pass_of_its_own_is_not_taken_for_its_parent() -> None:
    class Tempered(nn.CrossEntropyLoss):
        def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
            return F.cross_entropy(3 * logits, targets, reduction=self.reduction)

    model, batch = make("mlp-tanh")
    op = GaussNewton(Objective(model, Tempered(), batch))
    assert relative(op.dense(), dense_gauss_newton(model, Tempered(), batch)) < 1e-10


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

    objective = Objective.from_loss(model, loss, batches=uneven(batch))
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


def test_kinks_have_no_curvature_and_are_no_error() -> None:
    model, (x, _) = make("mlp-tanh")
    assert not GaussNewton(Objective(model, nn.L1Loss(), (x, x[:, :3]))).dense().any()
    far = 100 * x[:, :3].sign()
    huber = Objective(model, nn.HuberLoss(delta=0.5), [(x[:8], far[:8]), (x[8:], x[8:, :3] / 9)])
    truth = dense_gauss_newton(model, nn.HuberLoss(delta=0.5), (x[8:], x[8:, :3] / 9)) * 0.2
    assert relative(GaussNewton(huber, micro_batch=8).dense(), truth) < 1e-10


@pytest.mark.parametrize("memory", [None, 0], ids=["kept", "rebuilt"])
@pytest.mark.parametrize("closure", [False, True], ids=["module", "function"])
def test_a_checkpointed_model_is_recomputed_at_the_weights_of_the_operator(closure: bool, memory: int | None) -> None:
    torch.manual_seed(0)
    model = Checkpointed(reentrant=False, closure=closure).double()
    batch = make("mlp-tanh")[1]
    truth = dense_gauss_newton(model, nn.CrossEntropyLoss(), batch)
    op = GaussNewton(Objective(model, nn.CrossEntropyLoss(), batch), memory=memory)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    assert relative(op.dense(), truth) < 1e-10
    assert relative(op.dense(), truth) < 1e-10


def test_batchnorm_in_train_mode_and_a_loss_that_gives_a_mean_are_served() -> None:
    model, batch = make("conv-batchnorm")
    mean = lambda m, b: F.cross_entropy(m(b[0]), b[1])  # noqa: E731
    truth = dense_gauss_newton(model, nn.CrossEntropyLoss(), batch)
    assert relative(GaussNewton(Objective.from_loss(model, mean, batches=uneven(batch))).dense(), truth) < 1e-10
    parts = uneven(batch)
    names = {n: p.detach().clone() for n, p in model.named_parameters()}
    model.train()
    model.requires_grad_(True)
    truth = 0
    for x, y in parts:
        leaves = {n: p.clone().requires_grad_() for n, p in names.items()}
        buffers = {n: b.clone() for n, b in model.named_buffers()}
        z = functional_call(model, {**leaves, **buffers}, (x,))
        rows = torch.stack(
            [
                torch.cat([g.flatten() for g in torch.autograd.grad(o, list(leaves.values()), retain_graph=True)])
                for o in z.flatten()
            ]
        )
        h = torch.autograd.functional.hessian(functools.partial(F.cross_entropy, target=y), z.detach())
        truth = truth + rows.T @ h.reshape(len(rows), len(rows)) @ rows * len(y) / len(batch[1])
    op = GaussNewton(Objective(model, nn.CrossEntropyLoss(), parts, mode="train"))
    assert op.plan is not None
    assert sorted(op.plan.kept) == [3, 7]
    assert relative(op.dense(), truth) < 1e-10


def test_blocks_many_vectors_and_parameters_out_of_reach() -> None:
    model, batch = make("transformer-tied")
    model.spare = nn.Parameter(torch.ones(2, dtype=torch.float64))
    truth = dense_gauss_newton(model, nn.CrossEntropyLoss(), batch)
    op = GaussNewton(Objective(model, nn.CrossEntropyLoss(), uneven(batch)))
    assert op.unreached == ["spare"]
    vectors = torch.randn(op.size, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert relative(op @ vectors, truth @ vectors) < 1e-10
    block = op.block(lambda name, _: name.endswith("bias"))
    layout = op.parameters
    index = torch.cat([torch.arange(op.size)[layout.slices[layout.names.index(n)]] for n in block.parameters.names])
    assert relative(block.dense(), truth[index][:, index]) < 1e-10
    some = GaussNewton(Objective(model, nn.CrossEntropyLoss(), batch, params="mlp.*"))
    index = torch.cat([torch.arange(op.size)[layout.slices[layout.names.index(n)]] for n in some.parameters.names])
    assert relative(some.dense(), truth[index][:, index]) < 1e-10
    assert not op.block("spare").dense().any()


def test_batches_of_several_lengths() -> None:
    model, (x, y) = make("transformer-tied")
    parts = [(x[:4], y[:4]), (x[4:], y[4:])]
    short = [(parts[0][0][:, :3], parts[0][1][:, :3]), parts[1]]
    tokens_of = [p[1].numel() for p in short]
    truth = sum(
        dense_gauss_newton(model, nn.CrossEntropyLoss(), part) * n / sum(tokens_of)
        for part, n in zip(short, tokens_of, strict=True)
    )
    assert relative(GaussNewton(Objective(model, nn.CrossEntropyLoss(), short)).dense(), truth) < 1e-10


def test_it_is_the_hessian_of_a_linear_model_and_positive_semi_definite_elsewhere() -> None:
    _, (x, y) = make("mlp-tanh")
    linear = nn.Linear(4, 3).double()
    objective = Objective(linear, nn.CrossEntropyLoss(weight=WEIGHT), uneven((x, y)))
    assert relative(GaussNewton(objective).dense(), Hessian(objective).dense()) < 1e-12
    for net in NETS:
        model, batch = make(net)
        values = torch.linalg.eigvalsh(GaussNewton(Objective(model, nn.CrossEntropyLoss(), batch)).dense())
        assert values[0] > -1e-12 * values[-1]


def test_single_precision_and_other_dtypes() -> None:
    model, batch = make("mlp-tanh", dtype=torch.float32)
    objective = Objective(model, nn.CrossEntropyLoss(weight=WEIGHT.float()), batch)
    exact = GaussNewton(objective, dtype=torch.float64).dense()
    assert exact.dtype == torch.float64
    assert relative(GaussNewton(objective).dense(), exact) < 1e-5


def test_weights_that_change_afterwards_change_nothing() -> None:
    model, batch = make("mlp-tanh")
    op = GaussNewton(Objective(model, nn.CrossEntropyLoss(), batch), memory=0)
    before = op.dense()
    with torch.no_grad():
        model[0].weight.zero_()
    assert torch.equal(op.dense(), before)


def test_the_algorithms_take_it() -> None:
    model, batch = make("mlp-tanh")
    truth = torch.linalg.eigvalsh(dense_gauss_newton(model, nn.CrossEntropyLoss(), batch))
    op = GaussNewton(Objective(model, nn.CrossEntropyLoss(), batch))
    assert float(top_eigenpairs(op, 3, tol=1e-8).values[2]) == pytest.approx(float(truth[-3]), rel=1e-8)
    trace = spectral_density(op, steps=20, probes=60).trace()
    assert abs(trace.value - float(truth.sum())) < 4 * trace.standard_error


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


def test_a_vocabulary_is_never_squared() -> None:
    """20,000 classes: a matrix over them takes 1.6 GB; nothing larger than a few times the outputs is made."""
    torch.manual_seed(0)
    vocabulary, width = 20_000, 4
    net = nn.Sequential(nn.Embedding(32, width), nn.Linear(width, vocabulary))
    model = nn.Sequential(*net, _ClassesFirst())
    batch = (tokens(2, 3, 32)[0], torch.randint(vocabulary, (2, 3)))
    largest = _Largest()
    with largest:
        op = GaussNewton(Objective(model, nn.CrossEntropyLoss(), batch))
        vector = torch.randn(op.size, generator=torch.Generator().manual_seed(0))
        product = op @ vector
    assert float(product @ vector) > 0
    assert largest.numel <= 2 * max(op.size, 2 * 3 * vocabulary)


class _ClassesFirst(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


class _Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """The most elements of any tensor that an operation returned."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


def test_nothing_is_left_on_the_model() -> None:
    model, batch = make("conv-batchnorm")
    state = {n: t.clone() for n, t in model.state_dict().items()}
    op = GaussNewton(Objective(model, nn.CrossEntropyLoss(), batch))
    op.dense()
    assert not model._forward_hooks
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


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


def test_no_warning_of_ours_is_given() -> None:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("error", CurvdiagWarning)
        GaussNewton(Objective(mlp().double(), nn.CrossEntropyLoss(), make("mlp-tanh")[1])).dense()
