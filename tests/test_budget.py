"""One Krylov budget: what it counts, what it holds, and that it is better than its parts made one by one."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from matrices import heavy_tailed, with_spectrum

from curvdiag import anisotropy, measure_spectrum, spectral_density, top_eigenpairs
from curvdiag.errors import ArgumentError, NonFiniteError


class Counted:
    """A dense matrix that keeps every vector it was multiplied with."""

    def __init__(self, matrix):
        self.matrix, self.shape, self.dtype = matrix, matrix.shape, matrix.dtype
        self.seen = []

    def __matmul__(self, vector):
        self.seen.append(vector.double() / vector.double().norm())
        return self.matrix @ vector


@pytest.mark.parametrize("deflate", ["auto", 3, 0])
@pytest.mark.parametrize("warm", [False, True])
def test_the_products_are_those_of_the_eigenpairs_and_steps_times_probes_and_none_is_made_twice(deflate, warm):
    matrix, basis = with_spectrum(heavy_tailed())
    operator = Counted(matrix)
    start = basis[:, :5] + 0.01 * basis[:, 5:10] if warm else None
    found = measure_spectrum(operator, 5, steps=20, probes=3, deflate=deflate, start=start)
    before = len(operator.seen)
    assert found.matvecs == before == found.eigenpairs.matvecs + 60
    _ = found.lambda_max, found.trace, found.frobenius_norm, found.anisotropy.measures, found.density.count(1, 100)
    assert len(operator.seen) == before
    vectors = torch.stack([v for v in operator.seen if float(v.norm()) > 0])
    alike = (vectors @ vectors.T).abs() - torch.eye(len(vectors)).double()
    assert alike.max() < 0.9999  # no vector was multiplied twice
    # The probes know nothing of the search, or what is deflated would depend on them.
    first = found.eigenpairs.matvecs
    assert (vectors[first : first + 3] @ vectors[0]).abs().max() < 0.3


def test_eigenpairs_and_density_are_right():
    matrix, _ = with_spectrum(heavy_tailed())
    values = torch.linalg.eigvalsh(matrix).flip(0)
    found = measure_spectrum(matrix.float(), 5, steps=30, probes=4, tol=1e-3)
    assert found.eigenpairs.which == "LA"
    assert bool(found.eigenpairs.converged.all())
    np.testing.assert_allclose(found.eigenpairs.values, values[:5], rtol=1e-4)
    vectors = found.eigenpairs.vectors.double()
    residuals = (matrix @ vectors - vectors * found.eigenpairs.values).norm(dim=0)
    assert (residuals <= 1.01 * found.eigenpairs.residuals + 1e-4).all()
    assert found.lambda_max == pytest.approx(50, rel=1e-4)
    assert len(found.density.deflated) >= 5
    assert abs(found.trace.value - float(values.sum())) < 5 * found.trace.standard_error
    assert found.frobenius_norm.value == pytest.approx(float(values.norm()), rel=1e-3)
    exact = anisotropy(values)
    for name in ("top_ratio", "stable_rank", "intrinsic_dimension"):
        assert found.anisotropy.measures[name].value == pytest.approx(exact.measures[name].value, rel=0.02), name


def test_errors_are_a_fraction_of_those_of_eigenpairs_and_density_made_one_by_one():
    matrix, _ = with_spectrum(heavy_tailed())
    trace, square = float(matrix.trace()), float(matrix.square().sum())
    errors, products = {True: [], False: []}, {True: [], False: []}
    for seed in range(8):
        whole = measure_spectrum(matrix, 5, steps=20, probes=3, seed=seed)
        pairs = top_eigenpairs(matrix, 5, tol=1e-2, seed=seed)
        plain = spectral_density(matrix, steps=20, probes=3, seed=seed)
        for one, density, spent in (
            (True, whole.density, whole.matvecs),
            (False, plain, plain.matvecs + pairs.matvecs),
        ):
            norm = density.squared_frobenius_norm().value
            errors[one].append([density.trace().value - trace, norm - square])
            products[one].append(spent)
    # Both cost about the same: squares of errors times products compare them.
    costs = {one: np.mean(np.square(errors[one]), axis=0) * np.mean(products[one]) for one in errors}
    assert costs[True][0] < costs[False][0] / 5**2
    assert costs[True][1] < costs[False][1] / 50**2
    assert np.mean(products[True]) < 1.4 * np.mean(products[False])


def test_a_search_that_finds_no_more_than_it_was_asked_for_is_not_drawn_out():
    matrix, _ = with_spectrum(torch.linspace(1, 2, 400) ** 3)
    found = measure_spectrum(matrix, 2, steps=40, probes=3)
    assert bool(found.eigenpairs.converged.all())
    assert found.eigenpairs.matvecs <= top_eigenpairs(matrix, 2, tol=1e-2).matvecs + 16


def test_many_pairs_from_few_steps_cost_hardly_more_than_a_search_alone():
    values = torch.cat([50 * 0.99 ** torch.arange(300).double(), torch.linspace(-1, 1, 1200).double()])
    matrix, _ = with_spectrum(values)
    found, alone = measure_spectrum(matrix, 60, steps=10, probes=1), top_eigenpairs(matrix, 60, tol=1e-2)
    assert bool(found.eigenpairs.converged.all())
    assert found.eigenpairs.matvecs <= alone.matvecs + 10


def test_probes_are_not_those_of_the_measurement_that_a_start_comes_from():
    matrix, _ = with_spectrum(heavy_tailed())
    cold = Counted(matrix)
    first = measure_spectrum(cold, 1, steps=10, probes=3)
    warm = Counted(matrix)
    found = measure_spectrum(warm, 1, steps=10, probes=3, start=first.eigenpairs.vectors)
    probes = torch.stack(warm.seen[found.eigenpairs.matvecs :][:3])
    assert (probes @ cold.seen[0]).abs().max() < 0.3


def test_small_and_odd_matrices():
    for matrix in (torch.zeros(20, 20), torch.eye(7), torch.ones(1, 1), torch.diag(torch.tensor([3.0, -2.0]))):
        found = measure_spectrum(matrix)
        assert found.trace.value == pytest.approx(float(matrix.trace()), abs=1e-5)
        assert found.lambda_max == pytest.approx(float(matrix.diagonal().max()), abs=1e-5)
    repeated, _ = with_spectrum(torch.cat([torch.full((3,), 8.0), torch.linspace(-1, 1, 57)]))
    found = measure_spectrum(repeated, 4)
    np.testing.assert_allclose(found.eigenpairs.values[:3], 8, rtol=1e-3)
    assert found.density.count(7, 9).value == pytest.approx(3, abs=1e-6)


def test_little_memory_is_noted_and_late_eigenpairs_too(monkeypatch):
    matrix, _ = with_spectrum(heavy_tailed())
    monkeypatch.setattr("curvdiag.spectrum.budget.free_bytes", lambda device: 2 * 3 * 400 * 8)
    found = measure_spectrum(matrix, 5, steps=20)
    assert found.note.startswith("3 of ")
    assert found.note.endswith("known eigenvalues deflated, for want of memory")
    assert len(found.density.deflated) == 3
    monkeypatch.setattr("curvdiag.spectrum.budget.free_bytes", lambda device: 0)
    assert len(measure_spectrum(matrix, 5, steps=20).density.deflated) == 0


def test_the_result_becomes_json_prints_and_is_drawn():
    matrix, _ = with_spectrum(heavy_tailed(100))
    found = measure_spectrum(matrix, 3, steps=20)
    plain = json.loads(json.dumps(found.to_dict()))
    assert plain["matvecs"] == found.matvecs
    assert plain["density"]["deflated"] == found.density.deflated.tolist()
    assert f"{found.matvecs} products" in str(found)
    assert found.plot() is not None
    with pytest.raises(ArgumentError, match="probes"):
        measure_spectrum(matrix, probes=0)
    with pytest.raises(ArgumentError, match="steps"):
        measure_spectrum(matrix, steps=0)
    with pytest.raises(ArgumentError, match="deflate"):
        measure_spectrum(matrix, deflate=-1)
    operator = Counted(matrix)
    for options, what in (({"k": 0}, "k is"), ({"k": 1.5}, "k is"), ({"tol": 0.0}, "tolerance")):
        with pytest.raises(ArgumentError, match=what):
            measure_spectrum(operator, **options)
    assert not operator.seen  # before any product
    with pytest.raises(NonFiniteError):
        measure_spectrum(torch.full((5, 5), float("inf")))
