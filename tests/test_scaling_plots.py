"""C against H and its exponents: every point, every interval, and what was left out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scaling_results import directions, power_law, scaling_result

from curvdiag import plotting
from curvdiag.errors import ArgumentError
from figures import line, lines_of, new_axes


def slope(drawn: Any) -> float:
    x, y = np.log10(np.asarray(drawn.get_data(), dtype=float))
    return float((y[-1] - y[0]) / (x[-1] - x[0]))


# C against H


def test_every_direction_stands_at_its_curvature_and_noise() -> None:
    result = scaling_result(50)
    ax = plotting.scaling(result, new_axes(), square=True)
    held, inside = result.held_out, result.in_sample
    np.testing.assert_array_equal(line(ax, "$C_{ii}$, held out").get_data(), (held.curvature, held.noise))
    np.testing.assert_array_equal(line(ax, "$C_{ii}$, in-sample").get_data(), (inside.curvature, inside.noise))
    np.testing.assert_array_equal(line(ax, "E[h$^2$]$_{ii}$, held out").get_data(), (held.curvature, held.square))
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
    assert "H_{ii}" in ax.get_xlabel()
    assert "eigenbasis of H" in ax.get_xlabel()
    assert "C_{ii}" in ax.get_ylabel()
    plain = plotting.scaling(scaling_result(50, basis="parameter"), new_axes(), in_sample=False)
    assert "single parameters" in plain.get_xlabel()
    assert not any("E[h" in label or "in-sample" in label for label in lines_of(plain))


def test_in_sample_points_are_hollow_and_called_biased() -> None:
    ax = plotting.scaling(scaling_result(50), new_axes())
    assert line(ax, "$C_{ii}$, in-sample (biased)").get_markerfacecolor() == "white"
    assert line(ax, "$C_{ii}$, held out").get_markerfacecolor() != "white"


def test_the_line_ends_where_the_intervals_end() -> None:
    result = scaling_result(200)
    fit = result.held_out.noise_fits["ols"]
    fit.low[7:], fit.high[7:] = np.nan, np.nan
    drawn = line(plotting.scaling(result, new_axes()), r"$\gamma$")
    assert f"{fit.counts[6]} directions" in drawn.get_label()
    assert slope(drawn) == pytest.approx(fit.exponent[6], rel=1e-12)


def test_without_a_held_out_half_the_in_sample_fit_stands_alone_and_is_called_so() -> None:
    result = scaling_result(50)
    result.held_out = result.in_sample
    for draw in (plotting.scaling, plotting.exponent):
        labels = lines_of(draw(result, new_axes()))
        assert any("in-sample (biased)" in label for label in labels)
        assert not any("held out" in label for label in labels)


def test_the_line_is_the_first_method_on_all_directions_that_have_an_interval() -> None:
    result = scaling_result(200, gamma=1.4)
    drawn = line(plotting.scaling(result, new_axes()), r"$\gamma$")
    fit = result.held_out.noise_fits["ols"]
    assert slope(drawn) == pytest.approx(fit.exponent[-1], rel=1e-12)
    x, y = (np.log10(values[0]) for values in drawn.get_data())
    assert y == pytest.approx(fit.intercept[-1] + fit.exponent[-1] * x, rel=1e-12)
    assert (min(drawn.get_xdata()), max(drawn.get_xdata())) == (
        pytest.approx(result.held_out.curvature.min()),
        pytest.approx(result.held_out.curvature.max()),
    )
    text = drawn.get_label()
    assert f"{fit.exponent[-1]:.3f} [{fit.low[-1]:.3f}, {fit.high[-1]:.3f}]" in text
    assert "200 directions, held out" in text


def test_another_method_and_another_number_of_directions_can_be_asked_for() -> None:
    result = scaling_result(200)
    fit = result.held_out.noise_fits["deming"]
    count = int(fit.counts[6])
    drawn = line(plotting.scaling(result, new_axes(), method="deming", count=count), r"$\gamma$")
    assert slope(drawn) == pytest.approx(fit.exponent[6], rel=1e-12)
    assert f"{count} directions" in drawn.get_label()
    assert min(drawn.get_xdata()) == pytest.approx(result.held_out.curvature[:count].min())
    for bad in ({"method": "lasso"}, {"count": 7000}):
        with pytest.raises(ArgumentError):
            plotting.scaling(result, new_axes(), **bad)


def test_the_band_and_the_guides_turn_about_the_middle_of_the_fitted_points() -> None:
    result = scaling_result(100)
    ax = plotting.scaling(result, new_axes())
    fit = result.held_out.noise_fits["ols"]
    middle = np.log10(result.held_out.curvature).mean()
    height = fit.intercept[-1] + fit.exponent[-1] * middle
    for guide in (1, 2):
        drawn = line(ax, f"slope {guide}")
        assert slope(drawn) == pytest.approx(guide, rel=1e-9)
        x, y = np.log10(np.asarray(drawn.get_data(), dtype=float))
        assert np.interp(middle, x, y) == pytest.approx(height, rel=1e-9)
        assert tuple(drawn.get_xdata()) == pytest.approx(ax.get_xlim())
    (band,) = ax.collections
    corners = np.log10(band.get_paths()[0].vertices)
    right = corners[np.isclose(corners[:, 0], corners[:, 0].max()), 1]
    reach = corners[:, 0].max() - middle
    assert (right.min(), right.max()) == (
        pytest.approx(height + fit.low[-1] * reach),
        pytest.approx(height + fit.high[-1] * reach),
    )


def test_the_frame_is_that_of_the_points_whatever_the_guides_do() -> None:
    result = scaling_result(100, gamma=1.0)
    held = result.held_out
    low, high = plotting.scaling(held, new_axes()).get_ylim()
    assert held.noise.min() / 2 < low < held.noise.min() < held.noise.max() < high < held.noise.max() * 2


def test_directions_left_out_stand_at_the_edge_and_are_counted() -> None:
    result = scaling_result(100, out=8)
    result.held_out.noise[-1] = -1e-6
    ax = plotting.scaling(result, new_axes())
    crosses = line(ax, "not positive, left out: 8 of 100")
    x, y = (np.asarray(values) for values in crosses.get_data())
    np.testing.assert_allclose(x, ax.get_xlim()[0])
    np.testing.assert_allclose(y[:-1], result.held_out.noise[-8:-1])
    assert y[-1] == pytest.approx(ax.get_ylim()[0])
    assert len(line(ax, "$C_{ii}$, held out").get_xdata()) == 92
    assert "92 directions" in line(ax, r"$\gamma$").get_label()
    assert not any("left out" in label for label in lines_of(plotting.scaling(scaling_result(100), new_axes())))


def test_without_an_interval_or_a_fit_none_is_drawn() -> None:
    result = scaling_result(50)
    fit = result.held_out.noise_fits["ols"]
    fit.low[:], fit.high[:] = np.nan, np.nan
    ax = plotting.scaling(result, new_axes())
    assert not ax.collections
    assert "[" not in line(ax, r"$\gamma$").get_label()
    result.held_out.noise_fits = {}
    assert not any("slope" in label or "gamma" in label for label in lines_of(plotting.scaling(result, new_axes())))
    result.held_out.noise_fits = {"ols": power_law(*np.ones((3, 4)), counts=[])}
    for draw in (plotting.scaling, plotting.exponent):
        assert not any("gamma$ =" in label for label in lines_of(draw(result, new_axes())))


def test_nothing_positive_is_an_empty_picture_that_says_so() -> None:
    one = directions(20)
    one.curvature *= -1
    one.used[:] = False
    one.reach, one.noise_fits, one.square_fits = 0, {}, {}
    ax = plotting.scaling(one, new_axes())
    assert [text.get_text() for text in ax.texts] == ["no direction has both positive"]
    ax.figure.savefig("/dev/null", format="png")
    plotting.exponent(one, new_axes()).figure.savefig("/dev/null", format="png")


# The exponent


def test_the_exponent_is_drawn_at_every_number_of_directions_with_its_interval() -> None:
    result = scaling_result(300)
    ax = plotting.exponent(result, new_axes())
    assert ax.get_xscale() == "log"
    for one, name in ((result.held_out, "held out"), (result.in_sample, "in-sample (biased)")):
        for fits, what in ((one.noise_fits, "$C_{ii}$"), (one.square_fits, "E[h$^2$]$_{ii}$")):
            drawn = line(ax, rf"$\gamma$ of {what}, {name}")
            np.testing.assert_array_equal(drawn.get_data(), (fits["ols"].counts, fits["ols"].exponent))
            assert (drawn.get_markerfacecolor() == "white") == one.biased
    fit = result.held_out.noise_fits["ols"]
    corners = ax.collections[-1].get_paths()[0].vertices
    for count, low, high in zip(fit.counts, fit.low, fit.high, strict=True):
        drawn_at = corners[corners[:, 0] == count, 1]
        assert (drawn_at.min(), drawn_at.max()) == (pytest.approx(low), pytest.approx(high))
    assert {1, 2} <= {drawn.get_ydata()[0] for drawn in ax.lines if len(set(drawn.get_ydata())) == 1}
    assert "95 %" in ax.get_ylabel()


def test_guides_and_exponents_are_in_view_and_a_wild_interval_does_not_press_them_flat() -> None:
    result = scaling_result(300)
    fit = result.held_out.noise_fits["ols"]
    fit.exponent[0], fit.low[0], fit.high[0] = 1.3, -40.0, 50.0
    low, high = plotting.exponent(result, new_axes(), square=False, in_sample=False).get_ylim()
    assert low < min(1.0, fit.exponent.min())
    assert high > max(2.0, fit.exponent.max())
    assert high - low < 8
    quiet = scaling_result(300, gamma=1.0)
    quiet.held_out.noise_fits["ols"].exponent[:] = 1.0
    quiet.held_out.noise_fits["ols"].low[:] = 0.98
    quiet.held_out.noise_fits["ols"].high[:] = 1.02
    low, high = plotting.exponent(quiet, new_axes(), square=False, in_sample=False).get_ylim()
    assert 0.5 < low < 0.98 < 2.0 < high < 2.5


def test_the_ends_of_the_fits_and_of_their_intervals_are_marked_where_they_come_early() -> None:
    result = scaling_result(100, out=10)
    ax = plotting.exponent(result, new_axes())
    assert line(ax, "fits end at 90").get_xdata()[0] == 90
    assert not any("intervals end" in label for label in lines_of(ax))
    result.held_out.resolved = 40
    ax = plotting.exponent(result, new_axes())
    assert line(ax, "intervals end at 40").get_xdata()[0] == 40
    assert not any(" end at" in label for label in lines_of(plotting.exponent(scaling_result(100), new_axes())))


def test_a_bar_stands_for_the_only_interval_among_several_fits() -> None:
    result = scaling_result(100)
    fit = result.held_out.noise_fits["ols"]
    fit.low[1:], fit.high[1:] = np.nan, np.nan
    ax = plotting.exponent(result, new_axes(), square=False, in_sample=False)
    (bar,) = [segment for drawn in ax.collections for segment in drawn.get_segments()]
    np.testing.assert_allclose(bar, [(fit.counts[0], fit.low[0]), (fit.counts[0], fit.high[0])])


def test_one_fit_alone_has_a_bar() -> None:
    result = scaling_result(100).held_out
    fit = result.noise_fits["ols"]
    for part in ("counts", "exponent", "intercept", "r_squared", "low", "high"):
        setattr(fit, part, getattr(fit, part)[-1:])
    ax = plotting.exponent(result, new_axes(), square=False)
    (bar,) = [segment for drawn in ax.collections for segment in drawn.get_segments()]
    np.testing.assert_allclose(bar, [(100, fit.low[0]), (100, fit.high[0])])


# Layers


def test_each_layer_has_its_row_with_the_interval_and_the_figures() -> None:
    results = {name: scaling_result(100, gamma=g) for name, g in (("0.weight", 1.0), ("2.weight", 1.6))}
    ax = plotting.exponents_by_layer(results, new_axes())
    assert [label.get_text() for label in ax.get_yticklabels()] == list(results)
    assert ax.get_ylim() == (1.5, -0.5)
    bars = {s[0, 1]: s[:, 0] for c in ax.collections for s in c.get_segments()}
    for row, result in enumerate(results.values()):
        fit = result.held_out.noise_fits["ols"]
        np.testing.assert_allclose(bars[row], (fit.low[-1], fit.high[-1]))
        (dot,) = [drawn for drawn in ax.lines if list(drawn.get_ydata()) == [row]]
        assert dot.get_xdata()[0] == fit.exponent[-1]
        assert ax.texts[row].get_text() == f"{fit.exponent[-1]:.3f} [{fit.low[-1]:.3f}, {fit.high[-1]:.3f}], n = 100"
    assert {1, 2} <= {drawn.get_xdata()[0] for drawn in ax.lines}
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["held out", "in-sample (biased)"]


def test_a_layer_without_a_fit_has_a_dash_and_no_layer_is_refused() -> None:
    empty = scaling_result(50)
    empty.in_sample.noise_fits = {}
    empty.held_out.noise_fits = {}
    ax = plotting.exponents_by_layer({"a": empty, "b": scaling_result(50)}, new_axes())
    assert ax.texts[0].get_text() == "-"
    with pytest.raises(ArgumentError):
        plotting.exponents_by_layer({}, new_axes())
