"""What a measurement will take, before anything of its size is made: vectors, graphs, products, time and bytes."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from math import inf

import torch

from curvdiag.distributed import collectively
from curvdiag.errors import ArgumentError
from curvdiag.memory import free_bytes, human_bytes
from curvdiag.objective import Objective
from curvdiag.operators.base import LinearMap
from curvdiag.operators.plan import Plan, largest, lay_out, with_merged
from curvdiag.operators.trial import GRAPHS, Clock, Matrix, Trial, try_out
from curvdiag.results import Result
from curvdiag.spectrum.deflation import Deflate, check_deflate, fitting
from curvdiag.spectrum.density import lockstep
from curvdiag.spectrum.hardware import Hardware, Rates, hardware_of
from curvdiag.spectrum.objective_work import work_of
from curvdiag.spectrum.scale import BUILD, PASSES, Run
from curvdiag.spectrum.scale_plan import ScalePlan, check_ranks, duration, plan_ranks

UNCERTAINTY = 2.0
"""Factor to either side within which the time of an otherwise idle machine is expected."""
HEAP = 2.4
"""Resident memory over that of the tensors, at most. It was 1.5 to 2.14, from one run to the next, where most tensors
have 8 to 32 MiB, which come and go in glibc's heap (before 2.38 it cannot give a freed block to an aligned request of
the same size), and 1.0 where each tensor is mapped on its own."""


@dataclass(frozen=True)
class MeasurementPlan(Result):
    """What a density will take.

    Attributes:
        size: ``P``; one vector has so many numbers.
        samples: ``N``.
        dtype: Type of the vectors.
        matrix: Whose density.
        steps, probes: Of the Lanczos runs.
        lockstep: Probes that advance together.
        vector_bytes: One vector.
        vectors: How many of size ``P`` the Lanczos runs hold at once: three for each probe in lockstep.
        deflated: Vectors that stay to keep the probes out of what is deflated; with ``"auto"`` the most there may be.
        basis: Vectors that the first run stores to find these; given back before the probes start.
        weights_bytes: The copies of all weights and buffers.
        graphs: How the data are laid out in graphs.
        passing_bytes: The most that a product or a graph under construction needs beside all this, and gives back.
        products: Products in all, at most.
        seconds: Expected time, building the graphs included; the truth may be off by :data:`UNCERTAINTY`.
        peak_bytes: The most that tensors take at once.
        resident_bytes: The most that may be resident for it. On a CPU the C library's heap holds more than the tensors
            in it, :data:`HEAP` times as much at worst.
        free: Bytes that are free now.
        notes: What will not fit, and what happens then.
        on_ranks: The same on several ranks, where that was asked for.
    """

    size: int
    samples: int
    dtype: str
    matrix: str
    steps: int
    probes: int
    lockstep: int
    vector_bytes: int
    vectors: int
    deflated: int
    basis: int
    weights_bytes: int
    graphs: Plan
    passing_bytes: int
    products: int
    seconds: float
    peak_bytes: int
    resident_bytes: int
    free: int
    notes: tuple[str, ...] = ()
    on_ranks: ScalePlan | None = None

    def __str__(self) -> str:
        low, high = duration(self.seconds / UNCERTAINTY), duration(self.seconds * UNCERTAINTY)
        vectors = (
            f"{self.vectors} of {self.size:,} {self.dtype} numbers, {human_bytes(self.vectors * self.vector_bytes)}"
        )
        more = self.resident_bytes > self.peak_bytes
        heap = f", resident up to {human_bytes(self.resident_bytes)}" if more else ""
        rows = [
            (
                "products",
                f"{self.products:,} at most: {self.steps} steps, {self.probes} probes, {self.lockstep} at once",
            ),
            ("vectors", vectors),
            ("weights", f"copies, {human_bytes(self.weights_bytes)}"),
            ("graphs", str(self.graphs)),
            ("passing", f"{human_bytes(self.passing_bytes)} in a product or a graph under construction"),
            ("memory", f"{human_bytes(self.peak_bytes)} at the peak{heap}, of {human_bytes(self.free)} free"),
            ("time", f"about {duration(self.seconds)} ({low} to {high})"),
        ]
        if self.deflated:
            held = f"{self.deflated} vectors kept, a first run of {self.basis}"
            most = human_bytes((self.deflated + self.basis) * self.vector_bytes)
            rows.insert(2, ("deflation", f"{held}; {most} while it ends"))
        rows += [("note", note) for note in self.notes]
        head = f"density of the {self.matrix} of {self.size:,} parameters, {self.samples:,} samples"
        lines = [head, *(f"  {name:<10}{text}" for name, text in rows)]
        return "\n".join(lines if self.on_ranks is None else [*lines, str(self.on_ranks)])


@collectively
def plan_density(
    objective: Objective,
    *,
    steps: int = 80,
    probes: int = 4,
    deflate: Deflate = 0,
    matrix: Matrix = "hessian",
    method: str = "exact",
    dtype: torch.dtype | None = None,
    memory: int | None = None,
    micro_batch: int | None = None,
    world_size: int | None = None,
    sharded: bool | None = None,
    hardware: str | Hardware | None = None,
    flops: float | None = None,
    bandwidth: float | None = None,
    latency: float | None = None,
    clock: Clock = time.perf_counter,
) -> MeasurementPlan:
    """See :meth:`curvdiag.Objective.plan`."""
    if objective.sharded:
        raise ArgumentError(
            "a plan tries small graphs of all weights, and these are sharded: plan the same model before fully_shard, "
            f"with objective.plan(world_size={objective.holders.count}, sharded=True), which needs no other process"
        )
    if world_size is None and not objective.ranks.alone:
        world_size = objective.ranks.count
    rates = _check_ranks(world_size, sharded, hardware, flops, bandwidth, latency)
    for name, value in (("steps", steps), ("probes", probes)):
        if isinstance(value, bool) or int(value) != value or value < 1:
            raise ArgumentError(f"{name} is a positive number, not {value!r}")
    if matrix not in GRAPHS:
        known = " or ".join(map(repr, GRAPHS))
        raise ArgumentError(f"matrix is {known}, not {matrix!r}; C and the Fisher keep the graphs of the Hessian")
    if method != "exact":
        raise ArgumentError(
            f"method={method!r} cannot be planned: finite differences keep no graphs, a product is two gradients and "
            "takes the memory of one"
        )
    if memory is not None and memory < 0:
        raise ArgumentError(f"memory is a number of bytes, not {memory}")
    auto = check_deflate(deflate)
    pieces = list(objective.micro_batches(micro_batch))
    tried = try_out(objective, largest(pieces), matrix, dtype, clock)

    free = free_bytes(objective.device)
    weights_bytes = _weights_bytes(objective, dtype)
    vector_type = dtype if dtype in (torch.float32, torch.float64) else objective.dtype
    vector_type = vector_type if vector_type in (torch.float32, torch.float64) else torch.float32
    size, vector = objective.parameters.size, objective.parameters.size * vector_type.itemsize
    steps = min(steps, size)

    regroup = micro_batch is None and objective.can_regroup
    budget = (free - weights_bytes) // 2 if memory is None else memory
    graph = with_merged(tried.graph, pieces) if regroup else tried.graph
    graphs, _, _ = lay_out(pieces, graph, budget, free - weights_bytes, regroup=regroup)
    notes = [_rebuilt_note(graphs)] if graphs.rebuilt else []

    left = max(0, free - weights_bytes - graphs.bytes_kept)
    after = LinearMap(lambda rows: rows, size, vector_type, objective.device)
    at_once = min(lockstep(after, probes, 0), max(1, left // 2 // max(1, 5 * vector)))
    if at_once < probes:
        notes.append(f"only {at_once} of {probes} probes fit at once: they advance in groups, at the same products")
    deflated, basis, first = 0, 0, 0
    if deflate:
        wanted = 0 if auto else min(int(deflate), size)
        first = min(steps if auto else 3 * wanted + 20, size)
        basis, note = fitting(after, wanted, first)
        deflated = (wanted or basis // 2) if basis else 0
        first = first if basis else 0
        notes += [note] if note else []

    most = max((*graphs.kept, *graphs.rebuilt))
    rebuilt = max(graphs.rebuilt, default=0)
    product_peak = tried.passing(most) + (tried.graph(rebuilt) if rebuilt else 0)
    building_peak = tried.building(most)
    vectors = 3 * at_once
    running = vectors * vector + product_peak + deflated * vector
    finding = (basis + 1 + deflated) * vector + product_peak if basis else 0
    passing = int(max(product_peak, building_peak))
    peak = int(weights_bytes + graphs.bytes_kept + max(running, finding, building_peak))
    if peak > free:
        notes.append(
            f"the peak is more than what is free by {human_bytes(peak - free)}: give memory= for fewer kept graphs, "
            "micro_batch= for smaller ones, or fewer parameters with params="
        )
    products = steps * probes + first
    on_ranks = None
    if world_size is not None:
        work = work_of(objective, tried, pieces, dtype, vector_type.itemsize)
        if hardware is None:
            rates = replace(rates, memory=float(free + work.weights * work.itemsize))
        run = Run(steps, probes, deflated, first)
        on_ranks = plan_ranks(work, run, world_size, sharding=sharded, hardware=hardware, rates=rates)
    return MeasurementPlan(
        size,
        objective.size,
        str(vector_type).removeprefix("torch."),
        matrix,
        steps,
        probes,
        int(at_once),
        vector,
        int(vectors),
        int(deflated),
        int(basis),
        weights_bytes,
        graphs,
        passing,
        int(products),
        expected_seconds(tried, graphs, products, int(at_once)),
        peak,
        int(peak * HEAP) if objective.device.type == "cpu" else peak,
        free,
        tuple(notes),
        on_ranks,
    )


def expected_seconds(tried: Trial, graphs: Plan, products: int, at_once: int) -> float:
    """Time of all products and of the graphs, from that of small ones.

    A graph that is rebuilt serves ``at_once`` vectors before it is dropped.
    """
    everything = (*graphs.kept, *graphs.rebuilt)
    product = sum(map(tried.product, everything)) + PASSES * tried.dot
    rebuilding = BUILD * sum(map(tried.gradient, graphs.rebuilt)) / at_once
    return BUILD * sum(map(tried.gradient, graphs.kept)) + products * (product + rebuilding)


def _check_ranks(
    world_size: int | None,
    sharded: bool | None,
    hardware: str | Hardware | None,
    flops: float | None,
    bandwidth: float | None,
    latency: float | None,
) -> Rates:
    """What was said of the ranks.

    Raises:
        ArgumentError: It makes no sense.
    """
    said = {"sharded": sharded, "hardware": hardware, "flops": flops, "bandwidth": bandwidth, "latency": latency}
    if world_size is None:
        if alone := [f"{name}=" for name, value in said.items() if value is not None]:
            raise ArgumentError(f"{' and '.join(alone)} say what several ranks are like: give world_size= with them")
        return Rates()
    check_ranks(world_size)
    for name, what in (("flops", "operations"), ("bandwidth", "bytes"), ("latency", "seconds")):
        value = said[name]
        if value is not None and not (
            isinstance(value, int | float) and 0 <= value < inf and (value or what == "seconds")
        ):
            raise ArgumentError(
                f"{name} is a positive number of {what}{' a second' * (what != 'seconds')}, not {value!r}"
            )
    if hardware is not None:
        hardware_of(hardware)
    return Rates(flops, bandwidth, latency)


def _weights_bytes(objective: Objective, dtype: torch.dtype | None) -> int:
    model = objective.model
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}.values()
    return sum(t.numel() * (dtype if dtype and t.dtype.is_floating_point else t.dtype).itemsize for t in tensors)


def _rebuilt_note(graphs: Plan) -> str:
    return (
        f"{sum(graphs.rebuilt):,} of {sum(graphs.rebuilt) + sum(graphs.kept):,} samples do not fit into kept graphs: "
        "theirs are built anew at each step, for all probes in lockstep"
    )
