"""The model's outputs as a graph over the weights: products with ``J^T M J`` for a matrix ``M`` over the outputs.

With ``z`` the outputs and ``u`` anything of their shape, the graph of the gradient ``J^T u`` is linear in ``u``: its
derivative in ``u`` along ``v`` is ``J v``, a backward pass towards ``u`` alone. Then ``M`` acts on outputs, and one
more backward pass from ``z`` gives ``J^T (M J v)``. The model's second derivative is never taken. On linear layers
this is 4 matrix products, where a gradient is 3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from curvdiag.data import Batch
from curvdiag.errors import LossError, SecondDerivativeError
from curvdiag.objective import Objective
from curvdiag.operators.kept_graph import KeptGraph, watched_hooks
from curvdiag.operators.output_hessian import Product, Rule, closed_form
from curvdiag.operators.outputs import Pick, caught_outputs, check_only_way
from curvdiag.operators.second_derivative import check_nodes
from curvdiag.sandbox import numerics
from curvdiag.weights import Weights

_REMEDY = "write its backward pass with differentiable operations"


class OutputGraph(KeptGraph):
    """``J^T M J`` of one group of samples.

    Args:
        pick: Picks the outputs out of what the model returns.
        rule: Gives ``M``; where it gives None this is the Hessian of the loss in the outputs, differentiated twice.
    """

    def __init__(
        self,
        objective: Objective,
        weights: Weights,
        batch: Batch,
        dtype: torch.dtype | None,
        *,
        trusted: bool = False,
        pick: Pick | None = None,
        rule: Rule = closed_form,
    ) -> None:
        self.pick, self.rule = pick, rule
        super().__init__(objective, weights, batch, dtype, trusted=trusted)

    def _build(self, live: Mapping[str, Tensor]) -> None:
        with watched_hooks() as hooks, caught_outputs(self.objective.model, self.pick) as outputs:
            totals = self.objective.totals(self.batch, self.dtype)
        value, self.output = outputs.single(), outputs.edge
        self.recomputes = bool(hooks)
        loss = totals.sum() / self.objective.total_weight
        self.custom: list[str] = []
        if not self.checked:
            rerun = lambda: self.objective.totals(self.batch, self.dtype)  # noqa: E731
            check_nodes(self.objective, loss, live, rerun, of_model=False)
            self.custom = check_only_way(loss, self.output, self.weights)
        known = self.rule(self.objective, value, self.batch, self.dtype) if outputs.alone else None
        self.matrix: Product = self._twice if known is None else known
        slope = self._slope(loss, differentiable=known is None)
        self.outer = torch.zeros_like(value) if slope is None else slope.detach().clone()
        self.outer.requires_grad_()
        gradients = self._pulled_back()
        if not self.checked:
            self._check_finite(loss, gradients)
            self._check_linear(gradients)
        self._take_edges(gradients)

    def _slope(self, loss: Tensor, *, differentiable: bool) -> Tensor | None:
        """The gradient of the loss in the outputs; its graph is kept where it will be differentiated again."""
        self.slope: GradientEdge | None = None
        if self.output is None or not loss.requires_grad:
            return None
        (slope,) = torch.autograd.grad(loss, [self.output], create_graph=differentiable, allow_unused=True)
        if differentiable and slope is not None:
            self.slope = get_gradient_edge(slope) if slope.requires_grad else None
            if self.slope is None and bool(slope.any()):
                raise _linear_loss()
        return slope

    def _pulled_back(self) -> tuple[Tensor | None, ...]:
        """``J^T u`` by parameter, as a graph that depends on ``u``; None where the outputs do not."""
        if self.output is None:
            return (None,) * len(self.weights.chosen)
        return torch.autograd.grad(self.output, self.weights.chosen, self.outer, create_graph=True, allow_unused=True)

    def _check_linear(self, gradients: Sequence[Tensor | None]) -> None:
        for name, gradient, nonzero in zip(self.weights.names, gradients, self.nonzero, strict=True):
            if gradient is not None and nonzero and not gradient.requires_grad:
                raise SecondDerivativeError(
                    f"the gradient in {name!r} does not show that it depends on the gradient in the outputs: a "
                    f"function of the model detaches it in its backward pass; {_REMEDY}"
                )

    def _twice(self, vector: Tensor) -> Tensor:
        """The Hessian of the loss in the outputs times ``vector``, by a second backward pass through the loss."""
        if self.slope is None or self.output is None:
            return torch.zeros_like(vector)
        (product,) = self._backward([(self.slope, vector)], [self.output], keep=True)
        if product is None and bool(self.outer.detach().any()):
            raise _linear_loss()
        return torch.zeros_like(vector) if product is None else product

    def multiply(self, vectors: Sequence[Tensor], positions: Sequence[int], *, keep: bool) -> list[Tensor | None]:
        """The rows at ``positions`` times a vector that is zero elsewhere; None is zero."""
        moved = self.forward(vectors, positions, keep=keep)
        if moved is None:
            return [None] * len(positions)
        return self.back(self.matrix(moved), positions, keep=keep)

    def forward(self, vectors: Sequence[Tensor], positions: Sequence[int], *, keep: bool) -> Tensor | None:
        """``J v``: how the outputs move; None if not at all."""
        terms = self._terms(vectors, positions)
        return self._backward(terms, [self.outer], keep=keep)[0] if terms else None

    def back(self, outer: Tensor, positions: Sequence[int], *, keep: bool) -> list[Tensor | None]:
        """``J^T w`` for ``w`` of the outputs' shape."""
        assert self.output is not None
        leaves = [self.weights.chosen[i] for i in positions]
        return list(self._backward([(self.output, outer)], leaves, keep=keep))

    def _verify(self) -> None:
        self.checked = True
        seen: frozenset[object] = self.objective.__dict__.get("_transposed", frozenset())
        if self.output is None or (self.pick, self.rule) in seen:
            return
        with numerics(self.outer.device):
            self._check_transpose()
            if self.matrix == self._twice:
                self._check_output_hessian()
        self.objective.__dict__["_transposed"] = seen | {(self.pick, self.rule)}

    def _check_transpose(self) -> None:
        """``w . J v = J^T w . v`` for random vectors, which a hidden or wrong derivative in the model breaks."""
        generator = torch.Generator().manual_seed(1)
        vectors = [_random_like(w, generator) for w in self.weights.chosen]
        outer = _random_like(self.outer, generator)
        everything = range(len(vectors))
        moved = self.forward(vectors, everything, keep=True)
        moved = torch.zeros_like(outer) if moved is None else moved
        pulled = self.back(outer, everything, keep=True)
        back = sum(
            float((g.double() * v.double()).sum()) for g, v in zip(pulled, vectors, strict=True) if g is not None
        )
        # For normal vectors both dots have the norms of J v and of J^T w as their root mean squares.
        squares = [float(g.double().square().sum()) for g in pulled if g is not None]
        scale = max(sum(squares) ** 0.5, float(moved.norm()))
        self._compare(float((outer.double() * moved.double()).sum()), back, scale, "the model", "J v and J^T w")

    def _check_output_hessian(self) -> None:
        """The Hessian in the outputs is symmetric; where a custom function may hide something, compare differences."""
        generator = torch.Generator().manual_seed(2)
        one, other = (_random_like(self.outer, generator) for _ in range(2))
        forth, back = self._twice(one), self._twice(other)
        if not forth.any() and bool(self.outer.detach().any()):
            far = 1e3 * one
            if torch.equal(self._slope_at(far), self._slope_at(-far)):
                raise _linear_loss()
        dots = float((other * forth).double().sum()), float((one * back).double().sum())
        self._compare(*dots, max(float(forth.norm()), float(back.norm())), "the loss", "two second derivatives")
        if self.custom:
            coarse, fine = (self._by_differences(one, fraction) for fraction in (1.0, 0.5))
            scale = float(fine.norm())
            smooth = float((coarse - fine).norm()) <= 0.02 * scale
            if smooth and float((fine - forth).norm()) > 0.1 * scale:
                raise SecondDerivativeError(
                    f"{', '.join(self.custom)} hides a dependence from the second derivative of the loss in the "
                    f"model's outputs, which differs from finite differences; {_REMEDY}"
                )

    def _compare(self, one: float, other: float, scale: float, where: str, what: str) -> None:
        if abs(one - other) > torch.finfo(self.outer.dtype).eps ** 0.3 * scale:
            raise SecondDerivativeError(
                f"{what} that must agree differ by {abs(one - other) / scale:.2g} of their norm: an operation of "
                f"{where} has a wrong or hidden derivative; replace it, or {_REMEDY}"
            )

    def _by_differences(self, vector: Tensor, fraction: float) -> Tensor:
        """The Hessian of the loss in the outputs by central differences of its gradient there."""
        size = float(self.outer.detach().numel()) ** 0.5 or 1.0
        step = fraction * torch.finfo(vector.dtype).eps ** (1 / 3) * size / float(vector.norm())

        return (self._slope_at(step * vector) - self._slope_at(-step * vector)) / (2 * step)

    def _slope_at(self, shift: Tensor) -> Tensor:
        """The gradient of the loss in the outputs where these are moved by ``shift``."""

        def slope() -> Tensor:
            with caught_outputs(self.objective.model, self.pick, shift) as outputs:
                loss = self.objective.totals(self.batch, self.dtype).sum() / self.objective.total_weight
            assert outputs.edge is not None
            (found,) = torch.autograd.grad(loss, [outputs.edge], allow_unused=True)
            return torch.zeros_like(shift) if found is None else found

        found: Tensor = self.objective.inside(self.weights, slope, twice=True)
        return found


def _linear_loss() -> LossError:
    return LossError(
        "the loss has a gradient in the model's outputs and no second derivative: it is linear in them (as NLLLoss is "
        "in log-probabilities) or hides its second derivative, and the Gauss-Newton matrix would be zero; let the "
        "model return logits and the loss do the rest (cross_entropy), or pick them with outputs="
    )


def _random_like(tensor: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(tensor.shape, generator=generator).to(tensor.device, tensor.dtype)
