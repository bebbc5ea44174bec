"""SharpnessCappedLR keeps any schedule below the edge of stability, from measurements."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from lr_schedules import Training, rates_of, sgd, told, walk
from torch import nn
from torch.nn import functional as F
from torch.optim import lr_scheduler as torch_lr

from curvdiag import CurvatureMonitor, Hessian, Objective, top_eigenpairs
from curvdiag.errors import ArgumentError
from curvdiag.optim import LPSGD, LPSGDM, Lion
from curvdiag.schedules.sharpness_capped_lr import SharpnessCappedLR
from curvdiag.schedules.stability import stability_limit

pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.filterwarnings("ignore:measuring every")]


def constant_lr(optimizer):
    return torch_lr.ConstantLR(optimizer, factor=1.0)


# The cap


def test_the_rate_is_the_smaller_of_what_is_wanted_and_the_cap_and_rises_again():
    optimizer, bare = sgd(0.5), sgd(0.5)
    sharp = [1.0, 8.0, 8.0, None, 40.0, 2.0, 0.5, -3.0, 100.0]
    schedule = SharpnessCappedLR(torch_lr.ExponentialLR(optimizer, 0.9), told(*sharp), fraction=0.8)
    wanted = walk(bare, torch_lr.ExponentialLR(bare, 0.9), len(sharp))
    held = [1.0, 8.0, 8.0, 8.0, 40.0, 2.0, 0.5, -3.0, 100.0]
    caps = [0.8 * 2 / s if s > 0 else math.inf for s in held]
    found = walk(optimizer, schedule, len(sharp))
    assert found == pytest.approx([min(pair) for pair in zip(wanted, caps, strict=True)], rel=1e-14)
    assert [rate == want for rate, want in zip(found, wanted, strict=True)] == [
        cap >= want for cap, want in zip(caps, wanted, strict=True)
    ]
    assert [choice.chosen["cap/0"] for choice in schedule.history] == pytest.approx(caps[:3] + caps[4:], rel=1e-14)


def test_where_it_is_not_reached_every_bit_is_the_wrapped_schedules():
    def run(capped):
        training = Training(every=2, measure=["lambda_max"])
        schedule = torch_lr.CosineAnnealingLR(training.optimizer, 20)
        if capped:
            schedule = SharpnessCappedLR(schedule, training.monitor)
        rates = []
        for _ in range(20):
            training.step()
            schedule.step()
            rates.append(rates_of(training.optimizer)[0])
        if capped:
            assert min(schedule.caps) < math.inf
            assert all(choice.chosen["cap/0"] > 0.2 for choice in schedule.history)
        return rates, [p.detach() for p in training.model.parameters()]

    (rates, weights), (bare_rates, bare_weights) = run(True), run(False)
    assert rates == bare_rates
    assert all(torch.equal(one, other) for one, other in zip(weights, bare_weights, strict=True))


def test_before_the_first_measurement_and_where_nothing_is_finite_nothing_is_capped(caplog):
    caplog.set_level(logging.WARNING)
    optimizer = sgd(0.5)
    schedule = SharpnessCappedLR(constant_lr(optimizer), told(None, math.nan, math.inf, RuntimeError("no"), 40.0, None))
    assert schedule.caps == [math.inf]
    assert walk(optimizer, schedule, 7) == [0.5] * 4 + [pytest.approx(0.5 * 2 / 40.0, rel=1e-14)] * 3
    assert schedule.age == 3
    assert schedule.wanted_lrs == [0.5]


def test_each_group_has_the_cap_of_its_settings_as_they_are_now():
    groups = [
        {"params": [nn.Parameter(torch.zeros(1))]},
        {"params": [nn.Parameter(torch.zeros(1))], "momentum": 0.9, "weight_decay": 0.5},
        {"params": [nn.Parameter(torch.zeros(1))], "momentum": 0.9, "nesterov": True, "lr": 1e-3},
    ]
    optimizer = torch.optim.SGD(groups, lr=5.0)
    schedule = SharpnessCappedLR(constant_lr(optimizer), lambda: 10.0, fraction=0.5)
    assert rates_of(optimizer) == pytest.approx([0.5 * 2 / 10, 0.5 * 3.8 / 10.5, 1e-3])
    optimizer.param_groups[1]["momentum"] = 0.5
    walk(optimizer, schedule, 1)
    assert rates_of(optimizer) == pytest.approx([0.5 * 2 / 10, 0.5 * 3 / 10.5, 1e-3])


def test_one_cycle_moves_the_momentum_under_the_cap():
    optimizer = sgd(0.5, momentum=0.9)
    cycle = torch_lr.OneCycleLR(optimizer, 5.0, 20, base_momentum=0.85, max_momentum=0.95)
    schedule = SharpnessCappedLR(cycle, lambda: 2.0, fraction=1.0)
    capped = 0
    for _ in range(20):
        momentum, rate = optimizer.param_groups[0]["momentum"], rates_of(optimizer)[0]
        edge = 2 * (1 + momentum) / 2.0
        assert rate == pytest.approx(min(schedule.wanted_lrs[0], edge))
        capped += rate < schedule.wanted_lrs[0]
        optimizer.step()
        schedule.step()
    assert 5 < capped < 20


def test_a_setting_without_a_limit_keeps_the_last_one_and_stops_no_training(caplog):
    caplog.set_level(logging.WARNING)
    optimizer = sgd(5.0, momentum=0.5)
    schedule = SharpnessCappedLR(constant_lr(optimizer), lambda: 1.0, fraction=1.0)
    optimizer.param_groups[0]["momentum"] = 1.0
    walk(optimizer, schedule, 3)
    assert rates_of(optimizer) == [3.0]
    assert any("momentum is at least 0 and below 1" in record.getMessage() for record in caplog.records)


# From measurements: a rate far above the edge diverges without the cap and converges with it.


QUADRATIC = {
    "gradient descent": lambda p: torch.optim.SGD(p, 3.0),
    "heavy ball": lambda p: torch.optim.SGD(p, 9.0, momentum=0.9),
    "Nesterov": lambda p: torch.optim.SGD(p, 3.0, momentum=0.9, nesterov=True),
    "damped": lambda p: torch.optim.SGD(p, 9.0, momentum=0.6, dampening=0.3, weight_decay=0.1),
    "LPSGD": lambda p: LPSGD(p, 3.0, p=2.0, weight_decay=0.1),
    "LPSGDM": lambda p: LPSGDM(p, 90.0, p=2.0, beta=0.9),
}


def least_squares(make, capped, steps=300):
    """Distance from the minimum of a quadratic with eigenvalues up to 10 or so, start and end."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(30, 4, generator=generator, dtype=torch.float64) * torch.tensor([3.0, 1.0, 1.0, 0.5])
    model = nn.Linear(4, 1, bias=False).double()
    nn.init.ones_(model.weight)
    objective = Objective(model, F.mse_loss, (inputs, torch.zeros(30, 1, dtype=torch.float64)))
    optimizer = make(model.parameters())
    known = stability_limit(optimizer)
    schedule = constant_lr(optimizer)
    if capped:
        quantity = "preconditioned_lambda_max" if known.preconditioned else "lambda_max"
        monitor = CurvatureMonitor(objective, every=3, strict=True, measure=[quantity]).attach(optimizer)
        if known.preconditioned:  # D is known after the first step, which must be a small one
            schedule = torch_lr.LinearLR(optimizer, 1e-6, total_iters=5)
        else:
            monitor.measure()
        schedule = SharpnessCappedLR(schedule, monitor, fraction=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        F.mse_loss(model(inputs), torch.zeros(30, 1, dtype=torch.float64)).backward()
        optimizer.step()
        schedule.step()
    sharpness = float(torch.linalg.eigvalsh(2 * inputs.T @ inputs / 30).max())
    if capped:
        assert rates_of(optimizer)[0] == pytest.approx(0.9 * known.rate(sharpness), rel=0.02)
    return float(model.weight.detach().norm()) / 2


@pytest.mark.parametrize("name", QUADRATIC)
def test_on_a_quadratic_a_rate_far_above_the_edge_converges_under_the_cap(name):
    without = least_squares(QUADRATIC[name], False)
    assert not without < 1e6  # or NaN
    assert least_squares(QUADRATIC[name], True) < 1e-2


NETS = {
    "gradient descent": (lambda p: torch.optim.SGD(p, 100.0), 0.9),
    "heavy ball": (lambda p: torch.optim.SGD(p, 100.0, momentum=0.9), 0.3),
    "Nesterov": (lambda p: torch.optim.SGD(p, 100.0, momentum=0.9, nesterov=True), 0.5),
    "LPSGDM": (lambda p: LPSGDM(p, 30.0, p=4.0, beta=0.9), 0.5),
    "AdamW": (lambda p: torch.optim.AdamW(p, 10.0, weight_decay=0.0), 0.3),
}


def loss_of_a_net(make, fraction=None, steps=60):
    """The loss at the end over that at the start; without a cap if there is no fraction."""
    preconditioned = stability_limit(make([nn.Parameter(torch.zeros(1))])).preconditioned
    quantity = "preconditioned_lambda_max" if preconditioned else "lambda_max"
    training = Training(make, every=1 if fraction else 10_000, measure=[quantity])
    schedule = constant_lr(training.optimizer)
    if fraction:
        if preconditioned:  # D is known after the first step, which must be a small one
            schedule = torch_lr.LinearLR(training.optimizer, 1e-6, total_iters=5)
        else:
            training.monitor.measure()
        schedule = SharpnessCappedLR(schedule, training.monitor, fraction=fraction)
    before = training.loss()
    for _ in range(steps):
        training.step(batch=24)
        schedule.step()
    return float((training.loss() / before).detach()), schedule


@pytest.mark.parametrize("name", NETS)
def test_on_a_net_a_rate_far_above_the_edge_trains_under_the_cap(name):
    make, fraction = NETS[name]
    assert not loss_of_a_net(make)[0] < 2
    assert loss_of_a_net(make, fraction)[0] < 0.6


def test_close_to_the_edge_heavy_ball_can_be_thrown_where_the_loss_is_flat():
    """What the docstring warns of: there the sharpness is next to nothing, and so is the cap."""
    loss, schedule = loss_of_a_net(NETS["heavy ball"][0], 0.9)
    assert loss > 2
    assert schedule.sharpness < 1e-3
    assert schedule.get_last_lr() == schedule.wanted_lrs == [100.0]


def test_it_reads_the_sharpness_of_the_optimizers_own_kind():
    plain, scaled = (
        Training(measure=["lambda_max"]),
        Training(lambda p: LPSGDM(p, 0.1), measure=["preconditioned_lambda_max"]),
    )
    for training in (plain, scaled):
        schedule = SharpnessCappedLR(constant_lr(training.optimizer), training.monitor)
        for _ in range(5):
            training.step()
            schedule.step()
        (key,) = [k for k in training.monitor.latest.scalars if k.endswith("lambda_max")]
        assert schedule.sharpness == training.monitor.latest[key]
        recorded = dict(training.monitor.recorded)[5]
        assert set(recorded) == {f"schedule/sharpness_capped/{key}" for key in ("lambda_max", "cap/0", "lr/0")}
    with pytest.raises(ArgumentError, match="measures lambda_max"):
        SharpnessCappedLR(constant_lr(plain.optimizer), scaled.monitor)
    with pytest.raises(ArgumentError, match="measures preconditioned_lambda_max"):
        SharpnessCappedLR(constant_lr(scaled.optimizer), plain.monitor)


def test_a_function_may_give_eigenpairs():
    training = Training()
    top = top_eigenpairs(Hessian(training.monitor.objective), 2)
    schedule = SharpnessCappedLR(constant_lr(training.optimizer), lambda: top)
    assert schedule.sharpness == float(top.values[0])


# Other optimizers


def test_an_optimizer_whose_limit_is_not_known_needs_one():
    parameters = [nn.Parameter(torch.zeros(2))]
    for optimizer in (Lion(parameters, 9.0), torch.optim.RMSprop(parameters, 9.0), torch.optim.NAdam(parameters, 9.0)):
        with pytest.raises(ArgumentError, match="limit="):
            SharpnessCappedLR(constant_lr(optimizer), lambda: 4.0)
        SharpnessCappedLR(constant_lr(optimizer), lambda: 4.0, limit=3.0, fraction=0.5)
        assert rates_of(optimizer) == [0.5 * 3.0 / 4.0]


def test_a_given_limit_takes_the_place_of_the_known_one():
    optimizer = sgd(9.0, 9.0, momentum=0.9, weight_decay=0.3)
    schedule = SharpnessCappedLR(constant_lr(optimizer), lambda: 4.0, limit=[2.0, 1.0], fraction=1.0)
    assert rates_of(optimizer) == [0.5, 0.25]
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))], "lr": 9.0})
    schedule.scheduler.base_lrs.append(9.0)
    walk(optimizer, schedule, 2)
    assert rates_of(optimizer) == [0.5, 0.25, 0.25]
    for wrong in ([2.0], 0.0, -1.0, [1.0, math.inf], math.nan):
        with pytest.raises(ArgumentError, match="limit"):
            SharpnessCappedLR(constant_lr(sgd(0.5, 0.5)), lambda: 4.0, limit=wrong)


def test_a_given_limit_is_still_seen_through_what_the_optimizer_divides_by():
    coupled = Training(lambda p: torch.optim.Adam(p, 9.0, weight_decay=0.1), measure=["preconditioned_lambda_max"])
    with pytest.raises(ArgumentError, match="limit="):
        SharpnessCappedLR(constant_lr(coupled.optimizer), coupled.monitor)
    SharpnessCappedLR(constant_lr(coupled.optimizer), coupled.monitor, limit=38.0)
    plain = Training(lambda p: torch.optim.RMSprop(p, 9.0), measure=["lambda_max"])
    SharpnessCappedLR(constant_lr(plain.optimizer), plain.monitor, limit=2.0)


def test_ascent_needs_a_function():
    training = Training(lambda p: torch.optim.SGD(p, 9.0, maximize=True), measure=["lambda_max"])
    with pytest.raises(ArgumentError, match=r"maximize=True.*give a function"):
        SharpnessCappedLR(constant_lr(training.optimizer), training.monitor)
    SharpnessCappedLR(constant_lr(training.optimizer), lambda: 4.0)
    assert rates_of(training.optimizer) == [0.25]


@pytest.mark.parametrize("fraction", [0.0, -1.0, math.nan, math.inf])
def test_a_fraction_that_means_nothing_is_refused(fraction):
    with pytest.raises(ArgumentError, match="fraction"):
        SharpnessCappedLR(constant_lr(sgd()), lambda: 1.0, fraction=fraction)
    with pytest.raises(ArgumentError, match="wraps a learning-rate scheduler"):
        SharpnessCappedLR(sgd(), lambda: 1.0)
