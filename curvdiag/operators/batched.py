"""Several vectors through one graph: one batched backward pass, or one pass after the other.

A batched pass (``torch.func.vmap`` of ``torch.autograd.grad``) walks the graph once for all
vectors. It saves what each operation costs whatever its size, and on tensors of some thousand entries that is most of
the time; on large ones it is slower, since its matrix products are batched and its intermediates do not stay in cache.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from curvdiag.errors import ArgumentError
from curvdiag.objective import Objective
from curvdiag.operators.kept_graph import KeptGraph
from curvdiag.operators.watching import Watching
from curvdiag.parameters import Parameters

Batched = bool | Literal["auto", "timed"]
"""Whether several vectors share a backward pass: always, never, by the rule of :class:`Batching`, or as timed."""

Parts = Sequence[Tensor | None]
Pass = Callable[[Tensor, bool, bool], Parts]
"""One backward pass of (vector, or vectors as rows; whether the graph is walked again; whether these are several)."""

AT_ONCE = 64
"""Most vectors in one batched pass: its intermediates take so many times the memory of a single one."""

FEWEST = 4
"""Vectors from which the rule takes a batched pass; it costs about as much as two or three of the others."""

SMALL = {"cpu": 6_000}
"""Entries that an operation gives in the mean, up to which it takes longer to start than to do."""
SMALL_ELSEWHERE = 200_000
CLEARLY = 4
"""Times that many in a mean activation, and no pass needs to be made to see it."""

# Timed on one core of a Xeon at 2.8 GHz, float32, products with 8 vectors, time of single passes over that of a batched
# one: MLPs 64-32-10 of 64, 256 and 1,024 samples (1,000, 3,000 and 11,000 entries an operation) 2.8, 1.8 and about 1;
# 64-128-64-10 of 64 and 256 samples (4,000 and 10,500) 2 to 3 and 1; conv nets (800 and 6,300) 5.6 and 2.7.


class Batching:
    """How products with several vectors are taken on the graphs of one engine.

    With ``"auto"`` a rule decides, of the number of vectors and the size of what the operations of one product give.
    Nothing is timed, so that the same measurement gives the same bits. ``"timed"`` times both on the first graph, once
    for each layout and number of vectors, and keeps the answer with the objective; batched and single passes differ in
    the last bits, so that these may then differ from run to run.

    Where a graph cannot be walked in a batch (checkpointing, an operation without a rule for it, a custom function
    that refuses, a result that differs) single passes are taken silently, whatever the setting.
    """

    def __init__(self, objective: Objective, setting: Batched, layout: Hashable) -> None:
        if setting not in (True, False, "auto", "timed"):
            raise ArgumentError(f"batched is True, False, 'auto' or 'timed', not {setting!r}")
        self.setting, self.layout = setting, layout
        self.choices: dict[Hashable, bool] = objective.__dict__.setdefault("_batching", {})

    def passes(
        self, graph: KeptGraph, rows: Tensor, once: Pass, kind: Hashable, *, keep: bool
    ) -> Iterator[tuple[Any, Parts]]:
        """What ``once`` gives for all rows, with the rows that each part is for: an index, or a slice.

        Args:
            kind: What is computed, which a choice is kept for.
            keep: The graph is walked again after this.
        """
        if self.together(graph, rows, once, kind):
            for start in range(0, len(rows), AT_ONCE):
                part = slice(start, min(start + AT_ONCE, len(rows)))
                yield part, once(rows[part], keep or part.stop < len(rows), True)
        else:
            for index, row in enumerate(rows):
                yield index, once(row, keep or index < len(rows) - 1, False)

    def together(self, graph: KeptGraph, rows: Tensor, once: Pass, kind: Hashable) -> bool:
        """Whether these rows go through the graph in one pass."""
        fewest = FEWEST if self.setting == "auto" else 2
        if self.setting is False or len(rows) < fewest or graph.recomputes or not graph.can_batch:
            return False
        count = min(len(rows), AT_ONCE).bit_length() if self.setting == "timed" else 0
        key = self.layout, kind, self.setting, rows.dtype, str(rows.device), count
        if key not in self.choices:
            self.choices[key] = self._choose(graph, rows, once)
        return self.choices[key]

    def _choose(self, graph: KeptGraph, rows: Tensor, once: Pass) -> bool:
        limit = SMALL.get(rows.device.type, SMALL_ELSEWHERE)
        if self.setting == "auto" and graph.entries > CLEARLY * limit:
            return False
        generator = torch.Generator().manual_seed(0)
        pair = torch.randn(2, rows.shape[1], generator=generator).to(rows)
        with _Work() as work:
            one = once(pair[0], True, False)
        if self.setting == "auto" and work.entries > limit * work.operations:
            return False
        if not _agree([one, once(pair[1], True, False)], pair, once):
            return False
        return self.setting != "timed" or _faster(rows[:AT_ONCE], once)


def accumulate(products: Parts, total: Tensor, layout: Parameters, *, fresh: bool) -> None:
    """Add products given by parameter to a flat vector, or to several as rows, or write them there if ``fresh``."""
    if fresh and all(p is not None and p.dtype == total.dtype for p in products):
        lead = total.shape[:-1]
        flat = [p.reshape(*lead, -1) for p in products if p is not None]
        torch.cat(flat, dim=-1, out=total)  # one pass over the memory
        return
    if fresh:
        total.zero_()
    for view, product in zip(layout.views(total), products, strict=True):
        if product is not None:
            view.add_(product)


def _agree(singles: Sequence[Parts], pair: Tensor, once: Pass) -> bool:
    """Whether a batched pass works, at full speed, and gives the same."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            both = once(pair, True, True)
        except Exception:  # what a custom function's backward pass says to a batch may be anything
            return False
    if any("performance drop" in str(warning.message) for warning in caught):  # done row by row, and slower than that
        return False
    square, size = 0.0, 0.0
    for index, single in enumerate(singles):
        for one, many in zip(single, both, strict=True):
            if (one is None) != (many is None):
                return False
            if one is not None and many is not None:
                if many[index].shape != one.shape:
                    return False
                square += float((many[index].double() - one.double()).square().sum())
                size += float(one.double().square().sum())
    return square**0.5 <= torch.finfo(pair.dtype).eps ** 0.6 * size**0.5


def _faster(rows: Tensor, once: Pass) -> bool:
    """Whether a batched pass takes less time than single ones, each at its best of three."""

    def seconds(call: Callable[[], object]) -> float:
        synchronise = torch.cuda.synchronize if rows.device.type == "cuda" else lambda: None
        synchronise()
        started = time.perf_counter()
        call()
        synchronise()
        return time.perf_counter() - started

    def singly() -> None:
        for row in rows:
            once(row, True, False)

    times = [(seconds(lambda: once(rows, True, True)), seconds(singly)) for _ in range(3)]
    return min(one for one, _ in times) < min(other for _, other in times)


class _Work(Watching):
    """Counts operations, and the entries of what they give."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.entries = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.operations += 1
        for one in result if isinstance(result, tuple | list) else (result,):
            self.entries += one.numel() if isinstance(one, Tensor) else 0
        return result
