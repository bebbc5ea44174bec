"""A trace of one shape of group with the parts that were cut from it and their compiled code, kept by the objective.

It holds for all weights and for all batches of one shape, so that the operators of a whole training share it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from curvdiag.objective import Objective
from curvdiag.operators.linear_part import LinearPart, bytes_of, compiled, first_part, linear_part
from curvdiag.operators.tracing import Group, Trace, UntraceableError, hooked, trace
from curvdiag.sandbox import numerics

HESSIAN, ALONG, GATHER = "products", "dots", "gathered"
"""Products with the Hessian; derivatives of the samples along a vector; sums of gradients of samples."""


class Program:
    """A trace, the parts that were cut from it so far, and their compiled code."""

    def __init__(self, group: Group) -> None:
        self.trace: Trace = trace(group)
        self.whole = tuple(range(len(self.trace.vectors)))
        self.parts: dict[tuple[str, tuple[int, ...]], LinearPart] = {}
        self.first: dict[tuple[tuple[str, ...], bool], GraphModule] = {}
        self.code: dict[str, Callable[..., Sequence[Tensor]]] = {}
        self.plain: str | None = None  # why nothing is compiled
        self.used = False

    def part(self, kind: str, positions: Sequence[int]) -> LinearPart:
        """What products over the parameters at ``positions`` run."""
        key = kind, tuple(positions)
        if key not in self.parts:
            t = self.trace
            if kind == GATHER:
                self.parts[key] = linear_part([t.coefficients], [0], [t.gathered[i] for i in positions])
            else:
                outputs = [t.products[i] for i in positions] if kind == HESSIAN else [t.dots]
                self.parts[key] = linear_part(t.vectors, positions, outputs)
        return self.parts[key]

    def kept(self, kinds: Iterable[str]) -> list[Node]:
        """The nodes whose values serve these products, whole or of a block."""
        return list(dict.fromkeys(node for kind in kinds for node in self.part(kind, self.whole).kept))

    def bytes(self, kinds: Iterable[str]) -> int:
        """Memory that one graph keeps."""
        return bytes_of(self.kept(kinds), self.trace.arguments)

    def values(
        self, group: Group, kinds: tuple[str, ...], *, gradient: bool
    ) -> tuple[dict[Node, Tensor], list[Tensor]]:
        """What is kept, by node; and with ``gradient`` the loss and the gradient by parameter."""
        nodes, extra = self.kept(kinds), []
        if gradient:
            extra = [self.trace.loss, *(g for g in self.trace.gradients if g is not None)]
        if (kinds, gradient) not in self.first:
            self.first[kinds, gradient] = first_part(self.trace.arguments, [*nodes, *extra])
        with numerics(group.objective.device), torch.no_grad():
            found = self.first[kinds, gradient](*group.tensors, *self.trace.constants)
        return dict(zip(nodes, found, strict=False)), list(found[len(nodes) :])

    def run(self, kind: str, part: LinearPart, whole: bool, inputs: list[Tensor]) -> Sequence[Tensor]:
        """A product; that over all parameters by compiled code, blocks operation by operation."""
        with torch.no_grad():
            if whole and self.plain is None:
                if kind not in self.code:
                    self.code[kind] = compiled(part, inputs)
                return self.code[kind](*inputs)
            found: Sequence[Tensor] = part.run(*inputs)
        return found


def programs(objective: Objective) -> dict[Any, Program | str]:
    """The objective's programs, by what they depend on; or why there is none."""
    found: dict[Any, Program | str] = objective.__dict__.setdefault("_programs", {})
    return found


def program_of(group: Group) -> Program | str:
    """The program of a group, made if it is the first of its kind; or why there can be none."""
    module = hooked(group.objective.model)
    if module is not None:  # not kept: the user may take it off
        return f"a hook of {module} would get tensors without values"
    known = programs(group.objective)
    if group.key not in known:
        try:
            known[group.key] = Program(group)
        except UntraceableError as reason:
            known[group.key] = str(reason)
    return known[group.key]
