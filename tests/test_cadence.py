"""When the monitor measures: the steps of each cadence, and the share of time that OverheadBudget keeps to."""

from __future__ import annotations

import itertools
import json

import pytest
from nets import make
from torch.nn import functional as F

from curvdiag import CurvatureMonitor, Every, LogSpaced, Objective, OverheadBudget
from curvdiag.errors import ArgumentError
from curvdiag.monitor.measurement import Found


def objective():
    model, batch = make("mlp-tanh")
    return Objective(model, F.cross_entropy, batch)


def due(cadence, last):
    return [step for step in range(last + 1) if step and cadence(step)]


def test_every_measures_at_multiples():
    assert due(Every(7), 30) == [7, 14, 21, 28]
    assert due(Every(1), 3) == [1, 2, 3]


def test_log_spaced_measures_at_the_rounded_powers():
    assert due(LogSpaced(1), 20_000) == [1, 10, 100, 1_000, 10_000]
    assert due(LogSpaced(2), 1_100) == [1, 3, 10, 32, 100, 316, 1_000]
    many = due(LogSpaced(8), 10_000)
    assert sum(1_000 < step <= 10_000 for step in many) == sum(100 < step <= 1_000 for step in many) == 8
    assert many[:4] == [1, 2, 3, 4]  # where the powers are closer than steps, each step once
    assert not LogSpaced(8)(0)


@pytest.mark.parametrize(
    "make_cadence",
    [
        lambda: Every(0),
        lambda: Every(-3),
        lambda: LogSpaced(0),
        lambda: OverheadBudget(0),
        lambda: OverheadBudget(1),
        lambda: OverheadBudget(10),  # percent by mistake
    ],
)
def test_cadences_refuse_what_means_nothing(make_cadence):
    with pytest.raises(ArgumentError):
        make_cadence()


def test_a_monitor_takes_one_cadence_that_can_be_called():
    subject = objective()
    with pytest.raises(ArgumentError, match="not both"):
        CurvatureMonitor(subject, every=5, cadence=LogSpaced())
    with pytest.raises(ArgumentError, match="every="):
        CurvatureMonitor(subject, every=0)
    for wrong in (50, 0, "log"):
        with pytest.raises(ArgumentError, match="cadence"):
            CurvatureMonitor(subject, cadence=wrong)
    assert CurvatureMonitor(subject).cadence == OverheadBudget(0.1)
    assert CurvatureMonitor(subject, every=5).cadence == Every(5)


# OverheadBudget, simulated: the run's clock is a number.


def simulate(cadence, costs, steps, step_seconds=1.0, state=(0.0, 0.0, 0.0), first=1):
    """Steps at which a run measures, and (elapsed, measuring, last) after each measurement."""
    elapsed, measuring, last = state
    at, after = [], []
    costs = iter(costs)
    for step in range(first, first + steps):
        elapsed += step_seconds
        cadence.observe(elapsed=elapsed, measuring=measuring, last=last)
        if cadence(step):
            last = next(costs)
            elapsed, measuring = elapsed + last, measuring + last
            at.append(step)
            after.append((elapsed, measuring, last))
    return at, after, (elapsed, measuring, last)


def forever(*costs):
    while True:
        yield from costs


@pytest.mark.parametrize("fraction", [0.02, 0.1, 0.5, 0.9])
def test_equal_measurements_never_exceed_the_fraction_once_the_first_is_caught_up_with(fraction):
    at, after, (elapsed, measuring, _) = simulate(OverheadBudget(fraction), forever(20.0), 100_000)
    assert at[0] == 1
    assert all(measuring <= fraction * elapsed + 1e-9 for elapsed, measuring, _ in after[1:])
    # And the budget is used: one more would have fitted at most a few steps ago.
    assert measuring > fraction * elapsed - 20.0 - 2.0


@pytest.mark.parametrize(
    "costs",
    [
        forever(1.0, 5.0, 0.2, 30.0),
        forever(100.0, *[1.0] * 400),
        (1.0 + k / 10 for k in range(10_000)),  # ever dearer
        forever(0.01),  # much cheaper than a step: every step
    ],
    ids=["uneven", "one dear", "growing", "cheap"],
)
def test_uneven_measurements_exceed_the_fraction_by_the_last_one_at_most(costs):
    fraction = 0.1
    at, after, (elapsed, measuring, last) = simulate(OverheadBudget(fraction), costs, 50_000)
    assert all(measuring <= fraction * elapsed + last + 1e-9 for elapsed, measuring, last in after[1:])
    assert len(at) > 50
    assert at[-1] > 45_000, "measurements stop"
    # Without looking at the cadence's own reckoning: in the long run the share is kept.
    assert measuring / elapsed <= fraction + last / elapsed


def test_one_slow_measurement_neither_stops_the_others_nor_bunches_them():
    """The first one warms caches up. The others come at their own price, and not one after each step either."""
    at, after, _ = simulate(OverheadBudget(0.1), iter([60.0] + [1.0] * 10_000), 20_000)
    gaps = [b - a for a, b in itertools.pairwise(at)]
    assert 500 < gaps[0] < 1_200
    assert max(gaps[20:]) <= 10
    assert min(gaps) >= 4
    assert after[-1][1] > 0.1 * after[-1][0] - 2.0


@pytest.mark.parametrize("costs", [[3.0, 1.0, 7.0, 2.0] * 1_000, [60.0] + [1.0] * 1_000], ids=["uneven", "slow first"])
def test_a_restarted_budget_decides_as_the_old_one_would_have(costs):
    straight, *_ = simulate(OverheadBudget(0.1), iter(costs), 2_000)
    for cut in [500, *straight[1:12]]:
        first, second = OverheadBudget(0.1), OverheadBudget(0.1)
        before, _, state = simulate(first, iter(costs), cut)
        second.observe(elapsed=0.5, measuring=0.0, last=0.0)
        first.observe(elapsed=state[0], measuring=state[1], last=state[2])
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        after, *_ = simulate(second, iter(costs[len(before) :]), 2_000 - cut, state=state, first=cut + 1)
        assert before + after == straight


# The same through the monitor, on a clock of our own.


class FakeTime:
    def __init__(self):
        self.now = 1_000.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    fake = FakeTime()
    monkeypatch.setattr("curvdiag.monitor.clock.time", fake)
    monkeypatch.setattr("curvdiag.monitor.survey.time", fake)
    monkeypatch.setattr("curvdiag.monitor.price.time", fake)

    def measured(objective, settings, *, strict, **_):
        fake.now += 20.0
        return Found({"curv/hessian/lambda_max": 1.0}, {}, [], 7)

    def gradient(self):
        fake.now += 0.5

    monkeypatch.setattr("curvdiag.monitor.survey.measure", measured)
    monkeypatch.setattr(Objective, "gradient", gradient)
    return fake


def test_the_monitor_by_its_own_clock_keeps_the_budget(clock):
    monitor = CurvatureMonitor(objective(), cadence=OverheadBudget(0.25))
    started, shares = clock.now, []
    monitor.step()  # the clock starts here
    for _ in range(2_000):
        clock.now += 1.0
        if monitor.step() is not None:
            shares.append(monitor.latest["curv/overhead"])
            measuring = 20.0 * len(monitor.history) + 1.0  # two gradients were timed, once
            assert monitor.latest["curv/overhead"] == pytest.approx(measuring / (clock.now - started))
            assert monitor.clock.measuring == pytest.approx(measuring)
    assert monitor.history[0]["curv/overhead"] == 1.0
    assert max(shares) <= 0.25
    assert min(shares[3:]) > 0.23
    assert monitor.history[0]["curv/cost/seconds"] == 21.0
    assert monitor.latest["curv/cost/seconds"] == 20.0
    assert monitor.latest["curv/cost/gradients"] == 40.0
    assert monitor.latest["curv/cost/matvecs"] == 7.0


def test_the_monitors_clock_and_budget_go_on_after_a_restart(clock):
    def run(monitor, steps):
        for _ in range(steps):
            clock.now += 1.0
            monitor.step()

    first = CurvatureMonitor(objective(), cadence=OverheadBudget(0.1))
    run(first, 500)
    state = json.loads(json.dumps(first.state_dict()))
    elapsed, taken = first.clock.elapsed, len(first.history)
    clock.now += 1e6  # the machine was off
    second = CurvatureMonitor(objective(), cadence=OverheadBudget(0.1))
    second.load_state_dict(state)
    assert second.clock.elapsed == elapsed
    assert second.steps_done == 500
    run(second, 500)
    assert second.history[0].step > 500
    assert second.clock.measuring == pytest.approx(20 * (taken + len(second.history)) + 2, abs=0.1)
    assert second.latest["curv/overhead"] <= 0.1
    assert len(second.history) >= 2
