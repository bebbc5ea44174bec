"""The engine: graphs of the gradient, kept, through which a product is one more backward pass.

The graph of a group of samples is built once, as the gradient of ``sum_i s_i t_i / total_weight`` in the
weights, where ``s`` holds one weight for each sample (all ones). Its derivative in the weights along ``v`` is the
Hessian product; its derivative in ``s`` is ``v . grad t_i``, the product with the matrix of per-sample gradients.
Both come out of one backward pass. What is kept of the gradient are its edges in the graph, not its values.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge, saved_tensors_hooks

from curvdiag.data import Batch
from curvdiag.errors import NonFiniteError
from curvdiag.memory import free_bytes
from curvdiag.objective import Objective
from curvdiag.operators.plan import GraphBytes, foretell, lay_out
from curvdiag.operators.second_derivative import (
    check_against_differences,
    check_nodes,
    check_symmetry,
    check_truly_zero,
    missing_derivatives,
)
from curvdiag.sandbox import numerics
from curvdiag.weights import Weights

T = TypeVar("T")


class Graph:
    """The gradient of one group of samples as a function of weights and sample weights.

    Args:
        trusted: The same graph was built and checked before.
    """

    def __init__(
        self, objective: Objective, weights: Weights, batch: Batch, dtype: torch.dtype | None, *, trusted: bool = False
    ) -> None:
        self.objective, self.weights, self.batch, self.dtype = objective, weights, batch, dtype
        self.checked = trusted
        self.cleared: set[int] = set()
        self.suspicious = False
        live = dict(objective.model.named_parameters())
        with missing_derivatives():
            objective.inside(weights, lambda: self._build(live), twice=True)
        if self.suspicious:
            check_against_differences(objective, weights, batch, dtype, self._whole)
        if not objective.__dict__.get("_symmetric"):
            check_symmetry(objective, dtype, self._whole)
            objective.__dict__["_symmetric"] = True

    def _build(self, live: Mapping[str, Tensor]) -> None:
        with _watched_hooks() as hooks:
            totals = self.objective.totals(self.batch, self.dtype)
        self.recomputes = bool(hooks)
        self.sample_weights = torch.ones_like(totals, requires_grad=True)
        loss = (totals * self.sample_weights).sum() / self.objective.total_weight
        if not self.checked:
            rerun = lambda: self.objective.totals(self.batch, self.dtype)  # noqa: E731
            self.suspicious = check_nodes(self.objective, loss, live, rerun)
        gradients = torch.autograd.grad(loss, self.weights.chosen, create_graph=True, allow_unused=True)
        if not self.checked:
            self._check_gradients(loss, gradients)
        self.reached = [g is not None for g in gradients]
        self.edges: list[GradientEdge | None] = [
            None if g is None or not g.requires_grad else get_gradient_edge(g.clone() if g.is_leaf else g)
            for g in gradients
        ]
        self.totals = get_gradient_edge(totals) if totals.requires_grad else None

    def _check_gradients(self, loss: Tensor, gradients: Sequence[Tensor | None]) -> None:
        """The gradient is finite, and constant only in parameters whose second derivative is truly zero."""
        norms = torch.stack([torch.zeros_like(loss) if g is None else g.detach().norm().to(loss) for g in gradients])
        sizes = torch.cat([loss.detach()[None], norms]).tolist()
        if not all(map(math.isfinite, sizes)):
            where = self.objective.first_bad_batch(self.weights, self.dtype)
            raise NonFiniteError(f"{where}; there is no curvature at these weights")
        self.nonzero = [size > 0 for size in sizes[1:]]
        constant = [i for i, g in enumerate(gradients) if g is not None and not g.requires_grad and self.nonzero[i]]
        check_truly_zero(self.objective, self.weights, [self.batch], constant, self.dtype)

    def multiply(self, vectors: Sequence[Tensor], positions: Sequence[int], *, keep: bool) -> list[Tensor | None]:
        """The Hessian's rows at ``positions`` times a vector that is zero elsewhere; None is zero."""
        terms = self._terms(vectors, positions)
        leaves = [self.weights.chosen[i] for i in positions]
        if not terms:
            return [None] * len(positions)
        products = self._backward(terms, leaves, keep=keep or not self.checked)
        if not self.checked:
            self._check_missing([i for i, product in zip(positions, products, strict=True) if product is None])
            self.checked = len(positions) == len(self.edges)
        return list(products)

    def along(self, vectors: Sequence[Tensor], positions: Sequence[int], *, keep: bool) -> Tensor:
        """Derivative ``[B]`` of each sample's share of the objective: ``v . grad t_i / total_weight``."""
        terms = self._terms(vectors, positions)
        dots = self._backward(terms, [self.sample_weights], keep=keep)[0] if terms else None
        return torch.zeros_like(self.sample_weights) if dots is None else dots

    def gather(self, coefficients: Tensor, positions: Sequence[int], *, keep: bool) -> list[Tensor | None]:
        """``sum_i c_i grad t_i`` over the parameters at ``positions``, for coefficients ``[B]``; None is zero."""
        if self.totals is None:
            return [None] * len(positions)
        leaves = [self.weights.chosen[i] for i in positions]
        return list(self._backward([(self.totals, coefficients)], leaves, keep=keep))

    def _terms(self, vectors: Sequence[Tensor], positions: Sequence[int]) -> list[tuple[GradientEdge, Tensor]]:
        edges = (self.edges[i] for i in positions)
        return [(edge, vector) for edge, vector in zip(edges, vectors, strict=True) if edge is not None]

    def _backward(
        self, terms: list[tuple[GradientEdge, Tensor]], leaves: list[Tensor], *, keep: bool
    ) -> tuple[Tensor | None, ...]:
        """One backward pass from some edges of the graph, with what flows into them, to ``leaves``."""
        edges, outer = zip(*terms, strict=True)

        def backward() -> tuple[Tensor | None, ...]:
            return torch.autograd.grad(edges, leaves, outer, retain_graph=keep, allow_unused=True)

        with missing_derivatives():
            return self.objective.inside(self.weights, backward, twice=True) if self.recomputes else backward()

    def _whole(self, vector: Tensor) -> Tensor:
        """The product with one flat vector over all parameters."""
        layout, chosen = self.objective.parameters, self.weights.chosen
        vectors = [v.to(w.dtype) for v, w in zip(layout.views(vector), chosen, strict=True)]
        with numerics(vector.device):
            products = self.multiply(vectors, range(len(chosen)), keep=True)
        return layout.flatten(
            torch.zeros_like(w) if p is None else p for p, w in zip(products, chosen, strict=True)
        ).to(vector)

    def _check_missing(self, positions: Sequence[int]) -> None:
        """Parameters that a product did not reach: does any second derivative, if they have a gradient?"""
        edges = [edge for edge in self.edges if edge is not None]
        zeros = [torch.zeros_like(w) for w, edge in zip(self.weights.chosen, self.edges, strict=True) if edge]
        for i in positions:
            if not self.nonzero[i] or i in self.cleared:
                continue

            def reach(i: int = i) -> tuple[Tensor | None, ...]:
                leaf = self.weights.chosen[i]
                return torch.autograd.grad(edges, [leaf], zeros, retain_graph=True, allow_unused=True)

            if self.objective.inside(self.weights, reach, twice=True)[0] is None:
                check_truly_zero(self.objective, self.weights, [self.batch], [i], self.dtype)
            self.cleared.add(i)


class GraphEngine:
    """Hessian products over all samples, from kept graphs as far as memory reaches."""

    def __init__(
        self,
        objective: Objective,
        weights: Weights,
        dtype: torch.dtype | None,
        memory: int | None,
        micro_batch: int | None,
    ) -> None:
        self.objective, self.weights, self.dtype = objective, weights, dtype
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
        if self.dtype not in cache:

            def build(batch: Batch) -> Graph:
                return Graph(self.objective, self.weights, batch, self.dtype)

            own = list(self.weights.tensors().values())
            cache[self.dtype] = foretell(pieces, build, own, cut=self.objective.can_regroup)
        return cache[self.dtype]

    def _graph(self, batch: Batch, trusted: bool = False) -> Graph:
        graph = Graph(self.objective, self.weights, batch, self.dtype, trusted=trusted)
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

    def sample_dots(self, rows: Tensor, positions: Sequence[int]) -> Tensor:
        """``v . grad t_i / total_weight`` of every sample ``[k, N]``, for rows ``[k, p]``."""
        layout = self.objective.parameters.subset(positions)
        dtypes = [self.weights.chosen[i].dtype for i in positions]

        def dots(graph: Graph) -> Tensor:
            vectors = [[v.to(d) for v, d in zip(layout.views(row), dtypes, strict=True)] for row in rows]
            return torch.stack([graph.along(v, positions, keep=True) for v in vectors])

        with numerics(rows.device):
            return torch.cat(self._for_each_graph(dots), dim=1)

    def gather(self, coefficients: Tensor, positions: Sequence[int], dtype: torch.dtype) -> Tensor:
        """``sum_i c_i grad t_i`` as rows ``[k, p]``, for coefficients ``[k, N]`` in the order of the samples."""
        layout = self.objective.parameters.subset(positions)
        parts = iter(coefficients.split([*self.plan.kept, *self.plan.rebuilt], dim=1))
        with numerics(coefficients.device):
            out = torch.zeros(len(coefficients), layout.size, dtype=dtype, device=coefficients.device)

            def add(graph: Graph) -> None:
                for row, total in zip(next(parts), out, strict=True):
                    _accumulate(graph.gather(row, positions, keep=True), total, layout.views(total), fresh=False)

            self._for_each_graph(add)
        return out

    def _for_each_graph(self, function: Callable[[Graph], T]) -> list[T]:
        """``function`` of each graph, in the order of their samples; rebuilt ones are gone before the next is built."""
        results = [function(graph) for graph in self.kept]
        return results + [function(self._graph(batch, self.trusted[i])) for i, batch in enumerate(self.rebuilt)]

    def _add(
        self, graph: Graph, rows: Tensor, out: Tensor, positions: Sequence[int], *, fresh: bool, keep: bool
    ) -> bool:
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


@contextmanager
def _watched_hooks() -> Iterator[list[type]]:
    """Kinds of saved-tensor hooks that a forward pass enters.

    Checkpointing uses them to run the model again in each backward pass, which then must find the weights of the
    graph in it. PyTorch has no other sign of it when the checkpointed function is not a module.
    """
    seen: list[type] = []
    with _WATCHING:
        enter = saved_tensors_hooks.__enter__

        def watch(hooks: saved_tensors_hooks) -> None:
            seen.append(type(hooks))
            enter(hooks)

        saved_tensors_hooks.__enter__ = watch  # type: ignore[method-assign]
        try:
            yield seen
        finally:
            saved_tensors_hooks.__enter__ = enter  # type: ignore[method-assign]


_WATCHING = threading.RLock()
