"""Deflation against the dense truth: errors at equal products, means, intervals, and what the result holds."""

from __future__ import annotations

import json
from functools import cache

import numpy as np
import pytest
import torch
from matrices import heavy_tailed, with_spectrum
from torch import nn

from curvdiag import Hessian, Objective, anisotropy, spectral_density, top_eigenpairs
from curvdiag.experiments.digits import digits, small_mlp
from curvdiag.operators.base import linear_map
from curvdiag.plotting.eigenvalue_axis import atoms
from curvdiag.spectrum.deflation import find_deflation

pytest.importorskip("sklearn")


@cache
def hessian_of_digits(epochs: int) -> torch.Tensor:
    """Dense and in float64, of a 64-20-20-10 net (1,880 parameters) after so many epochs of SGD."""
    torch.manual_seed(0)
    images, classes = digits()
    images, classes = images[:1000], classes[:1000]
    model = small_mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(epochs):
        for chosen in torch.randperm(1000).split(32):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[chosen]), classes[chosen]).backward()
            optimizer.step()
    objective = Objective(model, nn.CrossEntropyLoss(), (images, classes))
    matrix = Hessian(objective, dtype=torch.float64).dense()
    return (matrix + matrix.T) / 2


def spread(matrix: torch.Tensor) -> float:
    """Standard deviation of ``z^T A z`` over random signs, exactly."""
    return float((2 * (matrix.square().sum() - matrix.diagonal().square().sum())).sqrt())


def root_mean_square(errors) -> float:
    return float(np.sqrt(np.mean(np.square(errors))))


@pytest.mark.parametrize(("epochs", "deflate"), [(30, "auto"), (30, 12)])
def test_on_a_trained_net_errors_at_equal_products_are_3_and_10_times_lower_over_20_seeds(epochs, deflate):
    matrix = hessian_of_digits(epochs)
    values = torch.linalg.eigvalsh(matrix)
    trace, square = float(values.sum()), float(values.square().sum())
    found = [spectral_density(matrix.float(), steps=20, probes=3, seed=s, deflate=deflate) for s in range(20)]
    # A plain density would have had this many probes for these products, and the standard errors are exact.
    probes = np.mean([d.matvecs for d in found]) / 20
    plain = spread(matrix) / probes**0.5, spread(matrix @ matrix) / probes**0.5
    assert root_mean_square([d.trace().value - trace for d in found]) < plain[0] / 3
    assert root_mean_square([d.squared_frobenius_norm().value - square for d in found]) < plain[1] / 10
    one = spectral_density(matrix.float(), steps=2, probes=400)
    assert one.trace().standard_error * 20 == pytest.approx(spread(matrix), rel=0.2)  # plain is as said


@pytest.mark.parametrize("steps", [20, 60])
def test_at_initialisation_no_error_is_more_than_a_tenth_above_that_of_a_plain_density_at_equal_products(steps):
    matrix = hessian_of_digits(0)
    square = matrix @ matrix
    ratios = []
    for seed in range(5):
        found = find_deflation(linear_map(matrix), "auto", steps=steps, probes=4, seed=seed)
        if found.projection is None:
            assert found.probe is not None  # the run is one of the four probes, so nothing was spent beside them
            continue
        rows = torch.cat([rows for rows, _ in found.projection.parts])
        values = ((rows @ matrix) * rows).sum(1)
        rest = [m - rows.T * values**p @ rows for p, m in ((1, matrix), (2, square))]
        cost = 1 + found.matvecs / (4 * steps)
        ratios.append([spread(r) / spread(m) * cost**0.5 for r, m in zip(rest, (matrix, square), strict=True)])
    assert (np.array(ratios) < 1.1).all()


def test_auto_takes_many_after_training_and_none_where_none_pay():
    assert len(spectral_density(hessian_of_digits(30), steps=40).deflated) == 0  # the default is a plain density
    assert len(spectral_density(hessian_of_digits(30), steps=40, deflate="auto").deflated) > 8
    matrix, _ = with_spectrum(torch.linspace(1, 2, 300))
    density = spectral_density(matrix, steps=30, probes=3, deflate="auto")
    assert density.note == "nothing deflated: it would not pay"
    plain = spectral_density(matrix, steps=30, probes=3)
    assert density.matvecs == plain.matvecs == 90
    np.testing.assert_allclose(density.per_probe(np.exp), plain.per_probe(np.exp), rtol=1e-9)


def test_the_run_that_gave_the_pairs_is_extra_and_its_probe_is_not_averaged():
    matrix, _ = with_spectrum(heavy_tailed())
    products = []

    class Counted:
        shape, dtype = matrix.shape, matrix.dtype

        def __matmul__(self, vector):
            products.append(vector)
            return matrix @ vector

    density = spectral_density(Counted(), steps=20, probes=3, deflate=6)
    first = len(products) - 60
    assert 7 <= first <= 20
    assert density.matvecs == len(products)
    assert density.probes == 3
    starts = torch.stack([v / v.norm() for v in (products[0], *products[first : first + 3])])
    assert (starts[1:] @ starts[0]).abs().max() < 0.3  # independent of the first


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_deflated_values_are_those_of_lapack_at_both_ends(dtype):
    values = torch.cat([torch.tensor([40.0, 20.0, 5.0, -30.0, -10.0]).double(), heavy_tailed(300)[12:]])
    matrix, _ = with_spectrum(values)
    density = spectral_density(matrix.to(dtype), steps=40, deflate=5)
    np.testing.assert_allclose(density.deflated, [40, -30, 20, -10, 5], rtol=1e-4)
    np.testing.assert_allclose(density.weights.sum(1), 1 - 5 / len(values), rtol=1e-12)
    assert density.lambda_max == pytest.approx(40, rel=1e-4)
    assert density.lambda_min == pytest.approx(-30, rel=1e-4)
    # What was deflated is not seen again, in no step.
    assert np.abs(density.nodes).max() < 3
    assert density.count(2, 100).value == pytest.approx(3)
    assert density.count(-100, -2).value == pytest.approx(2)
    grid = density.default_grid(8192)
    assert np.trapezoid(density(grid), grid) == pytest.approx(1, abs=1e-4)


def test_moments_have_no_bias_in_the_mean_of_many_probes():
    matrix, _ = with_spectrum(heavy_tailed(120, seed=3), seed=3)
    values = torch.linalg.eigvalsh(matrix).numpy()
    density = spectral_density(matrix, steps=4, probes=2000, deflate=4)
    assert len(density.deflated) == 4
    for k in (1, 2, 3):
        moment = density.moment(k)
        assert abs(moment.value - np.mean(values**k)) < 4 * moment.standard_error
        plain = spectral_density(matrix, steps=4, probes=50).moment(k)
        assert moment.standard_error * 2000**0.5 < 0.5 * plain.standard_error * 50**0.5


def test_student_intervals_of_trace_and_norm_from_8_probes_cover_them():
    matrix, _ = with_spectrum(heavy_tailed(120, seed=2), seed=2)
    truth = float(matrix.trace()), float(matrix.square().sum())
    covered = np.zeros(2)
    for seed in range(200):
        density = spectral_density(matrix, steps=3, probes=8, seed=seed, deflate=3)
        intervals = [e.interval(0.95) for e in (density.trace(), density.squared_frobenius_norm())]
        covered += [low <= t <= high for t, (low, high) in zip(truth, intervals, strict=True)]
    assert (covered >= 0.88 * 200).all()
    assert (covered <= 0.99 * 200).all()


def test_the_result_becomes_json_is_drawn_whole_and_gives_the_measures():
    matrix, _ = with_spectrum(heavy_tailed())
    density = spectral_density(matrix, steps=40, deflate=6)
    assert json.loads(json.dumps(density.to_dict()))["deflated"] == density.deflated.tolist()
    nodes, weights = atoms(density)
    assert weights.sum() == pytest.approx(1)
    assert np.isin(density.deflated, nodes).all()
    assert density.plot() is not None
    exact = anisotropy(torch.linalg.eigvalsh(matrix))
    found = anisotropy(density, top_eigenpairs(matrix, 5))
    for name in ("top_ratio", "stable_rank", "intrinsic_dimension", "participation_ratio"):
        assert found.measures[name].value == pytest.approx(exact.measures[name].value, rel=0.02), name
    assert found.bulk_edge.value < 2 * exact.bulk_edge.value + density.default_width()
