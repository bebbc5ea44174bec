"""Gradient diversity against its definition on per-sample gradients, and what its standard error promises."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from nets import cut, make
from test_noise import gradients
from torch import nn
from torch.nn import functional as F

from curvdiag import Objective
from curvdiag.errors import ArgumentError, LossError
from curvdiag.noise.diversity import diversity, gradient_diversity
from curvdiag.noise.sample_products import SampleProducts


def definition(rows: np.ndarray) -> float:
    return float((rows**2).sum() / (rows.sum(0) ** 2).sum())


def products_of(rows: np.ndarray) -> SampleProducts:
    """From per-sample gradients ``[N, P]``."""
    mean = rows.mean(0)
    return SampleProducts(
        (rows**2).sum(1), rows @ mean, float(mean @ mean), float(((rows - mean) ** 2).sum() / len(rows))
    )


def without_each(rows: np.ndarray, statistic) -> np.ndarray:
    return np.array([statistic(np.delete(rows, i, 0)) for i in range(len(rows))])


@pytest.mark.parametrize("net", ["mlp-relu", "conv-batchnorm", "transformer-tied"])
def test_it_equals_its_definition(net: str) -> None:
    model, batch = make(net)
    rows = gradients(model, batch).numpy()
    objective = Objective(model, nn.CrossEntropyLoss(), cut(batch, (7, 3)))
    assert gradient_diversity(objective).value == pytest.approx(definition(rows), rel=1e-10)
    assert gradient_diversity(objective, micro_batch=2).value == pytest.approx(definition(rows), rel=1e-10)


def test_its_standard_error_is_the_jackknife_over_samples() -> None:
    """One gradient left out at a time, of ``N D``. Batches of several shapes must not mix up the samples."""
    model, (x, y) = make("transformer-tied")
    short = Objective(
        model, nn.CrossEntropyLoss(), [(x[:2, :3], y[:2, :3]), (x[2:6], y[2:6]), (x[6:8, :3], y[6:8, :3])]
    )
    weights = torch.tensor([3.0, 3.0, 5.0, 5.0, 5.0, 5.0, 3.0, 3.0], dtype=torch.float64)
    rows = torch.cat(
        [gradients(model, part) for part in ((x[:2, :3], y[:2, :3]), (x[2:6], y[2:6]), (x[6:8, :3], y[6:8, :3]))]
    )
    rows = (rows * (weights / weights.mean())[:, None]).numpy()
    found = gradient_diversity(short)
    assert found.value == pytest.approx(definition(rows), rel=1e-10)
    bound = without_each(rows, lambda rest: len(rest) * definition(rest))
    error = math.sqrt(7 / 8 * ((bound - bound.mean()) ** 2).sum()) / 8
    assert found.standard_error == pytest.approx(error, rel=1e-8)
    assert found.samples == 8


def test_its_interval_covers_what_many_samples_would_show() -> None:
    """``N D`` tends to ``1 + tr(C) / |g|^2``, here 4.6; skewed gradients, 500 sets of 300, and of 30 too few."""
    generator = np.random.default_rng(0)
    mean = np.array([1.0, -0.5, 0.3, 0.0, 0.2])
    truth = 1 + 5 / (mean @ mean)
    hits = dict.fromkeys((30, 300), 0)
    for _ in range(500):
        for n in hits:
            low, high = diversity(products_of(mean + generator.gamma(4, size=(n, 5)) / 2 - 2)).interval()
            hits[n] += low <= truth / n <= high
    assert 0.92 <= hits[300] / 500 <= 0.98
    assert hits[30] < hits[300]  # the value of few samples lies below its limit, as the docstring says


def test_equal_and_opposite_gradients_are_the_ends() -> None:
    assert diversity(products_of(np.ones((4, 3)))).value == pytest.approx(1 / 4)
    opposite = diversity(products_of(np.array([[1.0], [-1.0], [1.0], [-1.0]])))
    assert math.isinf(opposite.value)
    assert math.isnan(opposite.standard_error)


def test_what_it_cannot_measure_is_refused() -> None:
    model, (x, y) = make("mlp-tanh")
    with pytest.raises(ArgumentError, match="three"):
        gradient_diversity(Objective(model, nn.CrossEntropyLoss(), (x[:2], y[:2])))
    with pytest.raises(LossError):
        gradient_diversity(Objective.from_loss(model, lambda m, b: F.cross_entropy(m(b[0]), b[1]), (x, y)))
