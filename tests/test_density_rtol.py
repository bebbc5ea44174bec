"""Steps and probes from a wanted accuracy: it is reached as often as claimed, and the note says whether."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from matrices import heavy_tailed, with_spectrum

from curvdiag import spectral_density
from curvdiag.errors import ArgumentError


def symmetric(size: int = 100) -> torch.Tensor:
    matrix = torch.randn(size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return (matrix + matrix.T) / 2


CASES = {
    "a trace near zero": (symmetric(), 0.1, 4, 0),
    "positive": (with_spectrum(torch.linspace(0, 1, 100) ** 4)[0], 0.1, 6, 0),
    "outliers, deflated": (with_spectrum(heavy_tailed(150, seed=2), seed=2)[0], 0.05, 4, 8),
}


@pytest.mark.parametrize("case", CASES)
def test_of_60_calls_at_most_a_few_say_that_it_was_reached_where_it_was_not(case):
    matrix, rtol, probes, deflate = CASES[case]
    values = torch.linalg.eigvalsh(matrix).numpy()
    truth = np.array([values.sum(), np.abs(values).sum(), np.square(values).sum()])
    allowed = rtol * truth[[1, 1, 2]]
    reached, wrong = 0, np.zeros(3)
    for seed in range(60):
        density = spectral_density(matrix, rtol=rtol, probes=probes, seed=seed, deflate=deflate)
        if "not reached" not in density.note:
            reached += 1
            found = [float(np.mean(density.size * density.per_probe(f))) for f in (lambda x: x, np.abs, np.square)]
            wrong += np.abs(np.array(found) - truth) > allowed
    assert reached >= 48
    assert (wrong <= 7).all()  # 3 expected at most; 7 are more than two standard deviations above


def test_a_tighter_accuracy_takes_more_probes_and_the_note_says_what_is_missing():
    matrix, _ = with_spectrum(torch.linspace(0, 1, 100) ** 4)
    loose, tight, never = (spectral_density(matrix, rtol=rtol, seed=1) for rtol in (0.4, 0.2, 0.001))
    assert loose.probes < tight.probes < never.probes == 64
    assert loose.note == f"rtol=0.4 reached after {loose.steps} steps and {loose.probes} probes"
    assert "rtol=0.001 not reached after" in never.note
    assert "probes are needed" in never.note
    for density in (loose, tight, never):
        assert density.matvecs == density.steps * density.probes
    short = spectral_density(with_spectrum(torch.linspace(-1, 1, 300) ** 9)[0], steps=3, rtol=0.05)
    assert "tr|H| still changes at 3 steps" in short.note


def test_steps_grow_until_the_trace_norm_stands_still():
    flat, wide = torch.linspace(0.9, 1.1, 300), torch.linspace(-1, 1, 300) ** 15
    few, many = (spectral_density(with_spectrum(values)[0], rtol=0.02, probes=8) for values in (flat, wide))
    assert few.steps == 12
    assert many.steps > 12
    exact = float(wide.abs().sum())
    mean = float(np.mean(many.size * many.per_probe(np.abs)))
    error = np.std(many.size * many.per_probe(np.abs)) / many.probes**0.5
    assert abs(mean - exact) < 0.02 * exact + 3 * error


def test_with_enough_probes_at_hand_the_numbers_are_those_of_a_density_with_these_steps_and_probes():
    matrix, _ = with_spectrum(torch.linspace(1, 2, 300))
    found = spectral_density(matrix, rtol=0.1, probes=5)
    plain = spectral_density(matrix, steps=found.steps, probes=found.probes)
    np.testing.assert_array_equal(found.nodes, plain.nodes)
    np.testing.assert_array_equal(found.weights, plain.weights)
    deflated = spectral_density(matrix, steps=30, rtol=0.1, probes=5, deflate="auto")
    assert deflated.note.startswith("nothing deflated: it would not pay; rtol=0.1 reached")
    assert deflated.trace().value == pytest.approx(plain.trace().value, rel=1e-6)  # the first run is a probe


def test_the_grouping_of_probes_changes_nothing(monkeypatch):
    matrix, _ = with_spectrum(torch.linspace(0, 1, 80) ** 4)
    together = spectral_density(matrix, rtol=0.2)
    monkeypatch.setattr("curvdiag.spectrum.density.free_bytes", lambda device: 0)
    seen = []
    alone = spectral_density(matrix, rtol=0.2, progress=lambda *p: seen.append(p))
    assert alone.steps == together.steps
    assert alone.matvecs == together.matvecs == seen[-1][0]
    np.testing.assert_allclose(alone.weights, together.weights, atol=1e-9)


def test_bad_accuracies_are_named_and_zero_matrices_are_reached_at_once():
    for bad in (0, -1, 1, 2.0, True, float("nan")):
        with pytest.raises(ArgumentError, match="rtol"):
            spectral_density(torch.eye(5), rtol=bad)
    with pytest.raises(ArgumentError, match="reorthogonalize"):
        spectral_density(torch.eye(5), rtol=0.1, reorthogonalize="full")
    for matrix in (torch.zeros(20, 20), torch.eye(20), torch.ones(1, 1)):
        assert "reached" in spectral_density(matrix, rtol=0.01).note
        assert "not" not in spectral_density(matrix, rtol=0.01).note
    whole = spectral_density(torch.diag(torch.tensor([3.0, 2.0, 1.0])), rtol=0.01, deflate=3)
    assert whole.note == "rtol=0.01 reached: every eigenvalue is deflated"
