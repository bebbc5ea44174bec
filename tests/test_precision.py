"""Products in less than full precision: their error is measured, and it is the true one."""

from __future__ import annotations

import math
from unittest import mock

import pytest
import torch
from nets import cut, make
from oracles import relative
from torch import Tensor, nn

from curvdiag import EmpiricalFisher, GaussNewton, Hessian, NoiseCovariance, Objective, spectral_density
from curvdiag.errors import ArgumentError, CurvdiagWarning
from curvdiag.operators import precision
from curvdiag.operators.gradient_graph import GradientGraph
from curvdiag.operators.precision import multiplication, product_error, true_products

KINDS = (Hessian, GaussNewton, NoiseCovariance, EmpiricalFisher)


def objective(net: str, dtype: torch.dtype = torch.float32) -> Objective:
    model, batch = make(net, dtype=dtype)
    return Objective(model, nn.CrossEntropyLoss(), cut(batch, (7, 3)))


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.__name__)
@pytest.mark.parametrize("net", ["mlp-tanh", "conv-batchnorm", "transformer-tied"])
def test_the_reported_error_is_of_the_size_of_the_true_one(net: str, kind: type) -> None:
    """Within a factor of 3 of the error of the whole matrix, in the Frobenius norm and at the largest eigenvalue."""
    problem = objective(net)
    truth = kind(problem, dtype=torch.float64).dense()
    op = kind(problem, precision="bfloat16")
    found = op.dense()
    assert found.dtype == torch.float32
    true = relative(found, truth)
    assert true / 3 < op.precision_error < 3 * true
    assert 1e-4 < op.precision_error < 0.05
    largest = torch.linalg.eigvalsh(truth).abs().max()
    moved = torch.linalg.eigvalsh((found + found.T).double() / 2) - torch.linalg.eigvalsh(truth)
    assert moved.abs().max() < 3 * op.precision_error * largest


def test_the_operator_stays_in_its_own_type_and_at_its_weights() -> None:
    for dtype in (torch.float32, torch.float64):
        problem = objective("mlp-tanh", dtype)
        op = Hessian(problem, precision="bfloat16")
        before = op.dense()
        assert before.dtype == op.dtype == dtype
        assert all(t.dtype == torch.bfloat16 for t in op._weights.chosen)
        with torch.no_grad():
            problem.model[0].weight.mul_(2)
        assert torch.equal(op.dense(), before)
        assert spectral_density(op, steps=5, probes=2).nodes.dtype == "float64"


def test_full_precision_is_the_default_and_reports_nothing() -> None:
    op = Hessian(objective("mlp-tanh"))
    assert op.precision == "full"
    assert op.precision_error is None
    assert "error" not in repr(op)
    rough = Hessian(objective("mlp-tanh"), precision="bfloat16")
    assert f"bfloat16 with an error of {rough.precision_error:.2g}" in repr(rough)


def test_a_small_difference_of_gradients_survives() -> None:
    """C is centred in the operator's type: subtracting the mean in bfloat16 would leave noise."""
    problem = objective("mlp-tanh")
    op = NoiseCovariance(problem, precision="bfloat16")
    everywhere = op._engine.sample_dots(torch.randn(2, op.size), op._positions)
    assert everywhere.dtype == torch.float32


def test_wrong_derivatives_are_found_in_spite_of_rounding() -> None:
    """Checks are made in full precision, and once: what bfloat16 cannot tell must not count as checked."""
    problem = objective("mlp-tanh")
    calls: list[torch.dtype | None] = []
    check = GradientGraph._meets

    def recorded(graph: GradientGraph) -> bool:
        calls.append(graph.dtype)
        return check(graph)

    with mock.patch.object(GradientGraph, "_meets", recorded):
        Hessian(problem, precision="bfloat16")
    assert calls == [None]


def error(rough: Tensor, full: Tensor, start: Tensor) -> float:
    return product_error(lambda v: v @ rough, true_products(lambda v: v @ full, start))


def test_a_large_error_is_warned_of() -> None:
    matrix, start = torch.diag(torch.tensor([2.0, 1.0])), torch.ones(1, 2)
    assert error(matrix, matrix, start) == 0
    assert math.isclose(error(1.03 * matrix, matrix, start), 0.03, rel_tol=1e-3)
    with pytest.warns(CurvdiagWarning, match=r"changes one by 0\.5"):
        error(1.5 * matrix, matrix, start)
    with pytest.warns(CurvdiagWarning, match="nan"):
        error(math.nan * matrix, matrix, start)
    assert error(matrix, 0 * matrix, start) == 0
    # What a random vector hardly shows, a power step does.
    with pytest.warns(CurvdiagWarning):
        found = error(
            torch.diag(torch.tensor([120.0, 1.0])), torch.diag(torch.tensor([100.0, 1.0])), torch.tensor([[1e-3, 1.0]])
        )
    assert found > 0.19


def test_switches_of_matrix_products_are_put_back() -> None:
    def now() -> list[object]:
        return [getattr(owner, name) for owner, name in precision._settings()]

    before, legacy = now(), torch.get_float32_matmul_precision()
    for kind, expected in (("tf32", {"tf32", True}), ("ieee", {"ieee", False})):
        with pytest.raises(KeyError), multiplication(kind):
            assert set(now()) <= expected
            raise KeyError
        assert now() == before
        assert torch.get_float32_matmul_precision() == legacy
    with multiplication(None):
        assert now() == before


def test_what_would_change_nothing_is_refused() -> None:
    problem = objective("mlp-tanh")
    cases = [
        ({"precision": "tf32"}, "CUDA"),
        ({"precision": "half"}, "'full', 'tf32' or 'bfloat16'"),
        ({"precision": "bfloat16", "share": True}, "copies"),
        ({"precision": "bfloat16", "dtype": torch.bfloat16}, "already"),
        ({"precision": "bfloat16", "method": "finite-difference"}, "finite differences"),
    ]
    for options, words in cases:
        with pytest.raises(ArgumentError, match=words):
            Hessian(problem, **options)
    with pytest.raises(ArgumentError, match="float32"):
        precision.check_precision("tf32", torch.device("cuda"), torch.float64, share=False)
    with pytest.raises(ArgumentError, match="coarse"):
        NoiseCovariance(problem, precision="bfloat16").gram()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="TF32 needs a CUDA device")
def test_tf32_on_a_device() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 10)).cuda()
    problem = Objective(model, nn.CrossEntropyLoss(), (torch.randn(512, 256), torch.randint(10, (512,))))
    vectors = torch.randn(Hessian(problem).size, 3, device="cuda")
    truth = Hessian(problem, dtype=torch.float64) @ vectors.double()
    op = Hessian(problem, precision="tf32")
    true = relative(op @ vectors, truth)
    assert 1e-6 < op.precision_error < 0.01
    assert true / 5 < op.precision_error < 5 * true
