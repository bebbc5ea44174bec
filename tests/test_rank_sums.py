"""Two batch sizes from ranks and micro-batches of unequal sizes and weights: without bias, whatever they are."""

from __future__ import annotations

import numpy as np
import pytest

from curvdiag.noise.rank_sums import micro_batches, two_norms
from curvdiag.noise.running import two_batches

MEAN = np.array([0.6, -0.4, 0.3, 0.0, 0.2])
SIZES = ((2, 3, 1), (8,), (4, 1))  # of the micro-batches of three ranks


def coefficient(accumulation: str, size: int, own: tuple[int, ...]) -> float:
    """What a user's loop multiplies a micro-batch's mean loss by."""
    return {
        "mean": 1 / len(own),
        "divisor": 1 / 4,
        "sum": 1.0,
        "samples": size / sum(own),
        "global": len(SIZES) * size / sum(map(sum, SIZES)),
    }[accumulation]


def step(generator: np.random.Generator, accumulation: str) -> tuple[float, float]:
    """``|G|^2`` and ``tr C`` from one step of three ranks, through the sums that they would exchange."""
    mode = "mean" if accumulation == "divisor" else accumulation
    rows, gradient = [], np.zeros(5)
    for own in SIZES:
        known = micro_batches(own, mode, 4 if accumulation == "divisor" else None)
        squares = 0.0
        for size in own:
            raw = coefficient(accumulation, size, own) * (MEAN + generator.gamma(4, size=(size, 5)) / 2 - 2).mean(0)
            gradient += raw / len(SIZES)
            squares += float(raw @ raw) / (size if known.unit_is_size else 1) ** 2
        rows.append([squares * known.divisor**2, *known.sums(len(SIZES))])
    row = [*np.sum(rows, axis=0), float(gradient @ gradient)]
    return two_batches(*two_norms(row, mode, len(SIZES)))


@pytest.mark.parametrize("accumulation", ["mean", "divisor", "sum", "samples", "global"])
def test_unequal_ranks_and_micro_batches_leave_no_bias(accumulation):
    generator = np.random.default_rng(0)
    found = np.array([step(generator, accumulation) for _ in range(4000)])
    errors = found.std(0) / 4000**0.5
    assert abs(found[:, 0].mean() - MEAN @ MEAN) < 4 * errors[0]
    assert abs(found[:, 1].mean() - 5.0) < 4 * errors[1]
    assert errors[0] < 0.05 * (MEAN @ MEAN)
    assert errors[1] < 0.02 * 5.0


@pytest.mark.parametrize(
    ("accumulation", "small", "large"),
    [
        ("mean", 6 / (1 / 2 + 1 / 3 + 1 + 1 / 8 + 1 / 4 + 1), 9 / ((1 / 2 + 1 / 3 + 1) / 9 + 1 / 8 + (1 / 4 + 1) / 4)),
        ("global", 6 / (1 / 2 + 1 / 3 + 1 + 1 / 8 + 1 / 4 + 1), 19),
    ],
)
def test_batch_sizes_are_those_of_equal_noise(accumulation, small, large):
    """Means of means: harmonic. The exact mean over all samples: their number."""
    rows = [[1.0, *micro_batches(own, accumulation, None).sums(3)] for own in SIZES]
    norms = two_norms([*np.sum(rows, axis=0), 1.0], accumulation, 3)
    assert norms.small_batch == pytest.approx(small, rel=1e-12)
    assert norms.large_batch == pytest.approx(large, rel=1e-12)
