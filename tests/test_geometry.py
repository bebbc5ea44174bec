"""The ``geometry`` experiment: the same descents by optimizers and by formulas, and what they show."""

from __future__ import annotations

import json
import math
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from curvdiag.experiments import geometry
from curvdiag.experiments.geometry_figure import draw
from curvdiag.experiments.geometry_results import ANISOTROPY, COSINE, GD, METHODS, PREDICTED, SIGN, UNSMOOTHED
from curvdiag.experiments.toys import STRONG, TOYS, WEAK, Toy
from figures import assert_no_text_over_another

START = torch.tensor([0.3, 2.2], dtype=torch.float64)
TURNED = math.pi / 4


@pytest.mark.parametrize("toy", [STRONG, WEAK, STRONG.turned(TURNED)], ids=lambda toy: f"{toy.name} {toy.angle:.1f}")
@pytest.mark.parametrize("method", METHODS)
def test_optimizers_and_schedules_go_where_the_formulas_go(toy: Toy, method: str) -> None:
    steps = 8  # later, rounding decides where the predicted decreases are equal
    path = geometry.descend(toy, method, START, steps)
    last, jumps = geometry.descend_many(toy, geometry.rule_of(toy, method, steps), START.expand(3, 2), steps)
    torch.testing.assert_close(last, path.points[-1].expand(3, 2), rtol=1e-9, atol=1e-9)
    moved = np.abs(np.diff([min(p, 1e9) for p in path.p])) > 0.5
    assert jumps.flatten().tolist() == [moved.sum()] * 3


def test_gd_and_signgd_are_the_published_steps() -> None:
    for toy, gd, sign in ((STRONG, 0.002, 0.05), (WEAK, 0.8, 0.2)):
        theta = START.clone()
        for point in geometry.descend(toy, GD, START, 20).points[1:]:
            theta = theta - gd * torch.tensor(toy.curvatures, dtype=torch.float64) * (theta - torch.tensor([1.0, 4.0]))
            torch.testing.assert_close(point, theta, rtol=1e-9, atol=1e-9)
        first = geometry.descend(toy, SIGN, START, 1).points[1]
        torch.testing.assert_close(first, START + sign, rtol=1e-6, atol=0)


def test_cosine_p_goes_from_p_max_to_two() -> None:
    p = geometry.descend(STRONG, COSINE, START, 11).p
    assert p == pytest.approx([2 + 4 * (1 + math.cos(math.pi * s / 10)) / 2 for s in range(11)])


def test_from_the_measured_condition_number_p_is_p_max_where_anisotropy_is_strong_and_small_where_weak() -> None:
    """With one ``a_high`` for both."""
    strong, weak = (geometry.descend(toy, ANISOTROPY, START, 3).p for toy in TOYS)
    assert strong == (geometry.P_MAX,) * 3
    expected = 2 + (geometry.P_MAX - 2) * math.log(1.5) / math.log(geometry.A_HIGH)
    assert weak == pytest.approx([expected] * 3, rel=1e-6)
    assert weak[0] <= 2.3


def final(toy: Toy, method: str, steps: int = 300, multiplier: float = 1.0) -> float:
    rule = geometry.rule_of(toy, method, steps)
    return float(toy.distance(geometry.descend_many(toy, rule, toy.starts(200), steps, multiplier)[0]).median())


def test_at_the_published_rates_large_p_is_ahead_where_anisotropy_is_strong_and_gd_where_it_is_weak() -> None:
    for method in (SIGN, COSINE, ANISOTROPY, PREDICTED):
        assert final(STRONG, method) < 0.1 * final(STRONG, GD)
        assert final(WEAK, GD) < 1e-9 or final(WEAK, GD) < 0.1 * final(WEAK, method)
    assert final(WEAK, SIGN) > 0.05


def test_with_the_eigenvectors_turned_signs_are_not_ahead() -> None:
    turned = STRONG.turned(TURNED)
    assert final(turned, SIGN) > final(turned, GD)
    assert final(turned, ANISOTROPY) > 0.9 * final(turned, GD)


def test_the_winner_flips_along_a_trajectory_and_the_smoothed_p_does_not() -> None:
    flips, smooth = (geometry.descend(WEAK, method, START, 60).p for method in (UNSMOOTHED, PREDICTED))
    assert (np.abs(np.diff(flips)) >= 1).sum() > 10
    assert np.abs(np.diff(smooth)).max() <= 0.4 + 1e-9  # a tenth of the way from one end to the other


def test_the_best_multiplier_is_the_one_that_ends_nearest() -> None:
    starts = WEAK.starts(60)
    for method in (SIGN, PREDICTED):
        best = geometry.best_multiplier(WEAK, method, starts, 20)
        ends = {}
        for factor in geometry.MULTIPLIERS:
            last, _ = geometry.descend_many(WEAK, geometry.rule_of(WEAK, method, 20), starts, 20, factor)
            ends[factor] = float(WEAK.distance(last).nan_to_num(math.inf).median())
        assert ends[best] == min(ends.values())


def test_wilsons_interval_is_the_set_of_shares_that_a_score_test_does_not_reject() -> None:
    for hits, number in ((0, 20), (7, 20), (990, 1000), (1000, 1000)):
        share, low, high = geometry.wilson(hits, number)
        grid = np.linspace(0, 1, 200_001)
        with np.errstate(divide="ignore", invalid="ignore"):
            inside = grid[np.abs(hits / number - grid) <= 1.959964 * np.sqrt(grid * (1 - grid) / number)]
        assert share == hits / number
        assert (hits == 0) <= (low == 0)
        assert (hits == number) <= (high == 1)
        assert (low, high) == pytest.approx((inside.min(), inside.max()), abs=2e-5)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], list[str], Figure]:
    """What a quick run writes and says, and its picture."""
    lines: list[str] = []
    pictures: list[Figure] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(geometry, "draw", lambda found: pictures.append(draw(found)) or pictures[0])
        out = tmp_path_factory.mktemp("geometry") / "new"
        paths = geometry.reproduce(out, seed=3, quick=True, progress=lines.append)
    return paths, lines, pictures[0]


def test_reproduce_writes_a_picture_and_all_numbers(written: tuple[list[Path], list[str], Figure]) -> None:
    paths, lines, _ = written
    assert [path.name for path in paths] == ["geometry.png", "geometry.json"]
    assert matplotlib.image.imread(paths[0]).shape[0] > 1000
    whole = json.loads(paths[1].read_text())
    assert {"options", "seed", "versions", "seconds", "results"} <= set(whole)
    assert whole["seed"] == 3
    outcomes = whole["results"]["outcomes"]
    assert set(outcomes) == {toy.name for toy in TOYS}
    one = outcomes[STRONG.name]["as published"]["best"]["40"]
    assert set(one) == set(METHODS)
    middle, low, high = one[SIGN]["distance"]
    assert low <= middle <= high
    assert any(SIGN in line for line in lines)


def test_the_same_seed_gives_the_same_numbers_and_another_one_others() -> None:
    first, again, other = (geometry.run(starts=10, steps=(4,), seed=seed).to_dict() for seed in (1, 1, 2))
    assert first["outcomes"] == again["outcomes"]
    assert first["outcomes"] != other["outcomes"]


def test_in_the_picture_no_text_lies_over_another(written: tuple[list[Path], list[str], Figure]) -> None:
    paths, _, figure = written
    assert_no_text_over_another(figure)
    assert "50 starts" in figure.axes[5].get_legend().get_title().get_text()
    assert "best rate" in figure.axes[9].get_xlabel()
    outcomes = json.loads(paths[1].read_text())["results"]["outcomes"]
    best = outcomes[WEAK.name]["as published"]["best"]["40"][SIGN]["distance"][0]
    drawn = [line.get_xdata()[0] for line in figure.axes[9].lines if len(line.get_xdata()) == 1]
    assert any(x == pytest.approx(best, rel=1e-3) for x in drawn)
