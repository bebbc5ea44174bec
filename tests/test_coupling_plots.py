"""Coupling, spectra and the whole page of the test of C against H; and what holds for all its figures."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, to_rgb
from matplotlib.figure import Figure
from scaling_results import coupling, scaling_result

from curvdiag import plotting
from curvdiag.errors import ArgumentError
from curvdiag.plotting.coupling import floor_of, relative
from curvdiag.plotting.fits import LOOKS
from curvdiag.plotting.scaling_page import HEIGHT, WIDTH
from figures import assert_no_text_over_another, line, lines_of, new_axes

# Coupling


def test_the_coupling_is_relative_to_the_diagonal_and_shown_as_it_is() -> None:
    result = scaling_result()
    for which, matrix in (("measured", result.coupling), ("baseline", result.coupling_baseline)):
        image = np.asarray(plotting.coupling(result, new_axes(), which=which).images[0].get_array())
        np.testing.assert_allclose(np.diagonal(image), 1.0)
        expected = abs(matrix[3, 7]) / np.sqrt(matrix[3, 3] * matrix[7, 7])
        assert image[3, 7] == pytest.approx(expected)


def test_both_matrices_share_one_logarithmic_colour_scale_and_one_bar() -> None:
    figure = Figure(figsize=(8.6, 4.2), layout="constrained")
    left, right = plotting.coupling_pair(scaling_result(), tuple(figure.subplots(1, 2)))
    one, two = left.images[0].norm, right.images[0].norm
    assert isinstance(one, LogNorm)
    assert (one.vmin, one.vmax) == (two.vmin, two.vmax)
    assert one.vmax == 1
    assert len(figure.axes) == 3
    assert (left.get_title(), right.get_title()) == ("measured", "random eigenvectors")
    alone = plotting.coupling(scaling_result(), new_axes(), which="baseline").images[0].norm
    assert (alone.vmin, alone.vmax) == (one.vmin, one.vmax)


def test_the_colours_begin_where_both_matrices_can_be_seen() -> None:
    faint = np.eye(60) + 2e-3 * (1 - np.eye(60))
    for one, two in ((coupling(), faint), (faint, coupling())):
        assert floor_of(scaling_result(coupling=one, coupling_baseline=two)) == pytest.approx(1e-3)


def test_the_first_direction_is_at_the_top_left_and_is_number_one() -> None:
    ax = plotting.coupling(scaling_result(), new_axes())
    assert ax.images[0].get_extent() == [0.5, 60.5, 60.5, 0.5]
    assert ax.get_ylim()[0] > ax.get_ylim()[1]


def test_a_direction_without_noise_is_no_shade_of_the_scale() -> None:
    matrix = coupling()
    matrix[5], matrix[:, 5] = 0.0, 0.0
    assert np.isnan(relative(matrix)[5]).all()
    ax = plotting.coupling(scaling_result(coupling=matrix), new_axes())
    assert ax.images[0].get_array().mask[5].all()
    bad, scale = ax.images[0].cmap.get_bad()[:3], ax.images[0].cmap(np.linspace(0, 1, 256))[:, :3]
    assert np.abs(scale - bad).max(axis=1).min() > 0.1
    ax.figure.savefig("/dev/null", format="png")


@pytest.mark.parametrize("matrix", [np.eye(4), np.ones((1, 1)), np.zeros((3, 3)), np.diag([1.0, 0.0])])
def test_degenerate_couplings_are_drawn(matrix: np.ndarray) -> None:
    result = scaling_result(coupling=matrix, coupling_baseline=matrix)
    assert 1e-4 <= floor_of(result) <= 0.1
    plotting.coupling(result, new_axes()).figure.savefig("/dev/null", format="png")


def test_an_unknown_or_missing_coupling_is_refused() -> None:
    with pytest.raises(ArgumentError):
        plotting.coupling(scaling_result(), new_axes(), which="both")
    with pytest.raises(ArgumentError):
        plotting.coupling(scaling_result(coupling=None), new_axes())


# Spectra


def test_eigenvalues_are_ranked_and_negative_ones_are_hollow_at_their_magnitude() -> None:
    ax = plotting.spectra({"H": [-3.0, 5.0, 0.0, 1.0, -4.0], "C": torch.tensor([2.0, 0.5])}, new_axes())
    assert ax.get_yscale() == "log"
    np.testing.assert_array_equal(line(ax, "H: 2 positive, 2 negative, 1 zero").get_data(), ([1, 2], [5, 1]))
    negative = line(ax, "H, negative")
    np.testing.assert_array_equal(negative.get_data(), ([1, 2], [4, 3]))
    assert negative.get_markerfacecolor() == "white"
    np.testing.assert_array_equal(line(ax, "C: 2 positive").get_data(), ([1, 2], [2, 0.5]))


def test_rounding_is_not_drawn_as_eigenvalues() -> None:
    values = np.concatenate([np.geomspace(1, 1e-6, 40), 1e-17 * np.array([1.0, -2.0, 3.0])])
    ax = plotting.spectra({"C": values}, new_axes())
    assert list(lines_of(ax)) == ["C: 40 positive, 3 zero"]
    assert ax.get_ylim()[0] > 1e-8
    assert ax.get_xscale() == "log"


def test_a_result_shows_the_spectra_that_it_knows() -> None:
    result = scaling_result()
    ax = plotting.spectra(result, new_axes())
    known = result.noise_spectrum[result.noise_spectrum > 0]
    np.testing.assert_allclose(line(ax, "C: ").get_ydata(), np.sort(known)[::-1])
    only = plotting.spectra(scaling_result(noise_spectrum=None), new_axes())
    assert not any(label.startswith("C") for label in lines_of(only))
    for bad in (scaling_result(dense=False), {}, {"H": []}, {"H": [1.0, np.nan]}):
        with pytest.raises(ArgumentError):
            plotting.spectra(bad, new_axes())


def test_where_one_is_a_density_all_are_drawn_as_densities_of_mass_one() -> None:
    rng = np.random.default_rng(0)
    nodes = np.tile(rng.standard_normal(200), (2, 1))
    known = SimpleNamespace(nodes=nodes, weights=np.full(nodes.shape, 1 / 200), deflated=np.empty(0), size=200)
    ax = plotting.spectra({"H": known, "C": rng.uniform(0.5, 2.0, 100)}, new_axes(), scale="linear")
    for name in ("H", "C"):
        x, y = (np.asarray(values, dtype=float) for values in line(ax, name).get_data())
        assert np.trapezoid(np.nan_to_num(y), x) == pytest.approx(1.0, abs=0.01)
    assert ax.get_xlabel() == "eigenvalue"


@pytest.mark.parametrize("values", [[0.0, 0.0], [-1.0], [1e-300], [1e300, -1e300]])
def test_degenerate_spectra_are_drawn(values: list[float]) -> None:
    ax = plotting.spectra({"H": values}, new_axes())
    ax.figure.savefig("/dev/null", format="png")
    assert all(np.isfinite(limit) for limit in (*ax.get_xlim(), *ax.get_ylim()))


# The page


def words_of(figure: Figure) -> str:
    return "\n".join(text.get_text() for ax in figure.axes for text in ax.texts)


def test_the_page_shows_all_figures_and_the_verdict() -> None:
    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    assert plotting.scaling_page(scaling_result(), figure) is figure
    titles = [ax.get_title() for ax in figure.axes]
    for part in ("noise against curvature", "exponent", "measured", "random eigenvectors", "spectra"):
        assert any(part in title for title in titles), part
    words = words_of(figure)
    assert "superlinear" in words
    for figures in ("interval [1.18, 1.22]", "0.081 ± 0.004 (0.72)", "0.94 ± 0.01 (0.05)", "0.93 (0.12)"):
        assert figures in words
    assert figure.get_suptitle() == "C against H: 2.weight, eigenbasis of H, 2,352 parameters, 1,797 samples"


def test_a_page_without_spectra_or_coupling_is_drawn_and_has_room_for_the_windows() -> None:
    result = scaling_result(dense=False, coupling=None, coupling_baseline=None, block="", commutator_baseline=np.nan)
    figure = plotting.scaling_page(result, Figure(figsize=(WIDTH, HEIGHT), layout="constrained"))
    assert not any("spectra" in ax.get_title() or "random" in ax.get_title() for ax in figure.axes)
    assert "rank correlation, bulk 101–300: 0.97 (0)" in words_of(figure)
    assert "whole model" in figure.get_suptitle()
    figure.savefig("/dev/null", format="png")


def test_a_long_story_is_cut_and_says_so() -> None:
    result = scaling_result(notes=tuple(f"note {i} costs $5 and is quite long, as notes often are" for i in range(60)))
    figure = plotting.scaling_page(result, Figure(figsize=(WIDTH, HEIGHT), layout="constrained"))
    assert "the whole of it is in the printed result" in words_of(figure)
    assert_no_text_over_another(figure)


# What holds for all


DRAW: dict[str, Callable[[Axes | None], Axes]] = {
    "scaling": lambda ax: plotting.scaling(scaling_result(out=12), ax, square=True, title="t"),
    "exponent": lambda ax: plotting.exponent(scaling_result(out=20), ax, title="t"),
    "layers": lambda ax: plotting.exponents_by_layer(
        {f"blocks.{i}.attention.weight": scaling_result(60, gamma=1 + i / 4) for i in range(4)}, ax, title="t"
    ),
    "coupling": lambda ax: plotting.coupling(scaling_result(), ax),
    "spectra": lambda ax: plotting.spectra(scaling_result(), ax, title="t"),
}


def test_no_function_changes_a_global_setting_or_touches_pyplot_when_it_is_given_axes() -> None:
    settings, figures = dict(mpl.rcParams), plt.get_fignums()
    for draw in DRAW.values():
        draw(new_axes())
    plotting.scaling_page(scaling_result(), Figure(figsize=(WIDTH, HEIGHT)))
    assert dict(mpl.rcParams) == settings
    assert plt.get_fignums() == figures


def test_without_axes_a_figure_is_made_that_pyplot_can_show() -> None:
    figures = [draw(None).figure for draw in DRAW.values()]
    figures += [plotting.scaling_page(scaling_result()), plotting.coupling_pair(scaling_result())[0].figure]
    for figure in figures:
        assert figure.number in plt.get_fignums()
        plt.close(figure)


def lightness(colour: Any) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
    return float(np.cbrt(np.dot(linear, (0.2126, 0.7152, 0.0722))))


def test_series_differ_in_marker_in_dash_and_in_lightness() -> None:
    for what in ("marker", "linestyle"):
        assert len({look[what] for look in LOOKS.values()}) == len(LOOKS)
    shades = sorted(lightness(look["color"]) for look in LOOKS.values())
    assert np.diff(shades).min() > 0.02


@pytest.mark.parametrize("which", list(DRAW))
def test_no_text_lies_over_another(which: str) -> None:
    assert_no_text_over_another(DRAW[which](new_axes(5.6, 3.6)).figure)


@pytest.mark.parametrize("dense", [True, False])
def test_no_text_of_the_page_lies_over_another(dense: bool) -> None:
    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    assert_no_text_over_another(plotting.scaling_page(scaling_result(out=12, dense=dense), figure))
