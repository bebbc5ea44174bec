"""AnisotropyLR multiplies any schedule by a power of the measured anisotropy."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from lr_schedules import Training, rates_of, sgd, told, walk
from torch.optim import lr_scheduler as torch_lr

from curvdiag import Estimate, anisotropy
from curvdiag.errors import ArgumentError
from curvdiag.schedules.anisotropy_lr import AnisotropyLR
from curvdiag.spectrum import MEASURES

pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.filterwarnings("ignore:measuring every")]


def constant_lr(optimizer):
    return torch_lr.ConstantLR(optimizer, factor=1.0)


def factors(measured, **options):
    """Of each step, for the condition number, unsmoothed and nearly unclipped unless told otherwise."""
    optimizer = sgd(1.0)
    options = {"measure": "condition_number", "smoothing": 0.0, "low": 1e-6, "high": 1e6, **options}
    return walk(optimizer, AnisotropyLR(constant_lr(optimizer), told(*measured), **options), len(measured))


@pytest.mark.parametrize("k", [0.5, 1.0, 2.0, 0.0, -1.0])
def test_the_factor_is_the_power_of_the_ratio_worked_out_by_hand(k):
    measured = [4.0, 16.0, 1.0, 4.0, 100.0]
    assert factors(measured, k=k) == pytest.approx([(4 / a) ** k for a in measured], rel=1e-12)
    assert factors(measured, k=k, a_ref=25.0) == pytest.approx([(25 / a) ** k for a in measured], rel=1e-12)


@pytest.mark.parametrize("name", MEASURES)
def test_the_rate_falls_where_anisotropy_rises_whichever_way_the_measure_goes(name):
    """By the measures themselves of three spectra, each more anisotropic than the one before."""
    spectra = [[4.0, 4.0, 4.0, 4.0, 4.0, -0.1], [9.0, 5.0, 4.0, 2.0, 2.0, -2.0], [80.0, 3.0, 1.0, 0.5, 0.1, -20.0]]
    if name == "condition_number":
        spectra = [[abs(x) for x in one] for one in spectra]
        spectra[0][-1], spectra[1][-1], spectra[2][-1] = 3.9, 1.0, 0.01
    if name == "bulk_ratio":  # one outlier over a bulk that narrows
        spectra = [[10.0, *[edge * i / 400 for i in range(400)]] for edge in (9.0, 5.0, 2.0)]
    measured = [getattr(anisotropy(spectrum), name).value for spectrum in spectra]
    first, second, third = factors(measured, measure=name)
    assert first == 1 > second > third
    assert third == pytest.approx(math.sqrt(min(measured[0], measured[2]) / max(measured[0], measured[2])), rel=1e-9)


def test_a_measure_and_its_inverse_give_the_same_smoothed_too():
    measured = [7.0, 3.0, 50.0, 1.0, 6.0]
    rising = factors(measured, smoothing=0.7)
    falling = factors([1 / a for a in measured], measure="effective_rank", smoothing=0.7)
    assert rising == pytest.approx(falling, rel=1e-12)


def test_its_logarithm_is_smoothed():
    log, expected = math.log(8.0), []
    for a in (8.0, 2.0, 32.0):
        log = 0.75 * log + 0.25 * math.log(a)
        expected.append((8.0 / math.exp(log)) ** 0.5)
    assert factors([8.0, 2.0, 32.0], smoothing=0.75) == pytest.approx(expected, rel=1e-12)


def test_the_factor_is_clipped():
    assert factors([1.0, 1e8, 1e-8, 1e300, 1e-300], k=50, low=0.2, high=3.0) == pytest.approx([1, 0.2, 3, 0.2, 3])


def test_before_the_first_measurement_and_with_what_cannot_be_used_nothing_moves(caplog):
    caplog.set_level(logging.WARNING)
    measured = [None, math.nan, 0.0, -2.0, 4.0, RuntimeError("no"), 0.0, 16.0, None]
    assert factors(measured) == pytest.approx([1, 1, 1, 1, 1, 1, 1, 0.5, 0.5])
    messages = [record.getMessage() for record in caplog.records]
    assert ["not finite" in messages[0], "no ratio" in messages[1]] == [True, True]
    assert "RuntimeError: no" in messages[2]
    assert len(messages) == 4


def test_any_schedule_keeps_its_shape_and_groups_their_own_rates():
    optimizer, bare = sgd(0.5, 0.1), sgd(0.5, 0.1)
    wrapped = AnisotropyLR(
        torch_lr.CosineAnnealingLR(optimizer, 10), told(4.0, 16.0), measure="condition_number", smoothing=0.0
    )
    plain = torch_lr.CosineAnnealingLR(bare, 10)
    for step in range(11):
        share = 1.0 if step == 0 else 0.5
        assert rates_of(optimizer) == [share * rate for rate in rates_of(bare)]
        for one, schedule in ((optimizer, wrapped), (bare, plain)):
            one.step()
            schedule.step()
    assert (wrapped.factor, wrapped.reference, wrapped.age) == (0.5, 4.0, 10)


@pytest.mark.parametrize("name", ["effective_rank", "stable_rank", "negative_mass"])
def test_from_a_monitor_it_follows_the_measure_that_is_named(name):
    training = Training(lambda p: torch.optim.SGD(p, 0.5), measure=["anisotropy"], every=3)
    schedule = AnisotropyLR(constant_lr(training.optimizer), training.monitor, measure=name, smoothing=0.0)
    for _ in range(9):
        training.step()
        schedule.step()
    first, *_, last = (m[f"curv/anisotropy/{name}"] for m in training.monitor.history)
    ratio = first / last if MEASURES[name].rises else last / first
    assert rates_of(training.optimizer) == [pytest.approx(0.5 * ratio**0.5, rel=1e-12)]
    assert ratio != 1
    recorded = dict(training.monitor.recorded)[9]
    assert set(recorded) == {f"schedule/anisotropy/{key}" for key in (name, "factor", "lr/0")}


def test_a_function_may_give_an_anisotropy_its_measures_an_estimate_or_a_measurement():
    found = anisotropy([4.0, 2.0, 1.0])
    expected = found.effective_rank.value
    monitor = Training(measure=["anisotropy"]).monitor
    measurement = monitor.measure()
    for answer in (found, found.measures, Estimate(expected, 0.0, 3), torch.tensor(expected, dtype=torch.float64)):
        assert AnisotropyLR(constant_lr(sgd()), told(answer)).reference == expected
    reference = AnisotropyLR(constant_lr(sgd()), told(measurement)).reference
    assert reference == measurement["curv/anisotropy/effective_rank"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"measure": "roundness"}, "measure is one of"),
        ({"k": math.inf}, "exponent k"),
        ({"low": 0.0}, "0 < low <= high"),
        ({"low": 2.0, "high": 1.0}, "0 < low <= high"),
        ({"high": math.inf}, "0 < low <= high"),
        ({"a_ref": 0.0}, "a_ref"),
        ({"smoothing": -0.1}, "smoothing"),
        ({"scheduler": None}, "wraps a learning-rate scheduler"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(options, words):
    with pytest.raises(ArgumentError, match=words):
        AnisotropyLR(**{"scheduler": constant_lr(sgd()), "source": told(), **options})


def test_its_docstring_says_that_no_rule_is_published():
    assert "No published rule exists" in AnisotropyLR.__doc__
