"""A scaled operator is S A S, and the work is counted where it is done."""

from __future__ import annotations

import pytest
import torch
from nets import make
from oracles import criterion_loss, dense_hessian, relative
from torch.nn import functional as F

from curvdiag import Objective, top_eigenpairs
from curvdiag.errors import ArgumentError, NonFiniteError, StaleWeightsError
from curvdiag.operators import Hessian, Scaled, SymmetricOperator
from curvdiag.operators.base import Cost


class Dense(SymmetricOperator):
    """A matrix that counts what it does."""

    def __init__(self, matrix):
        self.matrix = matrix
        self.size, self.dtype, self.device, self.cost = len(matrix), matrix.dtype, matrix.device, Cost()

    def apply(self, rows):
        assert rows.dtype == self.dtype
        self.cost.matvecs += len(rows)
        return rows @ self.matrix


def symmetric(size=40, dtype=torch.float64):
    root = torch.randn(size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return ((root + root.T) / 2).to(dtype)


def scales(size, dtype=torch.float64):
    """Of both signs, over ten decades, some of them zero."""
    generator = torch.Generator().manual_seed(1)
    scale = 10 ** torch.empty(size, dtype=torch.float64).uniform_(-5, 5, generator=generator)
    scale[::7] *= -1
    scale[3::11] = 0.0
    return scale.to(dtype)


def hessian(**options):
    model, batch = make("mlp-tanh")
    truth = dense_hessian(model, criterion_loss(F.cross_entropy, batch))
    return Hessian(Objective(model, F.cross_entropy, batch), **options), truth


def test_it_is_the_scaled_matrix():
    matrix, scale = symmetric(), scales(40)
    scaled = Scaled(Dense(matrix), scale)
    truth = scale[:, None] * matrix * scale
    assert relative(scaled.dense(), truth) < 1e-12
    vectors = torch.randn(40, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    assert relative(scaled @ vectors, truth @ vectors) < 1e-12
    assert relative(scaled @ vectors[:, 0], truth @ vectors[:, 0]) < 1e-12
    assert not scaled.dense()[3::11].any()


def test_a_scaled_hessian_and_its_blocks_against_the_dense_one():
    whole, truth = hessian()
    scale = scales(whole.size).abs().clamp(1e-2, 1e2)
    assert relative(Scaled(whole, scale).dense(), scale[:, None] * truth * scale) < 1e-12
    block, part = whole.block("2.*"), slice(30, 65)
    assert relative(Scaled(block, scale[part]).dense(), scale[part, None] * truth[part, part] * scale[part]) < 1e-12


def test_its_eigenvalues_are_those_of_the_preconditioned_matrix():
    whole, truth = hessian()
    diagonal = scales(whole.size).abs().clamp(1e-2, 1e2)
    top = top_eigenpairs(Scaled(whole, diagonal.rsqrt()), 2, tol=1e-9)
    exact = torch.linalg.eigvals(truth / diagonal[:, None]).real.sort(descending=True).values
    assert torch.allclose(top.values.double(), exact[:2], rtol=1e-8)


def test_the_work_is_counted_on_the_inner_operator():
    inner = Dense(symmetric())
    scaled = Scaled(inner, scales(40))
    scaled @ torch.ones(40, 3)
    scaled @ torch.ones(40)
    assert scaled.cost is inner.cost
    assert inner.cost.matvecs == 4
    whole, _ = hessian()
    graphs = whole.cost.graphs
    Scaled(whole, torch.ones(whole.size)) @ torch.ones(whole.size)
    assert (whole.cost.matvecs, whole.cost.graphs) == (1, graphs)


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16, torch.float32])
def test_products_are_in_single_precision_at_least(narrow):
    matrix, scale = symmetric(dtype=narrow), torch.full((40,), 300.0)
    scaled = Scaled(Dense(matrix), scale)
    assert scaled.dtype == (scaled @ torch.ones(40)).dtype == torch.float32
    truth = scale[:, None] * matrix.float() * scale  # 90,000 times as large, which float16 does not hold
    assert relative(scaled.dense(), truth) < 4 * torch.finfo(narrow).eps


def test_what_was_given_may_be_changed_afterwards():
    scale = torch.ones(40, dtype=torch.float64)
    scaled = Scaled(Dense(symmetric()), scale)
    scale.zero_()
    assert relative(scaled.dense(), symmetric()) < 1e-12
    vector = torch.ones(1, 40, dtype=torch.float64)
    scaled.apply(vector)
    assert torch.equal(vector, torch.ones(1, 40, dtype=torch.float64))


def test_stale_weights_are_noticed_through_it():
    whole, _ = hessian(share=True)
    scaled = Scaled(whole, torch.ones(whole.size))
    scaled @ torch.ones(whole.size)
    with torch.no_grad():
        next(whole.objective.model.parameters()).add_(1.0)
    with pytest.raises(StaleWeightsError):
        scaled @ torch.ones(whole.size)


@pytest.mark.parametrize(
    ("scale", "error", "words"),
    [
        (torch.ones(39), ArgumentError, r"shape \(40,\), not torch.float32 \(39,\)"),
        (torch.ones(40, 1), ArgumentError, r"\(40, 1\)"),
        (torch.ones(40, dtype=torch.int64), ArgumentError, "int64"),
        (torch.ones(40, dtype=torch.complex64), ArgumentError, "complex64"),
        ([1.0] * 40, ArgumentError, "not list"),
        (torch.full((40,), torch.nan), NonFiniteError, "40 of 40"),
        (torch.cat([torch.ones(39), torch.tensor([torch.inf])]), NonFiniteError, "1 of 40"),
        (torch.full((40,), 1e300, dtype=torch.float64), NonFiniteError, "torch.float32"),
    ],
)
def test_scales_that_are_none_are_refused(scale, error, words):
    with pytest.raises(error, match=words):
        Scaled(Dense(symmetric(dtype=torch.float32)), scale)


def test_a_dense_matrix_is_refused_with_what_to_do():
    with pytest.raises(ArgumentError, match="not Tensor; scale a dense matrix yourself"):
        Scaled(symmetric(), torch.ones(40))
