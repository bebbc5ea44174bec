"""Eigenpairs: residual bounds against LAPACK, multiplicities, restarts, warm starts, product counts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from matrices import Foreign, heavy_tailed, with_spectrum
from scipy.sparse import csr_matrix
from scipy.sparse.linalg import aslinearoperator

from curvdiag.errors import ArgumentError, NonFiniteError
from curvdiag.operators.base import linear_map
from curvdiag.spectrum import power_iteration, top_eigenpairs
from curvdiag.spectrum.eigen import search_eigenpairs


def expected(eigenvalues, which, k):
    descending = eigenvalues.double().sort(descending=True).values
    if which == "LA":
        return descending[:k]
    if which == "SA":
        return descending.flip(0)[:k]
    if which == "LM":
        return descending[descending.abs().argsort(descending=True)][:k]
    return torch.cat([descending[: k - k // 2], descending[len(descending) - k // 2 :]])


def check_against_lapack(pairs, matrix, slack=1e-12):
    """What an Eigenpairs promises: unit orthogonal vectors, true residuals, bounds that hold."""
    exact = torch.linalg.eigvalsh(matrix)
    vectors = pairs.vectors.double()
    assert (vectors.T @ vectors - torch.eye(vectors.shape[1], dtype=torch.float64)).abs().max() < 1e-5
    explicit = (matrix @ vectors - vectors * pairs.values).norm(dim=0)
    scale = float(exact.abs().max())
    eps = torch.finfo(pairs.vectors.dtype).eps
    # The residuals come from the recurrence; they equal the explicit ones up to rounding.
    assert (explicit - pairs.residuals).abs().max() <= 30 * eps * scale + slack
    distance = (pairs.values[:, None] - exact).abs().min(dim=1).values
    assert (distance <= pairs.residuals + slack).all()


@pytest.mark.parametrize("which", ["LA", "SA", "LM", "BE"])
@pytest.mark.parametrize("k", [1, 4, 7])
def test_every_end_of_the_spectrum_agrees_with_lapack(which, k):
    values = torch.cat([heavy_tailed(260), -torch.logspace(1.4, -1, 40, dtype=torch.float64)])
    matrix, _ = with_spectrum(values)
    pairs = top_eigenpairs(matrix, k, which=which, tol=1e-9)
    assert pairs.converged.all()
    np.testing.assert_allclose(pairs.values, expected(values, which, k), rtol=1e-9)
    check_against_lapack(pairs, matrix)


@pytest.mark.parametrize("tol", [1e-1, 1e-2, 1e-3, 1e-6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_residual_bounds_hold_against_lapack(tol, dtype):
    values = heavy_tailed(300)
    matrix, _ = with_spectrum(values)
    for seed in range(4):
        pairs = top_eigenpairs(matrix.to(dtype), 5, tol=tol, seed=seed)
        check_against_lapack(pairs, matrix.to(dtype).double(), slack=1e-12 if dtype == torch.float64 else 1e-4)
        assert (pairs.residuals <= tol * 50 * 1.01).all() == bool(pairs.converged.all())
    assert pairs.values.dtype == torch.float64
    assert pairs.vectors.shape == (300, 5)
    assert pairs.vectors.T.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k", [1, 5, 9, 12])
def test_nine_fold_eigenvalues_are_found_with_their_copies(dtype, k):
    # As in softmax regression at zero weights: the covariance of the inputs, once for each of nine directions.
    values = (10 * torch.logspace(0, -4, 30, dtype=torch.float64)).repeat_interleave(9)
    matrix, _ = with_spectrum(values)
    for seed in range(3):
        pairs = top_eigenpairs(matrix.to(dtype), k, tol=1e-3, seed=seed)
        assert pairs.converged.all()
        check_against_lapack(pairs, matrix, slack=1e-12 if dtype == torch.float64 else 1e-5)
        np.testing.assert_allclose(pairs.values, values[:k], rtol=1e-4)


@pytest.mark.parametrize("tol", [1e-6, 1e-3])
@pytest.mark.parametrize("which", ["LA", "SA", "LM", "BE"])
def test_copies_are_found_whatever_the_spectrum(which, tol):
    missed = 0
    for seed in range(30):
        generator = torch.Generator().manual_seed(seed)
        draw = torch.rand if seed % 2 else torch.randn
        values = draw(20, generator=generator, dtype=torch.float64).repeat_interleave(3)
        matrix, _ = with_spectrum(values, seed)
        pairs = top_eigenpairs(matrix, 5, which=which, tol=tol, seed=seed, basis_size=26 if seed % 3 else None)
        assert pairs.converged.all()
        error = (pairs.values.sort().values - expected(values, which, 5).sort().values).abs().max()
        missed += bool(error > 0.02 * values.abs().max())
    assert missed == 0  # the check promises at most one in a hundred looks


def test_near_copies_among_ten_pairs_of_a_heavy_tail_are_found():
    missed = 0
    for seed in range(48):
        values = heavy_tailed(300, 12 + seed % 8, seed % 5)
        values[-1 - seed % 3] = values[seed // 3 % 9] - 50 * (0, 1e-4, 3e-3, 1e-2)[seed % 4]
        pairs = top_eigenpairs(torch.diag(values), 10, tol=1e-3, seed=seed)
        missed += bool((pairs.values - expected(values, "LA", 10)).abs().max() > 0.02 * 50)
    assert missed == 0


def test_what_given_start_vectors_do_not_hold_is_looked_for_down_to_the_last_wanted_pair():
    """Hidden between the last wanted pair and the next: no copy of anything, and no random start has seen it."""
    values = torch.cat([torch.tensor([10.0, 9.0, 6.0, 4.0]).double(), torch.linspace(0, 1, 200, dtype=torch.float64)])
    start = torch.ones_like(values).index_fill_(0, torch.tensor(2), 0)
    for seed in range(20):
        pairs = top_eigenpairs(torch.diag(values), 3, start=start, seed=seed, max_matvecs=80)
        np.testing.assert_allclose(pairs.values, [10, 9, 6], rtol=1e-3)


def test_a_look_for_copies_reaches_down_to_where_a_residual_lets_them_hide():
    """At sixty residuals from a Ritz value a near copy hides with a chance of about one in a hundred."""
    matrix = torch.diag(heavy_tailed(400))
    search = search_eigenpairs(linear_map(matrix), 6, tol=1e-3, seed=0)
    values, residuals, points = search.values[search.best], search.residuals[search.best], search._points()
    end = float(values[-1]) + 0.01 * 50
    sure = [point for point, known in points if known == 1]
    assert len(sure) == 1
    assert end <= sure[0] <= max(end, float((values - 60 * residuals)[values > end].min()))
    assert all(end <= point <= sure[0] and known < 1 for point, known in points[1:])
    assert len(points) > 2


@pytest.mark.parametrize("which", ["LA", "SA", "LM", "BE"])
def test_after_a_random_start_a_look_for_copies_costs_less_and_finds_them(which):
    sign = -1 if which == "SA" else 1
    values = sign * torch.cat([torch.tensor([10.0, 9.0, 9.0, 1.3]).double(), torch.linspace(0, 1.0, 396).double()])
    start, spent, cold = torch.randn(400, generator=torch.Generator().manual_seed(1), dtype=torch.float64), 0, 0
    for seed in range(10):
        pairs = top_eigenpairs(torch.diag(values), 4, which=which, seed=seed)
        np.testing.assert_allclose(pairs.values, expected(values, which, 4), atol=0.02)
        cold += pairs.matvecs
        spent += top_eigenpairs(torch.diag(values), 4, which=which, start=start, seed=seed).matvecs
    assert which == "BE" or cold < spent  # at both ends, what converging costs differs more


def test_at_most_one_look_in_a_hundred_misses_what_lies_further_out():
    # A start vector that is an eigenvector converges at once and sees nothing else: all depends on one look.
    size, missed = 120, {}
    for name, bulk in (("tail", heavy_tailed(size, 20) / 10), ("flat", torch.rand(size, dtype=torch.float64))):
        for hidden in (1.5, 3.0, 100.0):
            values = torch.cat([torch.tensor([hidden, 1.3], dtype=torch.float64), bulk.clamp(max=1)[:-2]])
            matrix, start = torch.diag(values), torch.eye(size, dtype=torch.float64)[1]
            pairs = [
                top_eigenpairs(matrix, 1, start=start, tol=1e-2, seed=s, check_multiplicity=True) for s in range(200)
            ]
            missed[name, hidden] = sum(float(found.values[0]) < 0.98 * hidden for found in pairs)
    assert max(missed.values()) <= 2, missed


def test_a_look_that_was_asked_for_goes_down_to_the_tolerance():
    # What stands out by a hundredth of the largest is excluded in few steps, what does by 1e-3 of it only in more.
    rest = 7.9 + torch.rand(300, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    matrix, spent = torch.diag(torch.cat([torch.tensor([10.0, 9.0], dtype=torch.float64), rest])), {}
    for look in (False, "auto", True):
        pairs = [top_eigenpairs(matrix, 2, tol=1e-3, seed=seed, check_multiplicity=look) for seed in range(10)]
        assert all(found.values.tolist() == pytest.approx([10, 9], rel=1e-3) for found in pairs)
        spent[look] = sum(found.matvecs for found in pairs)
    assert spent[False] < spent["auto"] < spent[True]


@pytest.mark.parametrize("which", ["LA", "SA", "LM", "BE"])
def test_a_small_matrix_takes_no_more_products_than_its_order(which):
    matrix, _ = with_spectrum(heavy_tailed(47))
    pairs = top_eigenpairs(matrix, 2, which=which, tol=1e-9)
    assert pairs.converged.all()
    assert pairs.matvecs <= 47
    np.testing.assert_allclose(pairs.values, expected(heavy_tailed(47), which, 2), atol=1e-9)


def test_without_the_check_copies_are_missed():
    values = (10 * torch.logspace(0, -4, 30, dtype=torch.float64)).repeat_interleave(9)
    matrix, _ = with_spectrum(values)
    pairs = top_eigenpairs(matrix, 5, check_multiplicity=False)
    assert (pairs.values - values[:5]).abs().max() > 1
    check_against_lapack(pairs, matrix)


def test_a_warm_start_that_is_blind_to_a_new_largest_eigenvalue_finds_it():
    matrix, basis = with_spectrum(heavy_tailed(200))
    pairs = top_eigenpairs(matrix, 1, start=basis[:, 1])
    assert float(pairs.values[0]) == pytest.approx(50, rel=1e-5)
    blind = top_eigenpairs(matrix, 1, start=basis[:, 1], check_multiplicity=False)
    assert float(blind.values[0]) < 40


def test_a_single_value_that_a_random_vector_hardly_sees_is_found():
    """After one product the residual is that of the bulk: small, and far from the largest eigenvalue."""
    diagonal = torch.ones(100_000, dtype=torch.float64)
    diagonal[12_345] = 1.5

    class Diagonal:
        shape, dtype = (100_000, 100_000), torch.float64

        def __matmul__(self, vector):
            return diagonal * vector

    pairs = top_eigenpairs(Diagonal(), 1, tol=1e-2)
    assert float(pairs.values[0]) == pytest.approx(1.5)


def test_product_counts_stay_those_of_a_good_lanczos():
    matrix, _ = with_spectrum(heavy_tailed(800))
    for k, tol, most in ((1, 1e-2, 7), (1, 1e-3, 8), (5, 1e-2, 14), (5, 1e-3, 15), (10, 1e-2, 18), (10, 1e-3, 19)):
        counts = [top_eigenpairs(matrix, k, tol=tol, seed=s).matvecs for s in range(7)]
        assert np.median(counts) <= most
    found = top_eigenpairs(matrix, 1, tol=1e-3)
    nearby = matrix + 0.02 * with_spectrum(torch.randn(800, generator=torch.Generator().manual_seed(0)), seed=5)[0]
    for start, most in ((found.vectors, 5), (found.vectors[:, 0], 5)):
        warm = top_eigenpairs(nearby, 1, tol=1e-3, start=start)
        assert warm.matvecs <= most
        check_against_lapack(warm, nearby)


def test_products_are_counted_as_made():
    class Counting(Foreign):
        made = 0

        def __matmul__(self, vector):
            self.made += 1
            return super().__matmul__(vector)

    matrix, _ = with_spectrum(heavy_tailed(100))
    for run in (lambda op: top_eigenpairs(op, 6, tol=1e-6), power_iteration):
        op = Counting(matrix)
        assert run(op).matvecs == op.made


def test_restarts_on_a_short_basis_reach_the_same_pairs():
    values = torch.linspace(0, 1, 300, dtype=torch.float64)
    matrix, _ = with_spectrum(values)
    pairs = top_eigenpairs(matrix, 6, tol=1e-8, basis_size=20, max_matvecs=3000)
    assert pairs.converged.all()
    assert pairs.matvecs > 40  # so it did restart
    np.testing.assert_allclose(pairs.values, expected(values, "LA", 6), atol=1e-10)
    check_against_lapack(pairs, matrix)


@pytest.mark.parametrize("which", ["LA", "SA"])
@pytest.mark.parametrize(("basis", "most"), [(7, 100), (None, 60)])
def test_an_outlier_at_the_other_end_counts_after_a_restart(which, basis, most):
    values = torch.cat([torch.tensor([100.0]), torch.linspace(0, 1, 400)]).double() * (-1 if which == "LA" else 1)
    pairs = top_eigenpairs(torch.diag(values), 3, which=which, tol=1e-4, basis_size=basis, max_matvecs=400)
    assert pairs.converged.all()
    assert float(pairs.residuals.max()) <= 1e-4 * 100
    assert 28 < pairs.matvecs <= most  # so it did restart


def test_what_has_not_converged_is_flagged():
    matrix, _ = with_spectrum(torch.linspace(0, 1, 300, dtype=torch.float64))
    pairs = top_eigenpairs(matrix, 6, tol=1e-8, max_matvecs=12)
    assert pairs.matvecs == 12
    assert not pairs.converged.any()
    check_against_lapack(pairs, matrix)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("which", ["LA", "SA", "LM", "BE"])
def test_zero_identity_and_tiny_matrices(dtype, which):
    for matrix, value in ((torch.zeros(6, 6), 0.0), (torch.eye(6), 1.0), (-2 * torch.ones(1, 1), -2.0)):
        for k in (1, 3, 20):
            pairs = top_eigenpairs(matrix.to(dtype), k, which=which)
            assert len(pairs.values) == min(k, len(matrix))  # clipped to P
            assert pairs.converged.all()
            np.testing.assert_allclose(pairs.values, value, atol=1e-6)
            check_against_lapack(pairs, matrix.double(), slack=1e-6)
    whole = top_eigenpairs(torch.diag(torch.arange(8.0, dtype=dtype)), 8)
    np.testing.assert_allclose(whole.values, np.arange(8.0)[::-1], atol=1e-5)
    low_rank = torch.zeros(50, 50, dtype=dtype)
    low_rank[0, 0], low_rank[1, 1] = 3, -1
    np.testing.assert_allclose(top_eigenpairs(low_rank, 4, which="LM").values, [3, -1, 0, 0], atol=1e-5)


def test_an_asymmetric_operator_shows_in_the_residuals():
    matrix, _ = with_spectrum(heavy_tailed(100))
    generator = torch.Generator().manual_seed(0)
    noisy = matrix + 0.05 * torch.randn(100, 100, generator=generator, dtype=torch.float64)
    assert top_eigenpairs(noisy, 5, tol=1e-6).residuals.min() > 0.01
    assert not top_eigenpairs(noisy, 5, tol=1e-6).converged.any()


def test_any_square_object_with_shape_and_product_serves():
    matrix, _ = with_spectrum(heavy_tailed(60))
    array = matrix.numpy()
    for op in (array, csr_matrix(array), aslinearoperator(array), Foreign(matrix), matrix.float()):
        np.testing.assert_allclose(top_eigenpairs(op, 3).values, heavy_tailed(60)[:3], rtol=1e-4)


def test_power_iteration_agrees_with_lapack_and_says_when_it_does_not_converge():
    matrix, _ = with_spectrum(heavy_tailed(200))
    pairs = power_iteration(matrix, tol=1e-6, max_matvecs=500)
    assert pairs.converged.all()
    assert float(pairs.values) == pytest.approx(50, rel=1e-9)
    check_against_lapack(pairs, matrix)
    assert power_iteration(matrix, start=pairs.vectors[:, 0]).matvecs == 1
    assert float(power_iteration(-matrix, tol=1e-6, max_matvecs=500).values) == pytest.approx(-50, rel=1e-9)
    tied, _ = with_spectrum(torch.tensor([1.0, -1.0] + [0.0] * 20))
    assert not power_iteration(tied).converged.any()
    assert power_iteration(torch.zeros(5, 5)).converged.all()


def test_a_result_leaves_its_vectors_out_of_json_and_prints_its_state():
    pairs = top_eigenpairs(torch.eye(4), 2)
    assert set(pairs.to_dict()) == {"values", "residuals", "converged", "matvecs", "which"}
    assert "2 eigenpairs" in str(pairs)


def test_a_result_says_which_pairs_it_holds():
    for which in ("LA", "SA", "LM", "BE"):
        pairs = top_eigenpairs(torch.eye(4), 2, which=which)
        assert pairs.which == pairs.to_dict()["which"] == which
        assert which in str(pairs)
    assert power_iteration(torch.eye(4)).which == "LM"


def test_bad_arguments_and_products_are_named():
    matrix = torch.eye(5)
    for wrong, message in (
        ({"k": 0}, "k is"),
        ({"which": "LR"}, "which"),
        ({"tol": 0}, "tolerance"),
        ({"start": torch.ones(4)}, "start"),
        ({"start": torch.full((5,), float("nan"))}, "start"),
        ({"k": 3, "max_matvecs": 2}, "max_matvecs"),
        ({"k": 3, "basis_size": 4}, "basis"),
    ):
        with pytest.raises(ArgumentError, match=message):
            top_eigenpairs(matrix, **wrong)
    for run in (top_eigenpairs, power_iteration):
        with pytest.raises(NonFiniteError):
            run(torch.full((5, 5), float("nan")))


def test_progress_is_told_and_may_interrupt():
    seen = []
    top_eigenpairs(torch.diag(torch.arange(20.0)), 3, progress=lambda *p: seen.append(p))
    assert seen[-1] == (3, 3)

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        top_eigenpairs(torch.eye(9), progress=stop)
