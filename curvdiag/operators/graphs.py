"""The engine: graphs of all samples, kept as far as memory reaches; a product is a backward pass or two in them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from curvdiag.data import Batch
from curvdiag.memory import free_bytes
from curvdiag.objective import Objective
from curvdiag.operators.gradient_graph import GradientGraph
from curvdiag.operators.kept_graph import KeptGraph
from curvdiag.operators.plan import GraphBytes, foretell, lay_out
from curvdiag.sandbox import numerics
from curvdiag.weights import Weights

T = TypeVar("T")
G = TypeVar("G", bound=KeptGraph)


class GraphEngine(Generic[G]):
    """Products over all samples, from kept graphs as far as memory reaches.

    Args:
        build: Builds the graph of one group of samples: a class of graphs, or a partial call of one.
    """

    def __init__(
        self,
        objective: Objective,
        weights: Weights,
        dtype: torch.dtype | None,
        memory: int | None,
        micro_batch: int | None,
        build: Callable[..., G] = GradientGraph,  # type: ignore[assignment]
    ) -> None:
        self.objective, self.weights, self.dtype, self.build = objective, weights, dtype, build
        self.graphs_built = 0
        pieces = list(objective.micro_batches(micro_batch))
        budget = free_bytes(objective.device) // 2 if memory is None else memory
        size = self._graph_bytes(pieces) if budget > 0 else GraphBytes(0.0, 0.0)
        regroup = micro_batch is None and objective.can_regroup
        self.plan, kept, self.rebuilt = lay_out(pieces, size, budget, regroup=regroup)
        self.trusted = [False] * len(self.rebuilt)
        self.reached = [False] * len(weights.chosen)
        self.kept = [self._graph(batch) for batch in kept]
        self.unvisited = bool(self.rebuilt)

    def _graph_bytes(self, pieces: Sequence[Batch]) -> GraphBytes:
        cache: dict[Any, GraphBytes] = self.objective.__dict__.setdefault("_graph_bytes", {})
        kind = self.kind, self.dtype
        if kind not in cache:

            def build(batch: Batch) -> G:
                return self.build(self.objective, self.weights, batch, self.dtype)

            own = list(self.weights.tensors().values())
            cache[kind] = foretell(pieces, build, own, cut=self.objective.can_regroup)
        return cache[kind]

    @property
    def kind(self) -> Any:
        """The class of the graphs."""
        return getattr(self.build, "func", self.build)

    def _graph(self, batch: Batch, trusted: bool = False) -> G:
        graph = self.build(self.objective, self.weights, batch, self.dtype, trusted=trusted)
        self.graphs_built += 1
        self.reached = [a or b for a, b in zip(self.reached, graph.reached, strict=True)]
        return graph

    def multiply(self, rows: Tensor, positions: Sequence[int]) -> Tensor:
        """Rows ``[k, p]`` of products from rows ``[k, p]``, over the parameters at ``positions`` alone."""
        with numerics(rows.device):
            out = torch.empty_like(rows)
            for index, graph in enumerate(self.kept):
                self._add(graph, rows, out, positions, fresh=index == 0, keep=True)
            for index, batch in enumerate(self.rebuilt):
                # The graph is held by nothing here, so that it is gone before the next one is built.
                self.trusted[index] = self._add(
                    self._graph(batch, self.trusted[index]),
                    rows,
                    out,
                    positions,
                    fresh=index == 0 and not self.kept,
                    keep=False,
                )
        self.unvisited = False
        return out

    def sample_dots(self: GraphEngine[GradientGraph], rows: Tensor, positions: Sequence[int]) -> Tensor:
        """``v . grad t_i / total_weight`` of every sample ``[k, N]``, for rows ``[k, p]``."""
        layout = self.objective.parameters.subset(positions)
        dtypes = [self.weights.chosen[i].dtype for i in positions]

        def dots(graph: GradientGraph) -> Tensor:
            vectors = [[v.to(d) for v, d in zip(layout.views(row), dtypes, strict=True)] for row in rows]
            return torch.stack([graph.along(v, positions, keep=True) for v in vectors])

        with numerics(rows.device):
            return torch.cat(self._for_each_graph(dots), dim=1)

    def gather(
        self: GraphEngine[GradientGraph], coefficients: Tensor, positions: Sequence[int], dtype: torch.dtype
    ) -> Tensor:
        """``sum_i c_i grad t_i`` as rows ``[k, p]``, for coefficients ``[k, N]`` in the order of the samples."""
        layout = self.objective.parameters.subset(positions)
        parts = iter(coefficients.split([*self.plan.kept, *self.plan.rebuilt], dim=1))
        with numerics(coefficients.device):
            out = torch.zeros(len(coefficients), layout.size, dtype=dtype, device=coefficients.device)

            def add(graph: GradientGraph) -> None:
                for row, total in zip(next(parts), out, strict=True):
                    _accumulate(graph.gather(row, positions, keep=True), total, layout.views(total), fresh=False)

            self._for_each_graph(add)
        return out

    def _for_each_graph(self, function: Callable[[G], T]) -> list[T]:
        """``function`` of each graph, in the order of their samples; rebuilt ones are gone before the next is built."""
        results = [function(graph) for graph in self.kept]
        return results + [function(self._graph(batch, self.trusted[i])) for i, batch in enumerate(self.rebuilt)]

    def _add(self, graph: G, rows: Tensor, out: Tensor, positions: Sequence[int], *, fresh: bool, keep: bool) -> bool:
        """Add the products with one graph to ``out``; whether the graph has passed all checks."""
        layout = self.objective.parameters.subset(positions)
        dtypes = [self.weights.chosen[i].dtype for i in positions]
        for k, (row, total) in enumerate(zip(rows, out, strict=True)):
            vectors = [v.to(dtype) for v, dtype in zip(layout.views(row), dtypes, strict=True)]
            products = graph.multiply(vectors, positions, keep=keep or k < len(rows) - 1)
            _accumulate(products, total, layout.views(total), fresh=fresh)
        return graph.checked

    def visit(self) -> None:
        """Build the graph of every group once, to learn what the loss reaches."""
        for batch in self.rebuilt if self.unvisited else []:
            self._graph(batch)
        self.unvisited = False


def _accumulate(products: Sequence[Tensor | None], total: Tensor, views: Sequence[Tensor], *, fresh: bool) -> None:
    """Add a product given by parameter to the flat vector ``total``, or write it there if that is ``fresh``."""
    if fresh and all(p is not None and p.dtype == total.dtype for p in products):
        torch.cat([p.reshape(-1) for p in products if p is not None], out=total)  # one pass over the memory
        return
    if fresh:
        total.zero_()
    for view, product in zip(views, products, strict=True):
        if product is not None:
            view.add_(product)
