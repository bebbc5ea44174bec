"""The predicted decrease of directions, and the p that it chooses."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from nets import make
from torch import Tensor, nn

from curvdiag import GaussNewton, Objective
from curvdiag.errors import ArgumentError
from curvdiag.experiments.toys import STRONG, TOYS, WEAK, Toy
from curvdiag.optim import LPSGD, lp_direction
from curvdiag.schedules.predicted_decrease import candidates, predicted_decrease
from curvdiag.schedules.predicted_decrease_p import PredictedDecreaseP

GRID = (2.0, 3.0, 4.0, 6.0, 8.0, 10.0)


def random_problem(size: int = 9, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(size, size, dtype=torch.float64, generator=generator)
    return root @ root.T + 0.1 * torch.eye(size), torch.randn(size, dtype=torch.float64, generator=generator)


def by_hand(matrix: np.ndarray, gradient: np.ndarray, followed: np.ndarray, p: float, eps: float = 1e-8) -> float:
    """The formula for one p, in NumPy and in double precision."""
    d = followed / (np.abs(followed) + eps) ** ((p - 2) / (p - 1))
    return float((gradient @ d) ** 2 / (2 * d @ matrix @ d))


def winner(matrix: np.ndarray, gradient: np.ndarray, grid: tuple[float, ...] = GRID) -> float:
    return max(grid, key=lambda p: by_hand(matrix, gradient, gradient, p))


# The function


def test_it_is_what_the_best_step_on_the_quadratic_gains() -> None:
    matrix, gradient = random_problem()
    directions = torch.stack([lp_direction(gradient, p) for p in GRID], dim=1)
    found = predicted_decrease(matrix, gradient, directions)
    steps = torch.linspace(0, 2, 200_001, dtype=torch.float64)
    for d, value in zip(directions.T, found, strict=True):
        quadratic = -steps * (gradient @ d) + 0.5 * steps**2 * (d @ matrix @ d)  # a line search on a fine grid
        assert float(value) == pytest.approx(-float(quadratic.min()), rel=1e-6)
    assert found.tolist() == pytest.approx(
        [by_hand(matrix.numpy(), gradient.numpy(), gradient.numpy(), p) for p in GRID], rel=1e-6
    )


def test_newtons_direction_gains_most_and_length_does_not_matter() -> None:
    matrix, gradient = random_problem(seed=1)
    newton = torch.linalg.solve(matrix, gradient)
    others = torch.randn(9, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    others *= (others.T @ gradient).sign()
    found = predicted_decrease(matrix, gradient, torch.cat([newton.unsqueeze(1), 1e3 * others, others], dim=1))
    assert float(found[0]) == pytest.approx(float(0.5 * gradient @ newton), rel=1e-12)
    assert (found[1:] < found[0]).all()
    torch.testing.assert_close(found[1:51], found[51:], rtol=1e-12, atol=0)


def test_directions_without_a_best_step_are_nan() -> None:
    matrix = torch.diag(torch.tensor([2.0, -3.0, 0.0], dtype=torch.float64))
    gradient = torch.ones(3, dtype=torch.float64)
    columns = {
        "good": (1, 0, 0),
        "negative": (0, 1, 0),
        "flat": (0, 0, 1),
        "uphill": (-1, 0, 0),
        "nan": (math.nan, 0, 0),
    }
    directions = torch.tensor(list(columns.values()), dtype=torch.float64).T
    found = dict(zip(columns, predicted_decrease(matrix, gradient, directions).tolist(), strict=True))
    assert found.pop("good") == pytest.approx(0.25)
    assert all(math.isnan(value) for value in found.values()), found


def test_a_curvature_that_is_only_the_rounding_of_its_sum_is_none() -> None:
    values = torch.randn(200, 60, generator=torch.Generator().manual_seed(0)).abs()
    directions = torch.cat([values, 3 * values])
    matrix = torch.diag(torch.cat([torch.ones(200), -torch.ones(200) / 9]))  # what is gained above is lost below
    gradient = torch.ones(400)
    rounding = (directions * (matrix @ directions)).sum(0, dtype=torch.float64)
    assert (rounding > 0).any(), "here rounding alone would be a curvature"
    assert predicted_decrease(matrix, gradient, directions).isnan().all()
    assert predicted_decrease(matrix + 1e-3 * torch.eye(400), gradient, directions).isfinite().all()


def test_all_products_are_one_call() -> None:
    model, batch = make("mlp-tanh")
    objective = Objective(model, nn.CrossEntropyLoss(), batch)
    operator, gradient = GaussNewton(objective), objective.gradient()
    calls, apply = [], operator.apply
    operator.apply = lambda rows: calls.append(rows.shape) or apply(rows)  # type: ignore[method-assign]
    directions = torch.stack([lp_direction(gradient, p) for p in GRID], dim=1)
    found = predicted_decrease(operator, gradient, directions)
    assert calls == [(6, operator.size)]
    dense = operator.dense().numpy()
    expected = [by_hand(dense, gradient.numpy(), gradient.numpy(), p) for p in GRID]
    assert found.tolist() == pytest.approx(expected, rel=1e-6)


def test_shapes_that_disagree_are_refused() -> None:
    matrix, gradient = random_problem()
    for wrong in ((gradient[:4], torch.ones(9, 2)), (gradient, gradient), (gradient, torch.ones(2, 9))):
        with pytest.raises(ArgumentError, match="order 9"):
            predicted_decrease(matrix, *wrong)


def test_candidates_are_half_octaves_up_to_p_max() -> None:
    assert candidates(10) == GRID
    assert candidates(6) == (2, 3, 4, 6)
    assert candidates(9) == (2, 3, 4, 6, 8, 9)
    assert candidates(2.5) == (2, 2.5)
    assert candidates(2) == (2,)
    assert candidates(100)[-4:] == (48, 64, 96, 100)


# The toys


def share_at_most(toy: Toy, p: float) -> float:
    """Which share of starts, with directions from the optimum all equally likely, has its best real p at most there.

    With ``x``, ``y`` the distances along the axes and ``s = 1 / (p-1)``, Newton's direction ``(x, y)`` is that of
    ``(a x, b y)^s`` where ``((a x) / (b y))^s = x / y``; a larger ``s`` follows the larger gradient more.
    """
    (a, b), s = toy.curvatures, 1 / (p - 1)
    # s* >= s  <=>  log(x/y) / log(ax/by) >= s, or, where the larger gradient is that of the smaller distance, never.
    ratio = np.tan(np.linspace(0, np.pi / 2, 200_003)[1:-1])
    best = np.log(ratio) / np.log(a / b * ratio)
    return float(np.mean(best >= s))


@pytest.mark.parametrize("p_max", [6.0, 10.0])
def test_over_a_thousand_starts_the_median_is_large_where_anisotropy_is_strong_and_small_where_weak(
    p_max: float,
) -> None:
    medians = {}
    for toy in TOYS:
        module = toy.module(toy.optimum)
        optimizer = LPSGD(module.parameters(), p=p_max)
        slope = lambda toy=toy, module=module: (toy.gradient(module.theta.detach()), toy.hessian)  # noqa: E731
        schedule = PredictedDecreaseP(optimizer, slope, smoothing=0.0)
        chosen = []
        for start in toy.starts(1000, seed=0):
            with torch.no_grad():
                module.theta.copy_(start)
            schedule.step()
            chosen.append(optimizer.param_groups[0]["p"])
            if len(chosen) <= 100:
                expected = winner(toy.hessian.numpy(), toy.gradient(start).numpy(), candidates(p_max))
                assert chosen[-1] == pytest.approx(expected, abs=1e-12)
        medians[toy.name] = float(np.median(chosen))
        # The grid's winner is at most 3 wherever the best real p is, and 4 only beyond it.
        small, share = share_at_most(toy, 3.0), float(np.mean(np.array(chosen) <= 3 + 1e-9))
        assert small - 0.05 < share < share_at_most(toy, 4.0) + 0.05
    assert medians[STRONG.name] >= 6
    assert medians[WEAK.name] <= 3


@pytest.mark.parametrize("toy", TOYS, ids=lambda toy: toy.name)
@pytest.mark.parametrize("curvature", ["gauss-newton", "hessian"])
def test_measured_from_an_objective_it_chooses_the_same(toy: Toy, curvature: Any) -> None:
    module = toy.module(toy.optimum + 1)
    optimizer = LPSGD(module.parameters(), p=10.0)
    schedule = PredictedDecreaseP(optimizer, toy.objective(module), smoothing=0.0, curvature=curvature)
    for start in toy.starts(25, seed=1):
        with torch.no_grad():
            module.theta.copy_(start)
        schedule.step()
        expected = winner(toy.hessian.numpy(), toy.gradient(start).numpy())
        assert optimizer.param_groups[0]["p"] == pytest.approx(expected, abs=1e-12)
    assert len({choice.seen["winner"] for choice in schedule.history}) > 1
