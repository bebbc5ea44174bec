"""Hessian products without a second derivative: central differences of the gradient, for smooth models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from curvdiag.data import Batch
from curvdiag.errors import SecondDerivativeError
from curvdiag.objective import Objective, gradient
from curvdiag.weights import Weights

KINKED_MODULES = (
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.PReLU,
    nn.RReLU,
    nn.Threshold,
    nn.Hardtanh,
    nn.Hardsigmoid,
    nn.Hardswish,
    nn.Hardshrink,
    nn.Softshrink,
    nn.MaxPool1d,
    nn.MaxPool2d,
    nn.MaxPool3d,
    nn.AdaptiveMaxPool1d,
    nn.AdaptiveMaxPool2d,
    nn.AdaptiveMaxPool3d,
)
_KINKED_NODES = (
    "Relu",
    "Threshold",
    "MaxPool",
    "Hardtanh",
    "Hardswish",
    "Hardsigmoid",
    "Abs",
    "Clamp",
    "Max",
    "Min",
)


class FiniteDifferenceEngine:
    """``(grad(w + h v) - grad(w - h v)) / 2h``, two gradients a product.

    The step moves the weights by the cube root of the precision, relative to their norm, where rounding and
    truncation balance.

    Raises:
        SecondDerivativeError: Another step changes the product of a random vector by more than ``rtol``.
    """

    graphs_built = 0
    plan = None

    def __init__(
        self,
        objective: Objective,
        weights: Weights,
        dtype: torch.dtype | None,
        pieces: list[Batch],
        rtol: float,
    ) -> None:
        self.objective, self.weights, self.dtype, self.pieces = objective, weights, dtype, pieces
        coarsest = max(torch.finfo(t.dtype).eps for t in weights.chosen)
        if coarsest > torch.finfo(torch.float32).eps:
            raise SecondDerivativeError(
                f"finite differences need a forward pass in float32 or float64, and the weights are "
                f"{weights.chosen[0].dtype}: give dtype=torch.float32"
            )
        shrinking = [n for n, m in objective.model.named_modules() if getattr(m, "max_norm", None) is not None]
        if shrinking:
            raise SecondDerivativeError(
                f"{shrinking[0]!r} has max_norm, which moves its weights back during the forward pass: finite "
                "differences would not see where they were moved; use method='exact'"
            )
        self.length = _norm(weights.chosen) or 1.0
        self.step = coarsest ** (1 / 3) * self.length
        self.error = self._measured_error()
        if not self.error <= rtol:
            raise SecondDerivativeError(
                f"finite differences are not accurate on this model: another step changes a product by "
                f"{self.error:.2g} of its norm, more than rtol={rtol:g}. {self._cause()}"
            )

    def multiply(self, rows: Tensor, positions: Sequence[int]) -> Tensor:
        layout = self.objective.parameters
        inside = [layout.slices[i] for i in positions]
        products = []
        for row in rows:
            full = row.new_zeros(layout.size)
            for part, values in zip(inside, row.split([s.stop - s.start for s in inside]), strict=True):
                full[part] = values
            product = self.product(full, self.step)
            products.append(torch.cat([product[part] for part in inside]))
        return torch.stack(products)

    def product(self, vector: Tensor, step: float) -> Tensor:
        """One product ``[P]``, by moving the weights a distance ``step`` along ``vector`` and against it."""
        length = float(vector.norm())
        if length == 0 or length != length:
            return vector.clone()
        h = step / length
        ahead, behind = (self._gradient(vector, sign * h) for sign in (1.0, -1.0))
        return (ahead - behind) / (2 * h)

    def _gradient(self, vector: Tensor, h: float) -> Tensor:
        shifts = self.objective.parameters.views(vector)
        moved = tuple(w.detach() + h * v.to(w.dtype) for w, v in zip(self.weights.chosen, shifts, strict=True))
        return gradient(self.objective, self.weights.replaced(moved), self.pieces, self.dtype)

    def random_vector(self) -> Tensor:
        size, generator = self.objective.parameters.size, torch.Generator().manual_seed(0)
        vector = torch.randn(size, generator=generator, dtype=torch.float64)
        return vector.to(self.objective.device, self.dtype or self.objective.dtype)

    def _measured_error(self) -> float:
        """Largest relative change of a random vector's product when the step is another."""
        vector = self.random_vector()
        one = self.product(vector, self.step)
        scale = float(one.norm())
        # Half the step shows rounding. A step that suits float32 shows kinks, which a tiny one may not happen to meet.
        coarse = max(self.step, torch.finfo(torch.float32).eps ** (1 / 3) * self.length)
        others = [self.product(vector, step) for step in {self.step / 2, coarse} - {self.step}]
        return max(float((one - other).norm()) for other in others) / scale if scale > 0 else 0.0

    def _cause(self) -> str:
        modules = self.objective.model.named_modules()
        kinked = [f"{type(m).__name__} {name!r}" for name, m in modules if isinstance(m, KINKED_MODULES)]
        if not kinked:
            kinked = sorted({name for name in self._node_names() if any(k in name for k in _KINKED_NODES)})
        if kinked:
            return (
                f"The model has kinks ({', '.join(kinked[:4])}{', ...' if len(kinked) > 4 else ''}), across which the "
                "gradient jumps: use method='exact', or a smooth activation"
            )
        return "The forward pass is coarse (bfloat16 or float16 inside?): run it in float32, or use method='exact'"

    def _node_names(self) -> Iterator[str]:
        loss: Any = self.objective.inside(
            self.weights, lambda: self.objective.totals(self.pieces[0], self.dtype).sum(), twice=False
        )
        stack, seen = [loss.grad_fn], set()
        while stack:
            node = stack.pop()
            if node is not None and node not in seen:
                seen.add(node)
                yield node.name()
                stack.extend(following for following, _ in node.next_functions)

    def visit(self) -> None:
        """Nothing to build."""

    @property
    def reached(self) -> list[bool]:
        flat = gradient(self.objective, self.weights, self.pieces, self.dtype)
        return [bool(part.any()) for part in self.objective.parameters.views(flat)]


def _norm(tensors: Sequence[Tensor]) -> float:
    return float(torch.stack([t.detach().double().norm() for t in tensors]).norm())
