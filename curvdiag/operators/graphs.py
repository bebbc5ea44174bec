"""The engine: graphs of all samples, kept as far as memory reaches; a product is a backward pass or two in them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from curvdiag.data import Batch, merge, sample_count
from curvdiag.memory import free_bytes
from curvdiag.objective import Objective
from curvdiag.operators.batched import Batched, Batching, Parts, Pass, accumulate
from curvdiag.operators.gradient_graph import GradientGraph
from curvdiag.operators.kept_graph import KeptGraph
from curvdiag.operators.live_bytes import LiveBytes
from curvdiag.operators.plan import (
    SHARE,
    GraphBytes,
    Plan,
    alike_pieces,
    all_fit,
    calibration,
    first_samples,
    foretell,
    largest,
    lay_out,
    upper_bound,
    with_merged,
)
from curvdiag.operators.precision import Multiplication, multiplication
from curvdiag.operators.traced_graph import TracedGraphs
from curvdiag.sandbox import numerics
from curvdiag.space.inner_products import wide_dtype
from curvdiag.weights import Weights

T = TypeVar("T")
G = TypeVar("G", bound=KeptGraph)


@dataclass
class _Known:
    """What is known of the memory of graphs: that of one of ``few`` samples, and of all once that was needed."""

    few: int
    little: float
    size: GraphBytes | None = None


class GraphEngine(Generic[G]):
    """Products over all samples, from kept graphs as far as memory reaches.

    Args:
        build: Builds the graph of one group of samples: a class of graphs, or a partial call of one.
        batched: Whether several vectors share a backward pass.
        multiply_in: How CUDA devices do matrix products of float32; as the process is set up by default.
    """

    def __init__(
        self,
        objective: Objective,
        weights: Weights,
        dtype: torch.dtype | None,
        memory: int | None,
        micro_batch: int | None,
        build: Callable[..., G] = GradientGraph,  # type: ignore[assignment]
        batched: Batched = "auto",
        multiply_in: Multiplication | None = None,
    ) -> None:
        self.objective, self.weights, self.dtype, self.build = objective, weights, dtype, build
        self.graphs_built, self.multiply_in = 0, multiply_in
        pieces = list(objective.micro_batches(micro_batch))
        free = free_bytes(objective.device)
        if objective.device.type == "cpu":  # whose memory is shared with the ranks beside this one
            free //= objective.ranks.neighbours
        budget = free // 2 if memory is None else memory
        regroup = micro_batch is None and objective.can_regroup
        self._built: tuple[Batch, G] | None = None
        self._exact: Callable[[], GraphBytes] | None = None
        if budget > 0 or (regroup and len(alike_pieces(pieces)) < len(pieces)):
            size = self._graph_bytes(pieces, budget or free // SHARE, regroup)
        else:
            size = GraphBytes(0.0, 0.0)  # nothing depends on it
        self.layout, kept, self.rebuilt = lay_out(pieces, size, budget, free, regroup=regroup)
        self.batching = Batching(objective, batched, self._what())
        self.trusted: list[set[int]] = [set() for _ in self.rebuilt]  # parameters whose products have been checked
        self.reached = [False] * len(weights.chosen)
        self.kept = self._keep(kept)
        self.unvisited = bool(self.rebuilt)

    def _graph_bytes(self, pieces: Sequence[Batch], budget: int, regroup: bool) -> GraphBytes:
        """Memory of graphs: no less than it is, where even that fits, since more precision costs two gradients."""
        merged: Callable[[GraphBytes], GraphBytes] = lambda size: with_merged(size, pieces) if regroup else size  # noqa: E731
        if isinstance(self.build, TracedGraphs):  # whose shapes are known without building any
            build = self.build.graph_bytes
            return merged(build(self.objective, self.weights, pieces, self.dtype, budget, regroup=regroup))
        cache: dict[Any, _Known] = self.objective.__dict__.setdefault("_graph_bytes", {})
        kind = self.kind, self.dtype
        if kind not in cache:
            cache[kind] = self._first_graph(pieces)
        known = cache[kind]
        if known.size is not None:
            return merged(known.size)
        bound = merged(upper_bound(known.few, known.little))

        # It does not hold the engine, whose graphs are to go with the last reference to it.
        small = functools.partial(self.build, self.objective, self.weights, dtype=self.dtype, trusted=True)

        def exact() -> GraphBytes:
            if known.size is None:
                known.size = foretell(pieces, small, cut=True, little=known.little)
            return merged(known.size)

        if not all_fit(pieces, bound, budget):
            return exact()
        self._exact = exact
        return bound

    def _first_graph(self, pieces: Sequence[Batch]) -> _Known:
        """Check, once for an objective, a graph of few samples, which tell as much, and count what it takes."""
        piece = largest(pieces)
        few, many = calibration(sample_count(piece), cut=self.objective.can_regroup)
        counter = LiveBytes(recording=False)
        batch = first_samples(piece, few)
        graph = self.build(self.objective, self.weights, batch, self.dtype, counter=counter)
        if few == many:
            self._built = piece, graph  # one of those to be kept, perhaps
            return _Known(few, counter.now(), GraphBytes(0.0, counter.now() / few))
        return _Known(few, counter.now())

    @functools.cached_property
    def plan(self) -> Plan:
        """How the data are laid out; what kept graphs take is found out when it is asked for, if it did not matter."""
        if self._exact is None:
            return self.layout
        try:
            size = self._exact()
        except Exception:  # the live model is another by now, or on another device; the upper bound still holds
            return self.layout
        return replace(self.layout, bytes_kept=int(sum(map(size, self.layout.kept))))

    def _keep(self, batches: Sequence[Batch]) -> list[G]:
        """The graphs of ``batches``; one that was built for the checks is not built again."""
        (batch, graph), self._built = self._built or (None, None), None
        if graph is not None and all(batch is not one for one in batches):
            graph = None
        return [self._graph(one, made=graph if one is batch else None) for one in batches]

    def _what(self) -> Hashable:
        """What a choice between batched and single passes depends on, beside the vectors."""
        special = tuple(sorted(getattr(self.build, "keywords", {}).items()))
        return self.kind, special, self.weights.names, self.dtype, self.layout.kept, self.layout.rebuilt

    @property
    def kind(self) -> Any:
        """The class of the graphs."""
        return getattr(self.build, "func", self.build)

    def _graph(self, batch: Batch, trusted: bool = False, made: G | None = None) -> G:
        with multiplication(self.multiply_in):
            graph = made or self.build(self.objective, self.weights, batch, self.dtype, trusted=trusted)
        self.graphs_built += 1
        self.reached = [a or b for a, b in zip(self.reached, graph.reached, strict=True)]
        return graph

    def multiply(self, rows: Tensor, positions: Sequence[int], product: str = "multiply") -> Tensor:
        """Rows ``[k, p]`` of products from rows ``[k, p]``, over the parameters at ``positions`` alone."""
        return self.multiply_blocks([rows], [positions], product)[0]

    def multiply_blocks(
        self, rows: Sequence[Tensor], positions: Sequence[Sequence[int]], product: str = "multiply"
    ) -> list[Tensor]:
        """Products of several diagonal blocks, each with rows of its own, from one visit of each graph.

        Each block is a backward pass of its own, from its edges to its leaves, which walks only the part of the graph
        in between: of a chain of layers, those from the block's own to the loss. Blocks cannot share a pass, since it
        would add the products with what stands between them, ``sum_m H_lm v_m``.

        Args:
            product: Which matrix of the graph: the method that multiplies with it.
        """
        wanted = {i for inside in positions for i in inside} if self.rebuilt else set()
        with numerics(rows[0].device), multiplication(self.multiply_in):
            outs: list[Tensor | None] = [None] * len(rows)
            for graph in self.kept:
                self._add_blocks(graph, rows, outs, positions, product, keep=True)
            for index, group in enumerate(self.rebuilt):
                # The graph is held by nothing here, so that it is gone before the next one is built.
                made = wanted <= self.trusted[index]
                self._add_blocks(self._graph(merge(group), made), rows, outs, positions, product, keep=False)
                if product == "multiply":  # others do not check its derivatives
                    self.trusted[index] |= wanted
        self.unvisited = False
        return [torch.zeros_like(part) if out is None else out for part, out in zip(rows, outs, strict=True)]

    def forms(self, rows: Tensor, positions: Sequence[int], form: str = "form") -> Tensor:
        """``v^T M v`` ``[k]`` in float64 for rows ``[k, p]``, over the parameters at ``positions`` alone.

        Args:
            form: Which matrix of the graph: the method that takes its quadratic forms.
        """

        total = torch.zeros(len(rows), dtype=wide_dtype(rows.device), device=rows.device)

        def add(graph: G) -> None:
            def once(row: Tensor, keep: bool, batched: bool) -> Parts:
                vectors = self._vectors(row, positions)
                return [getattr(graph, form)(vectors, positions, keep=keep, batched=batched)]

            total.add_(self._numbers(graph, rows, once, (form, *positions), torch.zeros_like(total)))

        with numerics(rows.device), multiplication(self.multiply_in):
            for graph in self.kept:
                add(graph)
            for index, group in enumerate(self.rebuilt):
                add(self._graph(merge(group), set(positions) <= self.trusted[index]))
                if form == "form":  # others do not check its derivatives
                    self.trusted[index] |= set(positions)
        self.unvisited = False
        return total

    def _numbers(self, graph: G, rows: Tensor, once: Pass, kind: Hashable, out: Tensor) -> Tensor:
        """What one pass gives for each row, put into ``out``; None is what stands there."""
        for index, (one,) in self.batching.passes(graph, rows, once, kind, keep=True):
            if one is not None:
                out[index] = one
        return out

    def sample_dots(self: GraphEngine[GradientGraph], rows: Tensor, positions: Sequence[int]) -> Tensor:
        """``v . grad t_i / total_weight`` of every sample ``[k, N]``, for rows ``[k, p]``."""
        return self.sample_dots_of_blocks([rows], [positions])[0]

    def sample_dots_of_blocks(
        self: GraphEngine[GradientGraph], rows: Sequence[Tensor], positions: Sequence[Sequence[int]]
    ) -> list[Tensor]:
        """The same for several sets of parameters, from one visit of each graph."""

        def dots(graph: GradientGraph) -> list[Tensor]:
            found = []
            for part, inside in zip(rows, positions, strict=True):

                def along(row: Tensor, keep: bool, batched: bool, inside: Sequence[int] = inside) -> Parts:
                    return [graph.along(self._vectors(row, inside), inside, keep=True, batched=batched)]

                out = part.new_zeros(len(part), len(graph.sample_weights))
                found.append(self._numbers(graph, part, along, ("along", *inside), out))
            return found

        with numerics(rows[0].device), multiplication(self.multiply_in):
            return [torch.cat(parts, dim=1) for parts in zip(*self._for_each_graph(dots), strict=True)]

    def gather(
        self: GraphEngine[GradientGraph], coefficients: Tensor, positions: Sequence[int], dtype: torch.dtype
    ) -> Tensor:
        """``sum_i c_i grad t_i`` as rows ``[k, p]``, for coefficients ``[k, N]`` in the order of the samples."""
        return self.gather_blocks([coefficients], [positions], dtype)[0]

    def gather_blocks(
        self: GraphEngine[GradientGraph],
        coefficients: Sequence[Tensor],
        positions: Sequence[Sequence[int]],
        dtype: torch.dtype,
    ) -> list[Tensor]:
        """The same for several sets of parameters, each with its coefficients, from one visit of each graph."""
        layouts = [self.objective.parameters.subset(inside) for inside in positions]
        counts = [*self.layout.kept, *self.layout.rebuilt]
        shares = iter(list(zip(*(part.split(counts, dim=1) for part in coefficients), strict=True)))
        with numerics(coefficients[0].device), multiplication(self.multiply_in):
            outs = [
                torch.zeros(len(part), layout.size, dtype=dtype, device=part.device)
                for part, layout in zip(coefficients, layouts, strict=True)
            ]

            def add(graph: GradientGraph) -> None:
                for share, out, layout, inside in zip(next(shares), outs, layouts, positions, strict=True):

                    def gather(row: Tensor, keep: bool, batched: bool, inside: Sequence[int] = inside) -> Parts:
                        return graph.gather(row.to(graph.sample_weights), inside, keep=True, batched=batched)

                    for index, parts in self.batching.passes(graph, share, gather, ("gather", *inside), keep=True):
                        accumulate(parts, out[index], layout, fresh=False)
                        del parts

            self._for_each_graph(add)
        return outs

    def _for_each_graph(self, function: Callable[[G], T]) -> list[T]:
        """``function`` of each graph, in the order of their samples; rebuilt ones are gone before the next is built.

        It asks nothing of second derivatives, so that graphs which were built once need no further check.
        """
        results = [function(graph) for graph in self.kept]
        for group in self.rebuilt:
            results.append(function(self._graph(merge(group), not self.unvisited)))
        self.unvisited = False
        return results

    def _vectors(self, rows: Tensor, positions: Sequence[int]) -> list[Tensor]:
        """A flat vector, or several as rows, in the shapes and types of the parameters at ``positions``."""
        views = self.objective.parameters.subset(positions).views(rows)
        kinds = (self.weights.chosen[i].dtype for i in positions)
        return [v if v.dtype == kind else v.to(kind) for v, kind in zip(views, kinds, strict=True)]

    def _add_blocks(
        self,
        graph: G,
        rows: Sequence[Tensor],
        outs: list[Tensor | None],
        positions: Sequence[Sequence[int]],
        product: str,
        *,
        keep: bool,
    ) -> None:
        for index, (part, inside) in enumerate(zip(rows, positions, strict=True)):
            outs[index] = self._add(graph, part, outs[index], inside, product, keep=keep or index < len(rows) - 1)

    def _add(
        self, graph: G, rows: Tensor, out: Tensor | None, positions: Sequence[int], product: str, *, keep: bool
    ) -> Tensor | None:
        """Add the products with one graph to ``out``; the first ones are put where they are made room for."""
        layout, multiply = self.objective.parameters.subset(positions), getattr(graph, product)

        def once(row: Tensor, keep: bool, batched: bool) -> Parts:
            parts: Parts = multiply(self._vectors(row, positions), positions, keep=keep, batched=batched)
            return parts

        fresh = out is None
        for index, parts in self.batching.passes(graph, rows, once, (product, *positions), keep=keep):
            out = torch.empty_like(rows) if out is None else out  # once the pass has given back what it took
            accumulate(parts, out[index], layout, fresh=fresh)
            del parts  # before the next are made
        return out

    def visit(self) -> None:
        """Build the graph of every group once, to learn what the loss reaches."""
        for group in self.rebuilt if self.unvisited else []:
            self._graph(merge(group))
        self.unvisited = False
