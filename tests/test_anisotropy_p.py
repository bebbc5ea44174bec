"""AnisotropyP: its formula, the ends of its range, what it holds, and the two toys."""

from __future__ import annotations

import logging
import math

import pytest
import torch

from curvdiag import Estimate
from curvdiag.errors import ArgumentError
from curvdiag.experiments.toys import STRONG, WEAK
from curvdiag.operators import Hessian
from curvdiag.optim import LPSGDM
from curvdiag.schedules import AnisotropyP, Choice, CosineP
from curvdiag.schedules.anisotropy_scale import AnisotropyScale, geometric_mean
from curvdiag.spectrum import MEASURES, anisotropy


def optimizer(*groups, **options):
    listed = [{"params": [torch.zeros(10, requires_grad=True)], **group} for group in groups or [{}]]
    return LPSGDM(listed, lr=0.1, **{"p": 6.0, **options})


def answers(*listed):
    left = list(listed)

    def give():
        answer = left.pop(0) if left else None
        if isinstance(answer, Exception):
            raise answer
        return answer

    return give


def ps(schedule):
    return [float(group["p"]) for group in schedule.optimizer.param_groups]


def follow(values, *, groups=(), p_max=None, **options):
    """``p`` of the first group after each of the values; the first is read when the schedule is made."""
    schedule = AnisotropyP(optimizer(*groups), answers(*values), p_max, **{"smoothing": 0.0, **options})
    found = ps(schedule)[:1]
    for _ in values[1:]:
        schedule.step()
        found += ps(schedule)[:1]
    return found


def warned(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


# The formula


def test_the_formula_by_hand():
    # log 1, log 10, log 100, log 1000 over log 100, clipped
    options = {"measure": "condition_number", "a_high": 100.0}
    assert follow([1.0, 10.0, 100.0, 1000.0, 0.5], **options) == pytest.approx([2, 4, 6, 6, 2], rel=1e-15)
    options = {"measure": "condition_number", "a_low": 10.0, "a_high": 1000.0}
    assert follow([10**1.5, 100.0, 5.0], p_max=10, **options) == pytest.approx([4, 6, 2], rel=1e-14)


def test_for_a_measure_that_falls_the_formula_is_turned_round():
    # Of 100 directions 100 are isotropic; 10 are half way, in the logarithm, to 1.
    options = {"measure": "effective_rank", "a_low": 100.0, "a_high": 1.0}
    assert follow([100.0, 10.0, 1.0, 120.0], **options) == pytest.approx([2, 4, 6, 2])


@pytest.mark.parametrize("measure", [name for name in MEASURES if name != "negative_mass"])
def test_a_low_defaults_to_the_isotropic_value_and_a_high_to_the_first_measurement(measure):
    low = MEASURES[measure].isotropic(10)  # the optimizer has ten parameters
    high = low * (9 if MEASURES[measure].rises else 1 / 9)
    middle = low * (3 if MEASURES[measure].rises else 1 / 3)
    beyond = low * (20 if MEASURES[measure].rises else 1 / 20)
    assert follow([high, middle, low, beyond], measure=measure) == pytest.approx([6, 4, 2, 6])


def test_the_size_of_an_anisotropy_decides_its_isotropic_value():
    flat, steep = anisotropy([1.0] * 50), anisotropy([1.0] * 5 + [1e-9] * 45)
    # Five of fifty directions: the square root of that many is half way.
    middle = Estimate.exact(math.sqrt(50 * steep.effective_rank.value))
    schedule = AnisotropyP(optimizer(), answers(steep, flat, middle), smoothing=0)
    assert ps(schedule) == [6.0]
    schedule.step()
    assert ps(schedule) == pytest.approx([2.0])
    schedule.step()
    assert ps(schedule) == pytest.approx([4.0])


def test_the_size_is_known_after_a_restart_too():
    steep = anisotropy([1.0] * 5 + [1e-9] * 45)
    schedule = AnisotropyP(optimizer(), answers(steep), smoothing=0)
    again = AnisotropyP(optimizer(), answers(None, math.sqrt(50 * steep.effective_rank.value)), smoothing=0)
    again.load_state_dict(schedule.state_dict())
    again.step()
    assert ps(again) == pytest.approx([4.0])


@pytest.mark.parametrize("measure", MEASURES)
def test_more_anisotropic_curvature_never_has_a_smaller_p(measure):
    spectra = [torch.tensor([1.0] * 59 + [top]) for top in (1, 2, 5, 20, 50)]
    if measure == "negative_mass":
        spectra = [torch.linspace(-size, 1, 60) for size in (0.0, 0.1, 0.2, 0.5, 1.0)]
    measured = [anisotropy(spectrum) for spectrum in spectra]
    high = measured[-1].measures[measure].value
    found = follow(measured, measure=measure, a_high=high, a_low=0.01 if measure == "negative_mass" else None)
    assert found == sorted(found)
    assert found[0] == pytest.approx(2.0, abs=1e-9)
    assert found[-1] == 6.0


def test_the_default_measure_has_a_positive_value_for_every_matrix_but_zero():
    spectra = {
        "definite": [4, 3, 2, 1, 0.5, 0.2],
        "singular": [4, 3, 0, 0, 0, 0],
        "indefinite": [4, 3, -1, -2, 1, 0.1],
        "negative": [-4, -3, -2, -1, -1, -1],
        "balanced": [3, 2, 1, -1, -2, -3],
        "small": [4, 1],
    }
    measured = {name: anisotropy([float(value) for value in values]).measures for name, values in spectra.items()}
    always = {m for m in MEASURES if all(one[m].value > 1e-12 for one in measured.values())}
    assert always == {"stable_rank", "effective_rank"}
    assert AnisotropyP(optimizer(), answers()).measure in always


def test_smoothing_takes_the_first_as_it_is_and_bounds_a_wild_one():
    options = {"measure": "condition_number", "a_high": 100.0, "smoothing": 0.75}
    assert follow([10.0, 100.0, 1e30, 1.0], **options) == pytest.approx([4, 4.5, 4.875, 0.75 * 4.875 + 0.25 * 2])


@pytest.mark.parametrize(
    ("monotone", "expected"), [(False, [3, 5, 4, 2, 6]), ("down", [3, 3, 3, 2, 2]), ("up", [3, 5, 5, 5, 6])]
)
def test_monotone_from_the_first_measurement_on(monotone, expected):
    values = [10 ** (2 * (p - 2) / 4) for p in (3, 5, 4, 2, 6)]
    options = {"measure": "condition_number", "a_high": 100.0, "monotone": monotone}
    assert follow(values, **options) == pytest.approx(expected)


def test_negative_mass_needs_an_a_low_and_none_at_all_is_isotropic():
    with pytest.raises(
        ArgumentError, match=r"isotropic value of negative_mass is 0, which has no logarithm; give a_low="
    ):
        AnisotropyP(optimizer(), answers(), measure="negative_mass")
    options = {"measure": "negative_mass", "a_low": 0.01, "a_high": 0.25}
    assert follow([0.0, 0.05, 0.25, 0.5], **options) == pytest.approx([2, 4, 6, 6])


def test_a_zero_of_a_measure_that_falls_is_beyond_every_anisotropy():
    options = {"measure": "participation_ratio", "a_high": 1.0}
    assert follow([10.0, 0.0], **options) == pytest.approx([2, 6])


# The ends


def test_isotropic_measurements_give_2_and_the_first_that_is_not_becomes_a_high(caplog):
    schedule = AnisotropyP(optimizer(), answers(1.0, 1.0, 9.0, 3.0), measure="condition_number", smoothing=0)
    assert (ps(schedule), schedule.a_high) == ([2.0], None)
    schedule.step()
    assert (ps(schedule), schedule.a_high) == ([2.0], None)
    schedule.step()
    assert (ps(schedule), schedule.a_high) == ([6.0], 9.0)
    schedule.step()
    assert ps(schedule) == pytest.approx([4.0])
    assert warned(caplog) == ["AnisotropyP: the first condition_number, 1, is no a_high; give a_high="]


def test_a_first_measurement_of_zero_is_no_a_high():
    found = follow([0.0, 1.0, 10.0], measure="participation_ratio")
    assert found == pytest.approx([6.0, 6.0, 2.0])


def test_an_a_high_that_is_no_more_anisotropic_than_a_low_is_refused_or_held(caplog):
    for options in (
        {"measure": "condition_number", "a_high": 1.0},
        {"measure": "condition_number", "a_high": 5.0, "a_low": 6.0},
        {"measure": "effective_rank", "a_high": 6.0, "a_low": 5.0},
    ):
        with pytest.raises(ArgumentError, match="is no more anisotropic than a_low="):
            AnisotropyP(optimizer(), answers(), **options)
    found = follow([anisotropy([1.0] * 5), 3.0], measure="effective_rank", a_high=8.0)
    assert found == [6.0, 6.0]
    assert warned(caplog) == ["AnisotropyP: a_high = 8 is no more anisotropic than a_low = 5; p is held"]


# What it holds, says and remembers


def test_before_the_first_measurement_p_is_p_max():
    schedule = AnisotropyP(optimizer(p=3.0), answers(None, None, 100.0), 8.0, measure="condition_number", a_high=1e4)
    assert (ps(schedule), schedule.age, list(schedule.history)) == ([8.0], None, [])
    schedule.step()
    assert ps(schedule) == [8.0]
    schedule.step()
    assert ps(schedule) == pytest.approx([5.0])


def test_a_nan_or_an_error_is_held_logged_and_in_the_history(caplog):
    values = [9.0, math.nan, ValueError("no"), ValueError("no"), -3.0, 3.0]
    schedule = AnisotropyP(optimizer(), answers(*values), measure="condition_number", smoothing=0)
    ages = []
    for _ in values[1:-1]:
        schedule.step()
        assert ps(schedule) == [6.0]
        ages.append(schedule.age)
    assert ages == [1, 2, 3, 4]
    schedule.step()
    assert (ps(schedule), schedule.age) == (pytest.approx([4.0]), 0)
    assert [(one.step, bool(one.note)) for one in schedule.history] == [(0, 0), (1, 1), (2, 1), (4, 1), (5, 0)]
    assert len(warned(caplog)) == 3
    assert "condition_number is never negative" in warned(caplog)[2]


def test_what_it_saw_and_chose_is_logged_and_listed(caplog):
    groups = [{"name": "body"}, {"p": 4.0}]
    with caplog.at_level(logging.INFO):
        schedule = AnisotropyP(optimizer(*groups), answers(9.0, 3.0), measure="condition_number", smoothing=0)
        schedule.step()
    first, second = schedule.history
    assert first == Choice(0, {"a": 9.0}, {"p/body": 6.0, "p/1": 4.0})
    assert second.chosen == pytest.approx({"p/body": 4.0, "p/1": 3.0})
    assert "a_high = 9" in caplog.text
    assert "AnisotropyP, step 1, by condition_number: a = 3, p/body = 4, p/1 = 3" in caplog.text


def test_it_chains_with_the_published_schedule():
    opt = optimizer()
    cosine, measured = (
        CosineP(opt, 3),
        AnisotropyP(opt, answers(9.0, 3.0, 9.0), measure="condition_number", smoothing=0),
    )
    for expected in (2 + 4 * 0.5 * 0.5, 2.0):
        cosine.step()
        measured.step()
        assert ps(measured) == pytest.approx([expected])
    assert measured.history[-1].chosen == {"p/0": 2.0}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"measure": "sharpness"}, "no measure 'sharpness' of anisotropy; there are top_ratio, condition_number"),
        ({"a_low": 0.0}, "a_low is a positive number"),
        ({"a_high": -1.0}, "a_high is a positive number"),
        ({"a_high": math.nan}, "a_high is a positive number"),
        ({"smoothing": 1.0}, "at least 0 and below 1"),
        ({"monotone": True}, "monotone is False, 'down'"),
        ({"refresh": 0}, "refresh is a number of steps"),
        ({"p_max": 5.0}, "p_max=5 is below p=6"),
        ({"p_max": 1.0}, "p_max is at least 2"),
    ],
)
def test_what_means_nothing_is_refused(options, message):
    with pytest.raises(ArgumentError, match=message):
        AnisotropyP(optimizer(), answers(), **options)
    with pytest.raises(ArgumentError, match="group 0 of SGD has none; use LPSGD or LPSGDM"):
        AnisotropyP(torch.optim.SGD([torch.zeros(1)], lr=0.1), answers())
    with pytest.raises(ArgumentError, match="AnisotropyP follows a CurvatureMonitor or a function"):
        AnisotropyP(optimizer(), 3.0)


# Per group, by a function


def test_each_group_by_its_own_number(caplog):
    opt = optimizer({"name": "body"}, {"p": 4.0}, {})
    given = [{"body": 9.0, 1: 16.0}, {"body": 3.0, "1": None, "2": 5.0}, {"body": math.nan, 1: 4.0}]
    given += [{"body": None}, {"head": 1.0}]
    schedule = AnisotropyP(opt, answers(*given), measure="condition_number", per_layer=True, smoothing=0)
    assert ps(schedule) == [6.0, 4.0, 6.0]
    assert schedule.a_high == [9.0, 16.0, None]
    schedule.step()
    assert ps(schedule) == pytest.approx([4.0, 4.0, 6.0])
    assert schedule.history[-1].seen == {"a/body": 3.0, "a/2": 5.0}
    schedule.step()
    assert ps(schedule) == pytest.approx([4.0, 3.0, 6.0])
    for age in (1, 2):
        schedule.step()
        assert ps(schedule) == pytest.approx([4.0, 3.0, 6.0])
        assert schedule.age == age
    assert "no parameter group 'head'; there are body, 1, 2, 0" in warned(caplog)[-1]


def test_the_geometric_mean_is_weighted_and_zero_where_a_layer_is():
    assert geometric_mean({"a": 2.0, "b": 16.0, "other": 0.0}, {"a": 2.0, "b": 1.0}) == pytest.approx(4.0)
    assert geometric_mean({"a": 0.0, "b": 16.0}, {"a": 2.0, "b": 1.0}) == 0.0


# The toys


@pytest.mark.parametrize("angle", [0.0, 0.7])
@pytest.mark.parametrize("p_max", [6.0, 8.0])
def test_on_the_toys_one_a_high_gives_p_max_on_the_strong_and_hardly_more_than_2_on_the_weak_one(p_max, angle):
    """Measured through products with the Hessian of an objective; ``a_high`` is the same for both."""
    found = {}
    for toy in (STRONG.turned(angle), WEAK.turned(angle)):
        point = toy.module(toy.starts(1)[0])
        objective = toy.objective(point)
        schedule = AnisotropyP(
            LPSGDM(point.parameters(), lr=1e-3, p=p_max),
            lambda objective=objective: anisotropy(Hessian(objective)),
            measure="condition_number",
            a_high=3900.0,
        )
        found[toy.name] = ps(schedule)
        for _ in range(5):
            point.theta.grad = objective.gradient()
            schedule.optimizer.step()
            schedule.step()
            found[toy.name] += ps(schedule)
    assert found["strong anisotropy"] == [p_max] * 6
    exact = 2 + (p_max - 2) * math.log(1.5) / math.log(3900)
    assert found["weak anisotropy"] == pytest.approx([exact] * 6, rel=1e-6)
    assert max(found["weak anisotropy"]) <= 2.3


def test_the_scale_is_the_same_for_a_measure_and_its_inverse():
    up, down = AnisotropyScale("top_ratio"), AnisotropyScale("stable_rank")
    for a in (1.0, 2.0, 7.0, 60.0):
        assert up.fraction(a, 1.0, 50.0) == pytest.approx(down.fraction(1 / a, 1.0, 1 / 50.0))
