"""The gradient of a group of samples as a graph: its derivatives are products with the Hessian and with C.

It is the gradient of ``sum_i s_i t_i / total_weight`` in the weights, where ``s`` holds one weight for each sample
(all ones). Its derivative in the weights along ``v`` is the Hessian product; its derivative in ``s`` is
``v . grad t_i``, the product with the matrix of per-sample gradients. Both come out of one backward pass. Its
derivative in the gradient ``u`` of the loss in the model's outputs is ``J v``, so that products with the Gauss-Newton
matrix need no other graph.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from curvdiag.operators.kept_graph import watched_hooks
from curvdiag.operators.kinks import masked, without_zeros
from curvdiag.operators.meeting import Meeting, Met
from curvdiag.operators.output_products import OutputProducts
from curvdiag.operators.outputs import Outputs, caught_outputs, check_only_way
from curvdiag.operators.second_derivative import (
    check_against_differences,
    check_nodes,
    check_symmetry,
    check_truly_zero,
    random_pair,
)
from curvdiag.sandbox import numerics
from curvdiag.space.inner_products import dots_of_parts


class GradientGraph(OutputProducts):
    """The gradient of one group of samples as a function of weights and sample weights; its matrix is the Hessian."""

    way_checked = False
    zeros = False
    """Whether masks keep their derivatives, tensors of zeros."""

    def _build(self, live: Mapping[str, Tensor]) -> None:
        self.cleared: set[int] = set()
        self.reaches: set[int] = set()
        self.suspicious = False
        with watched_hooks() as hooks, caught_outputs(self.objective.model, None, must=False) as outputs:
            totals = self.objective.totals(self.batch, self.dtype)
        self.recomputes = bool(hooks)
        self.sample_weights = torch.ones_like(totals, requires_grad=True)
        loss = (totals * self.sample_weights).sum() / self.objective.total_weight
        if not self.checked:
            rerun = lambda: self.objective.totals(self.batch, self.dtype)  # noqa: E731
            self.suspicious = check_nodes(self.objective, loss, live, rerun)
        gradients = self._gradients(loss, outputs)
        if not self.checked:
            self._check_finite(loss, gradients)
            self._check_constant(gradients)
        self._take_edges(gradients)
        self.totals = get_gradient_edge(totals) if totals.requires_grad else None

    def _gradients(self, loss: Tensor, outputs: Outputs) -> tuple[Tensor | None, ...]:
        """The gradient by parameter, as a graph; where it passes the model's outputs is noted."""
        self.outputs, self.output = outputs, outputs.edge if outputs.calls == 1 else None
        if outputs.value is not None:
            self.shape = outputs.value = outputs.value.new_empty(outputs.value.shape, device="meta")
        wanted: tuple[Any, ...] = (*self.weights.chosen, *(() if self.output is None else (self.output,)))
        self.meeting = Meeting(loss)
        self.masked = [] if self.recomputes or self.zeros or self.output is None else masked(self.output.node)
        with self.meeting.noted(), without_zeros(self.masked):
            gradients = torch.autograd.grad(loss, wanted, create_graph=True, allow_unused=True)
        self.entries = self.meeting.entries
        slope = None if self.output is None else gradients[-1]
        self.entry = self.slope = None if slope is None or not slope.requires_grad else get_gradient_edge(slope)
        return gradients[: len(self.weights.chosen)]

    def _verify(self) -> None:
        if self.suspicious:
            check_against_differences(self.objective, self.weights, self.batch, self.dtype, self.whole)
        known = self.objective.__dict__
        if not known.get("_symmetric") and not self.zeros:  # with zeros no products are made
            met = self._meets()
            known["_meets"] = {self.dtype: met}
            known["_symmetric"] = met is not None or check_symmetry(self.objective, self.dtype, self.whole)

    def _meets(self) -> Met | None:
        """What walks that are cut leave, if ``u . H v`` is ``v . H u`` from half a product, to half of the digits.

        None: either may be wrong, or there is nothing to see, and products alone will tell.
        """
        if self.recomputes or not self.meeting.possible:
            return None
        chosen, everything = self.weights.chosen, range(len(self.edges))
        u, v = (self._parts(row) for row in random_pair(self.objective, self.dtype))
        backward = functools.partial(self._backward, keep=True)
        with numerics(self.objective.device):
            terms = self._terms(v, everything)
            if not terms:
                return None
            products, motions = self.meeting.product(backward, terms, chosen)
            self._check_reached(products, everything)
            if all(part is None for part in products):
                return None
            try:
                with self.walking:
                    left, _ = self.meeting.half(backward, self._terms(u, everything), chosen, ())
            except Exception:  # what a user's hook on a tensor says to a walk that is cut may be anything
                return None
            forth, back = dots_of_parts(list(zip(products, u, strict=True))), left.meets(motions, v)
            # Squares of half precision overflow in it.
            norms = [p.norm(dtype=torch.promote_types(p.dtype, torch.float32)) for p in products if p is not None]
            norm = float(torch.stack([part.float() for part in norms]).norm())
        close = back is not None and abs(float(forth - back)) < torch.finfo(u[0].dtype).eps ** 0.5 * norm
        # Of a parameter without a gradient here nothing is known of other samples.
        return Met(left.met, self.meeting.operations if all(self.nonzero) else ()) if close else None

    def _check_constant(self, gradients: Sequence[Tensor | None]) -> None:
        """The gradient is constant only in parameters whose second derivative is truly zero."""
        constant = [i for i, g in enumerate(gradients) if g is not None and not g.requires_grad and self.nonzero[i]]
        check_truly_zero(self.objective, self.weights, [self.batch], constant, self.dtype)

    def multiply(
        self, vectors: Sequence[Tensor], positions: Sequence[int], *, keep: bool, batched: bool = False
    ) -> list[Tensor | None]:
        """The Hessian's rows at ``positions`` times a vector that is zero elsewhere; None is zero."""
        terms = self._terms(vectors, positions)
        leaves = [self.weights.chosen[i] for i in positions]
        if not terms:
            return [None] * len(positions)
        products = self._backward(terms, leaves, keep=keep or not self.checked, batched=batched)
        self._check_reached(products, positions)
        return list(products)

    def form(
        self, vectors: Sequence[Tensor], positions: Sequence[int], *, keep: bool, batched: bool = False
    ) -> Tensor | None:
        """``v^T H v`` for a vector that is zero outside ``positions``; from half a product once that is known to do."""
        terms, known = self._terms(vectors, positions), self.objective.__dict__.get("_meets", {}).get(self.dtype)
        if terms and known is not None and self.meeting.possible and self._reaches(positions, known):
            backward = functools.partial(self._backward, keep=True, batched=batched)
            leaves = [self.weights.chosen[i] for i in positions]
            try:
                with self.walking:
                    found = self.meeting.form(backward, terms, leaves, vectors, positions, known, batched=batched)
            except (MemoryError, torch.OutOfMemoryError):
                raise
            except Exception:  # a hook, say, that the graph of the check had not; other errors a product raises too
                found = None
            if found is not None:
                return found
            self.meeting.possible = False
        return super().form(vectors, positions, keep=keep, batched=batched)

    def _reaches(self, positions: Sequence[int], known: Met) -> bool:
        """Whether no derivative in the parameters at ``positions`` is missing, as far as is known without a product."""
        # In a graph of the same operations, one after the other, all is reached that was reached in the checked one.
        if not self.checked and all(self.edges):
            self.checked = known.operations == self.meeting.operations
        return self.checked or self.reaches.issuperset(positions)

    def gauss_newton(
        self, vectors: Sequence[Tensor], positions: Sequence[int], *, keep: bool, batched: bool = False
    ) -> list[Tensor | None]:
        """The same with the Gauss-Newton matrix, the Hessian of the loss in the outputs taken by differentiation.

        Raises:
            LossError: The outputs cannot be found, or are not the only way from the parameters to the loss.
        """
        self._check_way()
        return self.through_outputs(vectors, positions, keep=keep, batched=batched)

    def gauss_newton_form(
        self, vectors: Sequence[Tensor], positions: Sequence[int], *, keep: bool, batched: bool = False
    ) -> Tensor | None:
        """Its quadratic form; raises the same."""
        self._check_way()
        return self.form_at_outputs(vectors, positions, keep=keep, batched=batched)

    def _check_way(self) -> None:
        if not self.way_checked:
            self.outputs.single()
            self.custom = check_only_way(self.totals, self.output, self.weights)
            self._check_outputs(GradientGraph)
            self.way_checked = True

    def along(
        self, vectors: Sequence[Tensor], positions: Sequence[int], *, keep: bool, batched: bool = False
    ) -> Tensor | None:
        """Derivative ``[B]`` of each sample's share of the objective: ``v . grad t_i / total_weight``; None is zero."""
        terms = self._terms(vectors, positions)
        return self._backward(terms, [self.sample_weights], keep=keep, batched=batched)[0] if terms else None

    def gather(
        self, coefficients: Tensor, positions: Sequence[int], *, keep: bool, batched: bool = False
    ) -> list[Tensor | None]:
        """``sum_i c_i grad t_i`` over the parameters at ``positions``, for coefficients ``[B]``; None is zero."""
        if self.totals is None:
            return [None] * len(positions)
        leaves = [self.weights.chosen[i] for i in positions]
        return list(self._backward([(self.totals, coefficients)], leaves, keep=keep, batched=batched))

    def _check_reached(self, products: Sequence[Tensor | None], positions: Sequence[int]) -> None:
        """Look at what a first product did not reach."""
        if not self.checked:
            self._check_missing([i for i, product in zip(positions, products, strict=True) if product is None])
            self.reaches.update(positions)
            self.checked = len(self.reaches) == len(self.edges)

    def _check_missing(self, positions: Sequence[int]) -> None:
        """Parameters that a product did not reach: does any second derivative, if they have a gradient?"""
        straight: set[str] = self.objective.__dict__.setdefault("_behind_masks", set())
        with_zeros: GradientGraph | None = None
        for i in positions:
            if not self.nonzero[i] or i in self.cleared or self.weights.names[i] in straight:
                continue
            reached = self._reached(i)
            if not reached and self.masked:  # behind masks, whose derivatives are zeros, and not missing
                make = functools.partial(WithZeros, self.objective, self.weights, self.batch, self.dtype)
                with_zeros = with_zeros or make(trusted=True)
                if reached := with_zeros._reached(i):
                    straight.add(self.weights.names[i])
            if not reached:
                check_truly_zero(self.objective, self.weights, [self.batch], [i], self.dtype)
            self.cleared.add(i)

    def _reached(self, i: int) -> bool:
        """Whether any second derivative reaches a parameter."""
        edges = [edge for edge in self.edges if edge is not None]
        zeros = [torch.zeros_like(w) for w, edge in zip(self.weights.chosen, self.edges, strict=True) if edge]

        def reach() -> tuple[Tensor | None, ...]:
            leaf = self.weights.chosen[i]
            return torch.autograd.grad(edges, [leaf], zeros, retain_graph=True, allow_unused=True)

        with self.walking:
            (found,) = self.objective.inside(self.weights, reach, twice=True)
        return found is not None


class WithZeros(GradientGraph):
    """The same graph as PyTorch makes it, only to see what is reached."""

    zeros = True
