"""Trace, diagonal and norm: exact where the theory says so, unbiased, and with errors that cover the truth."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from matrices import Foreign, heavy_tailed, with_spectrum
from scipy.sparse import csr_matrix
from scipy.sparse.linalg import aslinearoperator

from curvdiag.errors import ArgumentError, NonFiniteError
from curvdiag.spectrum import diagonal, frobenius_norm, trace

METHODS = ("hutchinson", "hutch++", "xtrace")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", ["hutch++", "xtrace"])
def test_a_low_rank_trace_is_exact(method, dtype):
    values = torch.zeros(80)
    values[:5] = torch.tensor([5.0, 4, 3, -2, 1])
    matrix, _ = with_spectrum(values)
    for seed in range(20):
        estimate = trace(matrix.to(dtype), method=method, probes=24, seed=seed)
        rounding = 200 * torch.finfo(dtype).eps * 5
        assert abs(estimate.value - 11) < rounding
        assert estimate.standard_error < rounding


@pytest.mark.parametrize("method", METHODS)
def test_a_diagonal_matrix_and_the_zero_matrix_are_exact(method):
    zero = trace(torch.zeros(9, 9), method=method)
    assert (zero.value, zero.standard_error) == (0, 0)
    if method == "hutchinson":
        matrix = torch.diag(torch.arange(1.0, 31.0, dtype=torch.float64))
        estimate = trace(matrix, probes=3)
        assert estimate.value == pytest.approx(465, rel=1e-12)
        assert estimate.standard_error < 1e-10


@pytest.mark.parametrize("method", ["hutch++", "xtrace"])
def test_more_probes_than_parameters_give_the_exact_trace(method):
    matrix, _ = with_spectrum(torch.linspace(-1, 2, 6))
    estimate = trace(matrix, method=method, probes=24)
    assert estimate.value == pytest.approx(float(matrix.trace()), abs=1e-12)
    assert estimate.interval() == (estimate.value, estimate.value)


def repeat(method, values, seeds=500):
    """Errors over seeds, the root mean square of the standard errors told, and the coverage of 95 % intervals."""
    matrix, _ = with_spectrum(values, seed=1)
    truth = float(matrix.trace())
    estimates = [trace(matrix, method=method, probes=36, seed=s) for s in range(seeds)]
    errors = np.array([e.value for e in estimates]) - truth
    covered = [low <= truth <= high for low, high in (e.interval() for e in estimates)]
    return errors, np.sqrt(np.mean([e.standard_error**2 for e in estimates])), np.mean(covered)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["heavy", "flat"])
def test_estimates_are_unbiased(method, kind):
    errors, _, _ = repeat(method, heavy_tailed(300) if kind == "heavy" else torch.linspace(-1, 2, 60))
    assert abs(errors.mean()) < 4 * errors.std() / len(errors) ** 0.5


@pytest.mark.parametrize(
    ("method", "kind"),
    [("hutchinson", "heavy"), ("hutchinson", "flat"), ("hutch++", "heavy"), ("hutch++", "flat"), ("xtrace", "heavy")],
)
def test_standard_errors_are_those_seen_and_intervals_cover(method, kind):
    errors, told, covered = repeat(method, heavy_tailed(300) if kind == "heavy" else torch.linspace(-1, 2, 60))
    assert told == pytest.approx(errors.std(), rel=0.15)
    assert 0.90 <= covered <= 0.98


def test_the_error_of_xtrace_is_too_small_on_a_flat_spectrum_by_no_more_than_documented():
    errors, told, covered = repeat("xtrace", torch.linspace(-1, 2, 60))
    assert 0.7 < told / errors.std() < 0.9
    assert 0.83 <= covered < 0.93


def test_hutchinson_has_the_exact_variance_of_rademacher_probes():
    matrix, _ = with_spectrum(heavy_tailed(60, 6), seed=1)
    variance = 2 * (matrix.square().sum() - matrix.diagonal().square().sum())
    estimate = trace(matrix, probes=1000)
    assert abs(estimate.value - float(matrix.trace())) < 4 * float(variance / 1000) ** 0.5
    assert estimate.standard_error**2 == pytest.approx(float(variance / 1000), rel=0.2)


def test_where_few_eigenvalues_dominate_the_better_methods_are_better():
    matrix, _ = with_spectrum(heavy_tailed(400))
    truth = float(matrix.trace())
    errors = {
        method: np.mean([abs(trace(matrix, method=method, probes=36, seed=s).value - truth) for s in range(10)])
        for method in METHODS
    }
    assert errors["hutch++"] < errors["hutchinson"] / 20
    assert errors["xtrace"] < errors["hutchinson"] / 20


@pytest.mark.parametrize("method", METHODS)
def test_probes_count_products(method):
    class Counting(Foreign):
        made = 0

        def __matmul__(self, vector):
            self.made += 1
            return super().__matmul__(vector)

    op, seen = Counting(with_spectrum(heavy_tailed(100))[0]), []
    trace(op, method=method, probes=24, progress=lambda *p: seen.append(p))
    assert op.made == 24
    assert seen[-1] == (24, 24)


def test_the_diagonal_is_exact_for_diagonal_matrices_and_covered_for_others():
    assert np.array_equal(diagonal(torch.diag(torch.arange(5.0)), 1).value, np.arange(5.0))
    matrix, _ = with_spectrum(heavy_tailed(100))
    estimate = diagonal(matrix, probes=400)
    exact = matrix.diagonal().numpy()
    variance = (matrix.square().sum(1) - matrix.diagonal().square()).numpy() / 400
    assert estimate.value.dtype == np.float64
    assert (np.abs(estimate.value - exact) < 5 * np.sqrt(variance)).all()
    np.testing.assert_allclose(estimate.standard_error**2, variance, rtol=0.5)
    assert np.isnan(diagonal(matrix, 1).standard_error).all()


def test_the_norm_is_covered():
    matrix, _ = with_spectrum(heavy_tailed(100))
    estimate = frobenius_norm(matrix, probes=200)
    assert abs(estimate.value - float(matrix.norm())) < 4 * estimate.standard_error
    assert frobenius_norm(torch.eye(7), 3).value == pytest.approx(7**0.5)
    assert frobenius_norm(torch.zeros(7, 7), 3).value == 0


@pytest.mark.parametrize("estimate", [trace, frobenius_norm])
def test_fewer_than_three_probes_give_no_interval(estimate):
    assert estimate(torch.ones(5, 5), probes=2).interval() == (-np.inf, np.inf)


def test_any_square_object_with_shape_and_product_serves():
    matrix, _ = with_spectrum(heavy_tailed(50))
    array = matrix.numpy()
    for method in METHODS:
        exact = trace(matrix, method=method).value
        for op in (array, csr_matrix(array), aslinearoperator(array), Foreign(matrix)):
            assert trace(op, method=method).value == pytest.approx(exact, rel=1e-8)


def test_seeds_decide_and_generators_advance():
    matrix, _ = with_spectrum(heavy_tailed(50))
    generator = torch.Generator().manual_seed(5)
    assert trace(matrix, seed=1).value == trace(matrix, seed=1).value
    assert trace(matrix, seed=1).value != trace(matrix, seed=2).value
    assert trace(matrix, seed=generator).value != trace(matrix, seed=generator).value


def test_bad_arguments_and_products_are_named():
    with pytest.raises(ArgumentError, match="method"):
        trace(torch.eye(4), method="exact")
    with pytest.raises(ArgumentError, match="at least 3"):
        trace(torch.eye(4), method="hutch++", probes=2)
    with pytest.raises(ArgumentError, match="at least 4"):
        trace(torch.eye(4), method="xtrace", probes=3)
    with pytest.raises(ArgumentError, match="square"):
        diagonal(torch.ones(3, 4))
    bad = torch.full((4, 4), float("nan"))
    for run in (diagonal, frobenius_norm, *(lambda op, m=m: trace(op, method=m) for m in METHODS)):
        with pytest.raises(NonFiniteError):
            run(bad)
