"""Lanczos: quadrature against dense moments, breakdown, orthogonality, vector by vector independence."""

from __future__ import annotations

import weakref

import numpy as np
import pytest
import torch
from matrices import Foreign, heavy_tailed, with_spectrum
from scipy.sparse import csr_matrix
from scipy.sparse.linalg import aslinearoperator
from torch.utils._python_dispatch import TorchDispatchMode

from curvdiag.errors import ArgumentError, NonFiniteError, TooLargeError
from curvdiag.space.inner_products import dots_of_parts
from curvdiag.space.probes import gaussian, rademacher
from curvdiag.spectrum.lanczos import lanczos, largest_weight
from curvdiag.spectrum.vectors import row_dots

POLICIES = ("none", "partial", "full")


def moments(matrix: torch.Tensor, starts: torch.Tensor) -> np.ndarray:
    """``z^T H^k z`` for k = 1..4, dense in float64, ``[4, probes]``."""
    image, rows = starts.double(), []
    for _ in range(4):
        image = image @ matrix
        rows.append((image * starts.double()).sum(1).numpy())
    return np.stack(rows)


def quadrature_moments(run) -> np.ndarray:
    nodes, weights = run.quadrature()
    return np.stack([(weights * nodes**k).sum(1) * run.norms**2 for k in range(1, 5)])


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("draw", [rademacher, gaussian])
def test_first_four_moments_of_each_start_vector_equal_the_dense_ones(policy, draw):
    matrix, _ = with_spectrum(heavy_tailed())
    starts = draw(4, 400, seed=1, dtype=torch.float64)
    run = lanczos(matrix, starts, 80, reorthogonalize=policy)
    np.testing.assert_allclose(quadrature_moments(run), moments(matrix, starts), rtol=1e-8)


@pytest.mark.parametrize("seed", range(3))
def test_float32_without_reorthogonalisation_keeps_the_moments_to_1e_minus_5(seed):
    matrix, _ = with_spectrum(heavy_tailed(seed=seed), seed=seed)
    starts = rademacher(4, 400, seed=seed)
    run = lanczos(matrix.float(), starts, 80)
    np.testing.assert_allclose(quadrature_moments(run), moments(matrix.float().double(), starts), rtol=1e-5)


def test_inner_products_of_long_float32_vectors_are_right_to_rounding():
    # At this length torch.dot is off by 3e-6 to 2e-5 and vector_norm by 5e-4 of the square.
    long = gaussian(1, 8_000_000, seed=0) + 0.5
    exact = float(long.double().square().sum())
    assert float(row_dots(long, long)) == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_inner_products_of_half_precision_round_nothing_more(dtype):
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(1000, generator=generator).to(dtype) for _ in range(2))
    exact = float(x.double() @ y.double())
    assert float(dots_of_parts([(x[:400], y[:400]), (x[400:], y[400:])])) == pytest.approx(exact, rel=1e-6)


def test_full_reorthogonalisation_keeps_the_basis_orthonormal_and_partial_nearly_so():
    matrix, _ = with_spectrum(heavy_tailed())
    starts = rademacher(2, 400, seed=0)
    for policy, bound in (("full", 1e-5), ("partial", 1e-3)):
        basis = lanczos(matrix.float(), starts, 60, reorthogonalize=policy).basis.double()
        gram = basis @ basis.transpose(1, 2)
        assert (gram - torch.eye(60, dtype=torch.float64)).abs().max() < bound
    # The spectrum is one on which it matters: without, the largest eigenvalue comes several times.
    nodes, _ = lanczos(matrix.float(), starts, 60).quadrature()
    assert (np.abs(nodes[0] - 50) < 1e-2).sum() > 1


def test_full_lanczos_of_as_many_steps_as_parameters_finds_every_eigenvalue():
    eigenvalues = torch.linspace(-1, 3, 30, dtype=torch.float64)
    matrix, _ = with_spectrum(eigenvalues)
    run = lanczos(matrix, gaussian(1, 30, seed=0, dtype=torch.float64), 50, reorthogonalize="full")
    assert run.alphas.shape == (1, 30)
    assert run.matvecs == 30
    np.testing.assert_allclose(run.quadrature()[0][0], eigenvalues, atol=1e-10)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_exhausted_krylov_space_ends_the_tridiagonal_and_spoils_nothing(policy, dtype):
    starts = rademacher(3, 60, seed=0, dtype=dtype)
    nodes, weights = lanczos(torch.zeros(60, 60, dtype=dtype), starts, 20, reorthogonalize=policy).quadrature()
    assert (nodes == 0).all()
    np.testing.assert_allclose(weights.sum(1), 1)
    run = lanczos(torch.eye(60, dtype=dtype), starts, 20, reorthogonalize=policy)
    assert (run.lengths == 1).all()
    np.testing.assert_allclose(run.quadrature()[0][:, 0], 1, rtol=1e-6)
    # Three distinct eigenvalues, each twenty-fold: the space has three dimensions.
    matrix, basis = with_spectrum(torch.tensor([5.0, 1.0, -2.0]).repeat_interleave(20))
    run = lanczos(matrix.to(dtype), starts, 20, reorthogonalize=policy)
    nodes, weights = run.quadrature()
    components = (starts.double() @ basis).square().reshape(3, 3, 20).sum(2) / 60
    for column, value in enumerate((5.0, 1.0, -2.0)):
        near = (np.abs(nodes - value) < 1e-3) * weights
        np.testing.assert_allclose(near.sum(1), components[:, column], rtol=2e-4)


def test_start_vectors_do_not_influence_each_other():
    matrix, _ = with_spectrum(heavy_tailed())
    starts = rademacher(3, 400, seed=0, dtype=torch.float64)
    together = lanczos(matrix, starts, 12)
    for i in range(3):
        alone = lanczos(matrix, starts[i : i + 1], 12)
        np.testing.assert_allclose(together.alphas[i], alone.alphas[0], rtol=1e-9)


@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: m.numpy(), lambda m: aslinearoperator(m.numpy())])
def test_any_square_object_with_shape_and_product_serves(wrap):
    matrix, _ = with_spectrum(heavy_tailed(50))
    starts = rademacher(2, 50, seed=0, dtype=torch.float64)
    reference = lanczos(matrix, starts, 10).alphas
    for op in (wrap(matrix), csr_matrix(matrix.numpy()), Foreign(matrix)):
        np.testing.assert_allclose(lanczos(op, starts, 10).alphas, reference, rtol=1e-8)


def test_an_operator_that_returns_its_argument_is_not_overwritten():
    class Same(Foreign):
        def __matmul__(self, vector):
            return vector

    starts = rademacher(1, 8, seed=0, dtype=torch.float64)
    kept = starts.clone()
    assert lanczos(Same(torch.eye(8, dtype=torch.float64)), starts, 3).alphas[0, 0] == pytest.approx(1)
    assert torch.equal(starts, kept)


def test_half_precision_operators_are_worked_on_in_single_precision():
    matrix = torch.diag(torch.arange(1.0, 9.0)).bfloat16()
    run = lanczos(matrix, rademacher(1, 8, seed=0), 8, reorthogonalize="full")
    np.testing.assert_allclose(run.quadrature()[0].max(), 8, rtol=0.02)


def test_bad_arguments_and_products_are_named():
    matrix = torch.eye(5)
    starts = rademacher(1, 5, seed=0)
    with pytest.raises(ArgumentError, match="rows"):
        lanczos(matrix, starts[:, :4], 3)
    with pytest.raises(ArgumentError, match="zero"):
        lanczos(matrix, torch.zeros(1, 5), 3)
    with pytest.raises(ArgumentError, match="steps"):
        lanczos(matrix, starts, 0)
    with pytest.raises(ArgumentError, match="reorthogonalize"):
        lanczos(matrix, starts, 3, reorthogonalize="sometimes")
    with pytest.raises(ArgumentError, match="square"):
        lanczos(torch.ones(5, 4), starts, 3)
    for bad in (float("nan"), float("inf")):
        with pytest.raises(NonFiniteError):
            lanczos(torch.diag(torch.tensor([1.0, 1, 1, 1, bad])), starts, 3)
    huge = Foreign(torch.empty(0))
    huge.shape = (10**12, 10**12)
    with pytest.raises(TooLargeError, match="basis"):
        lanczos(huge, torch.empty(1).expand(1, 10**12), 80, reorthogonalize="full")


def test_progress_counts_products_and_may_interrupt():
    seen = []
    lanczos(torch.eye(9), rademacher(2, 9, seed=0), 3, progress=lambda *p: seen.append(p))
    assert seen == [(2, 6), (4, 6), (6, 6)]

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lanczos(torch.eye(9), rademacher(2, 9, seed=0), 3, progress=stop)


@pytest.mark.parametrize("draw", [rademacher, gaussian])
def test_probes_depend_on_seed_and_index_alone(draw):
    rows = draw(5, 1000, seed=7)
    assert torch.equal(draw(2, 1000, seed=7, first=3), rows[3:])
    assert torch.equal(draw(5, 1000, seed=7, dtype=torch.float64), rows.double())
    assert not torch.equal(draw(1, 1000, seed=8), rows[:1])
    correlation = (rows @ rows.T / 1000 - torch.eye(5)).abs().max()
    assert correlation < 0.2
    if draw is rademacher:
        assert set(rows.unique().tolist()) == {-1.0, 1.0}


def test_generators_advance_and_the_global_state_is_untouched():
    state, generator = torch.get_rng_state(), torch.Generator().manual_seed(0)
    numpy_state = np.random.get_state()[1].copy()  # noqa: NPY002
    first, second = (rademacher(1, 100, seed=generator) for _ in range(2))
    again = rademacher(1, 100, seed=torch.Generator().manual_seed(0))
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    assert torch.equal(state, torch.get_rng_state())
    assert (numpy_state == np.random.get_state()[1]).all()  # noqa: NPY002
    with pytest.raises(ArgumentError, match="seed"):
        rademacher(1, 5, seed="zero")


def test_nothing_in_the_loop_waits_for_the_device():
    class Reads(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += func is torch.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))

    matrix, _ = with_spectrum(heavy_tailed(50))
    starts = rademacher(2, 50, seed=0, dtype=torch.float64)
    for policy in POLICIES:
        counts = []
        for steps in (3, 30):
            with Reads() as reads:
                lanczos(matrix, starts, steps, reorthogonalize=policy)
            counts.append(reads.count)
        assert counts[0] == counts[1]
        assert counts[0] > 0  # the checks after the loop, so reads are seen at all


def test_without_reorthogonalisation_memory_is_a_few_vectors_whatever_the_steps():
    size = 200_000
    vector = size * 4

    class Diagonal(Foreign):
        def __init__(self):
            self.shape, self.dtype = (size, size), torch.float32

        def __matmul__(self, v):
            return v * 2 + 1

    peak = 0

    made: list[weakref.ref] = []

    class Follow(TorchDispatchMode):
        """Follows the tensors of a vector's size that the run allocates."""

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal peak
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.untyped_storage().nbytes() >= vector:
                made.append(weakref.ref(result))
            alive = [t for t in (ref() for ref in made) if t is not None]
            peak = max(peak, len({t.untyped_storage().data_ptr() for t in alive}))
            return result

    starts = gaussian(1, size, seed=0)
    with Follow():
        lanczos(Diagonal(), starts, 12)
    assert 3 <= peak <= 7  # start, three vectors, and what the product itself needs


def test_no_eigenvalue_weighs_more_than_the_coefficients_allow():
    values = torch.tensor([9.0, 4.0, 3.5, 1.0, 0.2, 0.0, -1.0, -2.5], dtype=torch.float64)
    start = gaussian(1, 8, seed=3, dtype=torch.float64)
    weights = (start[0] ** 2 / start.square().sum()).tolist()
    run = lanczos(torch.diag(values), start, 7, reorthogonalize="full")
    alphas, betas = run.alphas[0].tolist(), run.betas[0].tolist()
    for steps in range(1, 8):
        bounds = [largest_weight(alphas[:steps], betas[:steps], value) for value in values.tolist()]
        assert all(weight <= bound * (1 + 1e-9) for weight, bound in zip(weights, bounds, strict=True))
        further = [largest_weight(alphas[:steps], betas[:steps], 9.0 + step) for step in range(5)]
        assert further == sorted(further, reverse=True)
    # One step short of the order, the moments leave no freedom at an eigenvalue.
    np.testing.assert_allclose(bounds, weights, rtol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_run_that_goes_on_equals_one_that_never_stopped(dtype):
    """Bit for bit, with one start whose Krylov space is exhausted before the first stop."""
    matrix, basis = with_spectrum(heavy_tailed())
    starts = torch.cat([rademacher(3, 400, seed=1, dtype=torch.float64), basis[:, :2].sum(1, keepdim=True).T])
    matrix, starts = matrix.to(dtype), starts.to(dtype)
    whole = lanczos(matrix, starts, 40)
    first = lanczos(matrix, starts, 9, resumable=True)
    kept = [t.clone() for t in first.position[:2]]
    run = lanczos(matrix, lanczos(matrix, first, 10, resumable=True), 40)
    for name in ("alphas", "betas", "norms", "lengths"):
        np.testing.assert_array_equal(getattr(run, name), getattr(whole, name))
    assert run.matvecs == whole.matvecs
    assert run.position is None
    assert all(torch.equal(now, then) for now, then in zip(first.position, kept, strict=False))
    again = lanczos(matrix, first, 9)
    np.testing.assert_array_equal(again.alphas, first.alphas)


def test_a_run_that_goes_on_makes_only_the_new_products():
    matrix, _ = with_spectrum(heavy_tailed())
    calls = []
    first = lanczos(matrix, rademacher(2, 400, seed=1, dtype=torch.float64), 5, resumable=True)
    lanczos(matrix, first, 12, progress=lambda done, planned: calls.append((done, planned)))
    assert calls == [(2 * j, 24) for j in range(6, 13)]


def test_a_run_that_cannot_go_on_is_refused():
    matrix, _ = with_spectrum(heavy_tailed())
    starts = rademacher(2, 400, seed=1, dtype=torch.float64)
    run = lanczos(matrix, starts, 5, resumable=True)
    with pytest.raises(ArgumentError, match="resumable=True"):
        lanczos(matrix, lanczos(matrix, starts, 5), 8)
    with pytest.raises(ArgumentError, match="has taken 5 steps"):
        lanczos(matrix, run, 4)
    with pytest.raises(ArgumentError, match="order"):
        lanczos(matrix[:300, :300], run, 8)
    for wrong in ({"starts": run}, {"starts": starts, "resumable": True}):
        with pytest.raises(ArgumentError, match="last two vectors"):
            lanczos(matrix, **{"steps": 8, "reorthogonalize": "partial", **wrong})
