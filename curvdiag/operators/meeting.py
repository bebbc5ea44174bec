"""``v^T H v`` for less than a product: the two walks of a Hessian product meet in the middle.

A product with ``v`` walks two graphs. In the gradient's it goes from the parameters to the loss: what arrives at the
gradient in an activation ``a`` is ``J_a v``, how ``a`` moves along ``v``, and every operation on the way leaves, at
each tensor that it has saved, what the motion makes of its own derivative. The loss's graph then carries all of that
back to the parameters. This second walk is the transpose of the motion. Where only the inner product with a vector
``u`` is wanted it can be spared: what was left at ``a`` meets ``J_a u`` there. On linear layers that is 4 matrix
products of 6.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge, get_gradient_edge

from curvdiag.operators.second_derivative import walk
from curvdiag.space.inner_products import dots_of_parts

Terms = Sequence[tuple[GradientEdge, Tensor]]
Backward = Callable[[Terms, Sequence[Tensor | GradientEdge]], tuple[Tensor | None, ...]]
"""One backward pass from edges, with what flows into them, to leaves."""

Motions = Mapping[int, Tensor | None]
"""How activations move along a vector, by their index; None is not at all."""


class Met(NamedTuple):
    """What walks that are cut are known to leave.

    Attributes:
        left: Activations at which something is left.
        operations: Those of the loss's graph that was walked, as :attr:`Meeting.operations`.
    """

    left: Sequence[int]
    operations: Sequence[object]


@dataclass(frozen=True)
class Left:
    """What the first walk of a product leaves, at each activation and at the parameters; None is zero."""

    activations: Sequence[Tensor | None]
    parameters: Sequence[Tensor | None]

    @property
    def met(self) -> list[int]:
        """Activations at which something is left."""
        return [i for i, part in enumerate(self.activations) if part is not None]

    def meets(self, motions: Motions, vectors: Sequence[Tensor], *, batched: bool = False) -> Tensor | None:
        """The inner product with the vector that makes these motions; None where one of them is not known."""
        if any(i not in motions for i in self.met):
            return None
        pairs = [(self.activations[i], motions[i]) for i in self.met]
        return dots_of_parts([*pairs, *zip(self.parameters, vectors, strict=True)], batched=batched)


class Meeting:
    """Where the activations are in the graph of a loss, and where the gradients in them are in the gradient's graph.

    Attributes:
        nodes: The loss's graph.
        activations: Where each is in the loss's graph: there arrives what operations leave at it.
        slopes: Where the gradient in it is: there arrives how it moves. None where that gradient is constant.
        entries: Of a mean activation.
        possible: Whether walks can be cut here; not with custom functions, complex or sparse gradients.
    """

    def __init__(self, loss: Tensor) -> None:
        self.activations: list[GradientEdge] = []
        self.slopes: list[GradientEdge | None] = []
        self.nodes = [node for node in walk(loss.grad_fn, set()) if not hasattr(node, "variable")]
        # A custom function, or a hook on a module, may make anything of a walk that is cut.
        self.possible = not any(isinstance(node, BackwardCFunction) for node in self.nodes)
        self.entries = 0.0
        self._met: dict[tuple[int, ...], list[int]] = {}

    @functools.cached_property
    def operations(self) -> list[object]:
        """The loss's graph: each node by name, with the places of those that it follows; parameters have none."""
        places = {node: place for place, node in enumerate(self.nodes)}
        return [(node.name(), *((places.get(to), at) for to, at in node.next_functions)) for node in self.nodes]

    def noted(self) -> AbstractContextManager[None]:
        """Note both while the gradient's graph is built."""

        def note(node: Any, gradients: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
            own = list(gradients)
            for index, slope in enumerate(gradients):
                edge = None
                if slope is not None and slope.requires_grad:
                    self.entries += (slope.numel() - self.entries) / (len(self.slopes) + 1)
                    if slope.is_complex() or slope.layout != torch.strided:
                        self.possible = False
                    else:  # its own: one gradient may go to several activations, or into another's
                        own[index] = alias = slope.view_as(slope)
                        edge = get_gradient_edge(alias)
                self.activations.append(GradientEdge(node, index))
                self.slopes.append(edge)
            return tuple(own)

        return _before(self.nodes, note)

    def product(
        self, backward: Backward, terms: Terms, leaves: Sequence[Tensor]
    ) -> tuple[tuple[Tensor | None, ...], Motions]:
        """A whole product, and how all activations move on the way."""
        ways = self._ways(range(len(self.slopes)))
        found = backward(terms, [*ways.values(), *leaves])
        return found[len(ways) :], dict(zip(ways, found, strict=False))

    def half(
        self, backward: Backward, terms: Terms, leaves: Sequence[Tensor], moving: Iterable[int]
    ) -> tuple[Left, Motions]:
        """The first walk alone, and how the activations in ``moving`` move."""
        ways, count = self._ways(moving), len(self.activations)
        with _before(self.nodes, lambda node, gradients: (None,) * len(gradients)):
            found = backward(terms, [*self.activations, *leaves, *ways.values()])
        end = count + len(leaves)
        return Left(found[:count], found[count:end]), dict(zip(ways, found[end:], strict=True))

    def form(
        self,
        backward: Backward,
        terms: Terms,
        leaves: Sequence[Tensor],
        vectors: Sequence[Tensor],
        positions: Sequence[int],
        known: Met,
        *,
        batched: bool,
    ) -> Tensor | None:
        """``v^T H v`` over the parameters at ``positions``; None where an activation's motion is not known.

        Args:
            known: What was left on a graph of other samples.
        """
        # Where nothing is left nobody asks for the motion, which would be kept until the end.
        inside, expected = tuple(positions), [i for i in known.left if i < len(self.slopes)]
        while True:
            moving = self._met.get(inside, expected)
            left, motions = self.half(backward, terms, leaves, moving)
            self._met[inside] = left.met
            if set(left.met) <= set(moving):
                return left.meets(motions, vectors, batched=batched)

    def _ways(self, moving: Iterable[int]) -> dict[int, GradientEdge]:
        return {i: slope for i in moving if (slope := self.slopes[i]) is not None}


@contextmanager
def _before(nodes: Sequence[Any], hook: Callable[[Any, Sequence[Tensor | None]], Any]) -> Iterator[None]:
    """Each of the nodes is walked with what ``hook(node, gradients)`` gives."""
    handles = []
    try:
        for node in nodes:
            handles.append(node.register_prehook(lambda gradients, node=node: hook(node, gradients)))
        yield
    finally:
        for handle in handles:
            handle.remove()
