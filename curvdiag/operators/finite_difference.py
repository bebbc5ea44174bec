"""Hessian products without a second derivative: central differences of the gradient, for smooth models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from curvdiag.data import Batch
from curvdiag.errors import SecondDerivativeError
from curvdiag.gradients import gradient, gradients
from curvdiag.objective import Objective
from curvdiag.weights import Weights

KINKED_MODULES = (
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.PReLU,
    nn.RReLU,
    nn.SELU,
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
_JUMPING = (
    "Relu",
    "LeakyRelu",
    "Prelu",
    "RreluWithNoise",
    "Threshold",
    "Hardtanh",
    "Hardsigmoid",
    "Hardswish",
    "Hardshrink",
    "Softshrink",
    "MaxPool",
    "AdaptiveMaxPool",
)
"""How names of operations begin whose derivative jumps: wherever they are, some step crosses a kink."""

_PERHAPS_KINKED = (*_JUMPING, "Abs", "Clamp", "Max", "Min")
"""Those and others, which often bend nowhere near: a norm is clamped so that nothing is divided by zero."""


class FiniteDifferenceEngine:
    """``(grad(w + h v) - grad(w - h v)) / 2h``, two gradients a product.

    The step moves the weights by the cube root of the precision, relative to the norm of those that the vector
    moves, where rounding and truncation balance.

    Args:
        kinks: Refuse activations and pooling with a kink outright. A product is wrong by many times its size where the
            step crosses one and right where it does not, so that on few samples some vectors tell nothing of others.

    Raises:
        SecondDerivativeError: The chosen parameters act through a kink; or another step changes a product by more than
            ``rtol``, for a random vector or for what two power iterations make of it, which is close to the sharpest
            directions.
    """

    graphs_built = 0
    plan = None
    remedies = ("use method='exact', or a smooth activation", "give dtype=torch.float64, or use method='exact'")

    def __init__(
        self,
        objective: Objective,
        weights: Weights,
        dtype: torch.dtype | None,
        pieces: list[Batch],
        rtol: float,
        *,
        kinks: bool = True,
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
        self.precision, self.rtol = coarsest, rtol
        self.squares = self._squares([w.detach() for w in weights.chosen])
        self.error = 0.0
        if kinks:
            self.refuse_kinks()
        self.check(range(len(weights.chosen)))

    def refuse_kinks(self) -> None:
        """Refuse a gradient that is known to jump, whether or not the steps of a check come across it."""
        if jumps := self._jumps():
            raise SecondDerivativeError(f"finite differences are for smooth models. {self._cause(jumps)}")

    def check(self, positions: Sequence[int]) -> None:
        """Measure the error on the block of the parameters at ``positions``, and refuse what is too coarse."""
        self.error = max(self.error, self._measured_error(positions))
        if not self.error <= self.rtol:
            raise SecondDerivativeError(
                f"finite differences are not accurate on this model: another step changes a product by "
                f"{self.error:.2g} of its norm, more than rtol={self.rtol:g}. {self._cause()}"
            )

    def multiply(self, rows: Tensor, positions: Sequence[int]) -> Tensor:
        layout = self.objective.parameters
        inside = [layout.slices[i] for i in positions]
        products = []
        for row in rows:
            full = row.new_zeros(layout.size)
            for part, values in zip(inside, row.split([s.stop - s.start for s in inside]), strict=True):
                full[part] = values
            product = self.product(full)
            products.append(torch.cat([product[part] for part in inside]))
        return torch.stack(products)

    def multiply_blocks(self, rows: Sequence[Tensor], positions: Sequence[Sequence[int]]) -> list[Tensor]:
        """Products of several diagonal blocks, one after the other: there is no graph to share."""
        return [self.multiply(part, inside) for part, inside in zip(rows, positions, strict=True)]

    def product(self, vector: Tensor, precision: float | None = None, fraction: float = 1.0) -> Tensor:
        """One product ``[P]``, at a fraction of the step that suits ``precision``."""
        reach, length = self._reach_and_length(vector)
        step = fraction * (precision or self.precision) ** (1 / 3) * reach
        if length == 0 or length != length:
            return vector.clone()
        h = step / length
        return self._change(vector, h) / (2 * h)

    def _change(self, vector: Tensor, h: float) -> Tensor:
        """How the gradient differs between both ends of a step."""
        ahead, behind = (self._gradient(vector, sign * h) for sign in (1.0, -1.0))
        return ahead - behind

    def _gradient(self, vector: Tensor, h: float) -> Tensor:
        shifts = self.objective.parameters.views(vector)
        moved = tuple(w.detach() + h * v.to(w.dtype) for w, v in zip(self.weights.chosen, shifts, strict=True))
        return gradient(self.objective, self.weights.replaced(moved), self.pieces, self.dtype)

    def random_vector(self) -> Tensor:
        size, generator = self.objective.parameters.size, torch.Generator().manual_seed(0)
        vector = torch.randn(size, generator=generator, dtype=torch.float64)
        return vector.to(self.objective.device, self.dtype or self.objective.dtype)

    def _squares(self, parts: Sequence[Tensor]) -> Tensor:
        """Square norms of the parameters, or of the parts of a vector."""
        return torch.stack([part.double().square().sum() for part in parts]).cpu()

    def _length(self, vector: Tensor) -> float:
        return float(vector.norm())

    def _reach_and_length(self, vector: Tensor) -> tuple[float, float]:
        return self._reach(self._squares(self.objective.parameters.views(vector))), self._length(vector)

    def _reach(self, shares: Tensor) -> float:
        """Norm of the weights, each tensor counted by its share in the vector; for weights of zero, 1 over sqrt(n)."""
        numels = torch.tensor(self.objective.parameters.numels, dtype=torch.float64)
        typical = float(self.squares.sum() / numels.sum()) or 1.0
        squares = torch.where(self.squares > 0, self.squares, typical * numels)
        return float(((squares * shares).sum() / shares.sum().clamp_min(1e-300)).sqrt())

    def _measured_error(self, positions: Sequence[int]) -> float:
        """Largest relative change of a product when the step is another."""
        inside = self._inside(positions)
        vector, worst = self.random_vector() * inside, 0.0
        for _ in range(3):
            one = self.product(vector) * inside
            scale = self._length(one)
            if scale == 0:
                break
            # Half the step shows rounding. One that suits float32 shows kinks, which a tiny one may not meet.
            others = [self.product(vector, fraction=0.5)]
            if self.precision < torch.finfo(torch.float32).eps:
                others.append(self.product(vector, torch.finfo(torch.float32).eps))
            worst = max(worst, *(self._length(one - other * inside) / scale for other in others))
            vector = one / scale
        return worst

    def _inside(self, positions: Sequence[int]) -> Tensor:
        """A vector of ones in the parameters at ``positions``, and zeros elsewhere."""
        inside = torch.zeros(self.objective.parameters.size, device=self.objective.device)
        for i in positions:
            inside[self.objective.parameters.slices[i]] = 1.0
        return inside

    def _cause(self, jumps: Sequence[str] = ()) -> str:
        modules = self.objective.model.named_modules()
        kinked = [f"{type(m).__name__} {name!r}" for name, m in modules if isinstance(m, KINKED_MODULES)]
        if not kinked:
            kinked = list(jumps) or sorted({n for n in self._node_names() if any(k in n for k in _PERHAPS_KINKED)})
        if kinked:
            return (
                f"The model has kinks ({', '.join(kinked[:4])}{', ...' if len(kinked) > 4 else ''}), across which the "
                f"gradient jumps: {self.remedies[0]}"
            )
        return (
            "The forward pass is coarse (bfloat16 or float16 inside?), or the weights of its layers are of very "
            f"different sizes: {self.remedies[1]}"
        )

    def _jumps(self) -> list[str]:
        """Operations between the parameters and the loss whose derivative jumps, but for what smooths it again."""
        edges = self._edges()
        return sorted({node.name() for into, node in edges if _has_kink(node) and not _smooths(into, node)})

    def _node_names(self) -> Iterator[str]:
        return (child.name() for _, child in self._edges())

    def _edges(self) -> Iterator[tuple[Any, Any]]:
        """Each operation of the loss of some samples, with the one that its result goes into."""
        root = self._loss().grad_fn
        stack, seen = [(None, root)] if root is not None else [], set()
        while stack:
            parent, node = stack.pop()
            yield parent, node
            if node not in seen:
                seen.add(node)
                stack.extend((node, following) for following, _ in node.next_functions if following is not None)

    def _loss(self) -> Any:
        """The loss of some samples, with its graph."""
        return self.objective.inside(
            self.weights, lambda: self.objective.totals(self.pieces[0], self.dtype).sum(), twice=False
        )

    def visit(self) -> None:
        """Nothing to build."""

    @property
    def reached(self) -> list[bool]:
        parts = gradients(self.objective, self.weights, self.pieces, self.dtype)
        return [part is not None for part in parts]


def _has_kink(node: Any) -> bool:
    name = node.name()
    if name.startswith("Elu"):  # also SELU and CELU: its slopes at zero
        return bool(getattr(node, "_saved_alpha", 1.0) * getattr(node, "_saved_input_scale", 1.0) != 1.0)
    return bool(name.startswith(_JUMPING))


def _smooths(parent: Any, kinked: Any) -> bool:
    """Whether ``parent`` is a power above one of ``kinked``, or its square: the gradient of that has no jump."""
    name = "" if parent is None else parent.name()
    if name.startswith("MulBackward"):
        return all(following is kinked for following, _ in parent.next_functions)
    exponent = getattr(parent, "_saved_exponent", None) if name.startswith("PowBackward") else None
    return isinstance(exponent, int | float) and exponent > 1
