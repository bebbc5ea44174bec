"""NoiseCurvatureLR sets the rate at which a step of SGD gains most, and holds it where there is none."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from lr_schedules import Training, rates_of, sgd, told, walk
from torch import nn
from torch.nn import functional as F
from torch.optim import lr_scheduler as torch_lr

from curvdiag import CurvatureMonitor, Estimate, Objective, noise_scale
from curvdiag.errors import ArgumentError
from curvdiag.noise import NoiseScale
from curvdiag.schedules.noise_curvature_lr import NoiseCurvatureLR

pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.filterwarnings("ignore:measuring every")]


def numbers(square, curvature, trace=0.0):
    return {"gradient_square": square, "gradient_curvature": curvature, "trace_hc": trace}


class NoisyQuadratic:
    """``f = 1/2 x^T H x`` with gradients ``H x + e``, ``e ~ N(0, C)`` for one sample; H and C do not commute."""

    def __init__(self, size=6, seed=0):
        self.generator = torch.Generator().manual_seed(seed)
        first, second = self.normal(size, size), self.normal(size, size)
        self.hessian = first @ first.T / size + 0.1 * torch.eye(size, dtype=torch.float64)
        self.root = 2 * second / size**0.5
        self.covariance = self.root @ self.root.T
        self.point = self.normal(size)
        self.gradient = self.hessian @ self.point

    def normal(self, *shape):
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def gradients(self, draws, batch):
        return self.gradient + self.normal(draws, len(self.point)) @ self.root.T / batch**0.5

    def loss(self, points):
        return 0.5 * ((points @ self.hessian) * points).sum(-1)

    def known(self):
        g = self.gradient
        return numbers(float(g @ g), float(g @ self.hessian @ g), float((self.hessian * self.covariance).sum()))


@pytest.mark.parametrize("batch", [1, 4, 64])
def test_the_expected_decrease_of_one_step_is_largest_at_its_rate(batch):
    """By simulation, with the same noise at every rate."""
    problem = NoisyQuadratic()
    optimizer = sgd(0.1)
    NoiseCurvatureLR(optimizer, problem.known, batch)
    (rate,) = rates_of(optimizer)
    gradients = problem.gradients(200_000, batch)

    def decreases(share):
        return problem.loss(problem.point) - problem.loss(problem.point - share * rate * gradients)

    at_best = decreases(1.0)
    for share in (0.5, 0.8, 0.9, 1.1, 1.25, 2.0):
        gain = at_best - decreases(share)
        assert gain.mean() > 4 * gain.std() / len(gain) ** 0.5
    # The sampled decrease is a parabola in the rate: a eta - b eta^2 / 2, whose top is at a / b.
    a = (gradients @ problem.gradient).mean()
    b = ((gradients @ problem.hessian) * gradients).sum(1).mean()
    assert float(a / b) == pytest.approx(rate, rel=0.02)


def test_it_is_mccandlishs_rate():
    """(||g||^2 / (g^T H g)) / (1 + B_noise / B)"""
    known = NoisyQuadratic().known()
    noise = known["trace_hc"] / known["gradient_curvature"]
    for batch in (1, 16, 1000):
        optimizer = sgd(0.1)
        NoiseCurvatureLR(optimizer, told(known), batch, scale=0.7)
        best = known["gradient_square"] / known["gradient_curvature"] / (1 + noise / batch)
        assert rates_of(optimizer) == [pytest.approx(0.7 * best, rel=1e-12)]


def test_from_small_probe_sets_it_is_the_rate_of_the_population():
    """On average over many, where the noise of a set's mean gradient meets as much curvature as the gradient does."""
    problem, samples, batch = NoisyQuadratic(), 12, 8
    problem.gradient *= 0.3
    rows = problem.gradient + problem.normal(40_000, samples, len(problem.point)) @ problem.root.T
    means = rows.mean(1)
    square = float((means.square().sum(1) - rows.var(1).sum(1) / samples).mean())
    along = float((means @ problem.hessian * means).sum(1).mean())
    trace = float(((rows - means[:, None]) @ problem.hessian * (rows - means[:, None])).sum(2).mean())
    unused = Estimate(math.nan, math.nan, samples)
    parts = [Estimate(value, 0.0, samples) for value in (square, trace)]
    found = NoiseScale(unused, unused, unused, parts[0], square, None, parts[1], along, 9, samples)
    assert along > 1.9 * problem.known()["gradient_curvature"]
    optimizer, other = sgd(0.1), sgd(0.1)
    NoiseCurvatureLR(optimizer, told(found), batch)
    NoiseCurvatureLR(other, problem.known, batch * samples / (samples - 1))  # the trace is divided by N
    assert rates_of(optimizer) == pytest.approx(rates_of(other), rel=0.01)


# From measurements


def regression(samples=40):
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(samples, 3, generator=generator, dtype=torch.float64)
    targets = inputs.sum(1, keepdim=True) + torch.randn(samples, 1, generator=generator, dtype=torch.float64)
    model = nn.Linear(3, 1, bias=False).double()
    nn.init.constant_(model.weight, -1.0)
    return model, inputs, targets


def test_from_a_monitor_it_is_what_single_gradients_say():
    model, inputs, targets = regression()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    monitor = CurvatureMonitor(Objective(model, F.mse_loss, (inputs, targets)), every=2, measure=["noise_scale"])
    found = monitor.attach(optimizer).measure()
    schedule = NoiseCurvatureLR(optimizer, monitor, 8)
    rows = 2 * (inputs @ model.weight.detach().T - targets) * inputs
    hessian, n, g = 2 * inputs.T @ inputs / 40, 40, rows.mean(0)
    variance = rows.var(0, unbiased=True).sum()
    assert found["noise/gradient_square"] == pytest.approx(float(g @ g - variance / n), rel=1e-9)
    trace = found.scalars["noise/trace_hc"]
    curvature = g @ hessian @ g - trace.value / (n - 1)
    assert found["noise/gradient_curvature"] == pytest.approx(float(curvature), rel=1e-9)
    assert abs(trace.value - float((hessian * torch.cov(rows.T, correction=0)).sum())) < 4 * trace.standard_error
    expected = (g @ g - variance / n) / (curvature + trace.value / 8)
    assert rates_of(optimizer) == [pytest.approx(float(expected), rel=1e-9)]
    before = rates_of(optimizer)
    for _ in range(2):
        optimizer.zero_grad()
        F.mse_loss(model(inputs), targets).backward()
        optimizer.step()
        schedule.step()
    assert rates_of(optimizer) != before
    recorded = dict(monitor.recorded)[2]
    names = ("gradient_square", "gradient_curvature", "trace_hc", "rate", "lr/0")
    assert set(recorded) == {f"schedule/noise_curvature/{name}" for name in names}


def test_a_function_may_give_a_noise_scale():
    training = Training()
    found = noise_scale(training.monitor.objective, curvature=True, starts=4)
    optimizer = sgd(0.01)
    NoiseCurvatureLR(optimizer, told(found), 8)
    noise, others = found.trace_hc.value, found.samples - 1
    bottom = found.gradient_curvature - noise / others + noise / 8
    assert rates_of(optimizer) == [pytest.approx(found.gradient_square.value / bottom, rel=1e-12)]


def test_a_noise_scale_without_curvature_is_logged_and_the_rate_held(caplog):
    caplog.set_level(logging.WARNING)
    optimizer = sgd(0.01)
    schedule = NoiseCurvatureLR(optimizer, told(noise_scale(Training().monitor.objective)), 8)
    assert rates_of(optimizer) == [0.01]
    (record,) = caplog.records
    assert "noise_scale(..., curvature=True)" in record.getMessage()
    assert schedule.age is None


# Smoothing, bounds, and what cannot be used


def test_numerator_and_denominator_are_smoothed_apart():
    optimizer = sgd(0.1)
    seen = [numbers(1.0, 2.0), numbers(9.0, 1.0, 8.0), numbers(-3.0, 4.0), numbers(2.0, -1.0, 4.0)]
    found = walk(optimizer, NoiseCurvatureLR(optimizer, told(*seen), 2, smoothing=0.75), 4)
    square, curvature, expected = 1.0, 2.0, []
    for one in seen:
        square = 0.75 * square + 0.25 * one["gradient_square"]
        curvature = 0.75 * curvature + 0.25 * (one["gradient_curvature"] + one["trace_hc"] / 2)
        expected.append(square / curvature)
    assert found == pytest.approx(expected, rel=1e-13)
    assert len(set(expected)) == 4


def test_the_rate_is_held_and_logged_where_the_denominator_is_not_positive(caplog):
    caplog.set_level(logging.WARNING)
    optimizer = sgd(0.1)
    seen = [
        None,
        numbers(1.0, 2.0),
        numbers(1.0, -5.0),
        numbers(1.0, -5.0),
        numbers(1.0, 20.0, 0.0),
        numbers(1.0, math.nan),
    ]
    schedule = NoiseCurvatureLR(optimizer, told(*seen), 2, smoothing=0.5)
    assert walk(optimizer, schedule, 6) == pytest.approx(
        [0.1, 0.5, 0.5, 0.5, 1 / (-3.25 / 2 + 10), 1 / (-3.25 / 2 + 10)]
    )
    assert [bool(choice.note) for choice in schedule.history] == [False, True, True, False, True]
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2
    assert "tr(HC)/B = -1.5 is not positive" in messages[0]
    assert "nan" in messages[1]


def test_a_gradient_that_is_all_noise_holds_the_rate_too(caplog):
    caplog.set_level(logging.WARNING)
    optimizer = sgd(0.1)
    seen = [numbers(-1.0, 2.0), numbers(4.0, 2.0), numbers(0.0, 2.0), numbers(-8.0, 2.0)]
    schedule = NoiseCurvatureLR(optimizer, told(*seen), 2, smoothing=0.5)
    assert walk(optimizer, schedule, 4) == pytest.approx([0.1, 1.5 / 2, 0.75 / 2, 0.75 / 2])
    assert schedule.age == 2
    assert "cannot be told from its noise" in caplog.records[0].getMessage()


def test_the_rate_is_clipped():
    optimizer = sgd(0.1)
    seen = [numbers(1.0, 1.0), numbers(1.0, 100.0), numbers(100.0, 1.0), numbers(1e308, 1e-308)]
    schedule = NoiseCurvatureLR(optimizer, told(*seen), 1, smoothing=0.0, low=0.5, high=2.0)
    assert walk(optimizer, schedule, 4) == [1.0, 0.5, 2.0, 2.0]


def test_groups_keep_the_ratio_of_their_initial_rates_and_a_warm_up_multiplies():
    optimizer = sgd(0.1, 0.05, 0.0)
    both = [
        torch_lr.LinearLR(optimizer, 0.25, total_iters=4),
        NoiseCurvatureLR(optimizer, lambda: numbers(3.0, 2.0), 1),
    ]
    schedule = torch_lr.ChainedScheduler(both)
    for step in range(7):
        share = 0.25 + 0.75 * min(step, 4) / 4
        assert rates_of(optimizer) == pytest.approx([1.5 * share, 0.75 * share, 0.0], rel=1e-12)
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_size": 0}, "batch size"),
        ({"batch_size": math.nan}, "batch size"),
        ({"scale": 0.0}, "scale"),
        ({"smoothing": 1.0}, "smoothing"),
        ({"low": 2.0, "high": 1.0}, "low <= high"),
        ({"low": -1.0}, "low <= high"),
        ({"optimizer": sgd(0.0, 0.1)}, "first parameter group's rate is zero"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(options, words):
    with pytest.raises(ArgumentError, match=words):
        NoiseCurvatureLR(**{"optimizer": sgd(), "source": told(), "batch_size": 4, **options})
