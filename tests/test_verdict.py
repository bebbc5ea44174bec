"""The verdict's words on textbook cases, and the figures in its reasons."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from curvdiag.errors import ArgumentError
from curvdiag.scaling.power_law import DirectionSamples, measure_power_law
from curvdiag.scaling.verdict import judge


def measured(noise, samples=2000, directions=30, decades=2.0, seed=0, **options):
    """Rank-one Hessians of mean ``H``, ``decades`` wide, and Gaussian gradients of variance ``noise(H)``."""
    generator = np.random.default_rng(seed)
    curvature = np.logspace(0, -decades, directions)
    slopes = np.sqrt(noise(curvature)) * generator.standard_normal((samples, directions))
    hessians = curvature * generator.standard_normal((samples, directions)) ** 2
    both = DirectionSamples(torch.from_numpy(slopes), torch.from_numpy(hessians))
    return measure_power_law(both, **{"methods": ["ols"], "bootstrap": 400} | options)


def scattered(decades):
    """Proportional on average: directions lie off by this much, alternating so that no slope comes of it."""
    return lambda h: 3 * h * 10 ** (decades * np.tile([1, -1, -1, 1], len(h))[: len(h)])


CASES = {
    "proportional": lambda h: 3 * h,
    "proportional on average": scattered(0.06),
    "superlinear": lambda h: h**1.4,
    "sublinear": lambda h: h**0.6,
    "not a power law": lambda h: h + 30 * h**2,
}


@pytest.mark.parametrize("word", CASES)
def test_the_word_is_that_of_the_law(word):
    words = [judge(measured(CASES[word], seed=s)).word for s in range(10)]
    # By design the interval misses an exponent of 1 once in twenty.
    assert words.count(word) >= (8 if word.startswith("proportional") else 10)


def test_directions_that_scatter_by_more_than_a_factor_of_1_6_follow_no_power_law():
    verdict = judge(measured(scattered(0.3)))
    assert verdict.word == "not a power law"
    assert "scatter by a factor of 2.0" in str(verdict)


@pytest.mark.parametrize(("power", "word"), [(1.3, "superlinear"), (0.7, "sublinear")])
def test_a_bend_that_is_real_but_small_leaves_the_word(power, word):
    verdict = judge(measured(lambda h: h**power * 10 ** (0.08 * np.log10(h) ** 2), samples=20_000))
    assert verdict.word == word
    assert "beyond sampling error but below 0.5" in str(verdict)


def test_the_reasons_carry_the_figures():
    held_out = measured(CASES["superlinear"])
    text = str(judge(held_out))
    law, departure = held_out.noise_fits["ols"], held_out.departure
    assert text.startswith("superlinear: ")
    assert f"exponent {law.exponent[-1]:.3f} on 30 directions over 2.0 decades" in text
    assert f"95 % interval [{law.low[-1]:.3f}, {law.high[-1]:.3f}] lies above 1" in text
    assert f"from {departure.bottom:.2f} at the smallest curvature to {departure.top:.2f} at the largest" in text


def test_directions_that_were_left_out_are_told():
    def noise(h):
        return np.where(np.arange(len(h)) == 7, 0.0, h)

    verdict = judge(measured(noise))
    assert verdict.word == "proportional"
    assert "1 of 30 directions have no positive curvature or noise" in str(verdict)


class TestUndecided:
    def test_an_interval_that_holds_1_and_1_5_decides_nothing(self):
        found = 0
        for seed in range(20):
            held_out = measured(lambda h: h**1.2, samples=60, directions=6, decades=0.8, seed=seed)
            low, high = held_out.noise_fits["ols"].low[-1], held_out.noise_fits["ols"].high[-1]
            if low <= 1 and high >= 1.5:
                verdict = judge(held_out)
                assert verdict.word == "undecided"
                assert "contains 1 and is too wide to decide" in str(verdict)
                found += 1
        assert found >= 5

    def test_a_narrow_range_of_curvature_decides_nothing(self):
        verdict = judge(measured(lambda h: h, decades=0.3))
        assert verdict.word == "undecided"
        assert "30 directions over 0.3 decades" in str(verdict)

    def test_few_directions_decide_nothing(self):
        verdict = judge(measured(lambda h: h, directions=4))
        assert verdict.word == "undecided"
        assert "4 directions" in str(verdict)

    def test_directions_that_are_not_resolved_decide_nothing(self):
        curvatures = torch.randn(200, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        held_out = measure_power_law(DirectionSamples(curvatures.flip(0), curvatures), bootstrap=100)
        verdict = judge(held_out)
        assert verdict.word == "undecided"
        assert "take more samples" in str(verdict)

    def test_a_measurement_without_a_bootstrap_decides_nothing(self):
        verdict = judge(measured(lambda h: h, bootstrap=0))
        assert verdict.word == "undecided"
        assert "measure with a bootstrap" in str(verdict)

    def test_equal_curvatures_decide_nothing(self):
        rows = torch.ones(50, 8, dtype=torch.float64)
        slopes = torch.randn(50, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        verdict = judge(measure_power_law(DirectionSamples(slopes, rows), bootstrap=100))
        assert verdict.word == "undecided"


def test_a_biased_measurement_is_not_judged():
    with pytest.raises(ArgumentError, match="biased"):
        judge(measured(lambda h: h, biased=True))


def test_a_fit_that_was_not_made_is_not_judged():
    with pytest.raises(ArgumentError, match="there are ols"):
        judge(measured(lambda h: h), method="deming")
