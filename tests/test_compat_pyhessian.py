"""PyHessian's class on this engine: the same questions, the same shapes, the dense truth, and no trace left."""

from __future__ import annotations

import copy
import inspect
import math
import warnings

import numpy as np
import pytest
import torch
from nets import Residual
from oracles import criterion_loss, dense_hessian
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from curvdiag.compat.pyhessian import hessian
from curvdiag.errors import ArgumentError, CurvdiagWarning, LossError

SAMPLES = 22  # batches of 8 leave a ragged one of 6
CRITERION = nn.CrossEntropyLoss()


def net_and_data():
    """A net with BatchNorm whose running statistics are not the initial ones, in training mode, float64."""
    torch.manual_seed(0)
    model = Residual()
    inputs, targets = torch.randn(SAMPLES, 1, 6, 6), torch.randint(3, (SAMPLES,))
    model.train()(inputs)
    return model, (inputs, targets)


def loader_of(data):
    return DataLoader(TensorDataset(*data), batch_size=8)


def source(kind, data):
    return {"data": data} if kind == "batch" else {"dataloader": loader_of(data)}


def ours(kind="batch", **options):
    model, data = net_and_data()
    return hessian(model, CRITERION, cuda=False, **source(kind, data), **options)


@pytest.fixture(scope="module", autouse=True)
def double():
    """PyHessian draws vectors of the default type."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(default)


@pytest.fixture(scope="module")
def truth(double):
    model, data = net_and_data()
    return dense_hessian(model, criterion_loss(CRITERION, data))


@pytest.fixture
def theirs():
    """PyHessian itself on a copy; it keeps graphs in ``.grad``, about which PyTorch warns."""
    made = []

    def make(kind, model, data):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from pyhessian import hessian as original

            made.append(original(copy.deepcopy(model), CRITERION, cuda=False, **source(kind, data)))
        torch.manual_seed(1)
        return made[-1]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield make
    for one in made:
        one.model.zero_grad()


def test_the_methods_take_the_arguments_of_the_original():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from pyhessian import hessian as original
    for name in ("__init__", "eigenvalues", "trace", "density", "dataloader_hv_product"):
        wanted = inspect.signature(getattr(original, name)).parameters
        here = inspect.signature(inspect.unwrap(getattr(hessian, name))).parameters
        assert [(p.name, p.default) for p in here.values() if p.kind is not p.KEYWORD_ONLY] == [
            (p.name, p.default) for p in wanted.values()
        ]


@pytest.mark.parametrize("kind", ["batch", "loader"])
def test_eigenvalues_are_those_of_the_original_and_of_the_dense_matrix(kind, theirs, truth):
    model, data = net_and_data()
    values, vectors = ours(kind).eigenvalues(tol=1e-6, top_n=3)
    dense = torch.linalg.eigvalsh(truth)
    dense = dense[dense.abs().argsort(descending=True)][:3]
    assert values == pytest.approx(dense.tolist(), rel=1e-6)
    original_values, original_vectors = theirs(kind, model, data).eigenvalues(maxIter=1000, tol=1e-7, top_n=3)
    assert values == pytest.approx(original_values, rel=1e-3)
    assert type(values) is type(original_values)
    assert type(values[0]) is type(original_values[0])
    for vector, original in zip(vectors, original_vectors, strict=True):
        assert [part.shape for part in vector] == [part.shape for part in original]
        cosine = sum(float((a * b).sum()) for a, b in zip(vector, original, strict=True))
        assert abs(cosine) == pytest.approx(1, abs=1e-2)
        assert sum(float(part.square().sum()) for part in vector) == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize("kind", ["batch", "loader"])
def test_a_product_is_that_of_the_original_and_of_the_dense_matrix(kind, theirs, truth):
    model, data = net_and_data()
    asked = ours(kind)
    vector = [torch.randn_like(p) for p in asked.params]
    form, image = asked.dataloader_hv_product(vector)
    flat = torch.cat([part.flatten() for part in vector])
    assert torch.allclose(torch.cat([part.flatten() for part in image]), truth @ flat, rtol=1e-9, atol=1e-12)
    assert form == pytest.approx(float(flat @ truth @ flat), rel=1e-9)
    if kind == "loader":
        original_form, original = theirs(kind, model, data).dataloader_hv_product(vector)
        assert form == pytest.approx(original_form, rel=1e-9)
        assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(image, original, strict=True))


@pytest.mark.parametrize("kind", ["batch", "loader"])
def test_the_trace_is_within_its_spread(kind, theirs, truth):
    model, data = net_and_data()
    exact, off = float(truth.trace()), truth - torch.diag(truth.diag())
    deviation = math.sqrt(2 * float(off.square().sum()))  # of one probe, in closed form
    samples = ours(kind).trace(maxIter=100, tol=0)
    assert [type(sample) for sample in samples] == [float] * 100
    assert abs(np.mean(samples) - exact) < 4 * deviation / 10
    assert np.std(samples) == pytest.approx(deviation, rel=0.4)
    original = theirs(kind, model, data).trace(maxIter=100, tol=0)
    assert len(original) == 100
    assert abs(np.mean(samples) - np.mean(original)) < 4 * deviation * math.sqrt(2) / 10


def test_the_trace_stops_when_its_spread_allows_it_and_not_before(truth):
    samples = ours().trace(maxIter=3000, tol=0.03)
    assert 8 <= len(samples) < 3000
    assert np.std(samples, ddof=1) / math.sqrt(len(samples)) <= 0.03 * abs(np.mean(samples))
    assert abs(np.mean(samples) - float(truth.trace())) < 4 * 0.03 * float(truth.trace())
    assert len(ours().trace(maxIter=5)) == 5
    # One probe is exact for a diagonal matrix, and eight are enough to see it.
    line = nn.Linear(1, 1, bias=False)
    assert hessian(line, nn.MSELoss(), (torch.ones(4, 1), torch.ones(4, 1)), cuda=False).trace() == [2.0] * 8


@pytest.mark.parametrize("kind", ["batch", "loader"])
def test_the_density_has_the_moments_of_the_dense_matrix(kind, truth):
    values = torch.linalg.eigvalsh(truth).numpy()
    nodes, weights = ours(kind).density(iter=12, n_v=100)
    assert [type(nodes), type(nodes[0]), type(nodes[0][0])] == [list, list, float]
    assert np.array(nodes).shape == np.array(weights).shape == (100, 12)
    assert np.allclose(np.sum(weights, axis=1), 1, atol=1e-12)
    for power in (1, 2, 3):
        each = np.sum(np.array(weights) * np.array(nodes) ** power, axis=1)
        assert abs(each.mean() - np.mean(values**power)) < 4 * each.std(ddof=1) / math.sqrt(100)
        assert each.std(ddof=1) > 0
    assert np.max(nodes) == pytest.approx(values.max(), rel=1e-2)


def test_a_density_keeps_its_shape_beyond_the_order_of_the_matrix():
    line = nn.Linear(2, 1, bias=False)
    asked = hessian(line, nn.MSELoss(), (torch.tensor([[1.0, 0], [0, 2]]), torch.ones(2, 1)), cuda=False)
    nodes, weights = asked.density(iter=5, n_v=2)
    assert np.array(nodes).shape == np.array(weights).shape == (2, 5)
    for row, weight in zip(nodes, weights, strict=True):
        assert np.dot(row, weight) == pytest.approx(2.5)
        assert row[:2] == pytest.approx([1, 4])
        assert weight == pytest.approx([0.5, 0.5, 0, 0, 0])


def test_the_density_feeds_the_plot_of_the_original():
    nodes, weights = ours().density(iter=10, n_v=2)
    # What PyHessian's density_plot.py does first with its arguments.
    assert np.mean(np.max(np.array(nodes), axis=1), axis=0) > np.mean(np.min(np.array(nodes), axis=1), axis=0)
    assert np.array(weights).ndim == 2


def test_nothing_of_the_model_changes():
    model, data = net_and_data()
    CRITERION(model(data[0]), data[1]).backward()
    model.norm1.eval()
    before = copy.deepcopy(model)
    gradients = [p.grad.clone() for p in model.parameters()]
    state = torch.get_rng_state()
    asked = hessian(model, CRITERION, dataloader=loader_of(data), cuda=False)
    asked.eigenvalues(), asked.trace(maxIter=8), asked.density(iter=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model.modules()] == [m.training for m in before.modules()]
    assert all(
        torch.equal(p.grad, g) and p.grad.grad_fn is None for p, g in zip(model.parameters(), gradients, strict=True)
    )
    old, new = before.state_dict(), model.state_dict()
    assert all(torch.equal(old[name], new[name]) for name in old)


def test_calls_draw_new_vectors_and_a_script_repeats():
    one, two = ours(seed=3), ours(seed=3)
    first = one.trace(maxIter=8)
    assert first == two.trace(maxIter=8)
    assert first != one.trace(maxIter=8)
    assert first != ours(seed=4).trace(maxIter=8)
    torch.manual_seed(9)
    assert ours(seed=3).trace(maxIter=8) == first


def test_eigenvalues_that_have_not_converged_are_warned_about():
    with pytest.warns(CurvdiagWarning, match=r"3 of 3 eigenvalues .* raise maxIter"):
        values, vectors = ours().eigenvalues(maxIter=1, tol=1e-9, top_n=3)
    assert len(values) == len(vectors) == 3


def test_a_missing_gpu_and_a_model_elsewhere_are_named(monkeypatch):
    model, data = net_and_data()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ArgumentError, match="no CUDA device here: say cuda=False"):
        hessian(model, CRITERION, data)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ArgumentError, match=r"the model is on cpu: move it with model.cuda\(\)"):
        hessian(model, CRITERION, data)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda model, data: hessian(model, CRITERION, cuda=False), "one of the two"),
        (lambda model, data: hessian(model, CRITERION, data, loader_of(data), cuda=False), "one of the two"),
        (lambda model, data: hessian(model, CRITERION, data, cuda=False).eigenvalues(top_n=0), "from 1 to"),
        (lambda model, data: hessian(model, CRITERION, data, cuda=False).eigenvalues(top_n=10**6), "from 1 to"),
        (lambda model, data: hessian(model, CRITERION, data, cuda=False).trace(maxIter=0), "maxIter is a positive"),
        (lambda model, data: hessian(model, CRITERION, data, cuda=False).trace(maxIter="ten"), "maxIter is a positive"),
        (lambda model, data: hessian(model, CRITERION, data, cuda=False).density(iter=math.inf), "iter is a positive"),
        (lambda model, data: hessian(model, CRITERION, data, cuda=False).eigenvalues(top_n=math.nan), "from 1 to"),
        (lambda model, data: hessian(model, CRITERION, data, cuda=False).trace(tol=-1), "not negative"),
        (lambda model, data: hessian(model, CRITERION, data, cuda=False).density(iter=0), "iter is a positive"),
        (lambda model, data: hessian(model, CRITERION, data, cuda=False).density(n_v=0), "n_v is a positive"),
        (
            lambda model, data: hessian(model, CRITERION, data, cuda=False).dataloader_hv_product([torch.ones(3)]),
            "in the shapes of params",
        ),
    ],
)
def test_wrong_arguments_are_refused_in_words(call, words):
    with pytest.raises(ArgumentError, match=words):
        call(*net_and_data())


def test_a_sum_over_samples_is_refused():
    model, data = net_and_data()
    with pytest.raises(LossError, match="sum"):
        hessian(model, nn.CrossEntropyLoss(reduction="sum"), data, cuda=False)
