"""The Gauss-Newton matrix against per-sample Jacobians and the dense Hessian of the loss in the outputs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from jacobians import dense_gauss_newton
from nets import Checkpointed, cut, make, mlp, tokens
from oracles import relative
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from curvdiag import GaussNewton, Hessian, Objective, spectral_density, top_eigenpairs
from curvdiag.errors import CurvdiagWarning

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


def test_no_warning_of_ours_is_given() -> None:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("error", CurvdiagWarning)
        GaussNewton(Objective(mlp().double(), nn.CrossEntropyLoss(), make("mlp-tanh")[1])).dense()
