"""The other quantities that learning-rate and p-schedules read, and what they ask the monitor itself."""

from __future__ import annotations

import importlib

import pytest
import torch
from nets import make
from oracles import criterion_loss, dense_hessian
from torch import nn
from torch.nn import functional as F

from curvdiag import CurvatureMonitor, LogSpaced, Objective, OverheadBudget, anisotropy
from curvdiag.monitor import quantities
from curvdiag.noise.cwgd import cwgd
from curvdiag.noise.noise_scale import noise_scale
from curvdiag.spectrum import MEASURES


def watch(objective, measure, **options):
    options = {"steps": 8, "probes": 3, "tol": 1e-9, "every": 1, "strict": True, **options}
    return CurvatureMonitor(objective, measure=list(measure), **options)


# Noise


def test_the_diagonal_form_of_cwgd_is_exact_where_the_hessian_is_diagonal():
    """A linear model of one-hot inputs: each weight has its own samples, and the Hessian is diagonal."""
    model = nn.Linear(3, 1, bias=False).double()
    inputs = torch.eye(3, dtype=torch.float64).repeat(4, 1) * torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    targets = torch.randn(12, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = watch(Objective(model, F.mse_loss, (inputs, targets)), ["cwgd_diagonal"], probes=2).measure()
    curvature = 2 * inputs.square().mean(0)
    gradients = 2 * (model(inputs) - targets).detach() * inputs
    variance = (gradients - gradients.mean(0)).square().mean(0)
    assert found["noise/cwgd_diagonal"] == pytest.approx(float(2 * (variance / curvature).sum()), rel=1e-12)
    assert not any("CWGD" in note for note in found.notes)


@pytest.mark.parametrize("probes", [1, 4])
def test_its_probes_are_those_of_the_settings(probes):
    model, batch = make("mlp-tanh")
    target = Objective(model, F.cross_entropy, batch)
    found = watch(target, ["cwgd_diagonal"], probes=probes, seed=5).measure()
    expected = cwgd(target, "diagonal", probes=probes, seed=5)
    assert found["noise/cwgd_diagonal"] == pytest.approx(expected.value.value, rel=1e-9)
    assert found["curv/cost/matvecs"] == probes
    hidden = any("noise of 4 probes hides" in note for note in found.notes)
    assert hidden == (probes == 4)  # a single probe cannot tell
    assert expected.lost_share > 0.1 or probes == 1


def test_notes_of_the_diagonal_form_are_passed_on():
    model = nn.Linear(3, 1, bias=False).double()
    inputs = torch.zeros(4, 3, dtype=torch.float64)
    found = watch(Objective(model, F.mse_loss, (inputs, torch.ones(4, 1, dtype=torch.float64))), ["cwgd_diagonal"])
    measured = found.measure()
    assert any("diagonal CWGD: no diagonal entry of the Hessian is positive" in note for note in measured.notes)
    assert measured["noise/cwgd_diagonal"] != measured["noise/cwgd_diagonal"]


def test_gradient_moments_are_measured_once_for_all_who_need_them(monkeypatch):
    calls = []
    moments = quantities.gradient_moments
    for name in ("curvdiag.monitor.quantities", "curvdiag.noise.noise_scale", "curvdiag.noise.cwgd"):
        module = importlib.import_module(name)
        monkeypatch.setattr(module, "gradient_moments", lambda *a, **o: calls.append(1) or moments(*a, **o))
    model, batch = make("mlp-tanh")
    watch(Objective(model, F.cross_entropy, batch), ["noise_scale", "noise_trace", "cwgd_diagonal"]).measure()
    assert len(calls) == 1


def test_the_parts_of_the_best_step_are_those_of_the_gradients_one_by_one():
    model, (inputs, targets) = make("mlp-tanh")
    target = Objective(model, F.cross_entropy, (inputs, targets))
    found = watch(target, ["noise_scale"], seed=2).measure()
    parameters = list(model.parameters())
    rows = []
    for x, t in zip(inputs, targets, strict=True):
        grads = torch.autograd.grad(F.cross_entropy(model(x[None]), t[None]), parameters)
        rows.append(torch.cat([g.flatten() for g in grads]))
    rows = torch.stack(rows)
    mean, count = rows.mean(0), len(rows)
    matrix = dense_hessian(model, criterion_loss(F.cross_entropy, (inputs, targets)))
    trace = float((rows - mean).square().sum()) / (count - 1)
    assert found["noise/gradient_square_probe"] == pytest.approx(float(mean @ mean), rel=1e-9)
    assert found["noise/gradient_square"] == pytest.approx(float(mean @ mean) - trace / count, rel=1e-9)
    assert found["noise/gradient_curvature_probe"] == pytest.approx(float(mean @ matrix @ mean), rel=1e-9)
    truth = float(((rows - mean) @ matrix * (rows - mean)).sum()) / count
    along = found.scalars["noise/trace_hc"]
    assert abs(along.value - truth) < 4 * along.standard_error
    # Without bias it is the mean over pairs of different samples.
    pairs = (rows @ matrix @ rows.T).fill_diagonal_(0).sum() / (count * (count - 1))
    curvature = found.scalars["noise/gradient_curvature"]
    assert abs(curvature.value - float(pairs)) < 4 * curvature.standard_error
    exact = float(mean @ matrix @ mean) - along.value / (count - 1)
    assert curvature.value == pytest.approx(exact, rel=1e-9)
    step = found["noise/gradient_square_probe"] / (found["noise/gradient_curvature_probe"] + along.value / 16)
    scale = noise_scale(target, curvature=True, starts=quantities.STARTS, seed=2)
    assert step == pytest.approx(scale.step(16).value, rel=1e-9)


# Layers


def test_the_anisotropy_of_a_layer_is_that_of_its_dense_block():
    model, batch = make("mlp-tanh")
    monitor = watch(Objective(model, F.cross_entropy, batch), ["layer_anisotropy"], steps=20, probes=60)
    found = monitor.measure()
    matrix = dense_hessian(model, criterion_loss(F.cross_entropy, batch))
    start = 0
    for layer in ("0", "2", "4"):
        size = sum(p.numel() for p in model[int(layer)].parameters())
        block = matrix[start : start + size, start : start + size]
        start += size
        exact = anisotropy(torch.linalg.eigvalsh(block))
        for name in ("stable_rank", "participation_ratio", "intrinsic_dimension", "effective_rank", "negative_mass"):
            value = found.scalars[f"curv/layer/{layer}/anisotropy/{name}"]
            assert abs(value.value - getattr(exact, name).value) < 5 * value.standard_error + 1e-9, (layer, name)
        assert f"curv/layer/{layer}/anisotropy/top_ratio" not in found.scalars
    assert {key.rpartition("/")[2] for key in found.scalars if "/anisotropy/" in key} <= set(MEASURES)
    assert not found.densities


def test_layers_and_their_anisotropy_share_all_products():
    model, batch = make("mlp-tanh")
    target = Objective(model, F.cross_entropy, batch)
    alone, layers, both = (
        watch(target, names).measure() for names in (["layer_anisotropy"], ["layers"], ["layers", "layer_anisotropy"])
    )
    assert alone["curv/cost/matvecs"] == layers["curv/cost/matvecs"] == both["curv/cost/matvecs"]
    assert set(both.scalars) == set(alone.scalars) | set(layers.scalars)
    for key in both.scalars:
        if key.startswith("curv/layer"):
            one = (alone if "/anisotropy/" in key else layers)[key]
            assert both[key] == one, key


# What a schedule asks the monitor itself


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, True),
        ({"cadence": OverheadBudget(0.5)}, True),
        ({"every": 3}, False),
        ({"cadence": LogSpaced(4)}, False),
        ({"cadence": lambda step: step == 2}, False),
    ],
)
def test_it_says_whether_its_cadence_reads_the_clock(options, expected):
    model, batch = make("mlp-tanh")
    assert CurvatureMonitor(Objective(model, F.cross_entropy, batch), **options).depends_on_clock is expected


def test_it_says_that_it_is_closed():
    model, batch = make("mlp-tanh")
    monitor = watch(Objective(model, F.cross_entropy, batch), ["trace"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert not monitor.closed
    with monitor.attach(optimizer):
        monitor.detach()
        assert not monitor.closed
    assert monitor.closed
    with pytest.raises(AttributeError):
        monitor.closed = False
