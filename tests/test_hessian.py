"""The Hessian operator against dense and closed-form Hessians."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from nets import NETS, cut, make, mlp, vectors
from oracles import chosen, criterion_loss, dense_gradient, dense_hessian, relative, true_value
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from curvdiag.errors import (
    ArgumentError,
    CurvdiagError,
    CurvdiagWarning,
    NonFiniteError,
    SecondDerivativeError,
    TooLargeError,
)
from curvdiag.objective import Objective
from curvdiag.operators import Hessian

ALL = list(NETS)
cross_entropy = nn.CrossEntropyLoss()


def probe(size: int, columns: int | None = None, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    shape = (size,) if columns is None else (size, columns)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("memory", [None, 0], ids=["kept", "rebuilt"])
@pytest.mark.parametrize("net", ALL)
def test_products_equal_those_of_the_dense_hessian(net, memory):
    model, batch = make(net)
    truth = dense_hessian(model, criterion_loss(cross_entropy, batch))
    op = Hessian(Objective(model, cross_entropy, batch), memory=memory)
    assert op.shape == tuple(truth.shape)
    v, several = probe(op.size), probe(op.size, 5)
    assert relative(op @ v, truth @ v) < 1e-10
    assert relative(op @ several, truth @ several) < 1e-10
    assert relative(op @ several[:, :1], truth @ several[:, :1]) < 1e-10
    assert relative(op.dense(chunk=50), truth) < 1e-10
    assert relative(op @ v, truth @ v) < 1e-10


@pytest.mark.parametrize("net", ALL)
def test_products_in_single_precision(net):
    model, batch = make(net, dtype=torch.float32)
    truth = dense_hessian(model, criterion_loss(cross_entropy, batch))
    op = Hessian(Objective(model, cross_entropy, batch))
    assert op.dtype == torch.float32
    assert relative(op.dense(), truth) < 2e-5


def test_double_precision_copies_of_single_precision_weights():
    model, batch = make("lstm", dtype=torch.float32)
    weight = torch.tensor([0.2, 1.0, 3.0])
    weighted = nn.CrossEntropyLoss(weight)
    truth = dense_hessian(model, criterion_loss(nn.CrossEntropyLoss(weight.double()), batch))
    op = Hessian(Objective(model, weighted, batch), dtype=torch.float64)
    assert op.dtype == torch.float64
    assert weighted.weight.dtype == torch.float32
    assert relative(op.dense(), truth) < 1e-10
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("net", ALL)
def test_value_and_gradient_of_the_objective(net):
    model, batch = make(net)
    loss = criterion_loss(cross_entropy, batch)
    objective = Objective(model, cross_entropy, cut(batch, (4, 4, 2)))
    assert objective.size == 10
    assert objective.value() == pytest.approx(true_value(model, loss), rel=1e-12)
    assert relative(objective.gradient(), dense_gradient(model, loss)) < 1e-10


def test_linear_regression_has_its_closed_form():
    torch.manual_seed(0)
    model, x, y = nn.Linear(4, 3).double(), torch.randn(20, 4).double(), torch.randn(20, 3).double()
    truth = torch.zeros(15, 15, dtype=torch.float64)
    gram = 2 / (20 * 3) * torch.cat([x, torch.ones(20, 1)], 1).double().T @ torch.cat([x, torch.ones(20, 1)], 1)
    for output in range(3):
        index = [*range(4 * output, 4 * output + 4), 12 + output]
        truth[np.ix_(index, index)] = gram
    assert relative(Hessian(Objective(model, nn.MSELoss(), (x, y))).dense(), truth) < 1e-10
    no_bias = Hessian(Objective(model, nn.MSELoss(), (x, y), params="weight")).dense()
    assert relative(no_bias, torch.kron(torch.eye(3).double(), 2 / 60 * x.T @ x)) < 1e-10


def test_softmax_regression_has_its_closed_form():
    torch.manual_seed(0)
    model, x, y = nn.Linear(4, 3).double(), torch.randn(20, 4).double(), torch.randint(3, (20,))
    p = model(x).detach().softmax(1)
    inner = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    extended = torch.cat([x, torch.ones(20, 1)], 1)
    full = torch.einsum("nab,ni,nj->aibj", inner, extended, extended) / 20
    order = [(a, i) for a in range(3) for i in range(4)] + [(a, 4) for a in range(3)]
    flat = [5 * a + i for a, i in order]
    truth = full.reshape(15, 15)[np.ix_(flat, flat)]
    assert relative(Hessian(Objective(model, cross_entropy, (x, y))).dense(), truth) < 1e-10


def test_logistic_regression_has_its_closed_form():
    torch.manual_seed(0)
    model, x, y = nn.Linear(4, 1).double(), torch.randn(20, 4).double(), torch.randint(2, (20, 1)).double()
    p = model(x).detach().sigmoid()
    extended = torch.cat([x, torch.ones(20, 1)], 1)
    truth = extended.T @ (p * (1 - p) * extended) / 20
    assert relative(Hessian(Objective(model, nn.BCEWithLogitsLoss(), (x, y))).dense(), truth) < 1e-10


@pytest.mark.parametrize("memory", [None, 0, 200_000])
@pytest.mark.parametrize("form", ["list", "loader", "micro-batch"])
def test_ragged_batches_equal_one_batch(form, memory):
    model, batch = make("mlp-tanh", samples=100)
    truth = dense_hessian(model, criterion_loss(cross_entropy, batch))
    data = {
        "list": cut(batch, (32, 32, 32, 4)),
        "loader": DataLoader(TensorDataset(*batch), batch_size=32),
        "micro-batch": batch,
    }[form]
    objective = Objective(model, cross_entropy, data)
    assert objective.size == 100
    op = Hessian(objective, memory=memory, micro_batch=32 if form == "micro-batch" else None)
    assert relative(op.dense(), truth) < 1e-10


@pytest.mark.parametrize("net", ["conv-batchnorm", "transformer-tied"])
def test_every_micro_batch_size_gives_the_same_products(net):
    model, batch = make(net)
    truth = dense_hessian(model, criterion_loss(cross_entropy, batch))
    objective = Objective(model, cross_entropy, cut(batch, (4, 4, 2)))
    for size in range(1, 12):
        for memory in (None, 0):
            op = Hessian(objective, micro_batch=size, memory=memory)
            assert relative(op @ probe(op.size), truth @ probe(op.size)) < 1e-10, (size, memory)


def test_graphs_are_kept_as_far_as_the_memory_reaches():
    model, batch = make("mlp-tanh", samples=40)
    truth = dense_hessian(model, criterion_loss(cross_entropy, batch))
    rebuilt = {}
    for memory in [0, *(2**k for k in range(8, 30))]:
        op = Hessian(Objective(model, cross_entropy, batch), memory=memory, micro_batch=10)
        op @ probe(op.size)
        before = op.cost.graphs
        assert relative(op @ probe(op.size, 3), truth @ probe(op.size, 3)) < 1e-10
        rebuilt[memory] = op.cost.graphs - before
    assert rebuilt[0] == 4
    assert rebuilt[2**29] == 0
    assert set(rebuilt.values()) & {1, 2, 3}, f"no budget keeps a part of the graphs: {rebuilt}"
    assert list(rebuilt.values()) == sorted(rebuilt.values(), reverse=True)


def test_independent_batches_are_merged_and_products_counted():
    model, batch = make("mlp-tanh", samples=100)
    op = Hessian(Objective(model, cross_entropy, cut(batch, (32, 32, 32, 4))), memory=1 << 30)
    op @ probe(op.size)
    graphs, matvecs = op.cost.graphs, op.cost.matvecs
    op @ probe(op.size, 6)
    assert op.cost.graphs == graphs
    assert op.cost.matvecs == matvecs + 6
    assert graphs == 1


def test_a_micro_batch_bounds_the_size_of_a_graph():
    model, batch = make("mlp-tanh", samples=100)
    objective = Objective(model, cross_entropy, cut(batch, (50, 50)))
    for memory in (1 << 30, 0):
        plan = Hessian(objective, memory=memory, micro_batch=20).plan
        assert sum(plan.kept) + sum(plan.rebuilt) == 100
        assert max(*plan.kept, *plan.rebuilt) <= 20


def test_batchnorm_in_train_mode_couples_the_samples_of_each_batch():
    model, batch = make("conv-batchnorm")
    parts = cut(batch, (6, 4))
    truth = sum(
        share * dense_hessian(model, criterion_loss(cross_entropy, part), mode="train")
        for share, part in zip((0.6, 0.4), parts, strict=True)
    )
    for memory in (None, 0):
        op = Hessian(Objective(model, cross_entropy, parts, mode="train"), memory=memory)
        assert relative(op.dense(), truth) < 1e-10
    try:
        split = Hessian(Objective(model, cross_entropy, parts, mode="train"), micro_batch=2).dense()
    except CurvdiagError:
        return
    assert relative(split, truth) < 1e-10


def test_eval_mode_is_the_default_whatever_the_training_does():
    model, batch = make("conv-batchnorm")
    truth = dense_hessian(model, criterion_loss(cross_entropy, batch))
    assert relative(Hessian(Objective(model.train(), cross_entropy, batch)).dense(), truth) < 1e-10


def test_the_operator_serves_scipy():
    from scipy.sparse.linalg import eigsh

    model, batch = make("mlp-tanh")
    op = Hessian(Objective(model, cross_entropy, batch))
    truth = torch.linalg.eigvalsh(dense_hessian(model, criterion_loss(cross_entropy, batch)))
    top = eigsh(op.to_scipy(), k=2, which="LA", return_eigenvectors=False)
    assert np.allclose(np.sort(top), truth[-2:].numpy(), rtol=1e-8)


class Rotary(nn.Module):
    """Real weights and a complex buffer."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 3)
        self.register_buffer("turns", torch.polar(torch.ones(2), torch.tensor([0.3, 1.0])))

    def forward(self, x):
        turned = torch.view_as_complex(self.first(x).view(-1, 2, 2)) * self.turns
        return self.last(torch.view_as_real(turned).flatten(1).tanh())


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("options", [{}, {"memory": 0}, {"share": True}, {"dtype": torch.float64}], ids=str)
@pytest.mark.parametrize(
    "build",
    [
        Rotary,
        lambda: nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3))),
    ],
    ids=["complex buffer", "spectral_norm"],
)
def test_complex_buffers_and_parametrizations(build, options):
    torch.manual_seed(0)
    model, batch = build(), vectors()
    truth = dense_hessian(model, criterion_loss(cross_entropy, batch))
    op = Hessian(Objective(model, cross_entropy, batch), **options)
    assert relative(op.dense(), truth) < (1e-7 if "dtype" in options else 2e-5)


class PlainWeightNorm(nn.Module):
    def __init__(self, dim, norms):
        super().__init__()
        self.dim = dim
        self.g = nn.Parameter(norms.detach().clone())

    def forward(self, v):
        others = tuple(d for d in range(v.ndim) if self.dim is None or d != self.dim)
        return v * (self.g / torch.linalg.vector_norm(v, dim=others, keepdim=True))


@pytest.mark.parametrize("dim", [0, 1, None])
def test_weight_norm_is_right_where_pytorch_is_not(dim):
    """The oracle writes the norm out: PyTorch's fused form has a wrong second derivative."""
    torch.manual_seed(0)
    (x, y) = vectors()
    layer = nn.Linear(4, 3).double()
    fused = nn.Sequential(nn.utils.parametrizations.weight_norm(layer, dim=dim), nn.Tanh())
    old = nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 3).double(), dim=dim), nn.Tanh())
    batch = (x.double(), y)
    for model, g, v in (
        (fused, fused[0].parametrizations.weight.original0, fused[0].parametrizations.weight.original1),
        (old, old[0].weight_g, old[0].weight_v),
    ):
        plain = nn.Sequential(nn.Linear(4, 3).double(), nn.Tanh())
        plain[0].weight.data.copy_(v.detach())
        plain[0].bias.data.copy_(model[0].bias.detach())
        nn.utils.parametrize.register_parametrization(plain[0], "weight", PlainWeightNorm(dim, g), unsafe=True)
        truth = dense_hessian(plain, criterion_loss(cross_entropy, batch))
        names = ["bias", "original", "0.g"]
        order = [next(n for n, _ in plain.named_parameters() if n.endswith(name)) for name in names]
        ours = Hessian(Objective(model, cross_entropy, batch))
        where = {"bias": "bias", "original": ("original1", "weight_v"), "0.g": ("original0", "weight_g")}
        ours_order = [next(n for n in ours.parameters.names if n.endswith(where[name])) for name in names]
        dense = ours.dense()
        theirs = Objective(plain, cross_entropy, batch).parameters

        def permuted(matrix, layout, wanted):
            index = torch.cat([torch.arange(layout.size)[layout.slices[layout.names.index(n)]] for n in wanted])
            return matrix[index][:, index]

        assert relative(permuted(dense, ours.parameters, ours_order), permuted(truth, theirs, order)) < 1e-10


def test_an_asymmetric_second_derivative_is_an_error():
    class Skewed(torch.autograd.Function):
        """A gradient that is not one of any function, in differentiable operations."""

        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.square().sum(1)

        @staticmethod
        def backward(ctx, grad):
            (x,) = ctx.saved_tensors
            return grad[:, None] * (2 * x + x.roll(1, 1).square())

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Linear(4, 4).double()

        def forward(self, x):
            return Skewed.apply(self.w(x))

    x, _ = vectors()
    with pytest.warns(CurvdiagWarning), pytest.raises(SecondDerivativeError):
        Hessian(Objective(Net(), lambda o, t: o, (x.double(), x.double())))


def test_the_users_own_penalty_on_the_weights_is_seen():
    model, batch = make("mlp-tanh")
    truth = dense_hessian(model, criterion_loss(cross_entropy, batch))
    truth += 0.02 * torch.eye(len(truth), dtype=torch.float64)

    def loss(m, b):
        return F.cross_entropy(m(b[0]), b[1]) + 0.01 * sum(p.pow(2).sum() for p in m.parameters())

    assert relative(Hessian(Objective.from_loss(model, loss, batch)).dense(), truth) < 1e-10


@pytest.mark.parametrize("wrong", [torch.ones(3), torch.ones(3, 2), torch.ones(80, 2, 2), np.ones(80)])
def test_a_vector_of_the_wrong_shape_is_refused(wrong):
    model, batch = make("mlp-tanh")
    with pytest.raises(ArgumentError):
        Hessian(Objective(model, cross_entropy, batch)) @ wrong


@pytest.mark.parametrize("bad", [{"micro_batch": 0}, {"memory": -1}, {"method": "guess"}, {"rtol": -1.0}])
def test_arguments_out_of_range_are_refused(bad):
    model, batch = make("mlp-tanh")
    with pytest.raises(ArgumentError):
        Hessian(Objective(model, cross_entropy, batch), **bad)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_names_the_batch(value):
    model, batch = make("mlp-tanh")
    batch[0][7] = value
    with pytest.raises(NonFiniteError, match="batch"):
        Hessian(Objective(model, cross_entropy, cut(batch, (5, 5)))) @ probe(sum(p.numel() for p in model.parameters()))


def test_a_dense_matrix_that_cannot_fit_is_refused_with_its_size():
    torch.manual_seed(0)
    op = Hessian(Objective(mlp(sizes=(4, 3000, 3000, 3)), F.cross_entropy, vectors(2)))
    with pytest.raises(TooLargeError, match=rf"{op.size:,}.*TB"):
        op.dense()


def test_parameters_stand_in_the_models_order():
    model, batch = make("transformer-tied")
    assert list(Objective(model, cross_entropy, batch).parameters.names) == chosen(model)
