"""Products with ``J^T M J`` for a matrix ``M`` over the model's outputs, from a graph that goes through them.

With ``z`` the outputs and ``u`` anything of their shape, the graph of the gradient ``J^T u`` is linear in ``u``: its
derivative in ``u`` along ``v`` is ``J v``, a backward pass towards ``u`` alone. Then ``M`` acts on outputs, and one
more backward pass from ``z`` gives ``J^T (M J v)``. The model's second derivative is never taken. On linear layers
this is 4 matrix products, where a gradient is 3.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from curvdiag.errors import LossError, SecondDerivativeError
from curvdiag.operators.kept_graph import KeptGraph
from curvdiag.operators.output_hessian import Product
from curvdiag.operators.outputs import Pick, caught_outputs
from curvdiag.sandbox import numerics
from curvdiag.space.inner_products import dots_of_parts

REMEDY = "write its backward pass with differentiable operations"


class OutputProducts(KeptGraph):
    """A graph that knows where the model's outputs are in it.

    Attributes:
        pick: Picks the outputs out of what the model returns.
        output: Where the outputs are; None if they depend on none of the chosen parameters.
        slope: Where the gradient of the loss in the outputs is, if it can be differentiated.
        entry: The ``u`` of ``J^T u``; None where nothing flows back from the outputs.
        matrix: ``M``; None is the Hessian of the loss in the outputs, by a second backward pass through the loss.
        shape: A tensor without memory like the outputs.
        custom: Names of custom functions between the outputs and the loss.
    """

    pick: Pick | None = None
    output: GradientEdge | None
    slope: GradientEdge | None
    entry: Tensor | GradientEdge | None
    matrix: Product | None = None
    shape: Tensor
    custom: list[str]

    def through_outputs(
        self, vectors: Sequence[Tensor], positions: Sequence[int], *, keep: bool, batched: bool = False
    ) -> list[Tensor | None]:
        """The rows of ``J^T M J`` at ``positions`` times a vector that is zero elsewhere; None is zero."""
        moved = self.forward(vectors, positions, keep=keep, batched=batched)
        if moved is None:
            return [None] * len(positions)
        return self.back(self._curved(moved, batched=batched), positions, keep=keep, batched=batched)

    def form_at_outputs(
        self, vectors: Sequence[Tensor], positions: Sequence[int], *, keep: bool, batched: bool = False
    ) -> Tensor | None:
        """``v^T J^T M J v``, at the outputs, without the way back; None is zero."""
        moved = self.forward(vectors, positions, keep=keep, batched=batched)
        if moved is None:
            return None
        return dots_of_parts([(moved, self._curved(moved, batched=batched))], batched=batched)

    def _curved(self, moved: Tensor, *, batched: bool) -> Tensor:
        """``M`` times movements of the outputs."""
        if self.matrix is None:
            return self._twice(moved, batched=batched)
        return torch.vmap(self.matrix)(moved) if batched else self.matrix(moved)

    def forward(
        self, vectors: Sequence[Tensor], positions: Sequence[int], *, keep: bool, batched: bool = False
    ) -> Tensor | None:
        """``J v``: how the outputs move; None if not at all."""
        terms = self._terms(vectors, positions)
        if not terms or self.entry is None:
            return None
        return self._backward(terms, [self.entry], keep=keep, batched=batched)[0]

    def back(
        self, outer: Tensor, positions: Sequence[int], *, keep: bool, batched: bool = False
    ) -> list[Tensor | None]:
        """``J^T w`` for ``w`` of the outputs' shape."""
        assert self.output is not None
        leaves = [self.weights.chosen[i] for i in positions]
        return list(self._backward([(self.output, outer)], leaves, keep=keep, batched=batched))

    def _twice(self, vector: Tensor, *, batched: bool = False) -> Tensor:
        """The Hessian of the loss in the outputs times ``vector``, by a second backward pass through the loss."""
        if self.slope is None or self.output is None:
            return torch.zeros_like(vector)
        (product,) = self._backward([(self.slope, vector)], [self.output], keep=True, batched=batched)
        if product is None and self._has_slope():
            raise linear_loss()
        return torch.zeros_like(vector) if product is None else product

    def _has_slope(self) -> bool:
        """Whether the loss has a gradient in the outputs."""
        nowhere = torch.zeros(self.shape.shape, dtype=self.shape.dtype, device=self.objective.device)
        return bool(self._slope_at(nowhere).any())

    def _check_outputs(self, route: object) -> None:
        """Check both derivatives, once for each objective and ``route`` from the parameters to the loss."""
        seen: frozenset[object] = self.objective.__dict__.get("_transposed", frozenset())
        if self.output is None or self.entry is None or route in seen:
            return
        with numerics(self.objective.device):
            self._check_transpose()
            if self.matrix is None:
                self._check_output_hessian()
        self.objective.__dict__["_transposed"] = seen | {route}

    def _check_transpose(self) -> None:
        """``w . J v = J^T w . v`` for random vectors, which a hidden or wrong derivative in the model breaks."""
        generator = torch.Generator().manual_seed(1)
        vectors = [_random(w.shape, generator).to(w) for w in self.weights.chosen]
        outer = self._random_outputs(generator)
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
        one, other = (self._random_outputs(generator) for _ in range(2))
        forth, back = self._twice(one), self._twice(other)
        if not forth.any() and self._has_slope():
            far = 1e3 * one
            if torch.equal(self._slope_at(far), self._slope_at(-far)):
                raise linear_loss()
        dots = float((other * forth).double().sum()), float((one * back).double().sum())
        self._compare(*dots, max(float(forth.norm()), float(back.norm())), "the loss", "two second derivatives")
        if self.custom:
            coarse, fine = (self._by_differences(one, fraction) for fraction in (1.0, 0.5))
            scale = float(fine.norm())
            smooth = float((coarse - fine).norm()) <= 0.02 * scale
            if smooth and float((fine - forth).norm()) > 0.1 * scale:
                raise SecondDerivativeError(
                    f"{', '.join(self.custom)} hides a dependence from the second derivative of the loss in the "
                    f"model's outputs, which differs from finite differences; {REMEDY}"
                )

    def _compare(self, one: float, other: float, scale: float, where: str, what: str) -> None:
        if abs(one - other) > torch.finfo(self.shape.dtype).eps ** 0.3 * scale:
            raise SecondDerivativeError(
                f"{what} that must agree differ by {abs(one - other) / scale:.2g} of their norm: an operation of "
                f"{where} has a wrong or hidden derivative; replace it, or {REMEDY}"
            )

    def _by_differences(self, vector: Tensor, fraction: float) -> Tensor:
        """The Hessian of the loss in the outputs by central differences of its gradient there."""
        size = float(self.shape.numel()) ** 0.5 or 1.0
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

    def _random_outputs(self, generator: torch.Generator) -> Tensor:
        return _random(self.shape.shape, generator).to(self.objective.device, self.shape.dtype)


def linear_loss() -> LossError:
    """There is no Gauss-Newton matrix."""
    return LossError(
        "the loss has a gradient in the model's outputs and no second derivative: it is linear in them (as NLLLoss is "
        "in log-probabilities) or hides its second derivative, and the Gauss-Newton matrix would be zero; let the "
        "model return logits and the loss do the rest (cross_entropy), or pick them with outputs="
    )


def _random(shape: torch.Size, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator)
