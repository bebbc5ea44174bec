"""What all kept graphs have in common: they are built once, checked, and walked backwards for each product."""

from __future__ import annotations

import abc
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge, saved_tensors_hooks

from curvdiag.data import Batch
from curvdiag.errors import NonFiniteError
from curvdiag.objective import Objective
from curvdiag.operators.second_derivative import missing_derivatives
from curvdiag.sandbox import numerics
from curvdiag.space.inner_products import dots_of_parts
from curvdiag.weights import Weights


class KeptGraph(abc.ABC):
    """A symmetric matrix over the parameters, made by one group of samples.

    Args:
        trusted: The same graph was built and checked before.
        counter: Counts what is built, and not what the checks make afterwards.

    Attributes:
        reached: For each parameter, whether the loss depends on it.
        edges: Where the gradient in each parameter is in the graph; None where nothing follows from it.
        nonzero: For each parameter, whether its gradient is not zero.
        recomputes: A backward pass runs parts of the model again (checkpointing).
        checked: No derivative is missing.
        walking: Held by whoever walks the graph, which others may be cutting short.
        entries: Of a mean activation, where it is known.
        can_batch: Several vectors can go through it in one pass.
    """

    can_batch = True
    entries = 0.0
    reached: list[bool]
    edges: list[GradientEdge | None]
    nonzero: list[bool]
    recomputes: bool

    def __init__(
        self,
        objective: Objective,
        weights: Weights,
        batch: Batch,
        dtype: torch.dtype | None,
        *,
        trusted: bool = False,
        counter: AbstractContextManager[object] | None = None,
    ) -> None:
        self.objective, self.weights, self.batch, self.dtype = objective, weights, batch, dtype
        self.checked = trusted
        self.walking = threading.RLock()
        live = dict(objective.model.named_parameters())
        with missing_derivatives(), counter or nullcontext():
            objective.inside(weights, lambda: self._build(live), twice=True)
        self._verify()

    @abc.abstractmethod
    def _build(self, live: Mapping[str, Tensor]) -> None:
        """Build the graph; called in the sandbox, with the parameters of the live model."""

    @abc.abstractmethod
    def _verify(self) -> None:
        """Checks that need the finished graph."""

    @abc.abstractmethod
    def multiply(
        self, vectors: Sequence[Tensor], positions: Sequence[int], *, keep: bool, batched: bool = False
    ) -> list[Tensor | None]:
        """The matrix's rows at ``positions`` times a vector that is zero elsewhere; None is zero.

        Args:
            keep: The graph will be walked again.
            batched: ``vectors`` holds several vectors, along a first dimension more, and so do the products.
        """

    def form(
        self, vectors: Sequence[Tensor], positions: Sequence[int], *, keep: bool, batched: bool = False
    ) -> Tensor | None:
        """``v^T M v`` for the same vectors, a number in float64, or one for each of several; None is zero."""
        products = self.multiply(vectors, positions, keep=keep, batched=batched)
        return dots_of_parts(list(zip(products, vectors, strict=True)), batched=batched)

    def whole(self, vector: Tensor) -> Tensor:
        """The product with one flat vector ``[P]``."""
        layout, chosen = self.objective.parameters, self.weights.chosen
        with numerics(vector.device):
            products = self.multiply(self._parts(vector), range(len(chosen)), keep=True)
        return layout.flatten(
            torch.zeros_like(w) if p is None else p for p, w in zip(products, chosen, strict=True)
        ).to(vector)

    def _parts(self, vector: Tensor) -> list[Tensor]:
        """A flat vector ``[P]`` in the shapes and types of the weights."""
        views = self.objective.parameters.views(vector)
        return [part.to(weight.dtype) for part, weight in zip(views, self.weights.chosen, strict=True)]

    def _take_edges(self, gradients: Sequence[Tensor | None]) -> None:
        """Keep where the gradients are in the graph, and not their values."""
        self.reached = [g is not None for g in gradients]
        self.edges = [
            None if g is None or not g.requires_grad else get_gradient_edge(g.clone() if g.is_leaf else g)
            for g in gradients
        ]

    def _check_finite(self, loss: Tensor, gradients: Sequence[Tensor | None]) -> None:
        norms = torch.stack([torch.zeros_like(loss) if g is None else g.detach().norm().to(loss) for g in gradients])
        sizes = torch.cat([loss.detach()[None], norms]).tolist()
        if not all(map(math.isfinite, sizes)):
            where = self.objective.first_bad_batch(self.weights, self.dtype)
            raise NonFiniteError(f"{where}; there is no curvature at these weights")
        self.nonzero = [size > 0 for size in sizes[1:]]

    def _terms(self, vectors: Sequence[Tensor], positions: Sequence[int]) -> list[tuple[GradientEdge, Tensor]]:
        edges = (self.edges[i] for i in positions)
        return [(edge, vector) for edge, vector in zip(edges, vectors, strict=True) if edge is not None]

    def _backward(
        self,
        terms: Sequence[tuple[GradientEdge, Tensor]],
        leaves: Sequence[Tensor | GradientEdge],
        *,
        keep: bool,
        batched: bool = False,
    ) -> tuple[Tensor | None, ...]:
        """One backward pass from some edges of the graph, with what flows into them, to ``leaves``."""
        edges, outer = zip(*terms, strict=True)

        def once(*outer: Tensor) -> tuple[Tensor | None, ...]:
            return torch.autograd.grad(edges, leaves, outer, retain_graph=keep, allow_unused=True)  # type: ignore[arg-type]

        def backward() -> tuple[Tensor | None, ...]:
            return _mapped(once, outer) if batched else once(*outer)

        with missing_derivatives(), self.walking:
            return self.objective.inside(self.weights, backward, twice=True) if self.recomputes else backward()


def _mapped(function: Callable[..., tuple[Tensor | None, ...]], stacks: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """``function`` of each set of slices along the first dimension, all at once; what is None for one is for all."""
    missing: list[bool] = []

    def present(*slices: Tensor) -> tuple[Tensor, ...]:
        results = function(*slices)
        missing[:] = [result is None for result in results]
        return tuple(result for result in results if result is not None)

    # Faster than is_grads_batched of autograd.grad, whose older vmap has fewer rules and falls back in silence.
    found = iter(torch.func.vmap(present)(*stacks))
    return tuple(None if gone else next(found) for gone in missing)


@contextmanager
def watched_hooks() -> Iterator[list[type]]:
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
