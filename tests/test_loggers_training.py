"""What loggers do costs the training nothing but time, and the time is counted."""

from __future__ import annotations

import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from logged import Spy, Training, mlflow_uri, offline
from test_leave_no_trace import EPOCHS, differing, objective, reference, train

from curvdiag import CurvatureMonitor, OverheadBudget, RunStore
from curvdiag.loggers import MLflowLogger, TensorBoardLogger, WandbLogger
from curvdiag.monitor.clock import Clock
from curvdiag.monitor.loggers import Loggers
from curvdiag.monitor.measurement import Found
from curvdiag.sandbox import random_fingerprint

pytestmark = pytest.mark.filterwarnings("ignore:measuring every")


def vandal(step, numbers):
    """Draws from all generators and leaves gradients off."""
    random.random(), np.random.rand(), torch.rand(3)  # noqa: NPY002
    random.seed(3)
    torch.set_grad_enabled(True)
    (torch.ones(2, requires_grad=True) ** 2).sum().backward()
    torch.set_grad_enabled(False)


@pytest.mark.parametrize("call", ["measure", "record", "close"])
def test_what_a_logger_draws_or_switches_is_put_back(call):
    class Vandal(Spy):
        def _call(self, name, *arguments):
            vandal(0, {})

    monitor = Training(loggers=[Vandal()], measure=["trace"]).monitor
    monitor.record({"mine": 1.0})
    before = random_fingerprint()
    {"measure": monitor.measure, "record": lambda: monitor.record({"mine": 2.0}), "close": monitor.close}[call]()
    assert random_fingerprint() == before
    assert torch.is_grad_enabled()


def test_a_run_with_every_logger_ends_with_the_same_bits(tmp_path, monkeypatch):
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    monkeypatch.chdir(tmp_path)
    told = [
        TensorBoardLogger("runs"),
        WandbLogger(**offline(tmp_path)),
        MLflowLogger(tracking_uri=mlflow_uri()),
        vandal,
    ]
    others = plt.get_fignums()  # of other tests
    figure = plt.figure()
    settings = dict(matplotlib.rcParams)

    def watch(model, batches):
        options = {"steps": 6, "probes": 2, "every": 2, "preset": "full", "loggers": told}
        return CurvatureMonitor(objective(model, "batch"), tmp_path / "run.db", **options)

    run, watching = train("sgd", "plain", watch)
    assert differing(reference("sgd", "plain"), run.trace()) == []
    assert len(watching.history) == EPOCHS * 5 // 2
    assert [event for event in RunStore(tmp_path / "run.db").events() if event.kind == "error"] == []
    assert plt.get_fignums() == [*others, figure.number]
    assert plt.gcf() is figure
    assert dict(matplotlib.rcParams) == settings
    plt.close(figure)


# Time


def mocked_time(monkeypatch, measurement):
    now = [0.0]
    monkeypatch.setattr("curvdiag.monitor.clock.time.perf_counter", lambda: now[0])

    def took(seconds):
        now[0] += seconds

    def measured(*_, **__):
        took(measurement)
        return Found({"curv/hessian/lambda_max": 1.0}, {}, [], 1)

    monkeypatch.setattr("curvdiag.monitor.survey.measure", measured)
    monkeypatch.setattr("curvdiag.monitor.price.Price.gradient_seconds", 1.0)
    return took


def test_the_time_of_loggers_counts_as_measuring(monkeypatch):
    took = mocked_time(monkeypatch, measurement=2.0)

    class Slow(Spy):
        def begin(self, name, config):
            took(30.0)

        def log(self, measurement):
            took(3.0)

        def numbers(self, step, scalars):
            took(0.5)

    training = Training(loggers=[Slow()], cadence=lambda step: step == 1)
    training.step()
    clock = training.monitor.clock
    assert (clock.measuring, clock.last) == (35.0, 5.0), "opening a logger is no part of what a measurement takes"
    training.monitor.record({"mine": 1.0})
    assert (clock.measuring, clock.last) == (35.5, 5.0)


@pytest.mark.parametrize("slow", ["log", "numbers"])
def test_a_budget_sees_what_loggers_take(slow, monkeypatch):
    took = mocked_time(monkeypatch, measurement=1.0)

    class Slow(Spy):
        def log(self, measurement):
            took(4.0 if slow == "log" else 0.0)

        def numbers(self, step, scalars):
            took(0.05 if slow == "numbers" else 0.0)

    training = Training(loggers=[Slow()], cadence=OverheadBudget(0.1))
    for _ in range(600):
        took(1.0)
        training.step()
        training.monitor.record({"mine": 1.0})
    clock = training.monitor.clock
    assert clock.measuring <= 0.1 * clock.elapsed + 5.0
    # All but the loggers' share is left to measurements: of 600 s about 67 s, 5 s each, or 37 s, 1 s each.
    assert len(training.history) == pytest.approx(13 if slow == "log" else 37, abs=2)


def test_numbers_before_the_first_measurement_do_not_put_it_off(monkeypatch):
    took = mocked_time(monkeypatch, measurement=1.0)

    class Slow(Spy):
        def begin(self, name, config):
            took(60.0)

    training = Training(loggers=[Slow()], cadence=OverheadBudget(0.1))
    training.monitor.record({"mine": 1.0})
    training.step()
    assert [m.step for m in training.history] == [1]


def test_without_loggers_nothing_is_timed_and_no_state_is_read(monkeypatch):
    monkeypatch.setattr("curvdiag.monitor.loggers.random_states", lambda: pytest.fail("there is no one to tell"))
    clock = Clock()
    none = Loggers([], clock, lambda: pytest.fail("there is no one to tell"), print, strict=True)
    none.numbers(3, {"mine": 1.0})
    none.close()
    assert clock.elapsed == 0.0


def test_optional_packages_and_pyplot_stay_unimported_until_they_are_needed():
    code = """
import sys
import numpy as np
import curvdiag.loggers
from curvdiag.loggers.evolution import Evolution
from curvdiag.monitor import Measurement
from curvdiag.spectrum import SpectralDensity
evolution = Evolution()
density = SpectralDensity(np.array([[0.0, 1.0]]), np.array([[0.5, 0.5]]), 10)
evolution.add(Measurement(1, None, {}, {("hessian", ""): density}, 0.0))
assert evolution.draw().any()
print([n for n in ("tensorboard", "wandb", "mlflow", "matplotlib.pyplot") if n in sys.modules])
"""
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"
