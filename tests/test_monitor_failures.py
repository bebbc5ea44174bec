"""What goes wrong in a measurement or in the run file is said once, and training goes on."""

from __future__ import annotations

import os
import re
import sqlite3
import warnings

import pytest
import torch
from nets import OnceDifferentiable, make
from torch.nn import functional as F

from curvdiag import CurvatureMonitor, CurvdiagWarning, LogSpaced, Objective, OverheadBudget, RunStore
from curvdiag.errors import ArgumentError, CurvdiagError, NonFiniteError, SecondDerivativeError, StoreError
from curvdiag.monitor.measurement import Found

SHARE = "measuring every"


class Training:
    def __init__(self):
        self.model, self.batch = make("mlp-tanh")
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05)

    def monitor(self, *args, **options):
        objective = Objective(self.model, F.cross_entropy, self.batch)
        options = {"steps": 6, "probes": 2, "cadence": lambda step: True, **options}
        return CurvatureMonitor(objective, *args, **options).attach(self.optimizer)

    def step(self, times=1):
        for _ in range(times):
            self.optimizer.zero_grad()
            F.cross_entropy(self.model(self.batch[0]), self.batch[1]).backward()
            self.optimizer.step()


def collected(function):
    """The messages of all warnings of ours, but for those of the share of time."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        function()
    ours = [str(w.message) for w in seen if issubclass(w.category, CurvdiagWarning)]
    return [message for message in ours if SHARE not in message]


def spoil(model):
    kept = model[0].weight.detach().clone()
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")
    return kept


# Measurements


def test_failed_measurements_are_recorded_and_warned_about_once_and_later_ones_succeed(tmp_path):
    training = Training()
    monitor = training.monitor(tmp_path / "run.db", preset="light")

    def run():
        training.step(2)
        kept = spoil(training.model)
        others = [p.detach().clone() for p in training.model.parameters()]
        training.step(3)  # everything is NaN now
        assert monitor.measure() is None
        with torch.no_grad():
            for p, other in zip(training.model.parameters(), others, strict=True):
                p.copy_(other)
            training.model[0].weight.copy_(kept)
        training.step(2)

    messages = collected(run)
    assert len(messages) == 1
    assert "step 3" in messages[0]
    assert "NonFiniteError" in messages[0]
    assert "training goes on" in messages[0]
    assert monitor.steps_done == 7
    assert [m.step for m in monitor.history] == [1, 2, 6, 7]
    errors = [e for e in monitor.run.events() if e.kind == "error"]
    assert [e.step for e in errors] == [3, 4, 5, 5]
    assert all("NonFiniteError" in e.message for e in errors)
    assert monitor.run.scalars("curv/hessian/lambda_max").steps.tolist() == [1, 2, 6, 7]
    monitor.close()


def test_strict_raises_what_went_wrong():
    training = Training()
    monitor = training.monitor(strict=True)
    spoil(training.model)
    with pytest.raises(NonFiniteError):
        training.step()
    with pytest.raises(NonFiniteError):
        monitor.measure()
    assert monitor.latest is None


def clock(monkeypatch, model, *, step, measurement, error=None):
    """A clock of our own: a step of the training and a measurement take the seconds given."""
    now = [0.0]
    monkeypatch.setattr("curvdiag.monitor.clock.time.perf_counter", lambda: now[0])

    def took(seconds):
        now[0] += seconds

    def measured(objective, settings, **_):
        took(measurement)
        if error is not None:
            raise error
        return Found({"curv/hessian/lambda_max": 1.0}, {}, [], 1)

    monkeypatch.setattr("curvdiag.monitor.survey.measure", measured)
    monkeypatch.setattr(Objective, "gradient", lambda self: took(0.01))
    model.register_forward_pre_hook(lambda *_: took(step))


def test_a_model_that_cannot_be_measured_trains_to_the_end():
    training = Training()
    training.model.insert(1, OnceDifferentiable())
    monitor = training.monitor()
    messages = collected(lambda: training.step(5))
    assert len(messages) == 1
    assert SecondDerivativeError.__name__ in messages[0]
    assert monitor.steps_done == 5
    assert not monitor.history


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), MemoryError(), TypeError("odd"), AssertionError()])
def test_any_exception_of_a_measurement_is_a_failure(error, tmp_path):
    training = Training()
    monitor = training.monitor(tmp_path / "run.db")

    def broken(*_):
        raise error

    handle = training.model[2].register_forward_pre_hook(lambda m, a: None if m.training else broken())
    messages = collected(lambda: training.step(3))
    handle.remove()
    assert len(messages) == 1
    assert type(error).__name__ in messages[0]
    assert [e.kind for e in monitor.run.events()] == ["error"] * 3
    collected(lambda: training.step(1))
    assert len(monitor.history) == 1
    monitor.close()


def test_interruptions_by_the_user_pass_through():
    training = Training()
    monitor = training.monitor()

    def interrupt(module, arguments):
        if not module.training:
            raise KeyboardInterrupt

    training.model[2].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        training.step()
    assert all(m.training for m in training.model.modules())
    assert monitor.steps_done == 1


def test_the_time_of_failed_measurements_counts(monkeypatch, tmp_path):
    """Else a budget would try again at each step."""
    training = Training()
    clock(monkeypatch, training.model, step=1.0, measurement=5.0, error=RuntimeError("broken"))
    monitor = training.monitor(tmp_path / "run.db", cadence=OverheadBudget(0.1))
    assert len(collected(lambda: training.step(301))) == 1
    assert [event.step for event in monitor.run.events()] == pytest.approx([1, 91, 136, 181, 226, 271], abs=2)
    assert monitor.clock.measuring <= 0.1 * monitor.clock.elapsed + 5.0
    monitor.close()


# The run file


def unwritable(tmp_path):
    (tmp_path / "text.db").write_text("this is not a run file" * 100)
    newer = tmp_path / "newer.db"
    RunStore(newer).close()
    with sqlite3.connect(newer) as connection:
        connection.execute("PRAGMA user_version = 99999")
    connection.close()
    return {
        "no such folder": tmp_path / "nowhere" / "run.db",
        "a folder": tmp_path,
        "not a run file": tmp_path / "text.db",
        "newer schema": newer,
        "a file system that refuses": "/proc/run.db",
    }


@pytest.mark.parametrize("kind", ["no such folder", "a folder", "not a run file", "newer schema"])
def test_a_path_that_cannot_be_a_run_file_is_refused_before_training(kind, tmp_path):
    path = unwritable(tmp_path)[kind]
    with pytest.raises(StoreError, match=re.escape(str(path))):
        Training().monitor(path)


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="there is no /proc on this system")
def test_a_file_system_that_refuses_costs_one_warning(tmp_path):
    path = unwritable(tmp_path)["a file system that refuses"]
    training = Training()
    made = []

    def run():
        made.append(training.monitor(path, preset="light"))
        training.step(3)

    messages = collected(run)
    assert len(messages) == 1
    assert str(path) in messages[0]
    assert [m.step for m in made[0].history] == [1, 2, 3]
    made[0].close()
    with pytest.raises(StoreError):
        Training().monitor(path, strict=True)


def test_a_folder_that_may_not_be_written_to(tmp_path):
    if os.geteuid() == 0:
        pytest.skip("permissions do not bind root")
    tmp_path.chmod(0o500)
    made = []
    try:
        messages = collected(lambda: made.append(Training().monitor(tmp_path / "run.db")))
    finally:
        tmp_path.chmod(0o700)
    assert len(messages) == 1
    assert made[0].measure() is not None


def test_a_disk_that_fills_up_costs_one_warning_and_what_was_recorded_is_kept(tmp_path):
    training = Training()
    monitor = training.monitor(tmp_path / "run.db", preset="standard")
    connection = monitor.store._database._connection

    def run():
        training.step(2)
        (pages,) = connection.execute("PRAGMA page_count").fetchone()
        connection.execute(f"PRAGMA max_page_count = {pages}")
        training.step(15)
        assert monitor.run.info.measurements < 17
        connection.execute("PRAGMA max_page_count = 100000")
        training.step(2)

    messages = collected(run)
    assert len(messages) == 1
    assert "full" in messages[0]
    assert "training goes on" in messages[0]
    assert len(monitor.history) == 19
    monitor.close()
    with RunStore(tmp_path / "run.db", readonly=True) as store:
        series = store.scalars("curv/hessian/lambda_max")
    assert series.steps.tolist() == list(range(1, 20)), "what could not be written is written once there is room"
    for step, value in zip(series.steps, series.values, strict=True):
        assert value == monitor.history[step - 1]["curv/hessian/lambda_max"]


def test_what_the_last_measurements_could_not_write_is_written_at_the_end(tmp_path):
    training = Training()
    monitor = training.monitor(tmp_path / "run.db", preset="standard")
    connection = monitor.store._database._connection

    def run():
        training.step(2)
        (pages,) = connection.execute("PRAGMA page_count").fetchone()
        connection.execute(f"PRAGMA max_page_count = {pages}")
        training.step(15)
        assert monitor.run.info.measurements < 17
        connection.execute("PRAGMA max_page_count = 100000")
        monitor.close()

    assert len(collected(run)) == 1
    with RunStore(tmp_path / "run.db", readonly=True) as store:
        assert store.scalars("curv/hessian/lambda_max").steps.tolist() == list(range(1, 18))


def test_a_disk_that_is_full_before_the_run_begins(tmp_path):
    training = Training()
    monitor = training.monitor(tmp_path / "run.db", preset="light", config={"long": "x" * 50_000})
    connection = monitor.store._database._connection
    (pages,) = connection.execute("PRAGMA page_count").fetchone()
    connection.execute(f"PRAGMA max_page_count = {pages}")
    messages = collected(lambda: training.step(3))
    assert len(messages) == 1
    assert len(monitor.history) == 3
    assert monitor.state_dict()["run"] is None
    monitor.close()


def test_a_file_that_fails_while_measurements_fail_too(tmp_path):
    training = Training()
    monitor = training.monitor(tmp_path / "run.db", preset="light")
    collected(lambda: training.step(1))
    monitor.store.close()
    spoil(training.model)
    messages = collected(lambda: training.step(4))
    assert len(messages) == 2
    assert any("NonFiniteError" in m for m in messages)
    assert any("closed" in m for m in messages)
    assert monitor.steps_done == 5


def test_a_strict_monitor_raises_what_the_file_refuses(tmp_path):
    training = Training()
    monitor = training.monitor(tmp_path / "run.db", preset="light", strict=True)
    training.step()
    monitor.store.close()
    with pytest.raises(StoreError):
        training.step()


def test_a_configuration_that_cannot_be_written_does_not_stop_the_run(tmp_path):
    training = Training()
    monitor = training.monitor(tmp_path / "run.db", preset="light", config={"sizes": {(1, 2): 3}})
    messages = collected(lambda: training.step(2))
    assert len(messages) == 1
    assert "JSON" in messages[0]
    assert [m.step for m in monitor.history] == [1, 2]
    spoil(training.model)
    assert len(collected(lambda: training.step(2))) == 1
    monitor.close()
    with RunStore(tmp_path / "run.db", readonly=True) as store:
        assert store.scalars("curv/hessian/lambda_max").steps.tolist() == [1, 2]
        assert "(1, 2)" in store.run().config["sizes"]


def test_a_closed_monitor_says_that_it_records_no_more(tmp_path):
    training = Training()
    monitor = training.monitor(tmp_path / "run.db", preset="light")
    collected(lambda: training.step(2))
    monitor.close()
    monitor.attach(training.optimizer)
    messages = collected(lambda: training.step(2))
    assert len(messages) == 1
    assert "closed" in messages[0]
    assert [m.step for m in monitor.history] == [1, 2, 3, 4]


# The warning of the price


def price(training, steps):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        training.step(steps)
    return [str(w.message) for w in seen if issubclass(w.category, CurvdiagWarning)]


@pytest.mark.parametrize("options", [{"every": 2, "cadence": None}, {"cadence": lambda step: step % 2 == 0}])
def test_measurements_dearer_than_half_the_run_are_warned_of_once_with_figures(options, monkeypatch):
    training = Training()
    clock(monkeypatch, training.model, step=1.0, measurement=6.0)
    monitor = training.monitor(**options)
    (message,) = price(training, 12)
    assert "every 2 steps takes 75% of the run: 6 s for each measurement, 2 s for the training" in message
    assert "OverheadBudget" in message
    assert len(monitor.history) == 6


@pytest.mark.parametrize("cadence", [OverheadBudget(0.5), LogSpaced(8)])
def test_cadences_whose_share_falls_by_themselves_are_not_warned_of(cadence, monkeypatch):
    training = Training()
    clock(monkeypatch, training.model, step=1.0, measurement=6.0)
    training.monitor(cadence=cadence)
    assert price(training, 12) == []


def test_measurements_below_half_of_the_run_are_not_warned_of(monkeypatch):
    training = Training()
    clock(monkeypatch, training.model, step=1.0, measurement=9.0)
    monitor = training.monitor(cadence=None, every=10)
    assert price(training, 40) == []
    assert len(monitor.history) == 4


def test_measuring_by_hand_before_the_first_step_is_not_warned_of(monkeypatch):
    training = Training()
    clock(monkeypatch, training.model, step=1.0, measurement=9.0)
    monitor = training.monitor(cadence=lambda step: False)
    assert collected(lambda: [monitor.measure() for _ in range(3)]) == []
    assert len(monitor.history) == 3


# Bad arguments in the middle of a run


def test_an_unknown_option_of_the_hessian_is_an_error_that_names_it():
    training = Training()
    with pytest.raises((ArgumentError, TypeError), match="methd"):
        training.monitor(hessian={"methd": "exact"}, strict=True).measure()


def test_an_objective_at_nan_weights_is_refused_when_it_is_made():
    training = Training()
    spoil(training.model)
    with pytest.raises(CurvdiagError, match="nan"):
        training.monitor()
