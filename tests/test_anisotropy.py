"""Anisotropy: each measure against its definition, its isotropic value, its direction, and its error."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from matrices import Foreign, heavy_tailed, with_spectrum

from curvdiag.errors import ArgumentError, NonFiniteError
from curvdiag.spectrum import MEASURES, Eigenpairs, anisotropy, spectral_density, top_eigenpairs


def by_definition(values):
    """The measures of a whole spectrum, written out once more."""
    values = np.sort(np.asarray(values, dtype=np.float64))[::-1]
    size = np.abs(values)
    share = size[size > 0] / size.sum()
    return {
        "top_ratio": values[0] / values[4],
        "condition_number": values[0] / values[-1] if values[-1] > 0 else math.nan,
        "stable_rank": (values**2).sum() / size.max() ** 2,
        "participation_ratio": values.sum() ** 2 / (values**2).sum(),
        "intrinsic_dimension": size.sum() / values[0],
        "effective_rank": math.exp(-(share * np.log(share)).sum()),
        "negative_mass": size[values < 0].sum() / size.sum(),
    }


@pytest.mark.parametrize("values", [heavy_tailed(300), torch.linspace(0.1, 3, 40), torch.linspace(-5, 1, 40)])
def test_eigenvalues_give_every_measure_by_its_definition(values):
    assert float(values.sort(descending=True).values[4]) > 0, "the ratio to the fifth needs five positive eigenvalues"
    result = anisotropy(values)
    for name, exact in by_definition(values).items():
        estimate = result.measures[name]
        assert estimate.value == pytest.approx(exact, rel=1e-9, nan_ok=True), name
        if not math.isnan(exact):
            assert estimate.standard_error == 0
            assert estimate.interval() == (estimate.value, estimate.value)
    assert math.isnan(result.condition_number.value) == (float(values.min()) <= 0)


def test_an_operator_gives_them_within_their_errors():
    values = heavy_tailed(300)
    matrix, _ = with_spectrum(values)
    result = anisotropy(matrix, probes=30)
    exact = by_definition(values)
    assert result.top_ratio.value == pytest.approx(exact["top_ratio"], rel=1e-3)
    for name in ("stable_rank", "participation_ratio", "intrinsic_dimension", "effective_rank", "negative_mass"):
        estimate = result.measures[name]
        assert 0 < estimate.standard_error < exact[name]
        assert abs(estimate.value - exact[name]) < 4 * estimate.standard_error, name
    assert "not positive definite" in result.reasons["condition_number"]
    assert result.matvecs == 80 * 30 + top_eigenpairs(matrix, 5, tol=1e-2).matvecs


def test_jackknifed_errors_are_those_seen_across_seeds():
    matrix, _ = with_spectrum(heavy_tailed(150))
    runs = [anisotropy(spectral_density(matrix, steps=25, probes=12, seed=s)).measures for s in range(80)]
    for name in ("stable_rank", "participation_ratio", "intrinsic_dimension", "effective_rank", "negative_mass"):
        seen = np.std([run[name].value for run in runs], ddof=1)
        told = np.sqrt(np.mean([run[name].standard_error ** 2 for run in runs]))
        assert told == pytest.approx(seen, rel=0.35), name


@pytest.mark.parametrize("size", [5, 60])
@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e6])
def test_isotropic_values_are_those_stated(size, scale):
    for source in (np.full(size, scale), scale * torch.eye(size, dtype=torch.float64)):
        for name, estimate in anisotropy(source).measures.items():
            assert estimate.value == pytest.approx(MEASURES[name].isotropic(size), rel=1e-6, abs=1e-9), name


def test_each_measure_moves_in_the_direction_stated():
    flat, steep = np.linspace(1, 2, 2000), 2.0 ** -np.linspace(0, 20, 2000)
    before, after = anisotropy(flat).measures, anisotropy(steep).measures
    assert list(MEASURES) == list(before)
    for name, measure in MEASURES.items():
        if name == "negative_mass":
            after = anisotropy(np.append(flat, -1.0)).measures
        assert (after[name].value > before[name].value) == measure.rises, name
        assert measure.formula
        assert measure.description


def test_the_bulk_edge_parts_outliers_from_the_bulk():
    generator = torch.Generator().manual_seed(0)
    bulk = torch.rand(988, generator=generator, dtype=torch.float64) * 2 - 1
    values = torch.cat([torch.linspace(100, 20, 12, dtype=torch.float64), bulk])
    exact = anisotropy(values)
    # Within a few kernel widths of the edge of the bulk, where the kernels' tails end.
    width = 101 / 1000**0.5 / 10
    assert 1 - width <= exact.bulk_edge.value <= 1 + 5 * width
    matrix, _ = with_spectrum(values)
    for seed in range(5):
        estimate = anisotropy(spectral_density(matrix, seed=seed))
        # The random weights of twelve outliers must not pass one of them off as the bulk.
        assert estimate.bulk_edge.value == pytest.approx(exact.bulk_edge.value, rel=0.3)
        assert 40 < estimate.bulk_ratio.value < 110
    assert anisotropy(values, width=0.05).bulk_edge.value == pytest.approx(1, rel=0.2)


def test_eigenpairs_sharpen_a_density():
    matrix, _ = with_spectrum(heavy_tailed(200))
    density = spectral_density(matrix, steps=6)
    alone = anisotropy(density)
    assert "five" in alone.reasons["top_ratio"]
    joined = anisotropy(density, top_eigenpairs(matrix, 5, tol=1e-6))
    assert joined.top_ratio.value == pytest.approx(float(heavy_tailed(200)[0] / heavy_tailed(200)[4]), rel=1e-6)
    assert joined.matvecs == 0


def made_pairs(values, which="LA", converged=True):
    values = torch.tensor(values, dtype=torch.float64)
    done = torch.full((len(values),), converged)
    return Eigenpairs(values, torch.eye(200, len(values)), torch.zeros(len(values)), done, 9, which)


def test_lambda_max_is_the_larger_of_pairs_and_density():
    matrix, _ = with_spectrum(heavy_tailed(200))
    density = spectral_density(matrix, steps=30)
    assert density.lambda_max == pytest.approx(50, rel=1e-9)
    # A pair that stopped early lies below what the density knows.
    late = anisotropy(density, made_pairs([40.0, 30.0, 20.0, 15.0, 10.0], converged=False))
    assert late.stable_rank.value == pytest.approx(anisotropy(density).stable_rank.value, rel=1e-9)
    early = anisotropy(spectral_density(matrix, steps=2), made_pairs([50.0]))
    assert early.intrinsic_dimension.value < anisotropy(spectral_density(matrix, steps=2)).intrinsic_dimension.value


def test_pairs_that_have_not_converged_give_no_exact_ratio():
    matrix, _ = with_spectrum(heavy_tailed(200))
    density = spectral_density(matrix, steps=30)
    pairs = top_eigenpairs(matrix, 5, tol=1e-6, max_matvecs=8)
    assert not pairs.converged.all()
    result = anisotropy(density, pairs)
    assert math.isnan(result.top_ratio.value)
    assert "not converged" in result.reasons["top_ratio"]


def test_only_pairs_that_are_the_largest_serve():
    values = torch.cat([torch.linspace(50, 20, 7), torch.tensor([-60.0, -45.0, -30.0]), 0.01 * torch.ones(190)])
    matrix, _ = with_spectrum(values)
    density = spectral_density(matrix, steps=20)
    ratio = float(values[0] / values[4])
    for which, k, known in (("LA", 5, 5), ("LM", 8, 5), ("LM", 6, 4), ("BE", 9, 5), ("BE", 8, 4)):
        result = anisotropy(density, top_eigenpairs(matrix, k, which=which, tol=1e-6))
        if known == 5:
            assert result.top_ratio.value == pytest.approx(ratio, rel=1e-6), which
        else:
            assert f"{known} are known" in result.reasons["top_ratio"], which
    # All of the smallest would fill the place of the largest.
    with pytest.raises(ArgumentError, match="smallest"):
        anisotropy(density, top_eigenpairs(matrix, 5, which="SA"))


@pytest.mark.parametrize("width", [0, 0.0, -1.0, math.nan, math.inf])
def test_a_width_that_is_not_positive_is_refused(width):
    with pytest.raises(ArgumentError, match="width"):
        anisotropy(np.arange(9.0), width=width)


def test_the_condition_number_is_that_of_a_positive_definite_matrix_only():
    matrix, _ = with_spectrum(torch.linspace(1, 9, 50))
    assert anisotropy(matrix).condition_number.value == pytest.approx(9, rel=1e-6)
    assert "not positive definite" in anisotropy(np.append(np.ones(9), 0.0)).reasons["condition_number"]
    assert "not positive definite" in anisotropy(-np.ones(9)).reasons["condition_number"]


def test_zero_and_negative_matrices_give_reasons_not_crashes():
    zero = anisotropy(torch.zeros(8, 8))
    assert set(zero.reasons) == set(MEASURES)
    assert all(math.isnan(value.value) for value in zero.measures.values())
    negative = anisotropy(-np.arange(1.0, 9.0))
    assert negative.negative_mass.value == 1
    assert set(negative.reasons) == {"top_ratio", "condition_number", "bulk_ratio", "intrinsic_dimension"}


def test_one_probe_has_no_errors_and_two_no_intervals():
    matrix, _ = with_spectrum(heavy_tailed(100))
    assert math.isnan(anisotropy(matrix, probes=1).stable_rank.standard_error)
    assert anisotropy(matrix, probes=2).stable_rank.interval() == (-math.inf, math.inf)


def test_any_source_serves_and_results_become_json():
    matrix, _ = with_spectrum(heavy_tailed(50))
    reference = anisotropy(matrix).stable_rank.value
    assert anisotropy(Foreign(matrix)).stable_rank.value == pytest.approx(reference, rel=1e-8)
    assert anisotropy(matrix.numpy()).stable_rank.value == pytest.approx(reference, rel=1e-8)
    assert json.loads(json.dumps(anisotropy(matrix).to_dict()))["size"] == 50
    assert "stable_rank" in str(anisotropy(matrix))


def test_bad_sources_are_named():
    with pytest.raises(ArgumentError, match="square"):
        anisotropy(torch.ones(3, 4))
    with pytest.raises(ArgumentError, match="eigenvalues"):
        anisotropy(np.empty(0))
    with pytest.raises(NonFiniteError):
        anisotropy(np.array([1.0, np.nan]))
