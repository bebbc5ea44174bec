"""What goes wrong with gradient noise is said, and measuring it leaves no trace."""

from __future__ import annotations

import math

import pytest
import torch
from nets import make
from test_leave_no_trace import differing, reference, train
from test_monitor_noise import ALWAYS, KEYS, same, watch
from torch import nn
from torch.nn import functional as F

from curvdiag import CurvatureMonitor, CurvdiagWarning, Objective, RunStore
from curvdiag.errors import NonFiniteError
from curvdiag.monitor import quantities
from curvdiag.monitor.settings import NOISE, PRESETS

pytestmark = pytest.mark.filterwarnings("ignore:measuring every")

FULL = [name for name in NOISE if name in PRESETS["full"]]


# What goes wrong on the way


def test_a_noise_scale_that_is_undefined_is_recorded_as_such(tmp_path):
    """Per-sample gradients that cancel: nothing is left of |g|^2 but noise."""
    model = nn.Linear(2, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    inputs = torch.tensor([[1.0, 0.5], [1.0, 0.5], [0.3, 1.0], [0.3, 1.0]], dtype=torch.float64)
    targets = torch.tensor([[1.0], [-1.0], [1.0], [-1.0]], dtype=torch.float64)
    with watch(Objective(model, F.mse_loss, (inputs, targets)), store=tmp_path / "run.db", preset="full") as monitor:
        found = monitor.measure()
    assert math.isnan(found["noise/scale"])
    assert math.isnan(found["noise/scale_curvature"])
    assert found["noise/trace"] > 0
    assert any("cannot be told from its noise" in note for note in found.notes)
    with RunStore(tmp_path / "run.db", readonly=True) as store:
        assert math.isnan(store.scalars("noise/scale").values[0])
        assert store.scalars("noise/trace").values[0] == found["noise/trace"]


def failing(monkeypatch, *names):
    def fail(work):
        work.hessian @ torch.ones(work.hessian.size, dtype=torch.float64)
        raise NonFiniteError("broken on purpose")

    for name in names:
        monkeypatch.setitem(quantities.QUANTITIES, name, fail)


def test_a_quantity_that_fails_leaves_the_others(monkeypatch, tmp_path):
    failing(monkeypatch, "cwgd", "trace")
    with watch(store=tmp_path / "run.db", preset="full", strict=False) as monitor:
        with pytest.warns(CurvdiagWarning) as seen:
            found = monitor.measure()
        monitor.measure()  # warned about once
        errors = [event.message for event in monitor.run.events() if event.kind == "error"]
    kept = set().union(*(KEYS[name] for name in PRESETS["full"] if name not in ("cwgd", "trace")))
    assert set(found.scalars) == kept | ALWAYS
    messages = [str(warning.message) for warning in seen]
    for name in ("cwgd", "trace"):
        (message,) = [m for m in messages if f"the measurement of {name} at step 0 failed and training goes on" in m]
        assert "NonFiniteError: broken on purpose" in message
    assert len(errors) == 4
    assert len(monitor.history) == 2


def test_a_measurement_of_which_nothing_succeeds_has_failed(monkeypatch):
    failing(monkeypatch, "cwgd", "trace")
    monitor = watch(measure=["cwgd", "trace"], strict=False)
    with pytest.warns(CurvdiagWarning, match="the measurement at step 0 failed"):
        assert monitor.measure() is None
    assert not monitor.history


def test_a_strict_monitor_raises_what_one_quantity_raised(monkeypatch):
    failing(monkeypatch, "cwgd")
    with pytest.raises(NonFiniteError, match="on purpose"):
        watch(preset="full").measure()


# What is left behind


def test_the_run_says_what_was_measured(tmp_path):
    with watch(store=tmp_path / "run.db", measure=["cwgd", "trace", "cwgd"]) as monitor:
        monitor.measure()
        own = monitor.run.info.config["curvdiag"]
    assert (own["preset"], own["measure"]) == (None, ["trace", "cwgd"])
    assert "['trace', 'cwgd']" in repr(monitor)
    with watch(store=tmp_path / "other.db") as monitor:
        monitor.measure()
        own = monitor.run.info.config["curvdiag"]
    assert (own["preset"], tuple(own["measure"])) == ("standard", PRESETS["standard"])


def test_the_same_weights_give_the_same_noise_and_another_seed_other_probes():
    monitor = watch(preset="full")
    first, second = monitor.measure(), monitor.measure()
    other = watch(preset="full", seed=1).measure()
    for key in KEYS["cwgd"] | KEYS["alignment"] | KEYS["noise_scale"] | KEYS["noise_trace"]:
        same(first.scalars[key], second.scalars[key])
    for key in ("noise/scale_curvature", "noise/cwgd", "align/cosine", "align/commutator"):
        assert first[key] != other[key], key
    assert first["noise/trace"] == other["noise/trace"]


def some_noise(model, measure, source):
    """As :func:`test_leave_no_trace.monitor`, with names; and each measurement must hold what it was asked for."""
    data = source
    if source is None:
        data = torch.randn(8, 1, 6, 6, generator=torch.Generator().manual_seed(3)), torch.arange(8) % 3
    target = Objective(model, F.cross_entropy, data)
    return CurvatureMonitor(target, every=2, steps=6, probes=2, strict=True, **measure)


@pytest.mark.parametrize("source", ["batch", "loader"])
@pytest.mark.parametrize("measure", [{"preset": "full"}, *({"measure": [name]} for name in NOISE)])
def test_a_run_whose_noise_is_measured_ends_with_the_same_bits(measure, source):
    run, monitor = train(
        watch=lambda model, batches: some_noise(model, measure, None if source == "batch" else batches)
    )
    assert differing(reference("sgd", "plain"), run.trace()) == []
    assert [one.step for one in monitor.history] == [2, 4, 6, 8, 10]
    wanted = set().union(*(KEYS[name] for name in measure.get("measure", FULL)))
    assert all(wanted <= set(one.scalars) for one in monitor.history)


def test_measuring_noise_between_backward_and_step_leaves_the_gradients():
    def disturb(run, _):
        before = {name: (p.grad, p.grad.clone()) for name, p in run.model.named_parameters() if p.grad is not None}
        assert some_noise(run.model, {"measure": NOISE}, None).measure() is not None
        for name, p in run.model.named_parameters():
            if p.grad is not None:
                assert p.grad is before[name][0]
                assert torch.equal(p.grad, before[name][1])

    run, _ = train(disturb=disturb)
    assert differing(reference("sgd", "plain"), run.trace()) == []


def test_a_quantity_that_fails_on_the_way_leaves_no_trace(monkeypatch):
    failing(monkeypatch, "cwgd")

    def interrupted(hessian, covariance, **_):
        covariance @ torch.ones(hessian.size)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(quantities, "alignment", interrupted)
    with pytest.warns(CurvdiagWarning, match="failed and training goes on"):
        run, monitor = train(
            watch=lambda model, _: CurvatureMonitor(
                some_noise(model, {}, None).objective, every=2, steps=6, probes=2, preset="full"
            )
        )
    assert differing(reference("sgd", "plain"), run.trace()) == []
    for one in monitor.history:
        assert KEYS["noise_scale"] <= set(one.scalars)
        assert not (KEYS["cwgd"] | KEYS["alignment"]) & set(one.scalars)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_noise_under_modes_without_gradients(mode):
    monitor = watch(measure=NOISE)
    outside = monitor.measure()
    with mode():
        inside = monitor.measure()
    for name in NOISE:
        for key in KEYS[name]:
            same(inside.scalars[key], outside.scalars[key])


def test_precision_and_pieces_of_the_hessian_are_those_of_the_noise():
    model, batch = make("mlp-tanh")
    single = Objective(model, F.cross_entropy, batch)
    double = watch(single, measure=NOISE, hessian={"dtype": torch.float64, "micro_batch": 2}).measure()
    exact = watch(Objective(model.double(), F.cross_entropy, (batch[0].double(), batch[1])), measure=NOISE).measure()
    for name in NOISE:
        for key in KEYS[name] - {"noise/cwgd", "noise/scale_curvature"}:
            value = exact.scalars[key]
            assert double[key] == pytest.approx(float(value), rel=1e-9, nan_ok=True), key
