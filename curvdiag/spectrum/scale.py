"""What a density takes on several ranks, each way there is: memory, traffic and time of a rank, as formulas.

Data-parallel: every rank has all weights, all vectors and its share of the samples; a product goes through kept graphs
and ends in one all-reduce. Sharded: weights and vectors are cut into as many parts as there are ranks; a product is the
difference of two gradients of FSDP2. Nothing is run here, and no process group is needed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import ceil

from curvdiag.operators.plan import SHARE, GraphBytes
from curvdiag.results import Result
from curvdiag.spectrum.collectives import Units, all_reduced, padded, ring_steps
from curvdiag.spectrum.hardware import LATENCY, Rates

BUILD = 1.4
"""Gradients that building a graph costs."""
PRODUCT = 2.0
"""Gradients of a product: a second backward pass through the graph of a gradient, or a difference of two gradients."""
PASSES = 7.0
"""A Lanczos step reads and writes its vectors about so often as an inner product does: two of these at a time."""
MOVED = 32
"""Numbers that a difference of gradients reads and writes for each of a rank's part: to move weights there and back,
and to keep, take up and subtract gradients."""
COPIED = 6
"""Numbers that FSDP2 reads and writes in a gradient for each weight, into and out of what it gathers and scatters."""
IN_LOCKSTEP = 5
"""Vectors that each probe in lockstep is given room for: the three of Lanczos, and two of its product."""
SHARDED_PRODUCT = 3
"""Vectors, each a rank's part, that a difference of gradients needs beside its result: what is multiplied, the first
gradient, and the second as it grows. When that has grown and nothing is gathered any more it is there twice."""
IN_FLIGHT = 4
"""Times the numbers of the largest group that FSDP2 holds of it and its neighbour: weights, gradients, both buffers."""
DATA_PARALLEL, SHARDED = "data-parallel, exact", "sharded, differences"


@dataclass(frozen=True)
class Work:
    """What a density is made of, wherever it runs.

    Attributes:
        size: ``P``; one vector has so many numbers.
        weights: Numbers in all weights and buffers of the model.
        samples: ``N``.
        flops: Operations of a gradient of one sample; None where nobody counted.
        graph: Bytes of a kept graph, by samples.
        walking: Bytes beside it while it is walked for a product, by samples; the parts of the product among them.
        activations: Bytes that a plain gradient holds at most beside weights and gradients, by samples in one pass.
        units: What FSDP2 gathers together.
        batch: Samples in one pass of a plain gradient.
        itemsize: Bytes of a number.
        recomputed: Whether a plain gradient computes its activations again, for a third more operations.
        product_seconds, gradient_seconds: Of so many samples, as measured; used where the rates have no FLOPs.
        dot_seconds: Of an inner product of two vectors, as measured; used where the rates have no memory bandwidth.
    """

    size: int
    weights: int
    samples: int
    flops: float | None
    graph: GraphBytes
    walking: Callable[[float], float]
    activations: GraphBytes
    units: Units
    batch: int
    itemsize: int = 4
    recomputed: bool = False
    product_seconds: Callable[[float], float] | None = None
    gradient_seconds: Callable[[float], float] | None = None
    dot_seconds: float | None = None


@dataclass(frozen=True)
class Run:
    """What is asked for: ``steps`` and ``probes`` of a density, ``deflated`` vectors, ``basis`` of the run before."""

    steps: int
    probes: int
    deflated: int = 0
    basis: int = 0

    @property
    def products(self) -> int:
        return self.steps * self.probes + self.basis


@dataclass(frozen=True)
class Share(Result):
    """What one rank takes.

    Attributes:
        way: Data-parallel with exact products, or sharded with differences.
        ranks: How many.
        samples: Most samples that a rank has.
        at_once: Probes that advance together.
        memory: Bytes by what holds them; together they are the peak.
        free: Bytes that a rank may take, or None.
        sent: Bytes that a rank sends for a product, and receives.
        collectives: Of a product, those of vectors and weights.
        compute: Seconds of a product, or None.
        communication: Seconds of a product, or None; one rank alone has none.
        products: In all.
        notes: What does not fit, and what happens then.
    """

    way: str
    ranks: int
    samples: int
    at_once: int
    memory: dict[str, int]
    free: float | None
    sent: float
    collectives: float
    compute: float | None
    communication: float | None
    products: int
    notes: tuple[str, ...] = field(default=())

    @property
    def sharded(self) -> bool:
        """Whether each rank has a part of the weights only."""
        return self.way == SHARDED

    @property
    def peak(self) -> int:
        """Bytes at the most."""
        return sum(self.memory.values())

    @property
    def fits(self) -> bool | None:
        """Whether the peak is within what a rank has; None where that is not known."""
        return None if self.free is None else self.peak <= self.free

    @property
    def product(self) -> float | None:
        """Seconds of a product where nothing overlaps, or None."""
        return None if self.compute is None or self.communication is None else self.compute + self.communication

    @property
    def seconds(self) -> float | None:
        """Seconds of the whole density, or None."""
        return None if self.product is None else self.products * self.product


def data_parallel(work: Work, ranks: int, rates: Rates, run: Run) -> Share:
    """A rank with all weights and vectors, and a share of the samples.

    ``memory = weights + copies + (3 k + deflated) vectors + graph(N/R) + walking(N/R)``;
    ``sent = 2 (R - 1)/R`` of a vector; ``compute = 2`` gradients of ``N/R`` samples.
    """
    vector, weights = work.size * work.itemsize, work.weights * work.itemsize
    samples = ceil(work.samples / ranks)
    left = None if rates.memory is None else max(0.0, rates.memory - 2 * weights)
    kept = left is None or work.graph(samples) <= left / 2
    # What does not fit is rebuilt at each step, a group of samples at a time: as many as an eighth has room for.
    alive = samples if kept or left is None else min(samples, max(1, work.graph.samples(left / SHARE)))
    graph = int(work.graph(alive))
    at_once = _at_once(run, vector, None if left is None else left - graph * kept)
    rebuilding = 0.0 if kept else BUILD / at_once
    compute = None
    if rates.flops is not None and work.flops is not None:
        compute = (PRODUCT + rebuilding) * samples * work.flops / rates.flops
    elif rates.flops is None and work.product_seconds is not None and work.gradient_seconds is not None:
        compute = work.product_seconds(samples) + rebuilding * work.gradient_seconds(samples)
    sent, collectives = all_reduced(vector, ranks), (ranks > 1) / at_once
    return Share(
        DATA_PARALLEL,
        ranks,
        samples,
        at_once,
        {
            "weights": weights,
            "copies": weights,
            "vectors": _vectors(run, at_once) * vector,
            "graphs": graph,
            "in a product": int(work.walking(alive)),
        },
        rates.memory,
        sent,
        collectives,
        _plus(compute, 2 * PASSES * work.size, work, rates),
        _moving(sent, 2 * ring_steps(ranks) * collectives, rates),
        run.products,
        () if kept else (f"graphs of {alive:,} of {samples:,} samples at a time, built anew at each step",),
    )


def sharded(work: Work, ranks: int, rates: Rates, run: Run, *, reshard: bool = True) -> Share:
    """A rank with its part of the weights and vectors, and a share of the samples, in passes of ``work.batch``.

    ``memory = (weights + copies + (3 k + deflated + 3) vectors)/R + gathered + activations``;
    ``sent = 2 passes (gathers + scatters)(R - 1)/R`` of the weights; ``compute = 2`` gradients of ``N/R`` samples.
    """
    samples = ceil(work.samples / ranks)
    alone = min(samples, work.batch)
    passes = ceil(samples / alone)
    weights = max(work.units.numbers(ranks) // ranks, ceil(work.weights / ranks)) * work.itemsize
    vector = ceil(work.size / ranks) * work.itemsize
    in_flight = IN_FLIGHT * work.units.largest(ranks) + 2 * padded(work.units.root, ranks)
    gathered, activations = in_flight * work.itemsize, int(work.activations(alone))
    left = None if rates.memory is None else rates.memory - 2 * weights - gathered - activations
    at_once = _at_once(run, vector, left)
    compute = None
    if rates.flops is not None and work.flops is not None:
        compute = PRODUCT * samples * work.flops / rates.flops * (4 / 3 if work.recomputed else 1)
    elif rates.flops is None and work.gradient_seconds is not None:
        compute = PRODUCT * passes * work.gradient_seconds(alone)
    gradients = 2 * passes
    touched = (2 * PASSES + MOVED) * work.size / ranks + gradients * COPIED * work.units.numbers(ranks)
    sent = gradients * work.units.sent(ranks, work.itemsize, reshard=reshard)
    collectives = gradients * (work.units.gathers(reshard=reshard) + work.units.scatters()) * (ranks > 1)
    return Share(
        SHARDED,
        ranks,
        samples,
        at_once,
        {
            "weights": weights,
            "copies": weights,
            "vectors": _vectors(run, at_once) * vector,
            "gathered": gathered,
            "activations": activations,
            "in a product": SHARDED_PRODUCT * vector + max(0, vector - gathered - activations),
        },
        rates.memory,
        sent,
        collectives,
        _plus(compute, touched, work, rates),
        _moving(sent, ring_steps(ranks) * collectives, rates),
        run.products,
        (f"each gradient in {passes:,} pass{'es' * (passes != 1)} of {alone:,} sample{'s' * (alone != 1)}",),
    )


def _vectors(run: Run, at_once: int) -> int:
    """The most vectors that are there at once: three for each probe, or the basis of the run that deflates."""
    return max(3 * at_once + run.deflated, run.basis + 1 + run.deflated if run.basis else 0)


def _at_once(run: Run, vector: int, left: float | None) -> int:
    if left is None:
        return run.probes
    return int(max(1, min(run.probes, left // 2 // max(1, IN_LOCKSTEP * vector))))


def _plus(compute: float | None, touched: float, work: Work, rates: Rates) -> float | None:
    """Seconds of computing with those in which so many numbers are read or written."""
    if compute is None:
        return None
    if rates.memory_bandwidth is not None:
        return compute + touched * work.itemsize / rates.memory_bandwidth
    return compute + touched * (work.dot_seconds or 0.0) / (2 * work.size)


def _moving(sent: float, steps: float, rates: Rates) -> float | None:
    """Seconds in which a rank sends so many bytes in so many steps of a ring."""
    if not steps:
        return 0.0
    return (
        None
        if rates.bandwidth is None
        else sent / rates.bandwidth + steps * (LATENCY if rates.latency is None else rates.latency)
    )
