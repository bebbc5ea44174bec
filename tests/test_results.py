"""Every result draws itself or says that it cannot."""

from __future__ import annotations

import importlib
import pkgutil

import numpy as np
import pytest
import torch
from test_duality import NAMES, relu_layer

import curvdiag
from curvdiag import plotting
from curvdiag.errors import ArgumentError
from curvdiag.results import Result
from curvdiag.scaling.duality import activity_weight_duality
from curvdiag.scaling.verdict import Verdict
from figures import new_axes


def kinds(base: type = Result) -> list[type]:
    return [one for kind in base.__subclasses__() for one in (kind, *kinds(kind))]


def test_every_figure_that_a_result_names_exists() -> None:
    for module in pkgutil.walk_packages(curvdiag.__path__, "curvdiag."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    own = [kind for kind in kinds() if kind.__module__.startswith("curvdiag.")]
    assert len(own) > 20
    for kind in own:
        assert not kind.figure or callable(getattr(plotting, kind.figure, None)), kind


def test_a_result_without_a_figure_says_so() -> None:
    with pytest.raises(ArgumentError, match="Verdict has no figure"):
        Verdict("undecided", ()).plot()


def test_the_duality_draws_the_measured_noise_and_every_prediction() -> None:
    layer, _, h = relu_layer(40)
    directions = torch.linalg.eigh(h.mean(0)).eigenvectors.flip(1)[:, :6]
    found = activity_weight_duality(*layer, directions=directions)
    ax = found.plot(new_axes(), title="one layer")
    labels = [str(line.get_label()) for line in ax.lines]
    assert [label.split(",")[0] for label in labels] == ["measured C", *NAMES]
    assert labels[0].endswith(f"exponent {found.noise_exponent:.2f}")
    seen = found.curvature > 0
    np.testing.assert_array_equal(ax.lines[0].get_xydata(), np.stack([found.curvature, found.noise], 1)[seen])
    np.testing.assert_array_equal(ax.lines[2].get_ydata(), found.predictions["same-sample"].along[seen])
    with pytest.raises(ArgumentError, match="directions="):
        activity_weight_duality(*layer).plot(new_axes())
