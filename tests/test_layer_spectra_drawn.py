"""The picture of all layers: a column each, its largest eigenvalue where it is, and what has not converged hollow."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from nets import make
from torch import nn

from curvdiag import Hessian, LayerSpectra, Objective, layer_spectra, plotting
from curvdiag.errors import ArgumentError
from curvdiag.estimate import Estimate
from curvdiag.spectrum.density import SpectralDensity
from curvdiag.spectrum.layers import LayerSpectrum
from figures import assert_no_text_over_another, lines_of, new_axes


@pytest.fixture(scope="module")
def found() -> LayerSpectra:
    model, batch = make("transformer-tied")
    return layer_spectra(Hessian(Objective(model, nn.CrossEntropyLoss(), batch)), steps=6)


def test_each_layer_has_its_column_and_its_largest_eigenvalue(found: LayerSpectra) -> None:
    ax = found.plot(new_axes(), title="A transformer")
    assert [label.get_text() for label in ax.get_xticklabels()] == list(found)
    points = np.concatenate([np.stack(one.get_data()) for one in lines_of(ax).values() if one.get_marker() == "o"], 1)
    points = points[:, np.argsort(points[0])]
    assert np.array_equal(points[0], np.arange(7))
    assert np.allclose(points[1], list(found.lambda_max.values()))
    columns = [one.get_datalim(ax.transData) for one in ax.collections if len(one.get_paths()[0].vertices) > 50]
    assert len(columns) == 7
    for at, (box, layer) in enumerate(zip(columns, found.layers.values(), strict=True)):
        assert at - 0.45 < box.x0 < at < box.x1 < at + 0.45
        assert box.y1 > layer.lambda_max
    assert_no_text_over_another(ax.figure)


def test_the_widest_column_has_the_most_eigenvalues_per_length() -> None:
    def spectrum(size: int) -> LayerSpectrum:
        nodes = np.linspace(0, 1, 50)[None]
        density = SpectralDensity(nodes, np.full((1, 50), 1 / 50), size)
        return LayerSpectrum(size, 1.0, 0.0, True, density.trace(), density, 50)

    found = LayerSpectra({"few": spectrum(50), "many": spectrum(5000)}, 1e-2, 100, 0)
    ax = plotting.layers(found, new_axes())
    few, many = (one.get_datalim(ax.transData).width for one in ax.collections if len(one.get_paths()[0].vertices) > 50)
    assert many == pytest.approx(0.84, abs=0.01)
    assert few == pytest.approx(many * 3 / 5, rel=0.02)  # two decades fewer, of five


def test_what_has_not_converged_is_hollow(found: LayerSpectra) -> None:
    one = replace(found["embed"], converged=False, residual=0.2)
    ax = replace(found, layers={**found.layers, "embed": one}).plot(new_axes())
    (hollow,) = [line for label, line in lines_of(ax).items() if "not converged" in label]
    assert 1 in hollow.get_xdata()
    assert hollow.get_markerfacecolor() == "white"
    lengths = [np.ptp(segment[:, 1]) for part in ax.collections if hasattr(part, "get_segments")
               for segment in part.get_segments()]  # fmt: skip
    assert max(lengths) == pytest.approx(0.4)


def test_traces_have_their_intervals(found: LayerSpectra) -> None:
    ax = found.plot(new_axes(), show="trace")
    line = next(one for one in ax.lines if one.get_marker() == "s")
    assert np.allclose(line.get_ydata(), [layer.trace.value for layer in found.layers.values()])
    (bars,) = [part for part in ax.collections if hasattr(part, "get_segments")]
    for segment, layer in zip(bars.get_segments(), found.layers.values(), strict=True):
        assert np.allclose(segment[:, 1], layer.trace.interval(0.95))
    assert ax.get_ylabel() == "trace"


def test_traces_of_many_magnitudes_are_told_apart_and_labels_stay_apart(found: LayerSpectra) -> None:
    traces = [
        Estimate(value, error, 3) for value, error in ((8.0, 1.4), (1.8, 0.1), (0.8, 0.2), (0.0, 0.0), (-30.0, 1.0))
    ]
    layers = {f"layer{i}": replace(found["embed"], trace=one) for i, one in enumerate(traces)}
    ax = replace(found, layers=layers).plot(new_axes(), show="trace", scale="symlog")
    assert ax.get_yscale() == "symlog"
    heights = ax.transAxes.inverted().transform(ax.transData.transform([(0, one.value) for one in traces]))[:, 1]
    assert np.abs(np.diff(np.sort(heights))).min() > 0.05
    low, high = ax.get_ylim()
    assert low < traces[-1].interval(0.95)[0] < traces[0].interval(0.95)[1] < high
    labels = [label.get_window_extent() for label in ax.get_yticklabels() if label.get_text()]
    assert not any(a.overlaps(b) for i, a in enumerate(labels) for b in labels[:i])
    zero = {"none": replace(found["embed"], trace=Estimate(0.0, 0.0, 3))}
    assert replace(found, layers=zero).plot(new_axes(), show="trace", scale="symlog") is not None


def test_what_cannot_be_drawn_is_refused(found: LayerSpectra) -> None:
    with pytest.raises(ArgumentError, match="show"):
        found.plot(new_axes(), show="density")
    for show in ("spectrum", "trace"):
        with pytest.raises(ArgumentError, match="scale"):
            found.plot(new_axes(), show=show, scale="log")
    with pytest.raises(ArgumentError, match="no layer"):
        plotting.layers(replace(found, layers={}), new_axes())
