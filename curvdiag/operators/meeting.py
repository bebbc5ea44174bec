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

from curvdiag.operators.bilinear import Place, Twins, twins
from curvdiag.operators.kinks import masked
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
        sparing: Whether twins may be spared.
        operations: Those of the loss's graph that was walked, in order. In another graph of the same ones all that was
            reached is reached again.
    """

    left: Sequence[int]
    sparing: bool
    operations: Sequence[str]


@dataclass(frozen=True)
class Left:
    """What the first walk of a product leaves, at each activation and at the parameters; None is zero, or spared.

    Attributes:
        twice: Of the activations, and of the parameters, those that count twice since their twins are spared.
    """

    activations: Sequence[Tensor | None]
    parameters: Sequence[Tensor | None]
    twice: tuple[frozenset[int], frozenset[int]] = (frozenset(), frozenset())

    @property
    def met(self) -> list[int]:
        """Activations at which something is left."""
        return [i for i, part in enumerate(self.activations) if part is not None]

    def meets(self, motions: Motions, vectors: Sequence[Tensor], *, batched: bool = False) -> Tensor | None:
        """The inner product with the vector that makes these motions; None where one of them is not known.

        Where twins are spared it has to be the vector that left this.
        """
        if any(i not in motions for i in self.met):
            return None
        pairs = [(self.activations[i], motions[i], i in self.twice[0]) for i in self.met]
        pairs += [(one, v, i in self.twice[1]) for i, (one, v) in enumerate(zip(self.parameters, vectors, strict=True))]
        total = dots_of_parts([(None if twice else one, other) for one, other, twice in pairs], batched=batched)
        if again := [(one, other) for one, other, twice in pairs if twice and one is not None]:
            total = total + 2 * dots_of_parts(again, batched=batched)
        return total


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

    @property
    def operations(self) -> list[str]:
        """Names of the nodes of the loss's graph, in order."""
        return [node.name() for node in self.nodes]

    @functools.cached_property
    def _twins(self) -> Twins:
        return twins(self.nodes, masked(self.nodes))

    @functools.cached_property
    def _spared(self) -> frozenset[int]:
        return _among(self._twins.spared, self.activations)

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
        self, backward: Backward, terms: Terms, leaves: Sequence[Tensor], moving: Iterable[int], *, sparing: bool
    ) -> tuple[Left, Motions]:
        """The first walk alone, and how the activations in ``moving`` move.

        Args:
            sparing: Leave out twins, which neither motions nor what is left are kept of.
        """
        count, out = len(self.activations), self._spared if sparing else frozenset()
        wanted, ways = [i for i in range(count) if i not in out], self._ways([i for i in moving if i not in out])
        with _before(self.nodes, lambda node, gradients: (None,) * len(gradients)):
            found = iter(backward(terms, [*(self.activations[i] for i in wanted), *leaves, *ways.values()]))
        at = {i: next(found) for i in wanted}
        left = Left([at.get(i) for i in range(count)], [next(found) for _ in leaves])
        return self.spared(left, leaves) if sparing else left, {i: next(found) for i in ways}

    def spared(self, left: Left, leaves: Sequence[Tensor]) -> Left:
        """The same without those whose twins count twice."""
        kept = [None if i in self._spared else part for i, part in enumerate(left.activations)]
        places = self.activations, [get_gradient_edge(leaf) for leaf in leaves]
        first, second = (_among(self._twins.twice, edges) for edges in places)
        return Left(kept, left.parameters, (first, second))

    def twins_agree(
        self, left: Left, motions: Motions, leaves: Sequence[Tensor], vectors: Sequence[Tensor], leeway: float
    ) -> bool:
        """Whether what may be spared is as much as what then counts twice, for the vector that left this."""
        with_twins = self.spared(left, leaves)
        one = [(left.activations[i], motions[i]) for i in self._spared if i in motions]
        other = [(left.activations[i], motions[i]) for i in with_twins.twice[0] if i in motions]
        other += [(left.parameters[i], vectors[i]) for i in with_twins.twice[1]]
        if len(one) < sum(left.activations[i] is not None for i in self._spared):
            return False
        nothing = (None, vectors[0])
        return abs(float(dots_of_parts([*one, nothing]) - dots_of_parts([*other, nothing]))) < leeway

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
            left, motions = self.half(backward, terms, leaves, moving, sparing=known.sparing)
            self._met[inside] = left.met
            if set(left.met) <= set(moving):
                return left.meets(motions, vectors, batched=batched)

    def _ways(self, moving: Iterable[int]) -> dict[int, GradientEdge]:
        return {i: slope for i in moving if (slope := self.slopes[i]) is not None}


def _among(places: frozenset[Place], edges: Sequence[GradientEdge]) -> frozenset[int]:
    """Which of the edges are there."""
    return frozenset(i for i, edge in enumerate(edges) if (edge.node, edge.output_nr) in places)


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
