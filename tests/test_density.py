"""The density: mass, trace, counts, coverage of intervals, odd spectra, invariance."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from matrices import Foreign, heavy_tailed, with_spectrum
from scipy.sparse import csr_matrix
from scipy.sparse.linalg import aslinearoperator

from curvdiag.errors import ArgumentError, NonFiniteError
from curvdiag.space.probes import rademacher
from curvdiag.spectrum import SpectralDensity, spectral_density


def off_diagonal(matrix):
    return matrix - torch.diag(matrix.diagonal())


def test_trace_is_hutchinsons_estimate_from_the_same_probes():
    matrix, _ = with_spectrum(heavy_tailed())
    density = spectral_density(matrix, steps=20, probes=5, seed=3)
    signs = rademacher(5, 400, seed=3, dtype=torch.float64)
    samples = ((signs @ matrix) * signs).sum(1).numpy()
    assert density.trace().value == pytest.approx(samples.mean(), rel=1e-10)
    assert density.trace().standard_error == pytest.approx(samples.std(ddof=1) / 5**0.5, rel=1e-8)
    assert density.moment(1).value * 400 == pytest.approx(density.trace().value)
    squares = (signs @ matrix).square().sum(1).mean()
    assert density.squared_frobenius_norm().value == pytest.approx(float(squares), rel=1e-10)
    assert density.frobenius_norm().value == pytest.approx(float(squares) ** 0.5, rel=1e-10)


def test_student_intervals_of_the_trace_from_8_probes_cover_it_in_90_to_98_percent_of_500_seeds():
    matrix, _ = with_spectrum(heavy_tailed(120, seed=2), seed=2)
    truth, covered = float(matrix.trace()), 0
    for seed in range(500):
        low, high = spectral_density(matrix, steps=3, probes=8, seed=seed).trace().interval(0.95)
        covered += low <= truth <= high
    assert 0.90 <= covered / 500 <= 0.98


def test_the_mean_over_1000_probes_lies_within_four_exact_standard_errors():
    matrix, _ = with_spectrum(heavy_tailed(120, seed=3), seed=3)
    exact = (2 * off_diagonal(matrix).square().sum() / 1000).sqrt()
    trace = spectral_density(matrix, steps=2, probes=1000, seed=0).trace()
    assert abs(trace.value - float(matrix.trace())) < 4 * exact
    # The reported standard error is that one, to its own sampling error of a few percent.
    assert trace.standard_error == pytest.approx(float(exact), rel=0.15)


def test_the_error_of_the_norm_covers_it():
    matrix, _ = with_spectrum(heavy_tailed(120, seed=4), seed=4)
    norms = [spectral_density(matrix, steps=2, probes=16, seed=s).frobenius_norm() for s in range(200)]
    values = np.array([n.value for n in norms])
    assert np.mean([n.standard_error for n in norms]) == pytest.approx(values.std(), rel=0.15)
    intervals = [n.interval() for n in norms]
    assert np.mean([low <= float(matrix.norm()) <= high for low, high in intervals]) > 0.85


@pytest.mark.parametrize("probes", [1, 2])
def test_an_interval_from_fewer_than_three_probes_is_infinite(probes):
    matrix, _ = with_spectrum(heavy_tailed(60))
    density = spectral_density(matrix, steps=5, probes=probes)
    for estimate in (density.trace(), density.frobenius_norm(), density.count(0, 1)):
        assert estimate.interval() == (-np.inf, np.inf)


@pytest.mark.parametrize("width", [None, 0.5])
def test_total_mass_is_one(width):
    matrix, _ = with_spectrum(heavy_tailed())
    density = spectral_density(matrix)
    np.testing.assert_allclose(density.weights.sum(1), 1, rtol=1e-12)
    grid = density.default_grid(8192, width)
    assert np.trapezoid(density(grid, width), grid) == pytest.approx(1, abs=1e-5)
    curves = density.density(grid, width, per_probe=True)
    assert curves.shape == (4, 8192)
    np.testing.assert_allclose(curves.mean(0), density(grid, width))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ghost_copies_change_no_moment_and_no_count(dtype):
    matrix, _ = with_spectrum(heavy_tailed())
    eigenvalues = torch.linalg.eigvalsh(matrix).numpy()
    plain = spectral_density(matrix.to(dtype), steps=80)
    full = spectral_density(matrix.to(dtype), steps=80, reorthogonalize="full")
    top = eigenvalues[-1]
    copies = [(np.abs(density.nodes[0] - top) < 1e-3 * top).sum() for density in (plain, full)]
    assert copies[0] > 1  # without reorthogonalisation there are ghosts
    assert copies[1] == 1
    # Between well separated eigenvalues, each probe's count is the same with ghosts as without.
    gaps = [(eigenvalues[-i - 1] + eigenvalues[-i]) / 2 for i in range(1, 10)]
    for low in gaps:
        counts = [d.size * (d.weights * (d.nodes >= low)).sum(1) for d in (plain, full)]
        np.testing.assert_allclose(counts[0], counts[1], rtol=1e-3)
        exact = plain.count(low, np.inf)
        assert abs(exact.value - (eigenvalues >= low).sum()) < 4 * max(exact.standard_error, 0.5)
    for k in range(1, 5):
        assert plain.moment(k).value == pytest.approx(full.moment(k).value, rel=1e-5)


def test_counts_average_to_those_of_lapack():
    values = torch.cat([torch.full((20,), -3.0), torch.zeros(60), torch.full((15,), 2.0), torch.full((5,), 9.0)])
    matrix, _ = with_spectrum(values)
    density = spectral_density(matrix, steps=10, probes=300)
    for low, high, exact in ((-4, -1, 20), (-3, -3, 20), (0, 0, 60), (0, np.inf, 80), (9, 10, 5), (3, 8, 0)):
        count = density.count(low, high)
        assert abs(count.value - exact) <= 4 * count.standard_error + 1e-6
    assert density.count(-np.inf, np.inf).value == pytest.approx(100)
    with pytest.raises(ArgumentError, match="empty"):
        density.count(1, 0)


def test_the_density_is_that_of_the_dense_spectrum():
    eigenvalues = torch.linalg.eigvalsh(with_spectrum(torch.linspace(-1, 1, 500).double() ** 3)[0])
    matrix, _ = with_spectrum(eigenvalues)
    density = spectral_density(matrix, steps=60, probes=30)
    grid, width = np.linspace(-1.2, 1.2, 300), 0.1
    kernels = np.exp(-0.5 * ((grid[:, None] - eigenvalues.numpy()) / width) ** 2) / (width * (2 * np.pi) ** 0.5)
    difference = np.abs(density(grid, width) - kernels.mean(1))
    assert np.trapezoid(difference, grid) < 0.03


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_multiplicities_and_zero_matrices_do_not_break_it(dtype):
    zero = spectral_density(torch.zeros(30, 30, dtype=dtype))
    assert zero.trace().value == 0
    assert zero.count(0, 0).value == 30
    identity = spectral_density(3 * torch.eye(30, dtype=dtype))
    assert identity.trace().value == pytest.approx(90, rel=1e-6)
    assert identity.count(3, 3).value == pytest.approx(30)
    assert identity.lambda_max == pytest.approx(3, rel=1e-6)
    nine, _ = with_spectrum(torch.logspace(1, -2, 10).repeat_interleave(9))
    density = spectral_density(nine.to(dtype))
    assert density.trace().value == pytest.approx(float(nine.trace()), abs=5 * density.trace().standard_error)
    for one in (zero, identity, density):
        grid = one.default_grid(4096)
        assert np.trapezoid(one(grid), grid) == pytest.approx(1, abs=1e-4)


def test_more_steps_than_parameters_are_clipped_and_noted():
    density = spectral_density(torch.diag(torch.arange(10.0)), steps=80)
    assert density.steps == 10
    assert density.matvecs == 40
    assert density.note == "80 steps clipped to 10, the order of the matrix"
    assert spectral_density(torch.eye(10), steps=10).note == ""
    assert spectral_density(torch.ones(1, 1), steps=10).lambda_max == pytest.approx(1)


def test_scaling_the_matrix_scales_the_density():
    matrix, _ = with_spectrum(heavy_tailed(100))
    one, large = (spectral_density(c * matrix, steps=30) for c in (1.0, 2.0**40))
    assert large.default_width() == pytest.approx(one.default_width() * 2.0**40, rel=1e-6)
    grid = one.default_grid()
    np.testing.assert_allclose(large(grid * 2.0**40) * 2.0**40, one(grid), rtol=1e-4, atol=1e-9)


def test_deflated_eigenvalues_enter_exactly():
    known = np.array([8.0, 5.0])
    density = SpectralDensity(np.array([[0.0, 1.0]] * 3), np.full((3, 2), 0.4), 10, deflated=known)
    assert density.trace().value == pytest.approx(4 + 13)
    assert density.squared_frobenius_norm().value == pytest.approx(4 + 89)
    assert density.count(4, 9).value == pytest.approx(2)
    assert density.count(0.5, 9).value == pytest.approx(6)
    assert (density.lambda_max, density.lambda_min) == (8.0, 0.0)
    grid = density.default_grid(8192)
    assert np.trapezoid(density(grid), grid) == pytest.approx(1, abs=1e-5)
    outliers = density.density(grid)[grid > 3]
    assert np.trapezoid(outliers, grid[grid > 3]) == pytest.approx(0.2, abs=1e-4)


def test_the_grouping_of_probes_changes_nothing(monkeypatch):
    matrix, _ = with_spectrum(heavy_tailed(80))
    together = spectral_density(matrix, steps=8, probes=5)
    monkeypatch.setattr("curvdiag.spectrum.density.free_bytes", lambda device: 0)
    seen = []
    alone = spectral_density(matrix, steps=8, probes=5, progress=lambda *p: seen.append(p))
    np.testing.assert_allclose(alone.nodes, together.nodes, rtol=1e-6, atol=1e-9)
    assert alone.matvecs == together.matvecs == 40
    assert seen[-1] == (40, 40)


def test_any_square_object_with_shape_and_product_serves():
    matrix, _ = with_spectrum(heavy_tailed(50))
    exact = spectral_density(matrix, steps=6).trace().value
    array = matrix.numpy()
    for op in (array, csr_matrix(array), aslinearoperator(array), Foreign(matrix)):
        assert spectral_density(op, steps=6).trace().value == pytest.approx(exact, rel=1e-9)


def test_a_result_becomes_json_and_bad_input_is_named():
    density = spectral_density(torch.eye(4), steps=2)
    assert json.loads(json.dumps(density.to_dict()))["size"] == 4
    with pytest.raises(NonFiniteError):
        spectral_density(torch.full((4, 4), float("nan")))
    with pytest.raises(ArgumentError, match="probes"):
        spectral_density(torch.eye(4), probes=0)
    with pytest.raises(ArgumentError, match="steps"):
        spectral_density(torch.eye(4), steps=0)
    with pytest.raises(ArgumentError, match="width"):
        density.density([0.0], width=0.0)


def test_a_density_prints_as_a_few_lines_and_not_as_arrays():
    matrix = torch.diag(torch.cat([torch.tensor([30.0]), torch.linspace(-1, 1, 199)]))
    shown = str(spectral_density(matrix, steps=20, probes=3, deflate=1))
    assert "density of 200 eigenvalues in [" in shown
    assert ", 30], 1 deflated" in shown
    assert "3 probes of 20 steps" in shown
    assert len(shown.splitlines()) == 4
    assert "1 probe of 20 steps" in (alone := str(spectral_density(matrix, steps=20, probes=1)))
    assert "(1 sample, of unknown error)" in alone
    assert "nan" not in alone
