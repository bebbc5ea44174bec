"""What a measurement of the monitor costs in products: no product twice, and less from the last eigenvector."""

from __future__ import annotations

import math

import pytest
import torch
from digits_training import checkpoints, hessian_of, probe_set
from nets import make
from oracles import criterion_loss, dense_hessian
from torch.nn import functional as F

from curvdiag import CurvatureMonitor, Objective, measure_spectrum, top_eigenpairs
from curvdiag.monitor import quantities, warm
from curvdiag.operators import Hessian

pytestmark = pytest.mark.filterwarnings("ignore:measuring every")

STEPS, PROBES = 12, 3
MATVECS, LARGEST = "curv/cost/matvecs", "curv/hessian/lambda_max"
PRECONDITIONED = "curv/preconditioned/lambda_max"


def watch(model=None, batch=None, **options):
    if model is None:
        model, batch = make("mlp-tanh")
    objective = Objective(model, F.cross_entropy, batch)
    return CurvatureMonitor(objective, **{"steps": STEPS, "probes": PROBES, "strict": True, **options})


def digits(**options):
    """A monitor of a trained net, and what trains it on to its next checkpoint."""
    run = checkpoints("relu-sgd", 5)
    model = next(run)
    return watch(model, probe_set(), **options), lambda: next(run)


@pytest.fixture
def multiplied(monkeypatch):
    """Each vector, as a row of single numbers, that a Hessian is multiplied with, or that it takes the form of."""
    rows = []

    def recorded(plain):
        def record(self, vectors):
            rows.extend(vectors.detach().clone().unbind(0))
            return plain(self, vectors)

        return record

    for name in ("_multiply", "_forms"):
        monkeypatch.setattr(Hessian, name, recorded(getattr(Hessian, name)))
    return rows


def repeated(rows):
    """Pairs of rows that are parallel, up to rounding."""
    unit = torch.stack([row / row.norm() for row in rows]).double()
    overlap = (unit @ unit.T).abs().fill_diagonal_(0)
    return int((overlap > 1 - 1e-9).sum()) // 2


def test_light_costs_the_top_eigenvalue_and_the_probes_of_the_trace(multiplied):
    monitor, _ = digits(preset="light")
    found = monitor.measure()
    alone = top_eigenpairs(hessian_of(monitor.objective.model), 1, tol=1e-2)
    assert len(multiplied) == found[MATVECS] + alone.matvecs
    assert found[MATVECS] == alone.matvecs + PROBES
    assert repeated(multiplied[: int(found[MATVECS])]) == 0


@pytest.mark.parametrize("measure", [["density"], ["anisotropy"], ["lambda_max", "trace", "density", "anisotropy"]])
def test_standard_costs_one_krylov_budget_and_no_product_twice(multiplied, measure):
    monitor, _ = digits(measure=measure)
    found = monitor.measure()
    made = multiplied.copy()
    spectrum = measure_spectrum(hessian_of(monitor.objective.model), 5, steps=STEPS, probes=PROBES, tol=1e-2)
    assert len(made) == found[MATVECS] == spectrum.matvecs
    assert repeated(made) == 0


def test_the_needs_of_full_add_up():
    parts = {
        "spectrum": ["lambda_max", "trace", "density", "anisotropy"],
        **{name: [name] for name in ("layers", "noise_scale", "noise_trace", "cwgd", "alignment")},
    }
    cost = {name: watch(measure=names).measure()[MATVECS] for name, names in parts.items()}
    assert cost["noise_trace"] == 0
    assert watch(preset="full").measure()[MATVECS] <= sum(cost.values())
    assert watch(preset="standard").measure()[MATVECS] == cost["spectrum"]


def test_light_measurements_start_from_the_last_eigenvector_and_stay_right():
    monitor, train = digits(preset="light")
    cold, _ = digits(preset="light", warm=False)
    cold.objective = monitor.objective
    spent = {"warm": 0.0, "cold": 0.0}
    assert monitor.measure()[MATVECS] == cold.measure()[MATVECS]  # there is nothing to start from
    for _ in range(4):
        train()
        one, other = monitor.measure(), cold.measure()
        spent["warm"] += one[MATVECS] - PROBES
        spent["cold"] += other[MATVECS] - PROBES
        exact = float(top_eigenpairs(hessian_of(monitor.objective.model), 1, tol=1e-6).values[0])
        assert one[LARGEST] == pytest.approx(exact, rel=1e-2)
        assert one["curv/hessian/trace"] == other["curv/hessian/trace"]
    assert spent["warm"] <= 0.75 * spent["cold"]


def test_the_preconditioned_eigenvalue_starts_warm_too_and_apart_from_the_other():
    model, batch = make("mlp-tanh")
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    monitor = watch(model, batch, measure=["lambda_max", "preconditioned_lambda_max"], tol=1e-4).attach(optimizer)
    monitor.cadence = lambda step: step > 2
    for _ in range(6):
        optimizer.zero_grad()
        F.cross_entropy(model(batch[0]), batch[1]).backward()
        optimizer.step()
    costs = [one[MATVECS] for one in monitor.history]
    assert min(costs[1:]) < costs[0]
    matrix = dense_hessian(model, criterion_loss(F.cross_entropy, batch))
    assert monitor.latest[LARGEST] == pytest.approx(float(torch.linalg.eigvalsh(matrix)[-1]), rel=1e-6)
    again = watch(model, batch, measure=["preconditioned_lambda_max"], tol=1e-8, warm=False).attach(optimizer)
    assert monitor.latest[PRECONDITIONED] == pytest.approx(again.measure()[PRECONDITIONED], rel=1e-5)


def test_a_leading_eigenvector_that_has_changed_completely_is_found():
    """The curvature moves from one layer to another between two measurements."""

    def loss(outputs, targets):
        parts = state["first"] * outputs[:, :30].square().sum(1) + state["second"] * outputs[:, 30:].square().sum(1)
        return parts.mean()

    state = {"first": 1.0, "second": 0.1}
    model = torch.nn.Linear(1, 60, bias=False).double()
    batch = torch.ones(4, 1, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    monitor = CurvatureMonitor(Objective(model, loss, batch), measure=["lambda_max"], strict=True)
    for first, second, largest in ((1.0, 0.1, 2.0), (0.1, 1.0, 2.0), (5.0, 1.0, 10.0), (1.0, 1.0, 2.0)):
        state.update(first=first, second=second)
        assert monitor.measure()[LARGEST] == pytest.approx(largest, rel=1e-3)


def test_each_measurement_mixes_another_random_vector_and_equal_runs_are_equal():
    seeds = []
    kept = warm.top_eigenpairs

    def record(*given, **options):
        seeds.append(options["seed"])
        return kept(*given, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(warm, "top_eigenpairs", record)
        one, other = watch(measure=["lambda_max"], seed=7), watch(measure=["lambda_max"], seed=7)
        values = [[monitor.measure()[LARGEST] for _ in range(3)] for monitor in (one, other)]
    assert values[0] == values[1]
    assert seeds == [7, 8, 9] * 2


def kept(monitor):
    return {name: vector for name, (_, vector) in monitor._survey.warm._kept.items()}


def test_a_failed_measurement_leaves_no_vector(monkeypatch):
    monitor = watch(preset="light", strict=False)
    monitor.measure()
    assert set(kept(monitor)) == {"hessian"}
    with torch.no_grad():
        weight = next(monitor.objective.model.parameters())
        before = weight.clone()
        weight.fill_(math.nan)
    with pytest.warns(match="failed"):
        assert monitor.measure() is None
    assert not kept(monitor)
    with torch.no_grad():
        weight.copy_(before)
    assert monitor.measure().scalars[LARGEST] == monitor.history[0][LARGEST]  # a cold one again

    def interrupted(work):
        raise KeyboardInterrupt

    monkeypatch.setitem(quantities.QUANTITIES, "trace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        monitor.measure()
    assert not kept(monitor)


def test_a_quantity_that_fails_alone_leaves_the_eigenvector_of_the_other(monkeypatch):
    monitor = watch(preset="light", strict=False)

    def broken(work):
        raise RuntimeError("broken")

    monkeypatch.setitem(quantities.QUANTITIES, "trace", broken)
    with pytest.warns(match="broken"):
        monitor.measure()
    assert set(kept(monitor)) == {"hessian"}


def test_what_has_not_converged_or_does_not_fit_into_memory_is_not_kept(monkeypatch):
    monitor = watch(measure=["lambda_max"])
    with monkeypatch.context() as patch:
        patch.setattr(warm, "free_bytes", lambda device: 100)
        monitor.measure()
        assert not kept(monitor)
    with monkeypatch.context() as patch:
        limited = warm.top_eigenpairs
        patch.setattr(warm, "top_eigenpairs", lambda *a, **o: limited(*a, **{**o, "tol": 1e-9, "max_matvecs": 2}))
        assert any("not converged" in note for note in monitor.measure().notes)
        assert not kept(monitor)
    monitor.measure()
    assert kept(monitor)["hessian"].numel() == monitor.objective.parameters.size


def test_a_vector_of_other_parameters_or_precision_is_not_used():
    starts = warm.WarmStarts()
    for name, dtype in (("mlp-tanh", torch.float64), ("mlp-relu", torch.float32), ("lstm", torch.float64)):
        model, batch = make(name, dtype=dtype)
        objective = Objective(model, F.cross_entropy, batch)
        found = starts.largest("hessian", Hessian(objective), objective, tol=1e-3, seed=0)
        alone = top_eigenpairs(Hessian(objective), 1, tol=1e-3)
        assert float(found.values[0]) == float(alone.values[0])
        assert found.matvecs == alone.matvecs


def test_the_first_measurement_after_a_resume_is_cold():
    monitor = watch(preset="light")
    first, second = monitor.measure(), monitor.measure()
    assert second[MATVECS] < first[MATVECS]
    monitor.load_state_dict(monitor.state_dict())
    assert monitor.measure()[LARGEST] == first[LARGEST]


def test_a_monitor_of_a_density_keeps_nothing():
    monitor = watch(preset="standard")
    assert [monitor.measure()[LARGEST] for _ in range(2)] == [monitor.measure()[LARGEST]] * 2
    assert not kept(monitor)
