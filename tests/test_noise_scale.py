"""Noise scales against dense covariance and Hessian, drawn mini-batches, and what their standard errors promise."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from matrices import with_spectrum
from nets import cut, make
from oracles import criterion_loss, dense_hessian, relative
from test_diversity import products_of, without_each
from test_noise import covariance, gradients
from torch import nn
from torch.nn import functional as F

from curvdiag import Hessian, Objective, cwgd, gradient_diversity, gradient_moments
from curvdiag.errors import ArgumentError, LossError, StaleWeightsError
from curvdiag.noise.noise_scale import along_noise, noise_over_gradient, noise_scale, simple_noise_scale
from curvdiag.noise.signed_sums import signed_sums
from curvdiag.space.probes import rademacher


@pytest.mark.parametrize("net", ["mlp-tanh", "conv-batchnorm", "transformer-tied"])
def test_scales_of_the_probe_set_equal_their_definitions(net: str) -> None:
    model, batch = make(net)
    rows = gradients(model, batch)
    g, c = rows.mean(0), covariance(rows)
    h = dense_hessian(model.eval(), criterion_loss(F.cross_entropy, batch))
    found = noise_scale(Objective(model, nn.CrossEntropyLoss(), cut(batch, (7, 3))), curvature=True, starts=400)
    assert found.b_simple_probe.value == pytest.approx(float(c.trace() / (g @ g)), rel=1e-10)
    assert found.trace.value == pytest.approx(float(c.trace()) * 10 / 9, rel=1e-10)
    assert found.gradient_square.value == pytest.approx(float(g @ g - c.trace() / 9), rel=1e-9)
    assert found.gradient_curvature == pytest.approx(float(g @ h @ g), rel=1e-9)
    trace = float((h * c).sum())
    assert abs(found.trace_hc.value - trace) < 4 * found.trace_hc.standard_error
    # The variance across signs, in closed form: 2 sum_{i != j} M_ij^2 for M = (g_i - g)^T H (g_j - g) / N.
    m = (rows - g) @ h @ (rows - g).T / 10
    spread = float(2 * (m.square().sum() - m.diagonal().square().sum()) / 400) ** 0.5
    assert found.trace_hc.standard_error == pytest.approx(spread, rel=0.35)
    if found.gradient_curvature > 0:
        assert found.b_noise.value == pytest.approx(found.trace_hc.value / found.gradient_curvature)


def test_random_sign_sums_are_what_they_say() -> None:
    """Row by row against per-sample gradients, weighted by class, through kept and rebuilt graphs and a block."""
    model, (x, y) = make("mlp-tanh")
    weight = torch.tensor([1.0, 3.0, 0.5], dtype=torch.float64)
    objective = Objective(model, nn.CrossEntropyLoss(weight=weight), (x, y))
    rows = gradients(model, (x, y)) * (weight[y] / weight[y].mean())[:, None]
    signs = rademacher(3, 10, seed=5, dtype=torch.float64)
    truth = signs @ (rows - rows.mean(0)) / 10**0.5
    assert relative(signed_sums(Hessian(objective), 3, 5), truth) < 1e-12
    assert relative(signed_sums(Hessian(objective, memory=0, micro_batch=4), 2, 5, first=1), truth[1:]) < 1e-12
    block = Hessian(objective).block("0.weight")
    assert relative(signed_sums(block, 3, 5), truth[:, :24]) < 1e-12


def test_all_signs_together_give_the_trace_exactly() -> None:
    """``E[b^T H b] = tr(H C)``: the mean over every one of the 2^6 sign vectors."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    h = with_spectrum(torch.tensor([3.0, 1.0, 0.2, -0.5]))[0]
    signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=6)), dtype=torch.float64)
    sums = signs @ (rows - rows.mean(0)) / 6**0.5
    found = along_noise(h, rows.mean(0), sums)
    assert found.trace.value == pytest.approx(float((h * covariance(rows)).sum()), rel=1e-12)
    assert found.matvecs == 65


def test_the_best_step_is_the_best_over_drawn_mini_batches() -> None:
    """A quadratic loss, every mini-batch of two samples: the mean loss after the step is a parabola in its length."""
    a = with_spectrum(torch.tensor([2.0, 1.0, 0.5, 0.1]))[0]
    generator = torch.Generator().manual_seed(1)
    x, w = torch.randn(6, 4, generator=generator, dtype=torch.float64), torch.full((4,), 1.5, dtype=torch.float64)
    model = nn.ParameterList([nn.Parameter(w.clone())])
    loss = lambda m, b: 0.5 * ((m[0] - b) @ a * (m[0] - b)).sum(1)  # noqa: E731
    found = noise_scale(Objective.from_loss(model, loss, x), curvature=True, starts=4000)

    def after(eta: float) -> float:
        pairs = itertools.product(range(6), repeat=2)
        steps = [w - eta * (w - x[list(pair)]).mean(0) @ a for pair in pairs]
        return float(torch.stack([0.5 * ((v - x) @ a * (v - x)).sum(1).mean() for v in steps]).mean())

    low, middle, high = after(0.0), after(1.0), after(2.0)
    best = (-3 * low + 4 * middle - high) / (2 * (-low + 2 * middle - high))
    step = found.step(2)
    assert abs(step.value - best) < 4 * step.standard_error
    assert step.standard_error < 0.02 * best
    formula = found.probe_square / found.gradient_curvature / (1 + found.b_noise.value / 2)
    assert step.value == pytest.approx(formula)


def test_the_population_is_estimated_without_bias() -> None:
    """``tr C`` and ``|g|^2`` over 4,000 sets of 8 samples, where ``|g|^2`` of a set is mostly noise."""
    generator = np.random.default_rng(0)
    mean = np.array([0.5, 0.2, 0.0])
    found = [simple_noise_scale(products_of(mean + generator.normal(size=(8, 3)))) for _ in range(4000)]
    for truth, values in ((3.0, [f.trace.value for f in found]), (0.29, [f.gradient_square.value for f in found])):
        assert abs(np.mean(values) - truth) < 4 * np.std(values) / 4000**0.5
    assert np.mean([f.probe_square for f in found]) > 2 * 0.29


def test_standard_errors_are_the_jackknife_over_samples() -> None:
    rows = np.random.default_rng(0).normal(size=(12, 3)) + 2

    def unbiased(rest: np.ndarray) -> tuple[float, float]:
        mean, n = rest.mean(0), len(rest)
        trace = ((rest - mean) ** 2).sum() / (n - 1)
        return trace, mean @ mean - trace / n

    found = simple_noise_scale(products_of(rows))
    for estimate, statistic in (
        (found.b_simple, lambda rest: unbiased(rest)[0] / unbiased(rest)[1]),
        (found.trace, lambda rest: unbiased(rest)[0]),
        (found.gradient_square, lambda rest: unbiased(rest)[1]),
    ):
        without = without_each(rows, statistic)
        assert estimate.value == pytest.approx(statistic(rows), rel=1e-10)
        error = math.sqrt(11 / 12 * ((without - without.mean()) ** 2).sum())
        assert estimate.standard_error == pytest.approx(error, rel=1e-8)


def test_intervals_over_samples_cover() -> None:
    """Skewed gradients, 500 sets of 300: ``B_simple``, ``tr C`` and ``|g|^2``.

    Over 3,000 sets they cover 95.7, 94.3 and 94.7 %; with exponential noise, of which 300 samples show the fourth
    moments badly, 94.3, 93.8 and 95.3 %.
    """
    generator = np.random.default_rng(1)
    mean = np.array([0.6, -0.4, 0.3, 0.0, 0.2])
    truth = {"b_simple": 5 / (mean @ mean), "trace": 5.0, "gradient_square": mean @ mean}
    hits = dict.fromkeys(truth, 0)
    for _ in range(500):
        found = simple_noise_scale(products_of(mean + generator.gamma(4, size=(300, 5)) / 2 - 2))
        for name, value in truth.items():
            low, high = getattr(found, name).interval()
            hits[name] += low <= value <= high
    for name, count in hits.items():
        assert 0.92 <= count / 500 <= 0.98, (name, count)


def test_the_interval_over_random_signs_covers() -> None:
    """``B_noise`` of a fixed set of 40 gradients from 24 starts, 500 seeds."""
    generator = torch.Generator().manual_seed(0)
    h = with_spectrum(torch.logspace(0, -2, 20, dtype=torch.float64))[0]
    rows = torch.randn(40, 20, generator=generator, dtype=torch.float64) @ h + 0.1
    centred, g = rows - rows.mean(0), rows.mean(0)
    truth = float((h * covariance(rows)).sum() / (g @ h @ g))
    hits = 0
    for seed in range(500):
        sums = rademacher(24, 40, seed=seed, dtype=torch.float64) @ centred / 40**0.5
        low, high = noise_over_gradient(along_noise(h, g, sums)).interval()
        hits += low <= truth <= high
    assert 0.92 <= hits / 500 <= 0.98


def test_no_number_where_there_is_none() -> None:
    """Negative curvature along the gradient; a gradient lost in its noise."""
    rows = torch.randn(50, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    shifted = rows + torch.tensor([4.0, 0.0, 0.0])
    h = torch.diag(torch.tensor([-1.0, 1.0, 1.0], dtype=torch.float64))
    found = simple_noise_scale(products_of(shifted.numpy()), along_noise(h, shifted.mean(0), rows[:5]))
    assert math.isnan(found.b_noise.value)
    assert math.isnan(found.step(1000).value)
    assert "not positive" in str(found)
    lost = simple_noise_scale(products_of((rows - rows.mean(0)).numpy()))
    assert math.isnan(lost.b_simple.value)
    assert "cannot be told from its noise" in str(lost)
    assert lost.gradient_square.value < 0
    products, gradient = products_of(shifted.numpy()), shifted.mean(0) / 10
    noisy = simple_noise_scale(products, along_noise(-h, gradient, rows[:5] * 3))
    assert "% of g^T H g is noise of the mean" in str(noisy)
    drowned = simple_noise_scale(products, along_noise(-h, gradient, rows[:5] * 10))
    assert "says nothing of the population" in str(drowned)


def test_it_shares_a_hessian_and_refuses_what_does_not_fit() -> None:
    model, batch = make("mlp-tanh")
    objective = Objective(model, nn.CrossEntropyLoss(), batch)
    hessian = Hessian(objective)
    shared, alone = (noise_scale(objective, curvature=True, starts=4, hessian=h) for h in (hessian, None))
    assert shared.to_dict() == alone.to_dict()
    assert hessian.cost.graphs == 1
    with pytest.raises(ArgumentError, match="another objective"):
        noise_scale(Objective(model, nn.CrossEntropyLoss(), batch), curvature=True, hessian=hessian)
    with pytest.raises(ArgumentError, match="method='exact'"):
        noise_scale(objective, curvature=True, hessian=Hessian(objective, method="finite-difference"))
    with pytest.raises(ArgumentError, match="curvature"):
        noise_scale(objective).step(4)
    with pytest.raises(ArgumentError, match="batch size"):
        shared.step(0)
    with pytest.raises(ArgumentError, match="start"):
        noise_scale(objective, curvature=True, starts=0)
    mean = Objective.from_loss(model, lambda m, b: F.cross_entropy(m(b[0]), b[1]), batch)
    with pytest.raises(LossError):
        signed_sums(Hessian(mean), 2, 0)


def test_moments_or_a_hessian_at_other_weights_are_refused() -> None:
    """Mixed with the gradients of now they would give a number that belongs to no weights at all."""
    model, batch = make("mlp-tanh")
    objective = Objective(model, nn.CrossEntropyLoss(), cut(batch, (7, 3)))
    moments, hessian = gradient_moments(objective), Hessian(objective)
    noise_scale(objective, curvature=True, moments=moments, hessian=hessian)
    with pytest.raises(ArgumentError, match="block"):
        noise_scale(objective, curvature=True, hessian=hessian.block("4.*"))
    with pytest.raises(ArgumentError, match="parameters"):
        noise_scale(objective, moments=gradient_moments(objective.restricted_to("4.*")))
    with pytest.raises(ArgumentError, match="not those of this objective"):
        noise_scale(Objective(model, nn.CrossEntropyLoss(), cut(batch, (7, 3))[:1]), moments=moments)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.01)
    for measure in (noise_scale, gradient_diversity):
        with pytest.raises(ArgumentError, match="not those of this objective"):
            measure(objective, moments=moments)
    with pytest.raises(StaleWeightsError):
        noise_scale(objective, curvature=True, hessian=hessian)
    with pytest.raises(StaleWeightsError):
        cwgd(objective, "diagonal", hessian=hessian)
    assert cwgd(objective, hessian=hessian).value.value > 0  # all of it at the weights of the Hessian
