"""Pictures show what was measured, where it was measured, and can be read by everybody."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm, to_rgb
from matplotlib.figure import Figure

from curvdiag import plotting
from curvdiag.errors import ArgumentError
from curvdiag.estimate import Estimate
from curvdiag.plotting.density import outliers
from curvdiag.plotting.eigenvalue_axis import choose_axis
from curvdiag.plotting.heatmap import cell_edges, ink_map
from curvdiag.plotting.style import LINES
from curvdiag.record import DensitySeries, Series
from curvdiag.spectrum import MEASURES
from curvdiag.spectrum import anisotropy as measure
from curvdiag.spectrum.density import SpectralDensity

OUTLIERS = np.array([300.0, 150.0, 70.0])


def of_eigenvalues(eigenvalues: np.ndarray, probes: int = 3) -> SpectralDensity:
    """The density that knows every eigenvalue, in each of its probes."""
    nodes = np.tile(eigenvalues, (probes, 1))
    return SpectralDensity(nodes, np.full(nodes.shape, 1 / len(eigenvalues)), len(eigenvalues), steps=9)


def bulk(seed: int = 0, size: int = 1000) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(size)


def heavy(growth: float = 1.0) -> SpectralDensity:
    return of_eigenvalues(np.concatenate([bulk(), growth * OUTLIERS]))


def benign() -> SpectralDensity:
    return of_eigenvalues(bulk() ** 2)


def over(densities: list[SpectralDensity], steps: list[int], epochs: Any = None) -> DensitySeries:
    at = np.array(steps)
    return DensitySeries(
        "hessian", "", at, np.full(len(at), np.nan) if epochs is None else np.array(epochs), 1.0 * at, tuple(densities)
    )


def scalar(name: str = "x", values: Any = (1.0, 2.0, 3.0), errors: Any = None, samples: int = 0) -> Series:
    values = np.array(values, dtype=float)
    at = np.arange(len(values))
    errors = np.full(len(values), np.nan) if errors is None else np.array(errors)
    return Series(name, 10 * at, at / 2, 1.0 * at, values, errors, np.full(len(values), samples))


def new_axes(width: float = 6.4, height: float = 4.0) -> Axes:
    return Figure(figsize=(width, height), layout="constrained").subplots()


# The eigenvalue axis


def test_outliers_that_dwarf_the_bulk_get_a_symmetric_log_axis_and_others_a_linear_one() -> None:
    assert not choose_axis([heavy()]).linear
    assert choose_axis([benign()]).linear
    assert not choose_axis([benign(), heavy()]).linear
    assert choose_axis([heavy()], "linear").linear
    assert not choose_axis([benign()], "symlog").linear


def test_positions_run_evenly_along_matplotlibs_axis_and_without_a_corner() -> None:
    axis = choose_axis([heavy()])
    ax = new_axes()
    axis.apply(ax, "x")
    positions = np.linspace(axis.low, axis.high, 501)
    drawn = ax.xaxis.get_transform().transform(axis.eigenvalue(positions))
    np.testing.assert_allclose(np.diff(drawn) / np.diff(drawn)[0], 1.0, rtol=1e-6)
    np.testing.assert_allclose(axis.position(axis.eigenvalue(positions)), positions, atol=1e-12)
    slope = np.diff(axis.eigenvalue(np.linspace(0.0, 2 / math.log(10), 2001)))
    assert np.abs(np.diff(slope) / slope[1:]).max() < 0.01


@pytest.mark.parametrize("scale", ["linear", "symlog"])
def test_the_density_along_the_axis_has_mass_one_with_deflated_eigenvalues_in_it(scale: str) -> None:
    nodes = np.tile(bulk(1, 50), (2, 1))
    density = SpectralDensity(nodes, np.full(nodes.shape, 0.02 * 0.9), 20, deflated=np.array([50.0, -60.0]))
    axis = choose_axis([density], scale)
    at = np.linspace(axis.low, axis.high, 20001)
    height = axis.smooth(density, at)
    assert np.trapezoid(height, at) == pytest.approx(1.0, abs=1e-4)
    beyond = at > axis.position(np.array(20.0))
    assert np.trapezoid(height[beyond], at[beyond]) == pytest.approx(0.05, abs=1e-4)


def test_on_a_linear_axis_the_density_is_that_of_the_result() -> None:
    density = benign()
    axis = choose_axis([density], "linear", width=0.3)
    at = np.linspace(-1, 12, 100)
    np.testing.assert_allclose(axis.smooth(density, at), density.density(at, 0.3), rtol=1e-10)


def test_gaps_between_ritz_values_of_the_bulk_do_not_look_like_holes() -> None:
    # Lanczos resolves the bulk about zero no finer than this, however narrow it is.
    nodes = np.concatenate([np.arange(-2.0, 2.5, 0.5), OUTLIERS])[None]
    weights = np.array([0.001, 0.002, 0.003, 0.09, 0.8, 0.09, 0.003, 0.002, 0.006, 0.001, 0.001, 0.001])[None]
    density = SpectralDensity(nodes, weights, 1000)
    axis = choose_axis([density])
    inside = axis.smooth(density, np.linspace(axis.position(np.array(-1.0)), axis.position(np.array(1.0)), 400))
    assert inside.min() > axis.one_eigenvalue(density.size)


# Heatmap


def mesh_of(ax: Axes) -> Any:
    return ax.collections[0]


def test_cells_lie_between_the_measurements_also_where_these_are_uneven() -> None:
    np.testing.assert_array_equal(cell_edges(np.array([0.0, 10.0, 100.0, 110.0])), [0, 5, 55, 105, 115])
    np.testing.assert_array_equal(cell_edges(np.array([10.0, 20.0])), [5, 15, 25])
    np.testing.assert_array_equal(cell_edges(np.array([7.0])), [6.5, 7.5])
    steps = [0, 10, 100, 110]
    ax = plotting.heatmap(over([heavy(g) for g in (0.1, 0.2, 0.5, 1.0)], steps), new_axes())
    edges = mesh_of(ax).get_coordinates()[0, :, 0]
    assert all(a <= step <= b for step, a, b in zip(steps, edges[:-1], edges[1:], strict=True))
    assert ax.get_xlim() == (0, 115)


def test_one_grid_one_kernel_and_one_colour_scale_hold_for_all_rows() -> None:
    series = over([heavy(), benign(), heavy()], [0, 1, 5])
    image = np.asarray(mesh_of(plotting.heatmap(series, new_axes())).get_array())
    np.testing.assert_array_equal(image[:, 0], image[:, 2])
    axis = choose_axis(series.densities)
    edges = axis.edges()
    np.testing.assert_allclose(image[:, 1], axis.smooth(benign(), 0.5 * (edges[1:] + edges[:-1])))


@pytest.mark.parametrize("scale", ["linear", "symlog"])
def test_a_single_outlier_among_a_thousand_eigenvalues_is_seen(scale: str) -> None:
    ax = plotting.heatmap(over([heavy()], [3]), new_axes(), scale=scale)
    mesh = mesh_of(ax)
    assert isinstance(mesh.norm, LogNorm)
    image = np.asarray(mesh.get_array())[:, 0]
    levels = mesh.get_coordinates()[:, 0, 1]
    row = np.searchsorted(levels, 300.0) - 1
    assert mesh.norm(image[row]) > 0.15
    empty = np.searchsorted(levels, 220.0) - 1
    assert mesh.norm(image[empty]) < 0.1


@pytest.mark.parametrize("count", [1, 2, 30])
@pytest.mark.parametrize("time_axis", ["x", "y"])
def test_any_number_of_measurements_is_drawn_either_way_round(count: int, time_axis: str) -> None:
    series = over([heavy(1 + i) for i in range(count)], [3**i if count < 5 else i**2 for i in range(count)])
    ax = plotting.heatmap(series, new_axes(), time_axis=time_axis, lambda_max=True)
    line = next(line for line in ax.lines if line.get_label() == r"$\lambda_{\max}$")
    xy = (series.steps, [d.lambda_max for d in series.densities])
    np.testing.assert_allclose(line.get_data(), xy if time_axis == "x" else xy[::-1])
    labels = (ax.get_xlabel(), ax.get_ylabel())
    expected = ("optimizer step", "Hessian eigenvalue")
    assert labels == (expected if time_axis == "x" else expected[::-1])
    assert ax.figure.axes[1].get_ylabel() == "density, per decade of the axis"
    ax.figure.savefig("/dev/null", format="png")


def test_epochs_are_shown_where_each_measurement_has_its_own() -> None:
    several = [heavy(), heavy()]
    assert plotting.heatmap(over(several, [1, 2], [0.5, 1.0]), new_axes()).get_xlabel() == "epoch"
    assert plotting.heatmap(over(several, [1, 2], [1, 1]), new_axes()).get_xlabel() == "optimizer step"
    for time, epochs in (("epochs", [1, 1]), ("epochs", None), ("days", [1, 2])):
        with pytest.raises(ArgumentError):
            plotting.heatmap(over(several, [1, 2], epochs), new_axes(), time=time)


def test_what_cannot_be_drawn_is_refused() -> None:
    nan = SpectralDensity(np.array([[np.nan]]), np.array([[1.0]]), 1)
    for bad in ([], [nan]):
        with pytest.raises(ArgumentError):
            plotting.heatmap(over(bad, list(range(len(bad)))), new_axes())
    for options in ({"scale": "log"}, {"width": 0.0}, {"range": (1, 1)}, {"time_axis": "z"}):
        with pytest.raises(ArgumentError):
            plotting.heatmap(over([heavy()], [1]), new_axes(), **options)


@pytest.mark.parametrize(
    "eigenvalues", [[0.0] * 5, [2.0] * 5, [-3.0], [1e-30, 1e-30], [1e100, -1e100], [0.0, 1e-9, 1e9]]
)
def test_degenerate_spectra_are_drawn(eigenvalues: list[float]) -> None:
    density = of_eigenvalues(np.array(eigenvalues))
    for ax in (plotting.density(density, new_axes()), plotting.heatmap(over([density], [0]), new_axes())):
        drawn = io.BytesIO()
        ax.figure.savefig(drawn, format="png")
        assert drawn.getvalue().startswith(b"\x89PNG")
        assert all(np.isfinite(limit) for limit in (*ax.get_xlim(), *ax.get_ylim()))


# Density


@pytest.mark.parametrize("scale", ["linear", "symlog"])
def test_outliers_are_marked_with_their_values_and_the_bulk_is_not(scale: str) -> None:
    values = np.concatenate([[-200.0], OUTLIERS])
    density = of_eigenvalues(np.concatenate([bulk(), values]))
    axis = choose_axis([density], scale)
    np.testing.assert_array_equal(outliers(density, axis), np.sort(values))
    ax = plotting.density(density, new_axes(), scale=scale)
    assert {"\N{MINUS SIGN}200", "300"} <= {text.get_text() for text in ax.texts}
    assert ax.get_yscale() == "log"


def test_a_spectrum_without_outliers_has_none_marked() -> None:
    uniform = of_eigenvalues(np.linspace(0, 1, 500))
    assert len(outliers(uniform, choose_axis([uniform]))) == 0
    few = of_eigenvalues(np.array([1.0, 2.0, 50.0]))
    assert len(outliers(few, choose_axis([few]))) == 0


# Scalars, eigenpairs, estimates


def test_the_band_is_the_student_t_interval_where_there_is_one() -> None:
    one = scalar(values=[5.0, 6.0], errors=[0.5, 1.0], samples=4)
    ax = plotting.scalars(one, new_axes())
    corners = ax.collections[0].get_paths()[0].vertices
    for at, value, error in zip(one.steps, one.values, one.standard_errors, strict=True):
        low, high = Estimate(value, error, 4).interval()
        drawn = corners[corners[:, 0] == at, 1]
        assert (drawn.min(), drawn.max()) == (pytest.approx(low), pytest.approx(high))
    unknown = plotting.scalars(scalar(errors=[1.0] * 3, samples=2), new_axes())
    assert all(not len(path.vertices) for path in unknown.collections[0].get_paths())


def test_nan_leaves_a_gap_and_the_log_scale_is_taken_only_where_it_can_be() -> None:
    line = plotting.scalars(scalar(values=[1.0, np.nan, np.inf, 2.0]), new_axes()).lines[0]
    assert np.isnan(line.get_ydata()[1:3]).all()
    assert plotting.scalars(scalar(values=[1.0, 1000.0]), new_axes()).get_yscale() == "log"
    assert plotting.scalars(scalar(values=[1.0, 2.0]), new_axes()).get_yscale() == "linear"
    assert plotting.scalars(scalar(values=[-1.0, 1000.0]), new_axes()).get_yscale() == "linear"
    wide = scalar(values=[1.0, 1000.0], errors=[5.0, 1.0], samples=3)
    assert plotting.scalars(wide, new_axes()).get_yscale() == "linear"
    band = plotting.scalars(wide, new_axes(), log=True)
    assert (band.collections[0].get_paths()[0].vertices[:, 1] > 0).all()
    with pytest.raises(ArgumentError):
        plotting.scalars([], new_axes())
    plotting.scalars(scalar(values=[]), new_axes())


def test_several_series_have_a_legend_and_one_has_its_name_on_the_axis() -> None:
    several = plotting.scalars([scalar("a"), scalar("b")], new_axes(), time="epochs")
    assert [text.get_text() for text in several.get_legend().get_texts()] == ["a", "b"]
    assert several.get_xlabel() == "epoch"
    assert plotting.scalars(scalar("a"), new_axes()).get_ylabel() == "a"


def some_eigenpairs() -> Any:
    return SimpleNamespace(
        values=torch.tensor([9.0, 4.0, -2.0]),
        residuals=torch.tensor([0.1, 0.5, 0.2]),
        converged=torch.tensor([True, False, True]),
    )


def test_residual_bars_hold_one_residual_to_each_side_and_what_has_not_converged_is_hollow() -> None:
    ax = plotting.eigenpairs(some_eigenpairs(), new_axes())
    bars = next(c for c in ax.containers if hasattr(c, "has_yerr")).lines[2][0].get_segments()
    ends = [(segment[0, 1], segment[1, 1]) for segment in bars]
    np.testing.assert_allclose(ends, [(8.9, 9.1), (3.5, 4.5), (-2.2, -1.8)], rtol=1e-6)
    faces = {line.get_label(): line.get_markerfacecolor() for line in ax.lines}
    assert faces["not converged"] == "white" != faces["converged"]


def test_an_estimate_is_drawn_with_its_interval() -> None:
    exact, scalar_one = Estimate.exact(2.0), Estimate(5.0, 1.0, 4)
    vector = Estimate.from_samples(np.arange(12.0).reshape(4, 3))
    for one in (exact, scalar_one, vector, Estimate(1.0, math.nan, 1)):
        one.plot(new_axes()).figure.savefig("/dev/null", format="png")
    ax = plotting.estimate(scalar_one, new_axes())
    segment = ax.containers[0].lines[2][0].get_segments()[0]
    np.testing.assert_allclose(segment[:, 1], scalar_one.interval())


def rows_of(ax: Axes) -> dict[str, tuple[str, float | None]]:
    """The figure's rows: label -> (value in figures, place of the dot)."""
    dots = {int(line.get_ydata()[0]): float(line.get_xdata()[0]) for line in ax.lines if line.get_marker() == "o"}
    texts = {int(text.get_position()[1]): text.get_text() for text in ax.texts}
    labels = [label.get_text() for label in ax.get_yticklabels()]
    assert set(texts) == set(range(len(labels)))
    return {label: (texts[row], dots.get(row)) for row, label in enumerate(labels)}


def test_every_measure_of_anisotropy_has_its_row_and_what_is_unknown_a_dash() -> None:
    density = of_eigenvalues(np.concatenate([bulk(), OUTLIERS]))
    density.nodes[0, :900] *= 1.1  # so that the probes differ
    result = measure(density)
    ax = result.plot(new_axes())
    assert ax.get_xscale() == "log"
    rows = rows_of(ax)
    assert list(rows) == [name.replace("_", " ") for name in MEASURES]
    for name, estimate in result.measures.items():
        text, dot = rows[name.replace("_", " ")]
        if math.isnan(estimate.value):
            assert (text, dot) == ("-", None)
        else:
            assert dot == estimate.value
            assert float(text) == pytest.approx(estimate.value, rel=5e-3)
    assert {rows["top ratio"], rows["condition number"]} == {("-", None)}
    bars = {round(s[0, 1]): s[:, 0] for c in ax.collections for s in c.get_segments()}
    row = list(MEASURES).index("effective_rank")
    np.testing.assert_allclose(bars[row], result.effective_rank.interval())


def test_measures_that_no_logarithmic_axis_can_hold_are_given_in_figures() -> None:
    flat = rows_of(measure(np.full(20, 3.0)).plot(new_axes()))
    assert flat["negative mass"] == ("0", None)
    assert flat["stable rank"] == ("20", pytest.approx(20.0))
    zero = rows_of(measure(np.zeros(5)).plot(new_axes()))
    assert set(zero.values()) == {("-", None)}
    wide = SimpleNamespace(measures={"a": Estimate(1.0, 1.0, 4), "b": Estimate(2.0, 1.0, 2)}, size=9)
    ax = plotting.anisotropy(wide, new_axes())  # type: ignore[arg-type]
    (bar,) = [s for c in ax.collections for s in c.get_segments()]
    assert bar[0, 0] == pytest.approx(ax.get_xlim()[0])
    assert bar[1, 0] == pytest.approx(Estimate(1.0, 1.0, 4).interval()[1])


# What holds for all


def draw_all(ax: Axes | None) -> Iterator[Axes]:
    yield heavy().plot(ax)
    yield over([heavy(), benign()], [0, 5]).plot(ax)
    yield scalar().plot(ax)
    yield plotting.eigenpairs(some_eigenpairs(), ax)
    yield Estimate(5.0, 1.0, 4).plot(ax)
    yield measure(heavy()).plot(ax)


def test_no_function_changes_a_global_setting_or_touches_pyplot_when_it_is_given_axes() -> None:
    settings, figures = dict(mpl.rcParams), plt.get_fignums()
    for _ in draw_all(new_axes()):
        pass
    assert dict(mpl.rcParams) == settings
    assert plt.get_fignums() == figures


def test_without_axes_a_figure_is_made_that_pyplot_can_show() -> None:
    before = dict(mpl.rcParams)
    for ax in draw_all(None):
        assert ax.figure.number in plt.get_fignums()
        plt.close(ax.figure)
    assert dict(mpl.rcParams) == before


def lightness(colour: Any) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
    return float(np.cbrt(np.dot(linear, (0.2126, 0.7152, 0.0722))))


def test_colours_keep_their_order_in_black_and_white() -> None:
    ramp = [lightness(colour[:3]) for colour in ink_map()(np.linspace(0, 1, 64))]
    assert (np.diff(ramp) < 0).all()
    assert ramp[0] < 0.96, "the palest tint must differ from paper"
    assert len({str(dash) for _, dash, _ in LINES}) == len({mark for _, _, mark in LINES}) == len(LINES)
    assert (np.diff([lightness(colour) for colour, _, _ in LINES]) > 0).all()


@pytest.mark.parametrize(
    "which", ["density", "density linear", "heatmap", "heatmap linear", "scalars", "many outliers", "anisotropy"]
)
def test_no_text_lies_over_another(which: str) -> None:
    ax = new_axes(5.0, 3.2)
    if which.startswith("heatmap"):
        series = over([heavy(g) for g in np.linspace(0.1, 40, 12)], [i**3 for i in range(12)])
        plotting.heatmap(series, ax, scale="linear" if "linear" in which else "auto", lambda_max=True)
    elif which == "scalars":
        plotting.scalars([scalar("curv/hessian/trace", [1.0, 1e4, 3e5]), scalar("b")], ax)
    elif which == "many outliers":
        plotting.density(of_eigenvalues(np.concatenate([bulk(), np.geomspace(10, 1000, 60)])), ax)
    elif which == "anisotropy":
        plotting.anisotropy(measure(heavy()), ax, title="Anisotropy of the Hessian")
    else:
        plotting.density(heavy(), ax, scale="linear" if "linear" in which else "auto", operator="Hessian", title="t")
    figure = ax.figure
    FigureCanvasAgg(figure).draw()
    boxes = [
        (text.get_text(), text.get_window_extent())
        for axes in figure.axes
        for text in [
            axes.title, axes.xaxis.label, axes.yaxis.label, *axes.texts,
            *(t for t in axes.get_xticklabels() if axes.get_xlim()[0] <= t.get_position()[0] <= axes.get_xlim()[1]),
            *(t for t in axes.get_yticklabels() if axes.get_ylim()[0] <= t.get_position()[1] <= axes.get_ylim()[1]),
        ]
        if text.get_text().strip() and text.get_visible()
    ]  # fmt: skip
    assert len(boxes) > 5
    for (a, one), (b, two) in itertools.combinations(boxes, 2):
        assert not one.overlaps(two), f"{a!r} lies over {b!r}"
    for text, box in boxes:
        assert figure.bbox.containsx(box.x0 + 1), text
        assert figure.bbox.containsx(box.x1 - 1), text
        assert figure.bbox.containsy(box.y0 + 1), text
        assert figure.bbox.containsy(box.y1 - 1), text
