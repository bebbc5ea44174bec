"""The two-batch-size estimate from a training loop: without bias, by hand on real loops, and its standard error."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from nets import make
from test_noise import gradients
from torch.nn import functional as F

from curvdiag.errors import ArgumentError
from curvdiag.noise.running import RunningNoiseScale, two_batches

MEAN = np.array([0.6, -0.4, 0.3, 0.0, 0.2])


def norms(generator: np.random.Generator, small: int, parts: int) -> tuple[float, float]:
    """Squared norms of the mean gradient of the first part and of all parts, from simulated gradients."""
    rows = MEAN + generator.gamma(4, size=(small * parts, 5)) / 2 - 2
    first, whole = rows[:small].mean(0), rows.mean(0)
    return float(first @ first), float(whole @ whole)


def test_two_batch_sizes_give_both_without_bias() -> None:
    generator = np.random.default_rng(0)
    found = np.array([two_batches(*norms(generator, 4, 8), 4, 32) for _ in range(5000)])
    errors = found.std(0) / 5000**0.5
    assert abs(found[:, 0].mean() - MEAN @ MEAN) < 4 * errors[0]
    assert abs(found[:, 1].mean() - 5.0) < 4 * errors[1]


def test_its_interval_covers() -> None:
    """500 runs of 400 steps with a memory of 200: ``B_simple``, ``|G|^2`` and ``tr C``."""
    generator = np.random.default_rng(0)
    truth = {"value": 5 / (MEAN @ MEAN), "gradient_square": MEAN @ MEAN, "trace": 5.0}
    hits = dict.fromkeys(truth, 0)
    for _ in range(500):
        noise = RunningNoiseScale(decay=0.995)
        rows = MEAN + generator.gamma(4, size=(400, 8, 2, 5)) / 2 - 2
        first, whole = rows[:, 0].mean(1), rows.mean((1, 2))
        for small, large in zip((first**2).sum(1), (whole**2).sum(1), strict=True):
            noise.update(small, large, 2, 16)
        for name, value in truth.items():
            low, high = getattr(noise, name).interval()
            hits[name] += low <= value <= high
    for name, count in hits.items():
        assert 0.92 <= count / 500 <= 0.98, (name, count)


def test_averages_are_exponential_and_correct_their_beginning() -> None:
    generator = np.random.default_rng(0)
    pairs = [norms(generator, 4, 8) for _ in range(7)]
    noise = RunningNoiseScale(decay=0.8)
    for small, large in pairs:
        noise.update(small, large, 4, 32)
    weights = 0.8 ** np.arange(6, -1, -1)
    found = np.array([two_batches(*pair, 4, 32) for pair in pairs])
    square, trace = np.average(found, axis=0, weights=weights)
    assert noise.gradient_square.value == pytest.approx(square, rel=1e-12)
    assert noise.value.value == pytest.approx(trace / square, rel=1e-12)
    # The covariance of weighted averages of independent steps, by NumPy.
    cov = np.cov(found.T, aweights=weights) * (weights**2).sum() / weights.sum() ** 2
    slope = np.array([-trace / square**2, 1 / square])
    assert noise.value.standard_error == pytest.approx(math.sqrt(slope @ cov @ slope), rel=1e-10)
    assert noise.trace.standard_error == pytest.approx(math.sqrt(cov[1, 1]), rel=1e-10)


@pytest.mark.parametrize("accumulation", ["mean", "sum", "samples", "divisor", "scaler"])
def test_a_loop_with_accumulation_gives_what_its_gradients_give(accumulation: str) -> None:
    """Micro-batches of 2, 3 and 5 samples; by hand from one backward pass a sample."""
    model, (x, y) = make("mlp-tanh")
    sizes = (2, 3, 5)
    rows = gradients(model, (x, y))
    means = torch.stack([part.mean(0) for part in rows.split(sizes)])
    small, big = float(means[0].square().sum()), float(means.mean(0).square().sum())
    large_batch = 9 / sum(1 / size for size in sizes)  # of the same variance as the mean of these three means
    if accumulation == "samples":
        big, large_batch = float(rows.mean(0).square().sum()), 10
    divisor = {"mean": 3, "divisor": 4, "scaler": 3}.get(accumulation, 1)
    noise = RunningNoiseScale(
        accumulation="mean" if accumulation in ("divisor", "scaler") else accumulation,
        divisor=4 if accumulation == "divisor" else None,
    )
    scale = 1024.0 if accumulation == "scaler" else 1.0
    for batch in zip(x.split(sizes), y.split(sizes), strict=True):
        loss = F.cross_entropy(model(batch[0]), batch[1]) / divisor * scale
        (loss * len(batch[1]) / 10 if accumulation == "samples" else loss).backward()
        noise.observe(model, len(batch[1]), scale=scale)
    model.zero_grad()  # step() no longer needs the gradients
    noise.step()
    square, trace = two_batches(small, big, 2, large_batch)
    assert noise.gradient_square.value == pytest.approx(square, rel=1e-10)
    assert noise.trace.value == pytest.approx(trace, rel=1e-10)


def test_unequal_micro_batches_leave_no_bias() -> None:
    """The mean of means of 1, 2 and 8 samples is as noisy as 1.85 samples, not as 11."""
    generator, noise = np.random.default_rng(0), RunningNoiseScale(decay=0.9999)
    parameter = torch.nn.Parameter(torch.zeros(5, dtype=torch.float64))
    for _ in range(3000):
        parameter.grad = torch.zeros(5, dtype=torch.float64)
        for size in (1, 2, 8):
            mean = (MEAN + generator.gamma(4, size=(size, 5)) / 2 - 2).mean(0)
            parameter.grad += torch.from_numpy(mean) / 3
            noise.observe([parameter], size)
        noise.step()
    for found, truth in ((noise.trace, 5.0), (noise.gradient_square, MEAN @ MEAN)):
        assert abs(found.value - truth) < 4 * found.standard_error
    assert noise.trace.standard_error < 0.5


def test_ranks_make_the_large_batch_larger() -> None:
    """Two ranks, two micro-batches each: the last backward pass averages ``.grad`` over the ranks."""
    model, (x, y) = make("mlp-tanh")
    rows = gradients(model, (x, y))[:8]
    local, whole = rows[:2].mean(0), rows.mean(0)
    p = torch.nn.Parameter(torch.zeros_like(local))
    noise = RunningNoiseScale()
    p.grad = local / 2
    noise.observe(p, 2)
    p.grad = whole
    noise.observe(p, 2)
    noise.step(ranks=2)
    square, trace = two_batches(float(local @ local), float(whole @ whole), 2, 8)
    assert noise.gradient_square.value == pytest.approx(square, rel=1e-12)
    assert noise.trace.value == pytest.approx(trace, rel=1e-12)


def test_it_goes_on_from_a_saved_state() -> None:
    generator = np.random.default_rng(0)
    pairs = [norms(generator, 4, 8) for _ in range(20)]
    whole, first, second = RunningNoiseScale(), RunningNoiseScale(), RunningNoiseScale(decay=0.5)
    for pair in pairs:
        whole.update(*pair, 4, 32)
    for pair in pairs[:9]:
        first.update(*pair, 4, 32)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for pair in pairs[9:]:
        second.update(*pair, 4, 32)
    assert second.value == whole.value
    assert second.state_dict() == whole.state_dict()
    with pytest.raises(ArgumentError, match="lacks"):
        second.load_state_dict({"decay": 0.5})


def test_steps_that_tell_nothing_are_left_out() -> None:
    noise = RunningNoiseScale()
    assert math.isnan(noise.value.value)
    assert math.isnan(noise.trace.value)
    parameter = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(ArgumentError, match="backward"):
        noise.observe(parameter, 4)
    parameter.grad = torch.ones(3)
    noise.observe(parameter, 4)
    noise.step()  # one micro-batch: one batch size
    noise.step()  # none at all
    noise.update(math.inf, math.nan, 4, 8)  # a step that a GradScaler skips
    assert (noise.updates, noise.skipped) == (0, 3)
    noise.update(1.0, 0.9, 4, 8)
    assert math.isnan(noise.value.standard_error)
    assert noise.value.interval() == (-math.inf, math.inf)
    noise.update(1.0, 0.1, 4, 8)
    noise.update(1.0, 0.1, 4, 8)
    assert noise.gradient_square.value < 0
    assert math.isnan(noise.value.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_other_kinds_are_read(dtype: torch.dtype) -> None:
    """Narrow types, sparse gradients with repeated rows, parameters without a gradient."""
    dense = torch.nn.Linear(3, 2).to(dtype)
    table = torch.nn.Embedding(5, 2, sparse=True).to(dtype)
    unused = torch.nn.Linear(2, 2)
    table(torch.tensor([1, 1, 4])).sum().backward()
    dense(torch.ones(1, 3, dtype=dtype)).sum().backward()
    noise = RunningNoiseScale()
    noise.observe(torch.nn.ModuleList([dense, table, unused]), 1)
    assert float(noise._first) == pytest.approx(6 + 2 + 2 * 4 + 2 * 1)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: RunningNoiseScale(decay=1.0),
        lambda: RunningNoiseScale(accumulation="total"),
        lambda: RunningNoiseScale(accumulation="sum", divisor=2),
        lambda: RunningNoiseScale().update(1.0, 1.0, 8, 8),
        lambda: RunningNoiseScale().observe(torch.nn.Linear(1, 1), 0),
    ],
)
def test_wrong_arguments_are_refused(wrong) -> None:
    with pytest.raises(ArgumentError):
        wrong()
