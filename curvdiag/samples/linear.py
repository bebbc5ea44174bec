"""Per-sample gradients of linear layers and matrix products, from activations and output gradients."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from curvdiag.samples import totals
from curvdiag.samples.calls import Call, Names, NotCovered
from curvdiag.samples.layout import by_sample
from curvdiag.samples.totals import Totals


class Linear(Call):
    """``x W^T + b``: the gradient of W is ``delta^T x`` summed over a sample's positions."""

    signature: ClassVar[Names] = ("input", "weight", "bias")
    roles: ClassVar[Names] = ("weight", "bias")
    transposed = False

    def prepare(self) -> None:
        weight, x = self.arguments["weight"], self.arguments["input"]
        bias = self.arguments.get("bias")
        if weight.ndim != 2 or x.ndim < 2:
            raise NotCovered("not a matrix of weights")
        if bias is not None and bias.shape != (weight.shape[1 if self.transposed else 0],):
            raise NotCovered("a bias that is broadcast")
        self._arranged: tuple[str, Tensor, Tensor] | None = None
        self._squared: Tensor | None = None

    def forget(self) -> None:
        super().forget()
        self._arranged = self._squared = None

    def _pair(self, layout: str) -> tuple[Tensor, Tensor] | None:
        """``delta`` as ``[B, R, out]`` and ``x`` as ``[B, R, in]``."""
        if self._arranged is None or self._arranged[0] != layout:
            delta = by_sample(self.delta, self.samples, layout, keep=1)
            x = by_sample(self.activation("input"), self.samples, layout, keep=1)
            if delta is None or x is None:
                return None
            self._arranged, self._squared = (layout, delta, x), None
        return self._arranged[1:]

    def rows(self, role: str, layout: str, which: slice) -> Tensor | None:
        pair = self._pair(layout)
        if pair is None:
            return None
        delta, x = pair[0][which], pair[1][which]
        if role == "bias":
            return delta.sum(1)
        left, right = (x, delta) if self.transposed else (delta, x)
        if len(delta) == 1:
            return torch.mm(left[0].T, right[0])[None]
        return torch.bmm(left.transpose(1, 2), right)

    def factors(self, role: str, layout: str) -> tuple[Tensor, Tensor | None] | None:
        """``delta`` ``[B, out]`` and ``x`` ``[B, in]`` (None for a bias); None where a sample has several positions."""
        pair = self._pair(layout)
        if pair is None or pair[0].shape[1] > 1:
            return None
        self.check()
        return pair[0][:, 0], None if role == "bias" else pair[1][:, 0]

    def totals(self, role: str, layout: str) -> Totals:
        pair = self._pair(layout)
        if pair is None:
            raise NotCovered("samples cannot be told apart")
        delta, x = pair
        if delta.shape[1] > 1:
            return super().totals(role, layout) if role == "weight" else totals.of_rows(delta.sum(1))
        delta, x = delta[:, 0], x[:, 0]
        if self._squared is None:
            self._squared = delta.square()
        if role == "bias":
            return Totals(delta.sum(0), self._squared.sum(0), self._squared.sum(1))
        squared, x2 = self._squared, x.square()
        norms = squared.sum(1) * x2.sum(1)
        first, second = self.room.get(role, (None, None))
        if self.transposed:
            return Totals(torch.mm(x.T, delta, out=first), torch.mm(x2.T, squared, out=second), norms)
        return Totals(torch.mm(delta.T, x, out=first), torch.mm(squared.T, x2, out=second), norms)


class MatMul(Linear):
    """``x @ W``."""

    signature: ClassVar[Names] = ("input", "weight")
    roles: ClassVar[Names] = ("weight",)
    transposed = True


class AddMM(Linear):
    """``b + x @ W``."""

    signature: ClassVar[Names] = ("bias", "input", "weight")
    defaults: ClassVar[dict[str, Any]] = {"beta": 1, "alpha": 1}
    transposed = True

    @classmethod
    def bind(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        names = {"mat1": "input", "mat2": "weight", "self": "bias"}
        return super().bind(args, {names.get(key, key): value for key, value in kwargs.items()})

    def prepare(self) -> None:
        super().prepare()
        if self.arguments["beta"] != 1 or self.arguments["alpha"] != 1 or self.arguments["bias"].ndim > 1:
            raise NotCovered("a scaled sum")
