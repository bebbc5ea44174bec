"""What a measured learning-rate schedule does with measurements that come, fail, age and end."""

from __future__ import annotations

import logging
import math

import pytest
from lr_schedules import Scaled, Told, Training, rates_of, sgd, told, walk
from torch.optim import lr_scheduler as torch_lr

from curvdiag import OverheadBudget
from curvdiag.errors import ArgumentError
from curvdiag.schedules.source import Choice

pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.filterwarnings("ignore:measuring every")]


def test_a_measurement_is_held_while_there_is_none_and_says_how_old_it_is(caplog):
    caplog.set_level(logging.WARNING)
    optimizer = sgd(1.0)
    answers = told(None, 0.5, None, None, math.nan, ValueError("broken"), -3.0, 0.25)
    schedule = Told(optimizer, answers)
    rates, ages = [], []
    for _ in range(8):
        rates.append(rates_of(optimizer)[0])
        ages.append(schedule.age)
        optimizer.step()
        schedule.step()
    assert rates == [1.0, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.25]
    assert ages == [None, 0, 1, 2, 3, 4, 5, 0]
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 3
    for message, words in zip(messages, ("nan", "ValueError: broken", "x is negative"), strict=True):
        assert words in message
        assert "steps ago" in message
    notes = [(choice.step, choice.seen, choice.chosen, bool(choice.note)) for choice in schedule.history]
    assert notes == [
        (1, {"x": 0.5}, {"lr/0": 0.5}, False),
        (4, {}, {"lr/0": 0.5}, True),
        (5, {}, {"lr/0": 0.5}, True),
        (6, {"x": -3.0}, {"lr/0": 0.5}, True),
        (7, {"x": 0.25}, {"lr/0": 0.25}, False),
    ]


def test_the_same_complaint_is_logged_once_until_a_measurement_succeeds(caplog):
    caplog.set_level(logging.WARNING)
    optimizer = sgd(1.0)
    walk(optimizer, Told(optimizer, told(-1.0, -2.0, -3.0, 0.5, -1.0, -1.0)), 8)
    assert [record.getMessage().count("x is negative") for record in caplog.records] == [1, 1]


def test_a_function_is_called_every_refresh_steps_and_at_a_milestone():
    make = {
        "factor": lambda o, source: Told(o, source, refresh=3),
        "wrapper": lambda o, source: Scaled(torch_lr.LinearLR(o), source=source, refresh=3),
    }
    for build in make.values():
        for milestone, expected in ((None, [0, 3, 6, 9]), (4, [0, 4, 7])):
            optimizer, at, now = sgd(1.0), [], [0]
            own = build(optimizer, lambda at=at, now=now: at.append(now[0]) or 0.5)
            schedule = own
            if milestone:
                schedule = torch_lr.SequentialLR(optimizer, [torch_lr.LinearLR(optimizer), own], [milestone])
            for step in range(1, 10):
                now[0] = step
                optimizer.step()
                schedule.step()
            assert at == expected
            assert own.age == 9 - expected[-1]


def test_the_source_must_be_a_monitor_that_measures_it_or_a_function():
    with pytest.raises(ArgumentError, match="Told follows a CurvatureMonitor or a function"):
        Told(sgd(), 3.0)
    with pytest.raises(ArgumentError, match=r"Told needs a monitor that measures lambda_max.*measure="):
        Told(sgd(), Training(measure=["trace"]).monitor)
    with pytest.raises(ArgumentError, match="refresh"):
        Told(sgd(), told(), refresh=0)


def test_a_monitor_is_read_after_each_measurement_and_gets_what_was_chosen():
    training = Training(measure=["lambda_max"])
    schedule = Told(training.optimizer, training.monitor)
    ages = []
    for _ in range(12):
        training.step()
        schedule.step()
        ages.append(schedule.age)
    assert ages == [None] * 4 + [0, 1, 2, 3, 4, 0, 1, 2]
    measured = {m.step: m["curv/hessian/lambda_max"] for m in training.monitor.history}
    assert [(one.step, one.seen["x"]) for one in schedule.history] == list(measured.items())
    assert dict(training.monitor.recorded) == {
        step: {"schedule/told/x": x, "schedule/told/lr/0": pytest.approx(0.2 * x)} for step, x in measured.items()
    }


def test_a_monitor_that_is_closed_or_fails_stops_no_training(caplog, monkeypatch):
    caplog.set_level(logging.WARNING)
    training = Training(measure=["lambda_max"], strict=False)
    schedule = Told(training.optimizer, training.monitor)
    for _ in range(6):
        training.step()
        schedule.step()
    held = rates_of(training.optimizer)
    training.monitor.close()
    for _ in range(6):
        training.step()
        schedule.step()
    assert rates_of(training.optimizer) == held
    assert schedule.age == 7
    assert sum("closed" in record.getMessage() for record in caplog.records) == 1

    training = Training(measure=["lambda_max"], strict=False)
    schedule = Told(training.optimizer, training.monitor)

    def broken(scalars):
        raise OSError("no space left")

    monkeypatch.setattr(training.monitor, "record", broken)
    for _ in range(6):
        training.step()
        schedule.step()
    assert schedule.age == 1
    assert any("no space left" in record.getMessage() for record in caplog.records)


def test_a_cadence_that_reads_the_clock_is_said_once(caplog):
    caplog.set_level(logging.WARNING)
    training = Training(measure=["lambda_max"], every=None, cadence=OverheadBudget(0.1))
    Told(training.optimizer, training.monitor)
    (message,) = [record.getMessage() for record in caplog.records]
    assert "clock" in message
    assert "every=" in message


def test_groups_are_called_by_their_names_in_the_history():
    optimizer = sgd(0.5, 0.25)
    optimizer.param_groups[1]["name"] = "head"
    schedule = Told(optimizer, told(0.5))
    assert schedule.history == [Choice(0, {"x": 0.5}, {"lr/0": 0.25, "lr/head": 0.125})]
