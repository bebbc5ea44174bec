"""What is remembered of one function call with a parameter in it, and what each kind of call knows.

For a call ``out = f(activations, parameter)`` and the gradient ``delta`` of the loss in ``out`` the per-sample
gradients of the parameter follow from ``delta`` and the activations alone.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from curvdiag.samples import totals
from curvdiag.samples.layout import LAYOUTS
from curvdiag.samples.totals import Totals

Names = tuple[str, ...]


class NotCovered(Exception):
    """A rule does not know this call; the parameters in it take another way."""


class Call:
    """One call of a function, with the activations that went in.

    Subclasses say in ``signature`` how arguments are named, in ``roles`` which of these may be parameters, and in
    :meth:`make` what else they need to know.

    Attributes:
        given: The parameters in the call, by role, without their graphs.
        samples: B, the number of samples in the batch.
        deltas: The gradient of the loss in each output; None until the backward pass, or where none flows.
        sides: What the parameters were made of, by role; set by who records.
        room: Where a role's sums may be written, first and second; a rule may leave it alone.
    """

    signature: ClassVar[Names] = ()
    roles: ClassVar[Names] = ()
    defaults: ClassVar[dict[str, Any]] = {}
    keeps = True
    """Whether the rule needs the activations."""

    def __init__(self, arguments: dict[str, Any], given: dict[str, Tensor], samples: int) -> None:
        self.arguments, self.given, self.samples = arguments, given, samples
        self.deltas: list[Tensor | None] = [None]
        self.sides: dict[str, Any] = {}
        self.room: dict[str, tuple[Tensor, Tensor]] = {}
        self.prepare()
        if not self.keeps:
            self.arguments = {}
        tensors = [t for name, t in self.arguments.items() if isinstance(t, Tensor) and name not in given]
        self._versions = [(t, t._version) for t in tensors]

    @property
    def delta(self) -> Tensor:
        """The gradient of the loss in the only output."""
        delta = self.deltas[0]
        assert delta is not None
        return delta

    @property
    def reached(self) -> bool:
        """Whether any gradient has come."""
        return any(delta is not None for delta in self.deltas)

    @classmethod
    def bind(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Arguments by name."""
        return {**cls.defaults, **dict(zip(cls.signature, args, strict=False)), **kwargs}

    def prepare(self) -> None:
        """Look at the arguments.

        Raises:
            NotCovered: They are beyond this rule.
        """

    def describe(self) -> tuple[Any, ...]:
        """What distinguishes this call from others of its kind, apart from sizes."""
        return ()

    def check(self) -> None:
        """The activations are still those that went in."""
        if any(t._version != version for t, version in self._versions):
            raise NotCovered("an activation was changed in place after it was used")

    def rows(self, role: str, layout: str, which: slice) -> Tensor | None:
        """Per-sample gradients ``[b, ...]`` of some samples; None where the layout is impossible."""
        raise NotImplementedError

    def totals(self, role: str, layout: str) -> Totals:
        """Their sums over all samples."""

        def rows(which: slice) -> Tensor:
            found = self.rows(role, layout, which)
            if found is None:
                raise NotCovered("samples cannot be told apart")
            return found

        return totals.in_pieces(rows, self.samples, self.given[role].shape)

    def forget(self) -> None:
        """Let go of everything that takes memory."""
        self.deltas, self.arguments, self._versions = [None] * len(self.deltas), {}, []

    def layouts(self, role: str) -> list[str]:
        """The layouts that the shapes allow."""
        return [layout for layout in LAYOUTS if self.rows(role, layout, slice(0, 1)) is not None]

    def activation(self, name: str) -> Tensor:
        """One that went in, in at least single precision."""
        return precise(self.arguments[name].detach())


def precise(tensor: Tensor) -> Tensor:
    """Half precision as single; anything else as it is."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
