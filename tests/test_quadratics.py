"""SGD on quadratics: the exact recursion against hand computation, dense matrices and limits; simulation against it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from curvdiag.errors import ArgumentError
from curvdiag.experiments.quadratics import (
    NOISES,
    ErrorLaw,
    adiabatic_tail,
    batch_cwgd,
    best_rate,
    cosine,
    curvatures_of,
    cwgd,
    cwgd_factor,
    decay,
    error_law,
    excess,
    noise_of,
    second_moments,
    simulate,
)

LIMIT = 1 - 2 ** (-1 / 3)


def gain(steps: int, condition: float, noise: str, floor: float = 0.0, start: float = 10.0) -> float:
    """What halving the peak rate of 1 takes off the final error of cosine, batch 16."""
    curvatures = curvatures_of(condition)
    rates = cosine(steps, floor)[:, None] * np.array([1.0, 0.5])
    errors = excess(second_moments(rates, curvatures, noise_of(noise, curvatures) / 16, start**2), curvatures)
    return float(1 - errors[1] / errors[0])


def test_two_steps_by_hand() -> None:
    """From v = 4, lambda = 0.5, s = 3: 0.25 * 4 + 3 = 4 at rate 1, then 0.5625 * 4 + 0.75 = 3 at rate 1/2."""
    path = second_moments(np.array([1.0, 0.5]), np.array([0.5]), np.array([3.0]), 4.0, path=True)
    assert path[:, 0].tolist() == [4.0, 4.0, 3.0]
    assert decay(np.array([1.0, 0.5]), np.array([0.5])).tolist() == [0.375]
    assert excess(path[-1], np.array([0.5])) == 0.75


def test_the_recursion_is_that_of_the_whole_covariance_in_any_basis() -> None:
    """``M <- (I - eta H) M (I - eta H) + eta^2 C`` with dense matrices that nothing diagonalises."""
    generator = np.random.default_rng(1)
    curvatures, noise, start = curvatures_of(30.0, 7), generator.uniform(0.1, 2, 7), generator.standard_normal(7)
    basis = np.linalg.qr(generator.standard_normal((7, 7)))[0]
    h, c = ((basis * values) @ basis.T for values in (curvatures, noise))
    moments = np.outer(basis @ start, basis @ start)
    rates = 1.3 * cosine(40, 0.1)
    for rate in rates:
        step = np.eye(7) - rate * h
        moments = step @ moments @ step + rate**2 * c
    found = excess(second_moments(rates, curvatures, noise, start**2), curvatures)
    assert found == pytest.approx(0.5 * np.trace(h @ moments), rel=1e-12)
    law = error_law(rates, curvatures, noise, start)
    assert law.mean == pytest.approx(found, rel=1e-12)


def test_a_constant_rate_ends_at_its_stationary_noise() -> None:
    """``eta s / (lambda (2 - eta lambda))``."""
    curvatures, noise = np.array([1.0, 0.2]), np.array([2.0, 5.0])
    found = second_moments(np.full(2000, 0.7), curvatures, noise, 100.0)
    assert found == pytest.approx(0.7 * noise / (curvatures * (2 - 0.7 * curvatures)), rel=1e-12)


def test_noise_that_depends_on_the_state_enters_by_its_expectation() -> None:
    """One step from v = 2 with variance 1 + v: 0.25 * 2 + 0.25 * 3 = 1.25, and another: 0.3125 + 0.5625."""
    rates = np.array([0.5, 0.5])
    assert second_moments(rates, np.ones(1), lambda v: 1 + v, 2.0).tolist() == [0.875]


def test_the_cosine_is_pytorchs() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 17, eta_min=0.2)
    seen = []
    for _ in range(17):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert (2 * cosine(17, 0.1)).tolist() == pytest.approx(seen, rel=1e-9)


def test_a_long_cosine_ends_where_the_integral_says() -> None:
    """Mode by mode against the closed form with the gamma function, within 1 % and nearer with more steps."""
    curvatures, noise = curvatures_of(10.0, 5), np.array([1.0, 0.3, 2.0, 0.1, 1.0])
    errors = []
    for steps in (2000, 20_000):
        found = second_moments(cosine(steps), curvatures, noise, 1.0)
        errors.append(np.abs(found / adiabatic_tail(1.0, steps, curvatures, noise) - 1).max())
    assert errors[1] < 0.01
    assert errors[1] < errors[0] / 2
    # The limit depends on the peak rate by its cube root: this is the 20.6 %.
    halved, whole = (adiabatic_tail(peak, 2000, curvatures, noise) for peak in (0.5, 1.0))
    assert 1 - halved / whole == pytest.approx(LIMIT, rel=1e-12)
    assert pytest.approx(0.206, abs=5e-4) == LIMIT


@pytest.mark.parametrize("noise", NOISES)
def test_halving_the_peak_of_a_long_cosine_takes_off_a_fifth(noise: str) -> None:
    """20.7 to 21.9 % at 5000 steps for every kind of noise and condition numbers up to 100, and towards 20.6 %."""
    gains = [gain(5000, condition, noise) for condition in (1.0, 10.0, 100.0)]
    assert min(gains) > 0.2065
    assert max(gains) < 0.2195
    assert gain(50_000, 1.0, noise) == pytest.approx(LIMIT, abs=3e-4)
    assert abs(gain(20_000, 100.0, noise) - LIMIT) < abs(gains[-1] - LIMIT) / 2


@pytest.mark.parametrize("noise", NOISES)
def test_with_a_floor_of_a_tenth_it_takes_off_half(noise: str) -> None:
    gains = [gain(5000, condition, noise, floor=0.1) for condition in (1.0, 10.0, 100.0)]
    assert min(gains) > 0.415
    assert max(gains) < 0.515


def test_with_too_few_steps_for_the_slow_modes_it_is_much_worse() -> None:
    assert gain(500, 100.0, "isotropic") < -1
    assert gain(5000, 1000.0, "proportional") < -0.5


def test_cwgd_is_constant_and_its_factor_as_published() -> None:
    curvatures = curvatures_of(100.0)
    for kind in NOISES:
        noise = noise_of(kind, curvatures)
        assert noise.mean() == pytest.approx(1.0)
        assert (cwgd(noise, curvatures) / 2) == pytest.approx(float((noise / curvatures).sum()))
    spread = np.ptp(noise_of("proportional", curvatures) / curvatures)
    assert spread == pytest.approx(0.0, abs=1e-12)
    assert np.ptp(noise_of("inverse", curvatures) * curvatures) == pytest.approx(0.0, abs=1e-12)
    ratio = np.array([1.0, 3.0, 0.0])
    assert cwgd_factor(ratio, 1.0).tolist() == [0.5, 0.25, 1.0]
    assert cwgd_factor(ratio, 3.0).tolist() == [0.25, 0.1, 1.0]
    assert cwgd_factor(ratio, 3.0, normalized=True).tolist() == [1.0, 0.4, 4.0]


def test_the_law_of_the_error_has_the_cumulants_of_its_samples() -> None:
    """Mean, variance and third central moment against a million draws of the final state."""
    curvatures, noise, start = np.array([1.0, 0.3, 0.1]), np.array([1.0, 2.0, 0.5]), np.array([0.0, 3.0, 8.0])
    rates = 0.8 * cosine(12)
    law = error_law(rates, curvatures, noise, start)
    spread = np.sqrt(second_moments(rates, curvatures, noise, 0.0))
    normal = np.random.default_rng(0).standard_normal((1_000_000, 3))
    errors = excess((decay(rates, curvatures) * start + spread * normal) ** 2, curvatures)
    centred = errors - law.mean
    for power, cumulant in ((1, 0.0), (2, law.variance), (3, law.third)):
        samples = centred**power
        assert abs(samples.mean() - cumulant) < 4 * samples.std() / 1000


def test_z_scores_are_exact_where_all_modes_are_alike() -> None:
    """The mean of ``S`` errors of ``d`` equal modes is a chi-square of ``S d`` degrees of freedom, far out as well."""
    d, seeds, v = 3, 4, 0.7
    law = ErrorLaw(np.array(0.5 * d * v), np.array(0.5 * d * v**2), np.array(d * v**3))
    for probability in (1e-9, 0.02, 0.5, 0.9, 1 - 1e-9):
        mean = 0.5 * v * stats.chi2.ppf(probability, d * seeds) / seeds
        assert law.z_score(mean, seeds) == pytest.approx(stats.norm.ppf(probability), abs=1e-5)


def test_z_scores_of_unlike_modes_are_standard_normal() -> None:
    """20,000 means of 16 errors: no more of them beyond 2, 3 and 3.5 than a normal number has, and no fewer."""
    curvatures, noise = np.array([1.0, 0.1, 0.02]), np.array([1.0, 1.0, 3.0])
    rates = cosine(60)
    law = error_law(rates, curvatures, noise, np.array([1.0, 1.0, 4.0]))
    spread = np.sqrt(second_moments(rates, curvatures, noise, 0.0))
    normal = np.random.default_rng(3).standard_normal((20_000, 16, 3))
    states = decay(rates, curvatures) * np.array([1.0, 1.0, 4.0]) + spread * normal
    scores = law.z_score(excess(states**2, curvatures).mean(1), 16)
    for side in (scores, -scores):
        for threshold in (1.0, 2.0, 3.0):
            share, expected = np.mean(side > threshold), stats.norm.sf(threshold)
            assert abs(share - expected) < 4 * np.sqrt(expected / 20_000)


def test_simulation_agrees_mode_by_mode_and_in_its_mean_path() -> None:
    """Means and second moments of each mode after a few steps, over 40,000 runs at two peak rates."""
    curvatures, noise = np.array([1.0, 0.3, 0.05]), np.array([0.5, 1.0, 4.0])
    rates = cosine(8)[:, None] * np.array([0.9, 0.4])
    states = simulate(rates, 8, curvatures, noise, 2.0, (2, 40_000), np.random.default_rng(0))
    variance = second_moments(rates, curvatures, noise, 0.0)
    mean = 2 * decay(rates, curvatures)
    assert np.all(np.abs(states.mean(1) - mean) < 4 * np.sqrt(variance / 40_000))
    assert np.all(np.abs(states.var(1) / variance - 1) < 4 * np.sqrt(2 / 40_000))
    # All modes, both schedules and all seeds have noise of their own.
    flat = states.transpose(0, 2, 1).reshape(6, -1)
    assert np.abs(np.corrcoef(flat) - np.eye(6)).max() < 4.5 / 200
    rates_by_call = simulate(
        lambda t: rates[t][:, None], 8, curvatures, noise, 2.0, (2, 40_000), np.random.default_rng(0)
    )
    assert np.array_equal(states, rates_by_call)


def test_cwgd_of_a_mini_batch_is_that_of_drawn_samples() -> None:
    """The shortcut by chi-squares against variances of samples that are drawn: two samples of one law."""
    curvatures, noise = curvatures_of(10.0, 4), np.array([1.0, 0.5, 2.0, 1.0])
    found = batch_cwgd(noise, curvatures, 5, 4000, np.random.default_rng(0))()
    drawn = np.random.default_rng(1).standard_normal((4000, 5, 4)) * np.sqrt(noise)
    truth = 2 * (drawn.var(1, ddof=1) / curvatures).sum(1)
    assert stats.ks_2samp(found, truth).pvalue > 1e-3
    assert found.mean() == pytest.approx(float(cwgd(noise, curvatures)), rel=0.05)


def test_the_best_rate_is_a_minimum_to_a_thousandth() -> None:
    """Against SciPy's own minimiser, for three cases that share one search; and an edge is reported."""
    from scipy.optimize import minimize_scalar

    curvatures = curvatures_of(20.0, 6)
    noises = np.stack([noise_of("isotropic", curvatures) * scale for scale in (0.01, 0.1, 1.0)])
    found = best_rate(cosine(100), curvatures, noises, 3.0, 1e-3, 3.0)
    assert not found.at_edge.any()
    for noise, rate, error in zip(noises, found.rate, found.error, strict=True):

        def final(log_rate: float, noise: np.ndarray = noise) -> float:
            rates = np.exp(log_rate) * cosine(100)
            return float(excess(second_moments(rates, curvatures, noise, 9.0), curvatures))

        truth = minimize_scalar(final, bounds=(np.log(rate / 2), np.log(min(2 * rate, 2.2))), method="bounded")
        assert error == pytest.approx(truth.fun, rel=1e-5)
        assert rate == pytest.approx(np.exp(truth.x), rel=5e-3)
        assert error == pytest.approx(final(np.log(rate)), rel=1e-9)
    edge = best_rate(cosine(100), curvatures, noises, 3.0, 1e-6, 1e-4)
    assert edge.at_edge.all()
    assert edge.rate == pytest.approx(1e-4, rel=1e-12), "and not beyond it"


def test_what_makes_no_sense_is_refused() -> None:
    for call, words in (
        (lambda: curvatures_of(0.5), "condition number"),
        (lambda: noise_of("pink", np.ones(2)), "isotropic"),
        (lambda: cosine(0), "step"),
        (lambda: cosine(5, 1.5), "floor"),
        (lambda: batch_cwgd(np.ones(2), np.ones(2), 1, 3, np.random.default_rng(0)), "two samples"),
    ):
        with pytest.raises(ArgumentError, match=words):
            call()


def test_a_rate_that_explodes_is_infinite_and_never_a_number() -> None:
    curvatures = np.array([1.0, 0.1])
    found = second_moments(np.full((3000, 1), 5.0), curvatures, np.ones(2), 1.0)
    assert np.isinf(found[0, 0])
    assert np.isfinite(found[0, 1])
