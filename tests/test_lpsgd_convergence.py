"""The theory's rate on a noisy quadratic, with the step size that it prescribes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from curvdiag.optim import LPSGD, LPSGDM

LAM = torch.logspace(-1, 0, 20, dtype=torch.float64)
SEEDS, LENGTHS = 80, (2**6, 2**8, 2**10)


def mean_squared_gradient(make, steps: int, rate: float) -> tuple[float, float]:
    """Of ``1/2 theta^T diag(lam) theta`` with unit noise; mean and standard error over runs, which are rows."""
    generator = torch.Generator().manual_seed(steps)
    theta = torch.ones(SEEDS, len(LAM), dtype=torch.float64).requires_grad_()
    optimizer = make([theta], rate)
    total = torch.zeros(SEEDS, dtype=torch.float64)
    for _ in range(steps):
        gradient = LAM * theta.detach()
        total += gradient.square().sum(1)
        theta.grad = gradient + torch.randn(theta.shape, generator=generator, dtype=torch.float64)
        optimizer.step()
    runs = (total / steps).numpy()
    return float(runs.mean()), float(runs.std(ddof=1) / SEEDS**0.5)


def slope(values):
    return np.polyfit(np.log(LENGTHS), np.log(values), 1)[0]


def constants(p: float) -> tuple[float, float]:
    """``c1`` and ``c2`` with ``g E u >= c1 g^2`` and ``E u^2 <= c2`` for one coordinate, unit noise and |g| <= 1."""
    z = np.linspace(-9, 9, 20_001)
    weight = np.exp(-(z**2) / 2)
    weight /= weight.sum()
    moved = [(g, np.sign(g + z) * np.abs(g + z) ** (1 / (p - 1))) for g in np.linspace(0.02, 1, 25)]
    return min(float(weight @ u) / g for g, u in moved), max(float(weight @ u**2) for _, u in moved)


@pytest.mark.parametrize(
    ("make", "p"),
    [
        (lambda ts, lr: LPSGD(ts, lr, p=2), 2),
        (lambda ts, lr: LPSGD(ts, lr, p=6), 6),
        (lambda ts, lr: LPSGDM(ts, lr, p=6), 6),
    ],
)
def test_the_mean_squared_gradient_falls_like_the_root_of_the_steps(make, p):
    """With ``eta = sqrt(2 (f0 - f*) / (L c2 T))``; and it stays below the theory's bound."""
    c1, c2 = constants(p)
    c2 *= len(LAM)
    gap, steepest = float(LAM.sum()) / 2, float(LAM.max())
    rates = [(2 * gap / (steepest * c2 * steps)) ** 0.5 for steps in LENGTHS]
    found = [mean_squared_gradient(make, steps, rate) for steps, rate in zip(LENGTHS, rates, strict=True)]
    values = np.array([value for value, _ in found])
    # Each known to four percent, so the slope to about one and a half: seven times less than its margin.
    assert max(error / value for value, error in found) < 0.04
    assert -0.6 < slope(values) < -0.4
    for value, rate, steps in zip(values, rates, LENGTHS, strict=True):
        assert value <= 2 * gap / (rate * c1 * steps) + steepest * rate * c2 / c1


def test_with_a_rate_that_does_not_fall_it_does_not():
    """The control: the slope comes from the step size."""
    values = [mean_squared_gradient(lambda ts, lr: LPSGD(ts, lr, p=6), steps, 0.3)[0] for steps in LENGTHS]
    assert np.log(values[-1] / values[-2]) / np.log(LENGTHS[-1] / LENGTHS[-2]) > -0.2
