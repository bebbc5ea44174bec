"""The experiment on CWGD-Cosine: its cells, its cases, its comparisons, and what it writes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from curvdiag.experiments import cwgd, cwgd_cells
from curvdiag.experiments.cwgd_adaptive import (
    Comparison,
    Method,
    chosen,
    compare_methods,
    ratio_of_means,
    run_methods,
)
from curvdiag.experiments.cwgd_cases import Quartic, Turning
from curvdiag.experiments.cwgd_cells import Grid, agreement, run_cells
from curvdiag.experiments.cwgd_digits import train
from curvdiag.experiments.cwgd_measured import measured_run
from curvdiag.experiments.quadratics import curvatures_of, noise_of
from curvdiag.plotting.cwgd_page import HEIGHT, WIDTH, cwgd_page
from figures import assert_no_text_over_another

REDUCED = Grid(conditions=(1.0, 30.0, 1000.0), batch_sizes=(4, 64), steps=(30, 100), seeds=48)


@pytest.fixture(scope="module")
def cells() -> list[cwgd_cells.Cell]:
    return run_cells(REDUCED)


def test_exact_and_simulated_errors_agree_in_every_cell(cells: list[cwgd_cells.Cell]) -> None:
    """288 means of independent noise: the largest score where that many reach in 99 of 100 cases, and their squares."""
    found = agreement(cells)
    assert len(cells) == len(REDUCED) == 72
    assert found.scores == 288
    assert found.allowed == pytest.approx(4.14, abs=0.01)  # 1 - 0.99^(1/288) on both sides
    assert found.holds, str(found)
    assert all(abs(z) < found.allowed for cell in cells for z in cell.z_scores.values())
    assert all(len(set(cell.z_scores.values())) == 4 for cell in cells), "every method has noise of its own"


@pytest.mark.parametrize("what", ["noise", "rates"])
def test_the_agreement_notices_a_simulation_that_is_slightly_wrong(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenth more noise, or rates one step late."""
    right = cwgd_cells.simulate

    def wrong(rates: Any, steps: int, curvatures: Any, noise: Any, *rest: Any) -> Any:
        if what == "noise":
            return right(rates, steps, curvatures, 1.1 * noise, *rest)
        return right(lambda t: rates(max(t - 1, 0)), steps, curvatures, noise, *rest)

    monkeypatch.setattr(cwgd_cells, "simulate", wrong)
    assert not agreement(run_cells(REDUCED)).holds


def test_cwgd_cosine_is_cosine_at_half_the_peak_rate(cells: list[cwgd_cells.Cell]) -> None:
    """To rounding, in every cell; the normalised variant is plain cosine; and tuned, nobody is ahead."""
    for cell in cells:
        assert cell.exact["cwgd"] == pytest.approx(cell.exact["halved"], rel=1e-12)
        assert cell.exact["normalised"] == pytest.approx(cell.exact["cosine"], rel=1e-12)
        assert cell.exact["halved"] != pytest.approx(cell.exact["cosine"], rel=1e-3)
        assert cell.best_cwgd[1] == pytest.approx(cell.best_cosine[1], rel=1e-5)
        assert cell.best_cwgd[0] == pytest.approx(2 * cell.best_cosine[0], rel=5e-3)
        assert cell.best_cosine[1] <= min(cell.exact.values()) * (1 + 1e-6)
        assert cell.at_edge == (cell.best_cosine[0] > 1.999)
    assert not any(cell.at_edge for cell in cells if cell.condition == 1)


def test_the_gain_of_a_cell_is_a_fifth_and_its_control_has_it_too() -> None:
    """Condition number 10, 1000 steps: 21 % lower than cosine, in simulation as well, and nothing below the control."""
    (cell,) = run_cells(
        Grid(conditions=(10.0,), batch_sizes=(16,), noises=("isotropic",), floors=(0.0,), steps=(1000,), seeds=128)
    )
    assert cell.gain == pytest.approx(cwgd_cells.LIMIT, abs=0.008)
    plain, divided = cell.simulated["cosine"], cell.simulated["cwgd"]
    ratio, error = divided.value / plain.value, math.hypot(divided.standard_error, plain.standard_error) / plain.value
    assert abs(ratio - (1 - cell.gain)) < 4 * error
    assert ratio + 4 * error < 1
    assert cell.exact["cwgd"] / cell.exact["halved"] == pytest.approx(1, abs=1e-12)
    assert cwgd_cells.gains_by_horizon((1000,), (10.0,), 0.0)[0, 0] == pytest.approx(cell.gain, rel=1e-12)


@pytest.mark.parametrize("rotated", [False, True])
def test_curvdiags_own_cwgd_is_constant_along_a_quadratic(rotated: bool) -> None:
    """With one probe set to rounding, in both forms; from each mini-batch it only scatters."""
    found = measured_run(20.0, "inverse", 8, 40, rotated=rotated, points=3, probe_samples=200, seed=2)
    for name in ("diagonal, fixed probe set", "full, fixed probe set"):
        assert found.wander[name] < 1e-9
    for name in ("diagonal, mini-batch, finite differences", "full, mini-batch"):
        assert 0.01 < found.wander[name] < 2
    full = found.values["full, fixed probe set"][0]
    assert full == pytest.approx(found.known, rel=0.4)  # eight starts, 200 samples
    diagonal = found.values["diagonal, fixed probe set"][0]
    if rotated:  # it misses most of what is in the slow modes
        assert diagonal < 0.6 * found.known
    else:
        assert diagonal == pytest.approx(found.known, rel=0.1)
    assert found.at == (0, 20, 39)


# How methods are tuned and compared


def test_constant_cwgd_shows_no_difference_and_a_replay_is_the_schedule_itself() -> None:
    """A turning case whose noise is isotropic with equal curvatures has nothing that changes."""
    case = Turning(30, condition=1.0, noise="isotropic")
    found = compare_methods(case, rates=np.array([0.05, 0.1, 0.2, 0.4, 0.8]), tuning_seeds=8, seeds=8)
    for form in case.forms:
        for method in ("normalised", "replayed", "normalised, untuned"):
            one = found.find(method, form)
            assert (one.ratio, one.low, one.high) == pytest.approx((1, 1, 1), rel=1e-9)
            assert one.verdict == "no difference shown"
        assert found.factors[form] == pytest.approx([1.0] * len(found.times))
    published, halved = found.find("published", "full"), found.find("halved")
    assert published.ratio == pytest.approx(halved.ratio, rel=1e-9)
    assert published.ratio != pytest.approx(1, rel=1e-3)
    assert halved.eta_max == found.eta_max / 2


def test_a_replay_is_the_mean_factor_at_the_tuned_rate() -> None:
    """Where the factor is the same for every seed, it is the adaptive method itself, at a rate that is not cosine's."""
    found = compare_methods(Turning(500, noise="proportional"), rates=2.0 ** np.arange(-3, 2), tuning_seeds=8, seeds=8)
    adaptive, replayed = (found.find(method, "full") for method in ("normalised", "replayed"))
    assert adaptive.eta_max != found.eta_max
    assert replayed.eta_max == adaptive.eta_max
    assert replayed.ratio == pytest.approx(adaptive.ratio, rel=1e-9)
    assert found.find("normalised, untuned", "full").ratio != pytest.approx(adaptive.ratio, rel=1e-3)


def test_each_method_is_tuned_by_itself_and_on_other_seeds() -> None:
    """Best by the tuning seeds' tables, which are made anew here; and the comparison comes from other noise."""
    case, rates = Quartic(40), 2.0 ** np.arange(-5, 1)
    found = compare_methods(case, rates=rates, tuning_seeds=16, seeds=16, seed=3)
    best, least = {}, {}
    for form in ("", "known"):
        tried = rates
        for _ in range(2):
            methods = [Method(r, form) for r in tried]
            errors = run_methods(case, methods, 16, np.random.default_rng([3, 0]))[0].mean(0)
            best[form], least[form] = tried[errors.argmin()], errors.min()
            tried = best[form] * 2.0 ** (np.arange(-4, 5) / 16)
    assert found.eta_max == best[""]
    assert found.find("normalised", "known").eta_max == best["known"]
    assert found.find("published", "known").eta_max == found.eta_max
    fresh = run_methods(case, [Method(found.eta_max)], 16, np.random.default_rng([3, 1]))[0]
    assert found.error == pytest.approx(fresh.mean(), rel=1e-12)
    assert found.error != pytest.approx(least[""], rel=1e-6)


def test_the_best_rate_what_the_grid_leaves_and_its_edges() -> None:
    """A parabola in the logarithm whose vertex lies a quarter of a step beside the grid."""
    rates = 2.0 ** np.arange(5)
    parabola = np.exp(0.3 * (np.arange(5) - 2.25) ** 2)
    cliff = np.array([3.0, 2.0, 1.9, np.inf, np.inf])
    table = {"": parabola, "full": parabola[::-1] * 7, "other": rates, "cliff": cliff}
    best, left, edge = chosen(table, {"": rates, "full": 3 * rates, "other": rates, "cliff": rates})
    assert best == {"": 4.0, "full": 12.0, "other": 1.0, "cliff": 4.0}
    assert left["cliff"] == pytest.approx(2.0 / 1.9 - 1)
    steep = chosen({"": np.where(np.isinf(cliff), 1e9, cliff)}, {"": rates})[1]
    assert steep[""] == pytest.approx(2.0 / 1.9 - 1)
    assert left[""] == pytest.approx(math.expm1(0.3 * 0.25**2), rel=1e-9)
    assert left["full"] == pytest.approx(left[""])
    assert math.isnan(left["other"])
    assert edge == ("other",)


def test_intervals_of_paired_ratios_cover() -> None:
    """Errors of two methods that share most of their noise: 95 % of 2000 intervals hold the ratio of the means."""
    generator = np.random.default_rng(0)
    common, own = generator.standard_normal((2000, 24)), generator.standard_normal((2000, 24))
    plain, other = np.exp(0.4 * common), 0.9 * np.exp(0.4 * common + 0.1 * own)
    truth = 0.9 * math.exp(0.1**2 / 2)
    found = np.array([ratio_of_means(a, b) for a, b in zip(other, plain, strict=True)])
    covered = np.mean((found[:, 1] <= truth) & (truth <= found[:, 2]))
    assert 0.93 < covered < 0.97
    unpaired = np.array([ratio_of_means(a, b[::-1]) for a, b in zip(other, plain, strict=True)])
    assert np.median(found[:, 2] - found[:, 1]) < 0.4 * np.median(unpaired[:, 2] - unpaired[:, 1])
    assert ratio_of_means(np.array([1.0, np.inf]), np.ones(2)) == (math.inf,) * 3


@pytest.mark.parametrize(
    ("low", "high", "coarse", "verdict"),
    [
        (0.8, 0.9, 0.01, "better"),
        (0.98, 0.995, 0.01, "no difference shown"),
        (0.9, 1.1, 0.0, "no difference shown"),
        (1.005, 1.02, 0.01, "no difference shown"),
        (1.02, 1.1, 0.01, "worse"),
        (1.02, 1.1, math.nan, "no difference shown"),
    ],
)
def test_a_verdict_needs_the_interval_and_the_grid(low: float, high: float, coarse: float, verdict: str) -> None:
    assert Comparison("normalised", "full", 0.1, (low * high) ** 0.5, low, high, coarse).verdict == verdict


# The net, and what is written


def test_a_training_on_digits_takes_its_rates_from_the_schedule() -> None:
    pytest.importorskip("sklearn")
    plain = train(Method(0.1), 0, epochs=1)
    assert plain.factors == pytest.approx(np.ones(46))
    again = train(Method(0.1, "diagonal", replay=np.ones(46)), 0, epochs=1)
    assert again.errors == plain.errors
    divided, kept = (train(Method(0.1, "diagonal", normalized=n), 0, epochs=1, refreshes=2) for n in (False, True))
    assert divided.factors[0] == pytest.approx(0.5)
    assert kept.factors[0] == pytest.approx(1.0)
    assert len(set(kept.factors.round(9))) == 2  # before the first refresh and after it
    assert kept.factors[22:24].tolist() == pytest.approx([1.0, kept.factors[-1]])
    twice = train(Method(0.2, "diagonal", normalized=False), 0, epochs=1, refreshes=2)
    assert twice.errors == pytest.approx(kept.errors, rel=1e-3)
    assert train(Method(0.1), 1, epochs=1).errors != plain.errors


@pytest.fixture(scope="module")
def study() -> cwgd.Study:
    pytest.importorskip("sklearn")
    return cwgd.run(quick=True, progress=lambda text: None)


def test_the_page_holds_everything_and_no_text_lies_over_another(study: cwgd.Study) -> None:
    figure = cwgd_page(study, Figure(figsize=(WIDTH, HEIGHT), layout="constrained"))
    assert_no_text_over_another(figure)
    assert len(figure.axes) == 6
    rows = [label.get_text() for label in figure.axes[5].get_yticklabels()]
    assert len(rows) == sum(len(one.factors) + 1 for one in study.adaptive)  # and the control
    assert rows[0] == "linear regression: known"
    cells = [line for line in figure.axes[0].lines if line.get_label().startswith(("isotropic", "prop", "inverse"))]
    assert sum(len(line.get_xdata()) for line in cells) == len(study.published.cells)


def test_what_is_written_is_json_with_everything_in_it(
    study: cwgd.Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cwgd, "run", lambda **options: study)
    picture, data = cwgd.reproduce(tmp_path / "new", seed=5, quick=True, progress=lambda text: None)
    assert picture.name == "cwgd.png"
    assert picture.stat().st_size > 50_000
    found = json.loads(data.read_text())
    assert found["seed"] == 5
    assert set(found["versions"]) == {"curvdiag", "torch", "numpy", "scipy"}
    assert found["options"]["quick"] is True
    assert len(found["results"]["published"]["cells"]) == len(study.published.cells)
    assert found["results"]["summary"]["1 - 2^(-1/3)"] == pytest.approx(0.2063, abs=1e-4)
    assert found["results"]["summary"]["|CWGD-Cosine / cosine at half the peak rate - 1|, largest"] < 1e-12
    assert found["results"]["summary"]["agreement of exact and simulated holds"] is True
    scatter = found["results"]["summary"]
    (means,) = (value for name, value in scatter.items() if name.startswith("CWGD from each mini-batch"))
    cells = study.published.cells
    one = [c.measured["cwgd"].standard_error * c.exact["cosine"] / c.exact["halved"] for c in cells]
    assert means["cwgd, batch 16"][1] == pytest.approx(np.linalg.norm(one) / len(cells), rel=1e-5)
    names = [one["name"] for one in found["results"]["adaptive"]]
    assert names[-1] == "MLP on digits"
    assert len(names) == 7
    assert 1 < cwgd.MINUTES < 15


def test_a_cell_is_the_same_whatever_the_rest_of_the_grid() -> None:
    one = Grid(conditions=(30.0,), batch_sizes=(4,), noises=("inverse",), floors=(0.1,), steps=(20,), seeds=3)
    more = Grid(conditions=(1.0, 30.0), batch_sizes=(16, 4), noises=("isotropic", "inverse"), steps=(20,), seeds=3)
    (alone,) = run_cells(one, seed=1)
    assert alone in run_cells(more, seed=1)
    assert alone.simulated != run_cells(one, seed=2)[0].simulated
    assert noise_of("inverse", curvatures_of(30.0)).mean() == pytest.approx(1)
