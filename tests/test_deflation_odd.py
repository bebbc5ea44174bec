"""Deflation of odd spectra, at odd orders and under little memory; and what keeps the deflated out of the probes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from matrices import heavy_tailed, with_spectrum
from torch.utils._python_dispatch import TorchDispatchMode

from curvdiag import anisotropy, spectral_density
from curvdiag.errors import ArgumentError, NonFiniteError
from curvdiag.operators.base import linear_map
from curvdiag.space.probes import rademacher
from curvdiag.spectrum.deflation import find_deflation
from curvdiag.spectrum.lanczos import lanczos
from curvdiag.spectrum.projection import Projection, gaps_between


def check_whole(density, matrix):
    """Mass, trace and norm of a matrix whose rest is exact or nearly so."""
    assert density.weights.sum(1) + len(density.deflated) / len(matrix) == pytest.approx(1)
    scale = float(matrix.norm()) + 1e-30
    assert density.trace().value == pytest.approx(float(matrix.trace()), abs=1e-4 * scale)
    assert density.squared_frobenius_norm().value == pytest.approx(scale**2, rel=1e-4, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("deflate", [1, 3, 100, "auto"])
def test_zero_diagonal_and_low_rank_matrices(dtype, deflate):
    low, _ = with_spectrum(torch.cat([torch.tensor([9.0, -4.0, 2.0]), torch.zeros(57)]))
    for matrix in (torch.zeros(60, 60), 3 * torch.eye(60), torch.ones(1, 1)):
        check_whole(spectral_density(matrix.to(dtype), steps=20, deflate=deflate), matrix)
    diagonal = torch.diag(torch.arange(60.0))
    density = spectral_density(diagonal.to(dtype), steps=20, deflate=deflate)
    assert density.lambda_max == pytest.approx(59, rel=1e-3)
    # Without deflation a diagonal matrix is exact, so "auto" deflates nothing, and else its own error shows.
    assert density.trace().value == pytest.approx(1770, rel=1e-5 if deflate == "auto" else 5e-3)
    density = spectral_density(low.to(dtype), steps=20, deflate=deflate)
    if deflate != 1:
        check_whole(density, low)
        np.testing.assert_allclose(density.deflated, [9, -4, 2], rtol=1e-5)
        assert density.count(-1e-3, 1e-3).value == pytest.approx(57)
    assert density.lambda_max == pytest.approx(9, rel=1e-5)
    beyond = np.abs(density.nodes) > (1e-4 if deflate != 1 else 4.1)
    assert density.weights[beyond].sum() < 1e-9


def test_eigenvectors_on_single_coordinates_are_not_worth_deflating():
    matrix = torch.diag(heavy_tailed())  # random signs see a diagonal matrix exactly
    density = spectral_density(matrix, steps=40, probes=3, deflate="auto")
    assert density.note == "nothing deflated: it would not pay"
    assert density.trace().value == pytest.approx(float(matrix.trace()), rel=1e-9)
    turned, _ = with_spectrum(heavy_tailed())
    assert len(spectral_density(turned, steps=40, probes=3, deflate="auto").deflated) > 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_more_than_there_are_makes_the_whole_spectrum_exact(dtype):
    matrix, _ = with_spectrum(torch.tensor([5.0, 3.0, 1.0, -2.0, 0.5, 0.1]))
    density = spectral_density(matrix.to(dtype), deflate=50)
    np.testing.assert_allclose(np.sort(density.deflated), [-2, 0.1, 0.5, 1, 3, 5], rtol=1e-4)
    assert density.trace().value == pytest.approx(7.6, rel=1e-4)
    assert density.matvecs == 6
    assert density.weights.sum() == 0
    assert anisotropy(density).condition_number.value != anisotropy(density).condition_number.value  # negative: NaN
    assert density.plot() is not None


def test_of_a_multiple_eigenvalue_one_is_deflated_and_the_probes_see_the_others():
    values = torch.cat([torch.full((4,), 10.0), torch.linspace(-1, 1, 76)])
    matrix, _ = with_spectrum(values)
    density = spectral_density(matrix, steps=30, probes=400, deflate=1)
    assert density.deflated == pytest.approx([10])
    count = density.count(9, 11)
    assert abs(count.value - 4) < 4 * count.standard_error
    assert abs(density.trace().value - 40) < 4 * density.trace().standard_error


@pytest.mark.parametrize("size", [3, 5])
def test_a_probe_that_lies_in_what_is_deflated_is_replaced(size):
    basis = torch.linalg.qr(torch.cat([torch.ones(size, 1), torch.eye(size)[:, 1:]], 1).double())[0]
    matrix = basis @ torch.diag(torch.tensor([7.0, *np.linspace(1, 2, size - 1)]).double()) @ basis.T
    for seed in range(12):
        density = spectral_density(matrix, probes=6, seed=seed, deflate=1)
        assert density.deflated == pytest.approx([7], abs=1e-2)
        assert density.nodes[density.weights > 0].min() >= 1 - 1e-6
        assert density.weights[density.nodes > 2.001].sum() < 1e-4


def test_float32_finds_what_float64_finds():
    matrix, _ = with_spectrum(heavy_tailed())
    for deflate in (8, "auto"):
        wide, narrow = (spectral_density(m, steps=60, deflate=deflate) for m in (matrix, matrix.float()))
        shared = min(len(wide.deflated), len(narrow.deflated))
        assert shared >= 8
        np.testing.assert_allclose(narrow.deflated[:8], wide.deflated[:8], rtol=1e-3)
        assert narrow.trace().value == pytest.approx(wide.trace().value, rel=2e-3)
        assert narrow.squared_frobenius_norm().value == pytest.approx(wide.squared_frobenius_norm().value, rel=1e-4)


@pytest.mark.parametrize("policy", ["partial", "full"])
def test_the_orthogonality_that_was_asked_for_holds_for_every_probe(policy):
    """Where nothing is deflated the first run must not go on without it: an outlier would come twice."""
    spectrum = torch.diag(torch.cat([torch.tensor([1e3, 300.0, 100.0]).double(), torch.linspace(0, 1, 297).double()]))
    options = {"steps": 60, "probes": 2, "reorthogonalize": policy}
    density = spectral_density(spectrum, deflate="auto", **options)
    assert density.note == "nothing deflated: it would not pay"
    assert ((density.nodes > 50).sum(1) == 3).all()
    np.testing.assert_allclose(density.nodes, spectral_density(spectrum, **options).nodes, rtol=1e-9, atol=1e-9)
    assert density.matvecs > 120  # the first run is no probe then


def test_under_little_memory_the_basis_restarts_or_nothing_is_deflated_and_the_note_says_which(monkeypatch):
    matrix, _ = with_spectrum(heavy_tailed())
    vector = 400 * 8
    whole = spectral_density(matrix, steps=40, probes=3, deflate=4)
    assert whole.note == ""
    # Room for the whole basis of 33, but not for the four vectors beside it.
    monkeypatch.setattr("curvdiag.spectrum.deflation.free_bytes", lambda device: 2 * 36 * vector)
    assert "restarted at 14" in spectral_density(matrix, steps=40, probes=3, deflate=4).note
    monkeypatch.setattr("curvdiag.spectrum.deflation.free_bytes", lambda device: 2 * 20 * vector)
    restarted = spectral_density(matrix, steps=40, probes=3, deflate=4)
    assert restarted.note == "the first run's basis was restarted at 14 vectors, for want of memory"
    np.testing.assert_allclose(restarted.deflated, whole.deflated, rtol=1e-4)
    short = spectral_density(matrix, steps=40, probes=3, deflate="auto")
    assert "limited to 12 vectors" in short.note
    assert len(short.deflated) >= 2
    monkeypatch.setattr("curvdiag.spectrum.deflation.free_bytes", lambda device: 2 * 10 * vector)
    for deflate in (4, "auto"):
        none = spectral_density(matrix, steps=40, probes=3, deflate=deflate)
        assert "nothing deflated: that takes" in none.note
        assert len(none.deflated) == 0
        assert none.matvecs == 120
        np.testing.assert_array_equal(none.nodes, spectral_density(matrix, steps=40, probes=3).nodes)


def test_what_is_rounding_beside_the_deflated_ends_a_run():
    low, _ = with_spectrum(torch.cat([torch.tensor([9e3, -4e3, 2e3]), torch.zeros(57)]))
    operator = linear_map(low.float())
    found = find_deflation(operator, 3, steps=20, probes=2, seed=0)
    starts = rademacher(2, 60, seed=5)
    found.projection(starts)
    assert (lanczos(operator, starts, 20, projection=found.projection).lengths <= 2).all()


def test_fewer_converged_than_asked_for_are_noted():
    matrix, _ = with_spectrum(torch.linspace(-1, 1, 400))
    density = spectral_density(matrix, steps=20, probes=3, deflate=30)
    assert density.note.endswith("of 30 eigenvalues deflated: no more had converged after 110 products")
    assert density.matvecs == 110 + 60


def test_bad_arguments_and_products_are_named():
    for bad in (-1, 1.5, "most", True, None):
        with pytest.raises(ArgumentError, match="deflate"):
            spectral_density(torch.eye(4), deflate=bad)
    with pytest.raises(NonFiniteError):
        spectral_density(torch.full((4, 4), float("nan")), deflate=1)


@pytest.mark.parametrize("deflate", [10, "auto"])
@pytest.mark.parametrize("seed", [0, 1, 20, 23])
def test_in_float32_over_80_steps_no_deflated_eigenvalue_comes_back_between_projections(deflate, seed):
    matrix, _ = with_spectrum(heavy_tailed(seed=seed), seed=seed)
    operator = linear_map(matrix.float())
    found = find_deflation(operator, deflate, steps=80, probes=4, seed=seed)
    density = spectral_density(matrix.float(), steps=80, seed=seed, deflate=deflate)
    left = torch.linalg.eigvalsh(matrix).numpy()
    for value in found.values:  # an eigenvalue of the edge may have converged before a larger one
        left = np.delete(left, np.abs(left - value).argmin())
    edge = np.abs(left).max()
    assert np.abs(density.nodes).max() < 1.05 * edge
    # Without any projection it would: this spectrum tells the difference.
    never = Projection(tuple((rows, 1000) for rows, _ in found.projection.parts), found.projection.scale)
    starts = rademacher(2, 400, seed=9)
    never(starts)
    nodes, _ = lanczos(operator, starts, 80, projection=never).quadrature()
    assert np.abs(nodes).max() > 10 * edge


def test_projections_are_made_every_few_steps():
    for gap, due in ((0, [0, 1, 2, 3, 4, 5, 6]), (1, [1, 2, 4, 5]), (3, [3, 4]), (5, [5, 6])):
        projection = Projection(((torch.eye(4)[:1], gap),), 1.0)
        assert [j for j in range(7) if projection.at(j) is not None] == due
    rest, none = np.array([-1.0, 1.0]), np.zeros(4)
    gaps = gaps_between(np.array([1.01, 3.0, 50.0, 1e4]), none, rest, 1e-16).tolist()
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[0] > gaps[2] > 1
    # In single precision the furthest may be left alone for two steps at most, and a poor eigenvector for none.
    assert gaps_between(np.array([50.0, 20.0]), np.array([0.0, 0.5]), rest, 6e-8).tolist() == [2, 0]
    assert gaps_between(np.array([5.0]), none[:1], np.empty(0), 1e-16).tolist() == [0]


def test_nothing_in_the_loop_waits_for_the_device():
    class Reads(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += func is torch.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))

    matrix, _ = with_spectrum(heavy_tailed(50))
    found = find_deflation(linear_map(matrix), 3, steps=30, probes=2, seed=0)
    starts = rademacher(2, 50, seed=0, dtype=torch.float64)
    found.projection(starts)
    counts = []
    for steps in (3, 30):
        with Reads() as reads:
            lanczos(matrix, starts, steps, projection=found.projection)
        counts.append(reads.count)
    assert counts[0] == counts[1] > 0
