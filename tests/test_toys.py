"""The two quadratics of the l_p paper: the same function in closed form, as a module and as an Objective."""

from __future__ import annotations

import math

import pytest
import torch

from curvdiag import GaussNewton, Hessian
from curvdiag.experiments.toys import STRONG, TOYS, WEAK, Toy

TURNED = [toy.turned(angle) for toy in TOYS for angle in (0.0, 0.3, math.pi / 4)]


def published(name: str, theta: torch.Tensor) -> torch.Tensor:
    """As the paper writes them."""
    a, b = (200.0, 0.05) if name == STRONG.name else (1.2, 0.8)
    return a / 2 * (theta[..., 0] - 1) ** 2 + b / 2 * (theta[..., 1] - 4) ** 2


@pytest.mark.parametrize("toy", TOYS, ids=lambda toy: toy.name)
def test_values_are_those_of_the_published_formulas(toy: Toy) -> None:
    theta = toy.starts(50, seed=1)
    torch.testing.assert_close(toy.value(theta), published(toy.name, theta), rtol=1e-12, atol=0)


@pytest.mark.parametrize("toy", TURNED, ids=lambda toy: f"{toy.name} {toy.angle:.2f}")
def test_gradients_and_curvature_are_those_of_the_values(toy: Toy) -> None:
    theta = toy.starts(1, seed=2)[0].requires_grad_()
    (gradient,) = torch.autograd.grad(toy.value(theta), theta)
    torch.testing.assert_close(toy.gradient(theta.detach()), gradient, rtol=1e-12, atol=1e-12)
    hessian = torch.autograd.functional.hessian(toy.value, theta.detach())
    torch.testing.assert_close(toy.hessian, hessian, rtol=1e-12, atol=1e-12)
    assert toy.condition_number == pytest.approx(float(torch.linalg.cond(hessian)), rel=1e-6)


@pytest.mark.parametrize("toy", TURNED, ids=lambda toy: f"{toy.name} {toy.angle:.2f}")
def test_the_objective_is_the_toy_and_its_gauss_newton_the_hessian(toy: Toy) -> None:
    start = toy.starts(1, seed=3)[0]
    objective = toy.objective(toy.module(start))
    assert objective.value() == pytest.approx(float(toy.value(start)), rel=1e-12)
    torch.testing.assert_close(objective.gradient(), toy.gradient(start), rtol=1e-12, atol=1e-12)
    for operator in (Hessian, GaussNewton):
        torch.testing.assert_close(operator(objective).dense(), toy.hessian, rtol=1e-12, atol=1e-12)


def test_turning_by_a_right_angle_swaps_the_axes() -> None:
    torch.testing.assert_close(STRONG.turned(math.pi / 2).hessian, STRONG.hessian.flip(0, 1))


def test_the_rate_is_the_published_one_at_both_ends_and_between_them_in_the_right_units() -> None:
    for toy, gd, sign in ((STRONG, 0.002, 0.05), (WEAK, 0.8, 0.2)):
        assert toy.rate(2.0) == gd
        assert toy.rate(math.inf) == pytest.approx(sign, rel=1e-12)
        assert toy.rate(3.0) == pytest.approx(math.sqrt(gd * sign), rel=1e-12)
    # With the loss in other units, a -> c a, a rate for g is divided by c and one for signs stays: so do the steps.
    c, p = 7.0, 6.0
    rho = (p - 2) / (p - 1)
    other = Toy("other units", (200 * c, 0.05 * c), gd_lr=0.002 / c, sign_lr=0.05)
    g = STRONG.gradient(STRONG.starts(1)[0])
    steps = [toy.rate(p) * h / h.abs() ** rho for toy, h in ((STRONG, g), (other, c * g))]
    torch.testing.assert_close(steps[0], steps[1], rtol=1e-10, atol=0)


def test_starts_surround_the_optimum_and_follow_the_seed() -> None:
    starts = WEAK.starts(4000, seed=5)
    assert torch.equal(starts, WEAK.starts(4000, seed=5))
    assert not torch.equal(starts, WEAK.starts(4000, seed=6))
    away = starts - torch.tensor([1.0, 4.0], dtype=torch.float64)
    assert (away.mean(0).abs() < 4 * 2 / math.sqrt(4000)).all()
    torch.testing.assert_close(away.std(0), torch.full((2,), 2.0, dtype=torch.float64), rtol=0.05, atol=0)
    torch.testing.assert_close(WEAK.distance(starts), away.norm(dim=1))
