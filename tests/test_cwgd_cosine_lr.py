"""CWGDCosineLR: the published formula, and what its control says of it."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from lr_schedules import Training, cosine, rates_of, sgd, told, walk
from torch import nn
from torch.nn import functional as F
from torch.optim import lr_scheduler as torch_lr

from curvdiag import Estimate, Objective, cwgd
from curvdiag.errors import ArgumentError
from curvdiag.schedules.cwgd_cosine_lr import CWGDCosineLR

pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.filterwarnings("ignore:measuring every")]

T = 20
MEASURED = [4.0, 4.0, 6.0, 10.0, 3.0, 1.0, 0.0, 20.0, 4.0, 8.0]


def constant(value):
    return lambda: value


# The formula


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("floor", [0.0, 0.05])
def test_the_rate_is_the_published_formula_worked_out_by_hand(alpha, floor):
    for normalized in (False, True):
        optimizer = sgd(0.5)
        schedule = CWGDCosineLR(optimizer, T, told(*MEASURED), alpha=alpha, eta_min=floor, normalized=normalized)
        found = walk(optimizer, schedule, len(MEASURED))
        for t, (rate, measured) in enumerate(zip(found, MEASURED, strict=True)):
            expected = cosine(t, T, 0.5, floor) / (1 + alpha * measured / MEASURED[0])
            assert rate == pytest.approx(expected * (1 + alpha if normalized else 1), rel=1e-13)


def test_its_cosine_is_pytorchs():
    for floor in (0.0, 0.03):
        ours, theirs = sgd(0.5, 0.02), sgd(0.5, 0.02)
        mine = CWGDCosineLR(ours, T, told(), eta_min=floor)
        other = torch_lr.CosineAnnealingLR(theirs, T, eta_min=floor)
        for _ in range(T + 1):
            assert rates_of(ours) == pytest.approx(rates_of(theirs), rel=1e-11, abs=1e-16)
            for optimizer, schedule in ((ours, mine), (theirs, other)):
                optimizer.step()
                schedule.step()


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_with_constant_cwgd_it_is_cosine_from_a_lower_rate_and_normalized_plain_cosine(alpha):
    """The control: nothing that is adaptive is left."""
    for normalized, peak in ((False, 0.5 / (1 + alpha)), (True, 0.5)):
        optimizer = sgd(0.5)
        schedule = CWGDCosineLR(optimizer, T, constant(7.3), alpha=alpha, normalized=normalized)
        found = walk(optimizer, schedule, T + 1)
        assert found == pytest.approx([cosine(t, T, peak) for t in range(T + 1)], rel=1e-13, abs=1e-16)


def error_at_the_end(rates, curvature=1.0, noise=1.0):
    """``v <- (1 - eta lambda)^2 v + eta^2 sigma^2``, exactly."""
    v = 1.0
    for eta in rates:
        v = (1 - eta * curvature) ** 2 * v + eta**2 * noise
    return v


def test_the_published_gain_is_that_of_half_the_peak_rate():
    """1 - 2^(-1/3) = 20.6 % less final error with CWGD that never moves, and nothing against the control."""
    steps, peak = 8_000, 0.5

    def run(schedule_of):
        optimizer = sgd(peak)
        return error_at_the_end(walk(optimizer, schedule_of(optimizer), steps))

    published = run(lambda o: CWGDCosineLR(o, steps, constant(2.0)))
    plain = error_at_the_end([cosine(t, steps, peak) for t in range(steps)])
    control = error_at_the_end([cosine(t, steps, peak / 2) for t in range(steps)])
    normalized = run(lambda o: CWGDCosineLR(o, steps, constant(2.0), normalized=True))
    assert 1 - published / plain == pytest.approx(1 - 2 ** (-1 / 3), abs=0.005)
    assert published == pytest.approx(control, rel=1e-9)
    assert normalized == pytest.approx(plain, rel=1e-9)


def test_before_the_first_measurement_it_is_plain_cosine_and_then_falls():
    for normalized, drop in ((False, 2.0), (True, 1.0)):
        optimizer = sgd(0.5)
        found = walk(optimizer, CWGDCosineLR(optimizer, T, told(None, None, 5.0), normalized=normalized), 4)
        plain = [cosine(t, T) for t in range(4)]
        assert found == pytest.approx(plain[:2] + [rate / drop for rate in plain[2:]], rel=1e-13)


def test_groups_have_cosines_of_their_own_and_one_divisor():
    optimizer = sgd(0.5, 0.1, 0.0)
    schedule = CWGDCosineLR(optimizer, T, told(2.0, 5.0), eta_min=0.02)
    walk(optimizer, schedule, 6)
    expected = [cosine(6, T, peak, 0.02) / 3.5 for peak in (0.5, 0.1)]
    assert rates_of(optimizer) == [*(pytest.approx(rate, rel=1e-13) for rate in expected), 0.0]
    assert schedule.history[-1].chosen["divisor"] == 3.5


# What cannot be used


@pytest.mark.parametrize("first", [0.0, -1.0, math.nan, math.inf, RuntimeError("no")])
def test_a_first_measurement_that_is_not_positive_leaves_plain_cosine_until_one_is(first, caplog):
    caplog.set_level(logging.WARNING)
    optimizer = sgd(0.5)
    schedule = CWGDCosineLR(optimizer, T, told(first, first, 4.0, 8.0))
    found = walk(optimizer, schedule, 4)
    divisors = [1, 1, 2, 3]
    assert found == pytest.approx([cosine(t, T) / d for t, d in enumerate(divisors)], rel=1e-13)
    assert (schedule.first, schedule.cwgd) == (4.0, 8.0)
    assert len(caplog.records) == 1
    assert "CWGDCosineLR" in caplog.records[0].getMessage()


def test_a_later_measurement_that_is_negative_is_held_and_zero_is_no_noise(caplog):
    optimizer = sgd(0.5)
    schedule = CWGDCosineLR(optimizer, T, told(4.0, 8.0, -1.0, 0.0))
    found = walk(optimizer, schedule, 4)
    assert found == pytest.approx([cosine(t, T) / d for t, d in enumerate([2, 3, 3, 1])], rel=1e-13)
    assert [bool(choice.note) for choice in schedule.history] == [False, False, True, False]


def test_a_ratio_beyond_all_bounds_gives_a_rate_of_zero_and_no_error():
    optimizer = sgd(0.5)
    found = walk(optimizer, CWGDCosineLR(optimizer, T, told(1e-300, 1e300, 1e-300)), 3)
    assert found[1] == 0.0
    assert found[2] == pytest.approx(cosine(2, T) / 2, rel=1e-13)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"alpha": -1}, "alpha"),
        ({"alpha": math.inf}, "alpha"),
        ({"eta_min": -0.1}, "eta_min"),
        ({"form": "both"}, '"full" or "diagonal"'),
        ({"refresh": 0}, "refresh"),
        ({"T_max": 0}, "T_max"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(options, words):
    with pytest.raises(ArgumentError, match=words):
        CWGDCosineLR(sgd(), **{"T_max": T, "source": told(), **options})


# What it reads


def test_a_result_an_estimate_and_a_tensor_are_numbers():
    for answer in (Estimate(4.0, 0.1, 3), torch.tensor(4.0), {"cwgd": 4.0}, 4):
        schedule = CWGDCosineLR(sgd(), T, told(answer))
        assert schedule.first == 4.0
    model = nn.Linear(3, 2).double()
    batch = torch.randn(12, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 2
    found = cwgd(Objective(model, F.cross_entropy, batch), starts=3)
    assert CWGDCosineLR(sgd(), T, told(found)).first == found.value.value


@pytest.mark.parametrize("form", ["full", "diagonal"])
def test_it_follows_either_form_of_a_monitors_cwgd(form):
    name = {"full": "cwgd", "diagonal": "cwgd_diagonal"}[form]
    training = Training(measure=[name], every=4)
    training.monitor.measure()
    schedule = CWGDCosineLR(training.optimizer, T, training.monitor, form=form)
    for t in range(9):
        values = [m[f"noise/{name}"] for m in training.monitor.history]
        assert schedule.first == values[0]
        assert rates_of(training.optimizer)[0] == pytest.approx(
            cosine(t, T, 0.2) / (1 + values[-1] / values[0]), rel=1e-12
        )
        training.step()
        schedule.step()
    assert len(values) == len(set(values)) == 3
    assert schedule.age == 1
    recorded = dict(training.monitor.recorded)[8]
    assert set(recorded) == {f"schedule/cwgd_cosine/{key}" for key in ("cwgd", "divisor", "lr/0")}
    other = {"full": "diagonal", "diagonal": "full"}[form]
    with pytest.raises(ArgumentError, match="needs a monitor that measures cwgd"):
        CWGDCosineLR(training.optimizer, T, training.monitor, form=other)


def test_a_warm_up_and_a_cap_of_others_go_with_it():
    optimizer = sgd(0.5)
    schedule = torch_lr.SequentialLR(
        optimizer,
        [torch_lr.LinearLR(optimizer, 0.1, total_iters=4), CWGDCosineLR(optimizer, T, told(4.0, 4.0, 12.0))],
        [4],
    )
    found = walk(optimizer, schedule, 7)
    assert found[:4] == pytest.approx([0.5 * (0.1 + 0.9 * t / 4) for t in range(4)], rel=1e-12)
    assert found[4:] == pytest.approx([cosine(0, T) / 2, cosine(1, T) / 4, cosine(2, T) / 4], rel=1e-12)
