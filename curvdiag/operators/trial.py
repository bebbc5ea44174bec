"""What small graphs take, in bytes and seconds, and from that what graphs of any number of samples will take."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from curvdiag.data import Batch, sample_count
from curvdiag.gradients import gradients
from curvdiag.objective import Objective
from curvdiag.operators.gradient_graph import GradientGraph
from curvdiag.operators.live_bytes import LiveBytes
from curvdiag.operators.output_graph import OutputGraph
from curvdiag.operators.plan import GraphBytes, calibration, first_samples, through
from curvdiag.weights import Weights

Matrix = Literal["hessian", "gauss_newton"]
Clock = Callable[[], float]
GRAPHS: dict[str, Callable[..., Any]] = {"hessian": GradientGraph, "gauss_newton": OutputGraph}

Line = GraphBytes
"""So much for itself, and so much for each sample: bytes or seconds."""


@dataclass(frozen=True)
class Peak:
    """The most bytes that are alive in a passage of code, for any number of samples.

    Where the most is alive depends on the samples: with few of them the weights decide, with many the activations. So
    a line is drawn for each operation, and the highest counts.
    """

    lines: tuple[Line, ...]

    def __call__(self, samples: float) -> float:
        return max(0.0, *(line(samples) for line in self.lines)) if samples else 0.0


@dataclass(frozen=True)
class Trial:
    """What small graphs took, as functions of the samples in one graph.

    Attributes:
        graph: Bytes that it keeps.
        building: Bytes beside these while it is built.
        passing: Bytes beside these while it is walked for a product.
        gradient: Seconds of a gradient.
        product: Seconds of a product.
        dot: Seconds of an inner product of two vectors, whatever the samples.
    """

    graph: Line
    building: Peak
    passing: Peak
    gradient: Line
    product: Line
    dot: float


def try_out(objective: Objective, piece: Batch, matrix: str, dtype: torch.dtype | None, clock: Clock) -> Trial:
    """Build graphs of a few samples, take products, and drop them; the model is left as it was."""
    twin = copy.copy(objective)  # its marks of what has been checked are not those of the objective
    twin.__dict__ |= {"_symmetric": True, "_warned_functions": dict(objective.__dict__.get("_warned_functions", {}))}
    weights = objective.weights(dtype=dtype)
    build = functools.partial(GRAPHS[matrix], twin, weights, dtype=dtype, trusted=True)
    few, many = calibration(sample_count(piece), cut=objective.can_regroup)
    counts = [many] if many in (few, objective.local_size) else [few, many]
    found = []
    for count in counts:
        batch = first_samples(piece, count)
        taken = _taken(functools.partial(build, batch), weights, clock)
        found.append(
            (*taken, _seconds(functools.partial(gradients, twin, weights, [batch], dtype), clock, objective.device))
        )
    much, building, passing, product, gradient = zip(*found, strict=True)
    flat = torch.ones(min(objective.parameters.size, 1 << 22), dtype=weights.chosen[0].dtype, device=objective.device)
    dot = _seconds(functools.partial(torch.dot, flat, flat), clock, flat.device) * objective.parameters.size / len(flat)
    peaks = (_peak(counts, building), _peak(counts, passing))
    return Trial(_line(counts, much), *peaks, _line(counts, gradient), _line(counts, product), dot)


def _taken(
    build: Callable[[], Any], weights: Weights, clock: Clock
) -> tuple[float, Sequence[float], Sequence[float], float]:
    """Bytes of a graph, those beside it while it is built and while it is walked, and the seconds of one product."""
    everywhere = range(len(weights.chosen))
    vectors = [torch.ones_like(w) for w in weights.chosen]
    with LiveBytes() as counter:
        graph = build()
        much, building = counter.now(), counter.history
        counter.reset()
        graph.multiply(vectors, everywhere, keep=True)
        passing = counter.history
    product = functools.partial(graph.multiply, vectors, everywhere, keep=True)  # counting takes time of its own
    seconds = _seconds(product, clock, vectors[0].device)
    return much, [n - much for n in building], [n - much for n in passing], seconds


def _peak(counts: list[int], histories: Sequence[Sequence[float]]) -> Peak:
    if len({len(history) for history in histories}) > 1:  # the operations depend on the samples
        histories = [[max(history)] for history in histories]
    return Peak(tuple(_straight(counts, values) for values in zip(*histories, strict=True)))


def _straight(counts: list[int], values: Sequence[float]) -> Line:
    """The same, whatever its signs: what is given back counts as well."""
    if len(counts) == 1:
        return Line(0.0, values[0] / counts[0])
    slope = (values[1] - values[0]) / (counts[1] - counts[0])
    return Line(values[0] - slope * counts[0], slope)


def _line(counts: list[int], values: Sequence[float]) -> Line:
    """Through two measured points, or through one and the origin."""
    return Line(0.0, values[0] / counts[0]) if len(counts) == 1 else through(counts[0], values[0], counts[1], values[1])


def _seconds(call: Callable[[], object], clock: Clock, device: torch.device) -> float:
    """Time of a call; of the faster of two where these are short."""
    wait = functools.partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
    times: list[float] = []
    while len(times) < 2 and sum(times) < 0.5:
        wait()
        started = clock()
        call()
        wait()
        times.append(clock() - started)
    return min(times)
