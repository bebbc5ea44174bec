"""What a schedule reads from a monitor or a callable; and what goes wrong there never reaches the training."""

from __future__ import annotations

import io
import logging
import math

import pytest
import torch
from nets import make
from torch.nn import functional as F

from curvdiag import CurvatureMonitor, Estimate, Objective, OverheadBudget
from curvdiag.errors import ArgumentError
from curvdiag.schedules.source import Source

pytestmark = pytest.mark.filterwarnings("ignore:measuring every")
KEY = {"top": "curv/hessian/lambda_max"}


def answers(*listed):
    """A function that gives these one after the other, and raises those that are exceptions."""
    left = list(listed)

    def give():
        answer = left.pop(0)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    return give


def source(what, keys=KEY, **options):
    return Source(what, keys, **{"needs": ["lambda_max"], "owner": "Test", **options})


def follower(model_and_batch=None, **options):
    model, batch = model_and_batch or make("mlp-tanh")
    return CurvatureMonitor(Objective(model, F.cross_entropy, batch), **{"every": 2, "preset": "light", **options})


def warned(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


# Callables


def test_a_callable_is_asked_every_so_many_steps():
    asked = []
    found = source(lambda: asked.append(len(asked)) or 7, refresh=3)
    assert [found.read(step) for step in range(8)] == [{"top": 7.0} if s % 3 == 0 else None for s in range(8)]
    assert len(asked) == 3
    assert found.read_at == 6
    assert found.read(0) == {"top": 7.0}, "a schedule that begins again asks again"


def test_numbers_tensors_estimates_mappings_and_attributes_are_understood():
    class Answer:
        top, low = Estimate(3.0, 0.1, 4), 1

    for answer in (3, 3.0, torch.tensor(3.0), torch.tensor([3.0], requires_grad=True), Estimate(3.0, 0.1, 4)):
        assert source(lambda a=answer: a).read(0) == {"top": 3.0}
        assert source(lambda a=answer: {"top": a, "other": 5}).read(0) == {"top": 3.0}
    assert source(Answer, {"top": "", "low": ""}).read(0) == {"top": 3.0, "low": 1.0}
    assert source(lambda: 5, pick=lambda answer: {"top": 2.0 * answer}).read(0) == {"top": 10.0}


def test_none_is_nothing_new_and_no_complaint(caplog):
    found = source(answers(None, 2.0, None))
    assert [found.read(step) for step in range(3)] == [None, {"top": 2.0}, None]
    assert not warned(caplog)
    assert found.read_at == 1


def test_what_fails_is_held_and_logged_once_until_something_succeeds(caplog):
    found = source(answers(1.0, ValueError("no"), ValueError("no, really"), math.nan, math.nan, 2.0, ValueError("no")))
    read = [found.read(step) for step in range(7)]
    assert read == [{"top": 1.0}, None, None, None, None, {"top": 2.0}, None]
    first, second, third = warned(caplog)
    assert first == "Test: the measurement failed: ValueError: no; the last measurement, of 1 steps ago, is held"
    assert "curv/hessian/lambda_max = nan" in second
    assert "of 3 steps ago" in second
    assert third == first


def test_noticed_is_what_the_last_reading_logged():
    found = source(answers(ValueError("no"), ValueError("no"), 1.0))
    found.read(0)
    assert "ValueError" in found.noticed
    found.read(1)
    assert not found.noticed
    assert "ValueError" in found.complaint
    found.read(2)
    assert not found.complaint


@pytest.mark.parametrize(
    "answer", [math.nan, math.inf, -math.inf, "five", {"bottom": 1}, [1, 2], torch.ones(2), object()]
)
def test_what_is_no_finite_number_is_held(answer, caplog):
    assert source(lambda: answer).read(0) is None
    assert "what there was before is held" in warned(caplog)[0]


def test_a_failing_callable_is_not_asked_again_before_the_next_refresh():
    asked = []

    def fail():
        asked.append(1)
        raise RuntimeError("out of memory")

    found = source(fail, refresh=5)
    for step in range(10):
        found.read(step)
    assert len(asked) == 2


def test_an_interruption_by_the_user_passes():
    with pytest.raises(KeyboardInterrupt):
        source(answers(KeyboardInterrupt())).read(0)


def test_partial_readings_give_what_is_there(caplog):
    keys = {"a": "curv/a", "b": "curv/b"}
    found = source(
        answers({"a": 1, "b": math.nan}, {"a": 2, "b": 3}, {"a": math.nan, "b": math.nan}), keys, partial=True
    )
    assert [found.read(step) for step in range(3)] == [{"a": 1.0}, {"a": 2.0, "b": 3.0}, None]
    first, second = warned(caplog)
    assert "curv/b = nan" in first
    assert "curv/a" not in first
    assert "curv/a = nan, curv/b = nan" in second


# Monitors


def test_each_measurement_of_a_monitor_is_read_once():
    monitor = follower()
    found = source(monitor)
    read = []
    for step in range(1, 7):
        monitor.step()
        read.append(found.read(step))
    tops = [m["curv/hessian/lambda_max"] for m in monitor.history]
    assert read == [None, {"top": tops[0]}, None, {"top": tops[1]}, None, {"top": tops[2]}]


def test_a_measurement_that_a_function_gives_again_is_nothing_new():
    monitor = follower(every=3)
    found = source(lambda: monitor.latest, pick=lambda measurement: {"top": measurement[KEY["top"]]})
    read = []
    for step in range(1, 8):
        monitor.step()
        read.append(found.read(step) is not None)
    assert read == [step in (3, 6) for step in range(1, 8)]
    assert found.read_at == 6
    again = source(lambda: monitor.latest, pick=lambda measurement: {"top": measurement[KEY["top"]]})
    again.load_state_dict(found.state_dict())
    assert again.read(8) is None


def test_a_number_that_the_monitor_did_not_get_is_held(caplog):
    monitor = follower()
    found = source(monitor, {"top": "curv/hessian/lambda_max", "other": "curv/anisotropy/condition_number"})
    monitor.measure()
    assert found.read(0) is None
    assert "curv/anisotropy/condition_number = nan (missing, or not finite)" in warned(caplog)[0]
    assert "lambda_max" not in warned(caplog)[0]


def test_a_monitor_that_does_not_measure_it_is_refused_with_the_remedy():
    with pytest.raises(
        ArgumentError, match="needs a monitor that measures anisotropy; this one measures lambda_max"
    ) as e:
        source(follower(), needs=["lambda_max", "anisotropy"])
    assert "measure=['lambda_max', 'trace', 'anisotropy']" in str(e.value)


def test_a_closed_monitor_is_said_once_after_its_last_measurement_was_read(caplog):
    monitor = follower()
    found = source(monitor)
    monitor.measure()
    monitor.close()
    assert found.read(1) is not None
    assert [found.read(step) for step in (2, 3, 4)] == [None] * 3
    assert [message for message in warned(caplog) if "monitor is closed" in message] == warned(caplog)
    assert len(warned(caplog)) == 1


def test_one_line_says_that_a_cadence_reads_the_clock(caplog):
    source(follower(every=3))
    assert not warned(caplog)
    source(follower(every=None, cadence=OverheadBudget(0.2)))
    (line,) = warned(caplog)
    assert "whose cadence reads the clock" in line
    assert "not bit-identical; give the monitor every=" in line


def test_one_line_says_that_ranks_must_measure_alike(caplog, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    source(follower())
    assert not warned(caplog)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)
    source(lambda: 1.0)
    assert not warned(caplog), "a function may broadcast"
    source(follower())
    (line,) = warned(caplog)
    assert "on each of 4 ranks by that rank's own measurement" in line
    assert "a function that broadcasts" in line


def test_numbers_of_a_schedule_stand_beside_the_measurements():
    monitor = follower()
    monitor.step()
    source(monitor).record({"schedule/p": 3.0})
    source(lambda: 1).record({"schedule/p": 3.0})
    assert monitor.recorded == [(1, {"schedule/p": 3.0})]


def test_what_a_monitor_refuses_to_record_stops_nothing_unless_it_is_strict(caplog, monkeypatch):
    monitor = follower()

    def refuse(scalars):
        raise OSError("disk")

    monkeypatch.setattr(monitor, "record", refuse)
    found = source(monitor)
    found.record({"p": 1.0})
    found.record({"p": 1.0})
    assert warned(caplog) == ["Test: its choice was not recorded: OSError: disk"]
    monitor.strict = True
    with pytest.raises(OSError, match="disk"):
        found.record({"p": 1.0})


# Checkpoints


def saved(*states):
    buffer = io.BytesIO()
    torch.save(states, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def test_a_measurement_that_nobody_has_read_is_in_the_checkpoint():
    monitor = follower()
    found = source(monitor)
    monitor.step()
    monitor.step()
    states = saved(monitor.state_dict(), found.state_dict())
    fresh = follower()
    again = source(fresh)
    fresh.load_state_dict(states[0])
    again.load_state_dict(states[1])
    expected = found.read(3)
    assert expected is not None
    assert again.read(3) == expected
    assert again.read(4) is None
    assert again.state_dict() == found.state_dict()


def test_what_was_read_is_not_read_again_and_a_newer_one_is():
    monitor = follower()
    found = source(monitor)
    for step in (1, 2):
        monitor.step()
        found.read(step)
    states = saved(monitor.state_dict(), found.state_dict())
    fresh = follower()
    again = source(fresh)
    fresh.load_state_dict(states[0])
    again.load_state_dict(states[1])
    assert again.read(3) is None
    fresh.step()
    fresh.step()
    assert again.read(4) == {"top": fresh.latest["curv/hessian/lambda_max"]}


def test_back_at_an_earlier_checkpoint_later_measurements_are_not_seen():
    monitor = follower()
    found = source(monitor)
    states = monitor.state_dict(), found.state_dict()
    for step in range(1, 5):
        monitor.step()
        found.read(step)
    monitor.load_state_dict(states[0])
    found.load_state_dict(states[1])
    assert found.read(1) is None
    monitor.step()
    assert found.read(1) is None
    monitor.step()
    assert found.read(2) is not None


def test_a_monitor_that_was_not_loaded_is_said_once(caplog):
    whole = source(follower(every=1))
    for _ in range(3):
        whole.source.step()
        whole.read(whole.source.steps_done)
    resumed = source(follower(every=1))
    resumed.load_state_dict(whole.state_dict())
    found = []
    for step in range(4, 9):
        resumed.source.step()
        found.append(resumed.read(step) is not None)
    assert found == [False, False, False, True, True]
    (line,) = warned(caplog)
    assert "the monitor counts step 1, and its measurement of step 3 was read: load the state of the monitor" in line


def test_a_callable_keeps_its_rhythm_and_a_complaint_is_not_news_twice(caplog):
    found = source(answers(1.0, ValueError("no")), refresh=3)
    for step in range(5):
        found.read(step)
    again = source(answers(ValueError("no"), 2.0), refresh=3)
    again.load_state_dict(saved(found.state_dict())[0])
    assert [again.read(step) for step in range(5, 10)] == [None, None, None, None, {"top": 2.0}]
    assert len(warned(caplog)) == 1


# What is refused


@pytest.mark.parametrize("refresh", [0, -1, 1.5, True, None])
def test_refresh_is_a_number_of_steps(refresh):
    with pytest.raises(ArgumentError, match="refresh is a number of steps, at least 1"):
        source(lambda: 1, refresh=refresh)


def test_a_source_is_a_monitor_or_a_function():
    with pytest.raises(
        ArgumentError, match="Test follows a CurvatureMonitor or a function without arguments, not float"
    ):
        source(3.0)
    with pytest.raises(ArgumentError, match="not None; where one rank alone measures, give every rank a function"):
        source(None)
