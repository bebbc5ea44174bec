"""Numbers of the user's own go into the run, beside the measurements, and survive what measurements survive."""

from __future__ import annotations

import io
import math
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from nets import make
from torch.nn import functional as F

from curvdiag import CurvatureMonitor, CurvdiagWarning, Estimate, Objective, RunStore
from curvdiag.errors import ArgumentError, StoreError
from curvdiag.monitor.measurement import Found

TRACE = "curv/hessian/trace"


def watch(store=None, **options):
    model, batch = make("mlp-tanh")
    options = {"measure": ["trace"], "cadence": lambda step: False, "strict": True, **options}
    return CurvatureMonitor(Objective(model, F.cross_entropy, batch), store, **options)


def steps(monitor, count):
    for _ in range(count):
        monitor.step()


def filed(path):
    """Everything that the run holds, by step."""
    with RunStore(path, readonly=True) as store:
        found = {}
        for name in store.scalar_names():
            series = store.scalars(name)
            for step, value in zip(series.steps.tolist(), series.values.tolist(), strict=True):
                found.setdefault(step, {})[name] = value
        return found


def own(values):
    return {name: value for name, value in values.items() if name.startswith("sched/")}


def checkpoint(monitor):
    file = io.BytesIO()
    torch.save(monitor.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_numbers_are_filed_under_the_present_step_and_kept_in_memory(tmp_path):
    with watch(tmp_path / "run.db", steps_per_epoch=4) as monitor:
        monitor.record({"sched/p": 6.0})
        steps(monitor, 3)
        monitor.record({"sched/p": 5.5, "sched/age": 2})
        assert monitor.run.scalars("sched/age").epochs.tolist() == [0.75]
    assert filed(tmp_path / "run.db") == {0: {"sched/p": 6.0}, 3: {"sched/p": 5.5, "sched/age": 2.0}}
    assert monitor.recorded == [(0, {"sched/p": 6.0}), (3, {"sched/p": 5.5, "sched/age": 2.0})]
    assert all(type(v) is float for _, one in monitor.recorded for v in one.values())
    assert monitor.history == []


def test_without_a_file_they_are_kept_in_memory():
    monitor = watch()
    monitor.record({"sched/p": 6.0})
    assert monitor.recorded == [(0, {"sched/p": 6.0})]
    assert monitor.run is None


@pytest.mark.parametrize("order", ["record first", "measure first", "around", "measured twice"])
def test_a_measurement_at_the_same_step_stands_beside_them(order, tmp_path):
    numbers = {"sched/p": 6.0, "sched/seen": 0.5}
    with watch(tmp_path / "run.db", measure=["density"], steps=4) as monitor:
        steps(monitor, 2)
        if order in ("record first", "around", "measured twice"):
            monitor.record({"sched/p": 6.0})
        found = monitor.measure()
        if order == "measured twice":
            found = monitor.measure()
        monitor.record({"sched/seen": 0.5} if order != "measure first" else numbers)
        series = monitor.run.scalars("curv/hessian/frobenius_norm")
        assert series.standard_errors.tolist() == [found.scalars["curv/hessian/frobenius_norm"].standard_error]
        assert len(monitor.run.densities("hessian")) == 1
        assert monitor.run.info.measurements == 1
    (held,) = filed(tmp_path / "run.db").values()
    assert own(held) == numbers
    assert {name: v for name, v in held.items() if name not in numbers} == {n: found[n] for n in found.scalars}


def test_of_two_numbers_under_one_key_the_later_one_counts_and_others_stay(tmp_path):
    with watch(tmp_path / "run.db") as monitor:
        steps(monitor, 1)
        monitor.record({"sched/p": 6.0, "sched/age": 1.0})
        monitor.record({"sched/p": 4.0})
    assert filed(tmp_path / "run.db") == {1: {"sched/p": 4.0, "sched/age": 1.0}}
    assert monitor.recorded == [(1, {"sched/p": 4.0, "sched/age": 1.0})]


def test_a_measured_key_may_be_recorded_and_the_later_one_counts(tmp_path):
    with watch(tmp_path / "run.db") as monitor:
        monitor.measure()
        monitor.record({TRACE: -1.0})
        assert monitor.run.scalars(TRACE).values.tolist() == [-1.0]
        found = monitor.measure()
        assert monitor.run.scalars(TRACE).values.tolist() == [found[TRACE]]


@pytest.mark.filterwarnings("error")
def test_what_numbers_are(tmp_path):
    given = {
        "int": 3,
        "numpy": np.float32(0.5),
        "tensor": torch.tensor([2.5], requires_grad=True),
        "array": np.array(1.5),
        "flag": True,
        "estimate": Estimate(4.0, 0.1, 5),
        "nan": math.nan,
        "infinite": math.inf,
    }
    with watch(tmp_path / "run.db") as monitor:
        monitor.record(given)
    found = filed(tmp_path / "run.db")[0]
    assert math.isnan(found.pop("nan"))
    expected = {"int": 3.0, "numpy": 0.5, "tensor": 2.5, "array": 1.5, "flag": 1.0, "estimate": 4.0}
    assert found == {**expected, "infinite": math.inf}


BAD = [
    ({"a": "0.5"}, "'a': '0.5'"),
    ({"a": None}, "'a': None"),
    ({"a": 1 + 2j}, r"'a': \(1\+2j\)"),
    ({"a": [0.5]}, r"'a': \[0.5\]"),
    ({"a": torch.ones(3)}, "'a': Tensor of 3 entries, torch.float32"),
    ({"a": torch.ones(1, dtype=torch.complex64)}, "'a': Tensor of 1 entries, torch.complex64"),
    ({"a": torch.ones(1, device="meta")}, "'a': Tensor of 1 entries"),
    ({"a": 10**400}, "'a': 1000"),
    ({"": 1.0}, "the name ''"),
    ({3: 1.0}, "the name 3"),
    ([("a", 1.0)], "a list instead of a dict"),
]


@pytest.mark.parametrize(("given", "words"), BAD)
def test_what_is_no_number_is_refused_and_named(given, words):
    strict, lenient = watch(), watch(strict=False)
    good = {**given, "good": 1.0} if isinstance(given, dict) else given
    with pytest.raises(ArgumentError, match=f"takes numbers by name, and refuses {words}"):
        strict.record(good)
    assert strict.recorded == []
    with pytest.warns(CurvdiagWarning, match=words):
        lenient.record(good)
    lenient.record(good)  # said once
    assert lenient.recorded == ([(0, {"good": 1.0})] if isinstance(given, dict) else [])


def test_nothing_to_record_begins_no_run(tmp_path):
    with watch(tmp_path / "run.db") as monitor:
        monitor.record({})
        assert monitor.store.runs() == []
    assert monitor.recorded == []


# What can go wrong


def test_a_full_disk_costs_one_warning_and_is_made_up_for(tmp_path):
    monitor = watch(tmp_path / "run.db", strict=False)
    connection = monitor.store._database._connection
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        monitor.record({"sched/p": 0.0})
        (pages,) = connection.execute("PRAGMA page_count").fetchone()
        connection.execute(f"PRAGMA max_page_count = {pages}")
        for k in range(1, 60):
            monitor.step()
            monitor.record({f"sched/{'x' * 200}/{j}": float(k) for j in range(5)})
        assert monitor.run.info.last_step < 59
        connection.execute("PRAGMA max_page_count = 100000")
        monitor.step()
        monitor.record({"sched/p": 60.0})
    assert len(seen) == 1
    assert "training goes on" in str(seen[0].message)
    monitor.close()
    assert sorted(filed(tmp_path / "run.db")) == list(range(61))


def test_a_closed_file_never_stops_the_training(tmp_path):
    monitor, strict = watch(tmp_path / "one.db", strict=False), watch(tmp_path / "two.db")
    for one in (monitor, strict):
        one.record({"sched/p": 6.0})
        one.close()
    with pytest.warns(CurvdiagWarning, match="closed"):
        monitor.record({"sched/p": 5.0})
    monitor.record({"sched/p": 4.0})
    assert monitor.recorded == [(0, {"sched/p": 4.0})]
    with pytest.raises(StoreError, match="closed"):
        strict.record({"sched/p": 5.0})


CRASH = """
import os, sys
sys.path[:0] = {paths!r}
from test_monitor_record import watch
monitor = watch({path!r})
for step in range(5):
    monitor.step()
    if step % 2 == 0:
        monitor.measure()
    monitor.record({{"sched/p": 6.0 - step}})
os._exit(9)
"""


def test_what_was_recorded_survives_a_killed_process(tmp_path):
    path = tmp_path / "run.db"
    code = CRASH.format(paths=[p for p in sys.path if p], path=str(path))
    assert subprocess.run([sys.executable, "-c", code], timeout=200).returncode == 9
    held = filed(path)
    assert {step: held[step]["sched/p"] for step in held} == {step + 1: 6.0 - step for step in range(5)}
    assert [step for step in held if TRACE in held[step]] == [1, 3, 5]


# Restarting


@pytest.mark.parametrize("first_again", ["record", "measure"])
def test_a_resumed_run_drops_what_lies_beyond_the_checkpoint_and_keeps_the_rest(first_again, tmp_path):
    path = tmp_path / "run.db"
    with watch(path) as first:
        for k in range(1, 5):
            first.step()
            first.record({"sched/p": 6.0 - k, "sched/age": 0.0})
        measured = first.measure()
        state = checkpoint(first)
        steps(first, 1)
        first.record({"sched/p": -1.0})  # beyond the checkpoint, and lost in a crash
        steps(first, 3)
        first.record({"sched/late": 1.0})
    with watch(path) as second:
        second.load_state_dict(state)
        if first_again == "record":
            second.record({"sched/p": 9.0})  # at the checkpoint's own step
        else:
            second.measure()
        steps(second, 3)
        second.record({"sched/p": 8.0})
        assert second.recorded[-1] == (7, {"sched/p": 8.0})
    held = filed(path)
    assert sorted(held) == [1, 2, 3, 4, 7]
    assert own(held[4]) == {"sched/p": 9.0 if first_again == "record" else 2.0, "sched/age": 0.0}
    assert held[4][TRACE] == measured[TRACE]
    assert held[7] == {"sched/p": 8.0}


def test_a_checkpoint_of_before_there_was_record_is_still_read(tmp_path):
    with watch(tmp_path / "run.db") as first:
        first.measure()
        state = {key: value for key, value in checkpoint(first).items() if key != "recorded"}
    with watch(tmp_path / "run.db") as second:
        second.load_state_dict(state)
        second.record({"sched/p": 1.0})
    assert set(filed(tmp_path / "run.db")[0]) > {"sched/p", TRACE}


def test_recording_at_every_step_is_cheap(tmp_path, monkeypatch):
    """A transaction a call: nothing is read back, and no density written again."""
    monkeypatch.setattr("curvdiag.monitor.survey.measure", lambda *_, **__: Found({"x": 1.0}, {}, [], 0))
    with watch(tmp_path / "run.db") as monitor:
        monitor.measure()
        statements = []
        monitor.store._database._connection.set_trace_callback(statements.append)
        for k in range(20):
            monitor.step()
            monitor.record({"sched/p": float(k)})
    writes = [s for s in statements if s.startswith(("INSERT", "DELETE", "UPDATE"))]
    assert len(writes) == 40
