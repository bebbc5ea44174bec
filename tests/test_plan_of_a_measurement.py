"""``objective.plan()`` says what a density will take, before anything of that size is made."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from nets import make
from torch import nn
from torch.nn import functional as F

from curvdiag import GaussNewton, Hessian, Objective, spectral_density
from curvdiag.errors import ArgumentError
from curvdiag.memory import human_bytes
from curvdiag.operators.live_bytes import LiveBytes
from curvdiag.operators.plan import Plan
from curvdiag.operators.trial import Line, Peak, Trial
from curvdiag.spectrum import deflation, density, forecast
from curvdiag.spectrum.forecast import BUILD, PASSES, expected_seconds, plan_density


def objective(samples: int = 400, batches: int = 1) -> Objective:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(60, 200), nn.Tanh(), nn.Linear(200, 200), nn.Tanh(), nn.Linear(200, 5))
    data = [(torch.randn(samples, 60), torch.randint(5, (samples,))) for _ in range(batches)]
    return Objective(model, F.cross_entropy, data)


@pytest.mark.parametrize(("samples", "batches"), [(20, 1), (400, 1), (400, 3), (3000, 1)])
def test_the_peak_is_that_of_the_tensors_that_are_then_alive(samples: int, batches: int) -> None:
    """Few samples, where the weights decide, and many, where the activations do."""
    subject = objective(samples, batches)
    plan = subject.plan(steps=4, probes=2)
    Hessian(subject, memory=0)  # what is checked once for an objective
    with LiveBytes() as counter:
        spectral_density(Hessian(subject, batched=False), steps=4, probes=2)
    assert plan.peak_bytes == pytest.approx(counter.peak(), rel=0.1)


@pytest.mark.parametrize("matrix", ["hessian", "gauss_newton"])
@pytest.mark.parametrize("memory", [None, 0, 1_000_000])
def test_the_graphs_are_those_of_the_operator(matrix: str, memory: int | None) -> None:
    subject = objective(batches=2)
    plan = subject.plan(matrix=matrix, memory=memory)
    op = {"hessian": Hessian, "gauss_newton": GaussNewton}[matrix](subject, memory=memory)
    assert op.plan is not None
    assert (plan.graphs.kept, plan.graphs.rebuilt) == (op.plan.kept, op.plan.rebuilt)
    assert bool(plan.notes) == (memory is not None)


@pytest.mark.parametrize("deflate", [0, 3, "auto"])
def test_the_products_are_at_least_those_that_are_made_and_all_of_them_without_deflation(deflate: int | str) -> None:
    subject = objective(40)
    plan = subject.plan(steps=30, probes=2, deflate=deflate)
    made = spectral_density(Hessian(subject), steps=30, probes=2, deflate=deflate)  # type: ignore[arg-type]
    assert made.matvecs <= plan.products
    assert deflate or made.matvecs == plan.products == 60
    assert len(made.deflated) <= plan.deflated


def test_the_time_is_that_of_the_passes_of_all_graphs_and_of_the_vectors() -> None:
    gradient, product = Line(0.5, 0.01), Line(1.0, 0.02)
    tried = Trial(Line(0, 0), Peak(()), Peak(()), gradient, product, dot=0.1)
    kept = expected_seconds(tried, Plan((100, 50), (), 0, 0), 40, 4)
    assert kept == pytest.approx(BUILD * (1.5 + 1.0) + 40 * (3.0 + 2.0 + PASSES * 0.1))
    rebuilt = expected_seconds(tried, Plan((), (100, 50), 0, 0), 40, 4)
    assert rebuilt == pytest.approx(40 * (3.0 + 2.0 + PASSES * 0.1 + BUILD * (1.5 + 1.0) / 4))


def test_seconds_come_from_the_clock_and_grow_with_the_products() -> None:
    def ticks() -> Iterator[float]:
        yield from (float(n) for n in range(10**6))

    plans = [plan_density(objective(), steps=steps, clock=ticks().__next__) for steps in (10, 20)]
    # One tick for each passage that is timed, whatever its size: products of 1 s, gradients of 1 s, dots of 1 s.
    scale = plans[0].size / min(plans[0].size, 1 << 22)
    assert plans[0].seconds == pytest.approx(BUILD + 40 * (1 + PASSES * scale))
    assert plans[1].seconds == pytest.approx(BUILD + 80 * (1 + PASSES * scale))


def test_it_says_what_does_not_fit_and_what_happens_then(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = objective()
    vector = 4 * subject.parameters.size
    for module in (forecast, density, deflation):
        monkeypatch.setattr(module, "free_bytes", lambda device: 24 * vector)
    tight = subject.plan(probes=4, deflate=10, memory=0)
    assert tight.lockstep < 4
    assert tight.basis == 0
    notes = " ".join(tight.notes)
    assert "advance in groups" in notes
    assert "nothing deflated" in notes
    assert "built anew" in notes
    monkeypatch.setattr(forecast, "free_bytes", lambda device: vector)
    assert "more than what is free" in str(subject.plan())


def test_it_leaves_no_trace() -> None:
    model, batch = make("conv-batchnorm")
    model.train()
    subject = Objective(model, F.cross_entropy, batch)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    marks, random = set(subject.__dict__), torch.get_rng_state()
    subject.plan()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(module.training for module in model.modules())
    assert torch.equal(random, torch.get_rng_state())
    assert set(subject.__dict__) == marks


def test_it_prints_what_a_reader_needs_and_becomes_a_dictionary() -> None:
    plan = objective().plan(steps=30, probes=3, deflate=5)
    text = str(plan)
    for word in (
        "products",
        "vectors",
        "deflation",
        "weights",
        "graphs",
        "memory",
        "time",
        human_bytes(plan.peak_bytes),
    ):
        assert word in text
    assert plan.to_dict()["products"] == plan.products == 90 + 35


def test_wrong_wishes_are_refused() -> None:
    subject = objective(8)
    wishes = {"quantity": "trace"}, {"steps": 0}, {"probes": 1.5}, {"matrix": "fisher"}, {"memory": -1}
    for wish in (*wishes, {"method": "finite-difference"}):
        with pytest.raises(ArgumentError):
            subject.plan(**wish)  # type: ignore[arg-type]
