"""The rule for every other function: run it again for one sample at a time, that function alone."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as trees

from curvdiag.samples import totals
from curvdiag.samples.calls import Call, NotCovered, precise
from curvdiag.samples.totals import Totals

SHARED = "-"
"""In place of an axis: the tensor belongs to no sample."""

MOST = 9
"""Ways of laying out the samples that are tried."""


class AnyCall(Call):
    """A call of whatever function, differentiated for each sample alone: recurrent cells, bilinear forms, ``einsum``.

    Attributes:
        deltas: The gradient of the loss in each output; None where none flows.
    """

    def __init__(self, function: Any, args: Any, kwargs: Any, given: dict[int, str], samples: int) -> None:
        """``given`` names the role of each parameter by its place among the arguments, flattened."""
        self.function, self.places = function, {role: place for place, role in given.items()}
        self.leaves, self.spec = trees.tree_flatten((args, kwargs))
        self.into = kwargs.get("out") is not None
        self._made: dict[str, Totals] = {}
        self._rows: tuple[tuple[str, slice], dict[str, Tensor]] | None = None
        arguments = {str(i): leaf for i, leaf in enumerate(self.leaves) if i not in given}
        super().__init__(arguments, {role: self.leaves[place] for place, role in given.items()}, samples)

    def prepare(self) -> None:
        name = getattr(self.function, "__name__", "")
        in_place = name.endswith("_") and not name.endswith("__")
        if in_place or name.startswith("__i") or name == "__setitem__" or self.into:
            raise NotCovered("it works in place")

    def layouts(self, role: str) -> list[str]:
        """Axes of the samples, one letter for each tensor that goes in or comes out, the likeliest first."""
        axes = [self._axes(tensor) for tensor in (*self._activations().values(), *self.deltas)]
        choices = ("".join(choice) for choice in itertools.product(*axes))
        return list(itertools.islice((c for c in choices if c.strip(SHARED)), MOST))

    def _activations(self) -> dict[int, Tensor]:
        own = set(self.places.values())
        return {i: t for i, t in enumerate(self.leaves) if isinstance(t, Tensor) and i not in own}

    def _axes(self, tensor: Tensor | None) -> str:
        if tensor is None or tensor.ndim == 0:
            return SHARED
        axes = "".join(str(axis) for axis in (0, 1) if tensor.ndim > axis and tensor.shape[axis] == self.samples)
        if not axes and tensor.shape[0] and tensor.shape[0] % self.samples == 0:
            axes = "0"  # several positions of a sample, one after the other
        return axes + SHARED

    def rows(self, role: str, layout: str, which: slice) -> Tensor | None:
        if self._rows is None or self._rows[0] != (layout, which):
            each = [self._alone(layout, i) for i in range(*which.indices(self.samples))]
            self._rows = (layout, which), {name: torch.stack([one[name] for one in each]) for name in self.given}
        return self._rows[1][role]

    def totals(self, role: str, layout: str) -> Totals:
        if role not in self._made:  # all roles come out of one pass over the samples
            for i in range(self.samples):
                for name, row in self._alone(layout, i).items():
                    self._add(name, totals.of_rows(row[None]))
        return self._made[role]

    def _add(self, name: str, new: Totals) -> None:
        old = self._made.get(name)
        self._made[name] = new if old is None else old + new

    def _alone(self, layout: str, sample: int) -> dict[str, Tensor]:
        """The gradients of one sample by role.

        Raises:
            NotCovered: The function does not work on one sample so laid out.
        """
        try:
            with torch.enable_grad():
                return self._differentiated(layout, sample)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            raise NotCovered(str(error)) from error

    def _differentiated(self, layout: str, sample: int) -> dict[str, Tensor]:
        leaves, axes = list(self.leaves), iter(layout)
        for place, leaf in self._activations().items():
            leaves[place] = self._part(leaf.detach(), next(axes), sample)
        own = {role: tensor.detach().requires_grad_() for role, tensor in self.given.items()}
        for role, place in self.places.items():
            leaves[place] = own[role]
        args, kwargs = trees.tree_unflatten(leaves, self.spec)
        outputs = trees.tree_leaves(self.function(*args, **kwargs))
        heads, outer = [], []
        for output, delta, axis in zip(outputs, self.deltas, axes, strict=True):
            if delta is not None and output.requires_grad:
                heads.append(output)
                outer.append(self._part(delta, axis, sample).to(output.dtype))
        found = torch.autograd.grad(heads, list(own.values()), outer, allow_unused=True) if heads else [None] * len(own)
        return {
            role: precise(torch.zeros_like(tensor) if g is None else g)
            for (role, tensor), g in zip(own.items(), found, strict=True)
        }

    def _part(self, tensor: Tensor, axis: str, sample: int) -> Tensor:
        """One sample of a tensor."""
        if axis == SHARED:
            return tensor
        size, rest = divmod(tensor.shape[int(axis)], self.samples)
        if rest:
            raise NotCovered("samples cannot be told apart")
        return tensor.narrow(int(axis), sample * size, size)
