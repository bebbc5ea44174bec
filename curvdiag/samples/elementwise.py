"""Per-sample gradients of parameters that are added, multiplied or repeated over the samples."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from curvdiag.samples.calls import Call, Names, NotCovered, precise
from curvdiag.samples.layout import by_sample


class Elementwise(Call):
    """A sum, difference, product or quotient with a parameter that is broadcast over the samples."""

    signature: ClassVar[Names] = ("input", "other")
    roles: ClassVar[Names] = ("input", "other")
    defaults: ClassVar[dict[str, Any]] = {"alpha": 1}
    kind = "add"

    def prepare(self) -> None:
        if len(self.given) != 1 or self.arguments["alpha"] != 1 or set(self.arguments) - {"input", "other", "alpha"}:
            raise NotCovered("options of arithmetic")

    def rows(self, role: str, layout: str, which: slice) -> Tensor | None:
        delta, parameter = self.delta, self.given[role]
        whole = parameter.reshape((1,) * (delta.ndim - parameter.ndim) + parameter.shape)
        axis = 1 if layout == "second" else 0
        if delta.ndim <= axis or whole.shape[axis] != 1:
            return None
        parts = by_sample(delta, self.samples, layout)
        if parts is None:
            return None
        parts = parts[which]
        if self.kind != "add":
            slope = by_sample(self._slope(role).expand(delta.shape), self.samples, layout)
            assert slope is not None
            parts = parts * slope[which]
        inner = [size for d, size in enumerate(whole.shape) if d != axis]
        lost = [1] + [d + 2 for d, size in enumerate(inner) if size == 1]
        return parts.sum(lost).reshape(len(parts), *parameter.shape)

    def _slope(self, role: str) -> Tensor:
        """The derivative of the output in the parameter, entry by entry."""
        if self.kind == "sub":
            return self.delta.new_tensor(1.0 if role == "input" else -1.0)
        other = self.arguments["input" if role == "other" else "other"]
        other = precise(other.detach()) if isinstance(other, Tensor) else self.delta.new_tensor(other)
        if self.kind == "mul":
            return other
        own = precise(self.given[role])
        return 1 / other if role == "input" else -other / own.square()


class Add(Elementwise):
    kind = "add"
    keeps = False


class Subtract(Elementwise):
    kind = "sub"
    keeps = False


class Multiply(Elementwise):
    kind = "mul"


class Divide(Elementwise):
    kind = "div"


class Expand(Call):
    """A parameter repeated for each sample, as a class token is."""

    keeps = False

    def rows(self, role: str, layout: str, which: slice) -> Tensor | None:
        if layout != "first" or self.delta.shape[0] != self.samples:
            return None
        parameter, parts = self.given[role], self.delta[which]
        whole = (1,) * (parts.ndim - parameter.ndim) + parameter.shape
        lost = [d for d in range(1, parts.ndim) if whole[d] == 1]
        return (parts.sum(lost) if lost else parts).reshape(len(parts), *parameter.shape)
