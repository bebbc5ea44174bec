"""Limits of stability against the companion matrices of the update rules, and against runs of the optimizers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from curvdiag.errors import ArgumentError
from curvdiag.optim import LPSGD, LPSGDM, Lion, SignSGD
from curvdiag.schedules.stability import (
    GRADIENT_DESCENT,
    StabilityLimit,
    averaged_momentum_limit,
    heavy_ball_limit,
    nesterov_limit,
    stability_limit,
)

BETAS = [0.0, 0.3, 0.5, 0.9, 0.99]


# One step of each rule on f = h/2 x^2, written out: (x, m) -> (x, m).


def heavy_ball(x, m, rate, h, beta, dampening):
    m = beta * m + (1 - dampening) * h * x
    return x - rate * m, m


def nesterov(x, m, rate, h, beta):
    g = h * x
    m = beta * m + g
    return x - rate * (g + beta * m), m


def averaged(x, m, rate, h, beta, decay=0.0):
    m = beta * m + (1 - beta) * h * x
    return (1 - rate * decay) * x - rate * m, m


def spectral_radius(step):
    """Of the linear map ``step`` on (x, m), from what it does to the unit vectors."""
    columns = [step(1.0, 0.0), step(0.0, 1.0)]
    return max(abs(np.linalg.eigvals(np.array(columns).T)))


def crosses_one_at(edge, step):
    return (
        spectral_radius(lambda x, m: step(x, m, edge * (1 - 1e-6)))
        < 1
        < spectral_radius(lambda x, m: step(x, m, edge * (1 + 1e-6)))
    )


@pytest.mark.parametrize("h", [0.02, 1.0, 37.0])
@pytest.mark.parametrize("beta", BETAS)
def test_the_spectral_radius_of_the_companion_matrix_crosses_one_at_the_limit(beta, h):
    for dampening in (0.0, 0.4, beta):
        edge = heavy_ball_limit(beta, dampening) / h
        assert crosses_one_at(edge, lambda x, m, rate, d=dampening: heavy_ball(x, m, rate, h, beta, d))
    assert crosses_one_at(nesterov_limit(beta) / h, lambda x, m, rate: nesterov(x, m, rate, h, beta))
    assert crosses_one_at(averaged_momentum_limit(beta) / h, lambda x, m, rate: averaged(x, m, rate, h, beta))


@pytest.mark.parametrize("beta", BETAS)
def test_below_the_limit_every_rate_is_stable(beta):
    """The crossing is the first one, not some later one."""
    for share in np.linspace(0.01, 0.999, 60):
        rate = share * heavy_ball_limit(beta, 0.2)
        assert spectral_radius(lambda x, m, rate=rate: heavy_ball(x, m, rate, 1.0, beta, 0.2)) < 1
        rate = share * nesterov_limit(beta)
        assert spectral_radius(lambda x, m, rate=rate: nesterov(x, m, rate, 1.0, beta)) < 1


@pytest.mark.parametrize("decay", [0.01, 0.5, 8.0])
@pytest.mark.parametrize("beta", BETAS)
def test_weight_decay_moves_the_edge_as_said(beta, decay):
    h = 3.0
    coupled = StabilityLimit(heavy_ball_limit(beta, 0.1), coupled_decay=decay).rate(h)
    assert crosses_one_at(coupled, lambda x, m, rate: heavy_ball(x, m, rate, h + decay, beta, 0.1))
    decoupled = StabilityLimit(averaged_momentum_limit(beta), decoupled_decay=decay).rate(h)
    assert crosses_one_at(decoupled, lambda x, m, rate: averaged(x, m, rate, h, beta, decay))


def test_the_limits_at_momentum_nine_tenths_are_the_published_ones():
    assert GRADIENT_DESCENT == heavy_ball_limit(0) == nesterov_limit(0) == averaged_momentum_limit(0) == 2
    assert heavy_ball_limit(0.9) == pytest.approx(3.80, rel=1e-12)
    assert nesterov_limit(0.9) == pytest.approx(1.357, abs=5e-4)
    assert averaged_momentum_limit(0.9) == pytest.approx(38.0, rel=1e-12)


# Runs


CURVATURES = torch.tensor([5.0, 0.7, 0.05], dtype=torch.float64)

OPTIMIZERS = {
    "SGD": lambda p, lr: torch.optim.SGD(p, lr),
    "SGD with decay": lambda p, lr: torch.optim.SGD(p, lr, weight_decay=0.4),
    "dampening without momentum": lambda p, lr: torch.optim.SGD(p, lr, dampening=0.5),
    "heavy ball": lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9),
    "heavy ball, damped": lambda p, lr: torch.optim.SGD(p, lr, momentum=0.7, dampening=0.4, weight_decay=0.3),
    "averaged": lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9, dampening=0.9),
    "Nesterov": lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9, nesterov=True, weight_decay=0.1),
    "LPSGD": lambda p, lr: LPSGD(p, lr, p=2, weight_decay=0.1),
    "LPSGDM": lambda p, lr: LPSGDM(p, lr, p=2, beta=0.9),
    "LPSGDM with decay": lambda p, lr: LPSGDM(p, lr, p=2, beta=0.8, weight_decay=0.2),
}


def grown(make, rate, steps=1500):
    """By what the distance from the minimum of a rotated quadratic grew, start to end."""
    generator = torch.Generator().manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=torch.float64)).Q
    hessian = rotation * CURVATURES @ rotation.T
    point = nn.Parameter(rotation.sum(1))
    optimizer = make([point], rate)
    for _ in range(steps):
        point.grad = hessian @ point.detach()
        optimizer.step()
    return float(point.detach().norm()) / math.sqrt(3)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_runs_of_the_optimizers_converge_below_the_limit_and_diverge_above(name):
    make = OPTIMIZERS[name]
    found = stability_limit(make([nn.Parameter(torch.zeros(1))], 0.1))
    assert found.preconditioned == name.startswith("LP")
    edge = found.rate(float(CURVATURES.max()))
    assert grown(make, 0.99 * edge) < 0.5
    assert grown(make, 1.01 * edge) > 1e2


@pytest.mark.parametrize("decay", [0.0, 0.6])
def test_adamw_with_a_scaling_that_stands_still_diverges_at_its_limit(decay):
    """With beta2 next to 1, and far along, v stands still while the gradients are of its own size."""
    scale = torch.tensor([0.5, 2.0, 1.3], dtype=torch.float64)
    hessian = torch.tensor([[4.0, 1.0, 0.0], [1.0, 2.0, 0.3], [0.0, 0.3, 1.0]], dtype=torch.float64)
    root = scale.rsqrt()
    sharpness = float(torch.linalg.eigvalsh(root[:, None] * hessian * root).max())

    def run(share):
        point = nn.Parameter(torch.ones(3, dtype=torch.float64))
        optimizer = torch.optim.AdamW([point], betas=(0.9, 1 - 1e-9), eps=0.0, weight_decay=decay)
        state = {"step": torch.tensor(1e11, dtype=torch.float64), "exp_avg": torch.zeros_like(point)}
        optimizer.state[point] = {**state, "exp_avg_sq": scale.square()}
        limit = stability_limit(optimizer)
        assert limit.preconditioned
        optimizer.param_groups[0]["lr"] = share * limit.rate(sharpness)
        norms = []
        for _ in range(1500):
            point.grad = hessian @ point.detach()
            optimizer.step()
            norms.append(float(point.detach().norm()))
        return norms

    assert run(0.99)[-1] < 0.5
    assert max(run(1.01)) > 1e2


# What is asked of an optimizer


def test_each_group_has_the_limit_of_its_own_settings():
    first, second = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    groups = [{"params": [first]}, {"params": [second], "momentum": 0.5, "nesterov": True, "weight_decay": 0.1}]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    one, other = (stability_limit(optimizer, group) for group in optimizer.param_groups)
    assert one == StabilityLimit(heavy_ball_limit(0.9))
    assert other == StabilityLimit(nesterov_limit(0.5), coupled_decay=0.1)
    with pytest.raises(ArgumentError, match="2 parameter groups"):
        stability_limit(optimizer)


def test_adam_counts_only_with_decoupled_decay():
    point = [nn.Parameter(torch.zeros(2))]
    assert stability_limit(torch.optim.Adam(point, betas=(0.8, 0.99))).limit == pytest.approx(18)
    assert stability_limit(torch.optim.AdamW(point, weight_decay=0.3)).decoupled_decay == 0.3
    with pytest.raises(ArgumentError, match="AdamW, or give limit="):
        stability_limit(torch.optim.Adam(point, weight_decay=0.1))


class Signed(torch.optim.SGD):
    """Calls itself SGD, and steps another way."""

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data -= group["lr"] * parameter.grad.sign()


@pytest.mark.parametrize("kind", [torch.optim.NAdam, torch.optim.RMSprop, Lion, SignSGD, Signed])
def test_an_optimizer_whose_limit_is_not_known_is_refused(kind):
    with pytest.raises(ArgumentError, match=f"{kind.__name__} is not known.*limit="):
        stability_limit(kind([nn.Parameter(torch.zeros(2))], lr=0.1))


def test_a_schedule_or_a_hook_on_the_optimizer_changes_nothing():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=0.1, momentum=0.9)
    torch.optim.lr_scheduler.ConstantLR(optimizer)
    optimizer.register_step_post_hook(lambda *_: None)
    assert stability_limit(optimizer).limit == heavy_ball_limit(0.9)


def test_there_is_no_edge_where_no_curvature_is_positive():
    assert StabilityLimit(2.0).rate(0.0) == StabilityLimit(2.0, coupled_decay=0.1).rate(-3.0) == math.inf


@pytest.mark.parametrize("momentum", [-0.1, 1.0, 1.5, math.nan])
def test_momentum_out_of_range_is_refused(momentum):
    for limit in (heavy_ball_limit, nesterov_limit, averaged_momentum_limit):
        with pytest.raises(ArgumentError, match="momentum is at least 0 and below 1"):
            limit(momentum)
    with pytest.raises(ArgumentError, match="dampening"):
        heavy_ball_limit(0.9, momentum)
