"""Measuring again and again takes no more memory: no tensor, graph or hook stays behind."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import warnings
from pathlib import Path

import pytest
import torch
from nets import Drop, OnceDifferentiable, make, vectors
from torch import nn
from torch.nn import functional as F

from curvdiag import CurvatureMonitor, CurvdiagWarning, Objective
from curvdiag.operators import Hessian

MIB = 2**20


def live_tensors():
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


def resident():
    """Resident bytes, with what the C library keeps in reserve given back where it can be."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def wide():
    """A graph of about a megabyte, so that one that is left behind shows; its products take little time."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 256), nn.Tanh(), nn.BatchNorm1d(256), nn.Dropout(0.5), nn.Linear(256, 3))
    return model, vectors(128)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
@pytest.mark.filterwarnings("ignore:measuring every")
def test_memory_does_not_grow_over_200_measurements(tmp_path):
    model, batch = wide()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    objective = Objective(model, F.cross_entropy, batch)
    options = {"every": 1, "preset": "standard", "steps": 4, "probes": 2, "tol": 0.3}
    monitor = CurvatureMonitor(objective, tmp_path / "run.db", **options).attach(optimizer)

    def train(steps):
        for _ in range(steps):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(batch[0]), batch[1])
            loss.backward()
            monitor.observe_loss(loss)
            optimizer.step()
        del loss
        return live_tensors(), resident()

    tensors, before = train(20)  # warm-up
    middle = train(90)
    after = train(90)
    assert len(monitor.history) == 200
    assert after[0] <= middle[0] <= tensors  # fewer, where leftovers of other tests have gone meanwhile
    assert after[1] - before < 8 * MIB  # 180 graphs would be far more than a hundred
    assert after[1] - middle[1] < 4 * MIB
    monitor.close()


def broken_by_nan(model):
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))


@pytest.mark.parametrize("kind", ["no second derivative", "nan"])
def test_failed_measurements_leave_nothing_either(kind):
    model, batch = make("mlp-tanh")
    if kind == "no second derivative":
        model.insert(2, OnceDifferentiable())
    monitor = CurvatureMonitor(Objective(model, F.cross_entropy, batch), cadence=lambda step: False)
    if kind == "nan":
        broken_by_nan(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CurvdiagWarning)
        assert monitor.measure() is None
        before = live_tensors()
        for _ in range(5):
            assert monitor.measure() is None
    assert live_tensors() == before


def test_objectives_operators_and_monitors_go_when_they_are_dropped():
    """Every objective builds a small graph to learn its memory; that one has to go as well."""
    models = [Drop() for _ in range(6)]
    data = vectors()

    def use(model):
        objective = Objective(model, F.cross_entropy, data)
        op = Hessian(objective)
        op @ torch.ones(op.size)
        op.block("head.*") @ torch.ones(21)
        monitor = CurvatureMonitor(objective, preset="full", steps=4, probes=2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        monitor.attach(optimizer)
        monitor.measure()
        monitor.close()

    use(models[0])
    before = live_tensors()
    for model in models[1:]:
        use(model)
    assert live_tensors() == before


def test_the_history_holds_numbers_and_no_tensors():
    model, batch = make("mlp-tanh")
    monitor = CurvatureMonitor(Objective(model, F.cross_entropy, batch), preset="full", steps=4, probes=2)
    monitor.measure()
    before = live_tensors()
    monitor.measure()
    assert live_tensors() == before
    assert len(monitor.history) == 2
