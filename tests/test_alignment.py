"""Alignment of C with H: dense truths, closed-form random baselines, and errors that cover."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from matrices import Foreign, heavy_tailed, with_spectrum
from scipy.stats import spearmanr

from curvdiag.errors import ArgumentError, NonFiniteError
from curvdiag.scaling.alignment import (
    Window,
    alignment,
    commutator,
    cosine,
    gradient_share,
    loss_scaled_alignment,
    windows,
)
from curvdiag.scaling.haar import SpectralMoments, random_commutator, random_cosine, random_coupling


def pair(size: int = 40, turn: float = 0.3) -> tuple[torch.Tensor, torch.Tensor]:
    """H with a heavy tail, and a C with other eigenvalues in a basis turned a little from that of H."""
    h, basis = with_spectrum(heavy_tailed(size), seed=3)
    generator = torch.Generator().manual_seed(4)
    skew = torch.randn(size, size, generator=generator, dtype=torch.float64)
    turned = basis @ torch.linalg.matrix_exp(turn * (skew - skew.T) / size**0.5)
    values = torch.logspace(0, -3, size, dtype=torch.float64)
    return h, (turned * values) @ turned.T


def haar(size: int, generator: torch.Generator) -> torch.Tensor:
    basis, triangle = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    return basis * triangle.diagonal().sign()


def test_dense_matrices_give_the_definitions() -> None:
    h, c = pair()
    norms = float(h.norm() * c.norm())
    found = alignment(h, c.numpy())
    assert found.commutator.value == pytest.approx(float((c @ h - h @ c).norm()) / norms, rel=1e-12)
    assert found.cosine.value == pytest.approx(float((h @ c).trace()) / norms, rel=1e-12)
    assert found.commutator.interval() == (found.commutator.value, found.commutator.value)
    assert commutator(h, c).value == found.commutator.value
    assert cosine(h, c).value == found.cosine.value
    expected = float((h @ c).trace() / (2 * 0.7 * h.norm() ** 2))
    assert loss_scaled_alignment(c, h, 0.7).value == pytest.approx(expected, rel=1e-12)


def test_shared_eigenvectors_commute_and_a_multiple_is_parallel() -> None:
    h, basis = with_spectrum(heavy_tailed(30))
    c = (basis * torch.rand(30, dtype=torch.float64)) @ basis.T
    assert commutator(h, c).value < 1e-14
    assert commutator(Foreign(h), Foreign(c), probes=5).value < 1e-14
    assert cosine(h, 3 * h).value == pytest.approx(1, rel=1e-14)
    parallel = cosine(Foreign(h), Foreign(3 * h), probes=5)
    assert parallel.value == pytest.approx(1, rel=1e-14)
    assert parallel.standard_error < 1e-14


@pytest.mark.parametrize("measure", [commutator, cosine])
@pytest.mark.parametrize("turn", [0.05, 0.3, 2.0])
def test_matrix_free_intervals_cover_the_dense_truth(measure, turn) -> None:
    h, c = pair(60, turn)
    truth = measure(h, c).value
    found = [measure(Foreign(h), c, seed=seed) for seed in range(300)]
    covered = np.mean([low <= truth <= high for low, high in (e.interval() for e in found)])
    assert 0.90 <= covered <= 0.98


def test_the_loss_scaled_alignment_is_covered_too() -> None:
    h, c = pair(60)
    truth = loss_scaled_alignment(c, h, 2.0).value
    found = [loss_scaled_alignment(Foreign(c), h, 2.0, seed=seed).interval() for seed in range(300)]
    assert 0.90 <= np.mean([low <= truth <= high for low, high in found]) <= 0.98


def test_four_products_a_probe_and_two_without_the_commutator() -> None:
    h, c = pair(20)
    for measure, expected in ((alignment, 40), (cosine, 20)):
        counts = []
        for _ in range(2):
            made = []

            class Counting(Foreign):
                def __matmul__(self, vector, made=made):
                    made.append(1)
                    return super().__matmul__(vector)

            measure(Counting(h), Counting(c), probes=10)
            counts.append(len(made))
        assert counts == [expected, expected]


def test_random_commutator_and_cosine_are_averages_over_random_eigenvectors() -> None:
    size, draws = 7, 10_000
    h, c = torch.linspace(-1, 3, size, dtype=torch.float64), torch.logspace(0, -2, size, dtype=torch.float64)
    moments = SpectralMoments.of_spectrum(h), SpectralMoments.of_spectrum(c)
    generator = torch.Generator().manual_seed(0)
    norms = float(h.norm() * c.norm())
    squares, cosines = [], []
    for _ in range(draws):
        q = haar(size, generator)
        turned = (q * c) @ q.T
        squares.append(float(((turned * (h[None] - h[:, None])) ** 2).sum()) / norms**2)
        cosines.append(float(turned.diagonal() @ h) / norms)
    for samples, expected in ((squares, random_commutator(*moments) ** 2), (cosines, random_cosine(*moments))):
        assert abs(np.mean(samples) - expected) < 4 * np.std(samples) / draws**0.5
        assert np.std(samples) / draws**0.5 < 0.02 * abs(expected)


def test_the_baselines_of_whole_matrices_need_no_eigenvalues() -> None:
    h, c = pair()
    moments = [SpectralMoments.of_spectrum(torch.linalg.eigvalsh(m)) for m in (h, c)]
    exact = alignment(h, c)
    assert exact.commutator_baseline == pytest.approx(random_commutator(*moments), rel=1e-10)
    assert exact.cosine_baseline == pytest.approx(random_cosine(*moments), rel=1e-10)
    probed = alignment(Foreign(h), Foreign(c), probes=2000)
    assert probed.commutator_baseline == pytest.approx(exact.commutator_baseline, rel=0.05)
    assert probed.cosine_baseline == pytest.approx(exact.cosine_baseline, rel=0.1)


@pytest.mark.parametrize(("kept", "count", "size"), [(6, 6, 6), (6, 3, 6), (3, 2, 6), (2, 5, 6), (5, 4, 6)])
def test_drawn_couplings_have_the_moments_of_random_eigenvectors(kept, count, size) -> None:
    """Against full random bases, whichever rows the fast draw leaves out; second moments against closed forms."""
    values = np.array([3.0, 1.0, 0.5, 0.2, 0.1, 0.05])[:kept]
    full = torch.zeros(size, dtype=torch.float64)
    full[:kept] = torch.from_numpy(values)
    generator, draws = torch.Generator().manual_seed(1), 3000
    fast = np.stack([random_coupling(values, count, size=size, seed=s) for s in range(draws)])
    slow = np.stack([((q.T * full) @ q)[:count, :count].numpy() for q in (haar(size, generator) for _ in range(draws))])
    on, off = SpectralMoments.of_spectrum(values, size).entries
    for power in (2, 4):
        for i, j in ((0, 0), (0, 1), (count - 1, 0), (count - 1, count - 1)):
            x, y = fast[:, i, j] ** power, slow[:, i, j] ** power
            assert abs(x.mean() - y.mean()) < 4.5 * math.sqrt((x.var() + y.var()) / draws)
            if power == 2:
                assert abs(x.mean() - (on if i == j else off)) < 4.5 * x.std() / math.sqrt(draws)
    assert abs(fast[:, 0, 1].mean()) < 4.5 * fast[:, 0, 1].std() / math.sqrt(draws)


def test_windows_are_the_definitions() -> None:
    size = 30
    h, c = pair(size, 0.5)
    values, vectors = torch.linalg.eigh(h)
    values, vectors = values.flip(0), vectors.flip(1)
    k = vectors.T @ c @ vectors
    found = windows(k, values, top=8, bulk=15, spectrum=torch.linalg.eigvalsh(c))
    assert [(w.name, w.first, w.last) for w in found] == [("top", 0, 8), ("bulk", 8, 23)]
    for w in found:
        inside, curvature = k[w.first : w.last, w.first : w.last], values[w.first : w.last]
        diagonal = torch.diag(curvature)
        commuted = inside @ diagonal - diagonal @ inside
        assert w.commutator == pytest.approx(float(commuted.norm() / inside.norm() / diagonal.norm()), rel=1e-10)
        own = inside.diagonal()
        assert w.diagonal_recovery == pytest.approx(float(own.square().sum() / inside.square().sum()), rel=1e-12)
        coupled = [
            abs(float(inside[i, j])) / math.sqrt(float(own[i] * own[j]))
            for i in range(len(own))
            for j in range(i + 1, len(own))
        ]
        assert w.coupling_mean == pytest.approx(np.mean(coupled), rel=1e-10)
        assert w.coupling_variance == pytest.approx(np.var(coupled), rel=1e-8)
        assert w.rank_correlation == pytest.approx(spearmanr(own, curvature).statistic, abs=1e-12)
        assert w.left_out == 0
        assert set(w.to_dict()["baseline"]) == set(w.baseline) <= set(w.to_dict())


def test_commuting_matrices_are_recovered_wholly() -> None:
    values = np.logspace(0, -3, 40)
    (window,) = windows(np.diag(values**1.4), values)
    assert (window.commutator, window.diagonal_recovery, window.coupling_mean) == (0, 1, 0)
    assert window.rank_correlation == pytest.approx(1, rel=1e-12)
    assert (window.first, window.last) == (0, 40)
    assert window.baseline["diagonal_recovery"] < 0.3
    moments = SpectralMoments.of_spectrum(values), SpectralMoments.of_spectrum(values**1.4)
    assert window.baseline["commutator"] == pytest.approx(random_commutator(*moments), rel=1e-10)


@pytest.mark.parametrize("known", ["spectrum", "nonzero eigenvalues", "window"])
def test_random_rotations_reproduce_the_baselines(known: str) -> None:
    """Means over random eigenvectors of C of the measured numbers are the baselines beside them."""
    size, repeats = 24, 400
    curvature = np.logspace(0, -2, size)
    spectrum = np.where(np.arange(size) < 15, np.logspace(0, -1.5, size), 0.0)
    generator = torch.Generator().manual_seed(2)
    measured, baselines = [], []
    for _ in range(repeats):
        q = haar(size, generator).numpy()
        k = (q.T * spectrum) @ q
        given = {
            "spectrum": {"spectrum": spectrum},
            "nonzero eigenvalues": {"spectrum": spectrum[:15], "size": size},
            "window": {},
        }[known]
        found = windows(k, curvature, top=6, bulk=10, draws=1, seed=len(measured), **given)
        measured.append([[getattr(w, name) for name in w.baseline] for w in found])
        baselines.append([list(w.baseline.values()) for w in found])
    m, b = np.array(measured), np.array(baselines)
    # The commutator's is a root mean square, the recovery's a ratio of means: compared as means to 3 and 5 %.
    error = np.sqrt((m.var(axis=0) + b.var(axis=0)) / repeats)
    slack = np.array([0.03, 0.05, 0, 0, 0]) * b.mean(axis=0)
    assert (np.abs(m.mean(axis=0) - b.mean(axis=0)) < 4 * error + slack).all()


def test_an_exact_mean_of_the_recovery_for_a_single_random_direction() -> None:
    """For C of rank one the recovery is sum u^4 / (sum u^2)^2, whose mean over the sphere is 3 / (n + 2)."""
    (window,) = windows(np.eye(12), np.arange(12.0, 0, -1), spectrum=[2.0], size=50)
    assert window.baseline["diagonal_recovery"] == pytest.approx(3 / 14, rel=1e-12)
    assert window.baseline["coupling_mean"] == pytest.approx(1, rel=1e-9)


def test_directions_without_noise_are_left_out_of_the_coupling_and_counted() -> None:
    k = np.array([[2.0, 1.0, 0.3], [1.0, 8.0, 0.1], [0.3, 0.1, -1.0]])
    (window,) = windows(k, [3.0, 2.0, 1.0])
    assert window.left_out == 1
    assert window.coupling_mean == pytest.approx(0.25)
    assert window.rank_correlation == pytest.approx(0.5)


def test_what_is_undefined_is_nan() -> None:
    zero, one = torch.zeros(4, 4), torch.eye(4)
    for found in (commutator(zero, one), cosine(one, zero), cosine(Foreign(zero), one)):
        assert math.isnan(found.value)
    (window,) = windows(torch.eye(3), torch.ones(3))
    assert math.isnan(window.rank_correlation)
    assert math.isnan(windows(torch.eye(3), torch.arange(3.0), top=1)[0].coupling_mean)
    assert math.isnan(gradient_share(torch.zeros(3), torch.eye(3)))
    assert math.isnan(random_commutator(SpectralMoments(4, 0.0, 0.0), SpectralMoments(4, 1.0, 1.0)))


def test_the_gradient_share_is_that_of_the_span() -> None:
    generator = torch.Generator().manual_seed(0)
    basis = haar(9, generator)
    g = torch.randn(9, generator=generator, dtype=torch.float64)
    expected = float((basis[:, :4].T @ g).square().sum() / g.square().sum())
    assert gradient_share(g, basis[:, :4]) == pytest.approx(expected, rel=1e-12)
    mixed = basis[:, :4] @ torch.randn(4, 4, generator=generator, dtype=torch.float64)
    assert gradient_share(g, mixed) == pytest.approx(expected, rel=1e-8)
    assert gradient_share(g.float(), basis.float()) == pytest.approx(1, rel=1e-5)


def test_results_read_as_text() -> None:
    h, c = pair(20)
    assert "random eigenvectors" in str(alignment(h, Foreign(c), probes=4))
    (window,) = windows(c, torch.ones(20).cumsum(0))
    assert isinstance(window, Window)
    assert str(window).startswith("top 0..19: commutator")


def test_what_makes_no_sense_is_refused() -> None:
    h, c = pair(12)
    with pytest.raises(ArgumentError, match="same parameters"):
        commutator(h, c[:5, :5])
    with pytest.raises(ArgumentError, match="at least 1 probe"):
        cosine(Foreign(h), c, probes=0)
    with pytest.raises(ArgumentError, match="positive loss"):
        loss_scaled_alignment(c, h, 0.0)
    with pytest.raises(NonFiniteError):
        commutator(h, c * math.nan)
    with pytest.raises(ArgumentError, match="n eigenvalues"):
        windows(h, torch.ones(5))
    with pytest.raises(ArgumentError, match="not be empty"):
        windows(h, torch.ones(12), top=0)
    with pytest.raises(NonFiniteError):
        windows(h * math.inf, torch.ones(12))
    with pytest.raises(ArgumentError, match="has no 12 eigenvalues"):
        windows(h, torch.ones(12), spectrum=torch.ones(12), size=4)
    with pytest.raises(ArgumentError, match="orthonormal directions"):
        random_coupling(np.ones(3), 4)
    with pytest.raises(ArgumentError, match="directions"):
        gradient_share(torch.ones(3), torch.eye(4))
