"""One forward and one backward pass over a group of samples, and what each parameter's rule makes of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from curvdiag.data import Batch, sample_count
from curvdiag.errors import NonFiniteError
from curvdiag.objective import Objective
from curvdiag.samples import totals
from curvdiag.samples.calls import Call, NotCovered, precise
from curvdiag.samples.recorder import Recorder, Side
from curvdiag.samples.totals import Totals
from curvdiag.weights import Weights


@dataclass(frozen=True)
class Use:
    """A parameter's part in one call."""

    call: Call
    index: int
    role: str
    side: Side

    @property
    def key(self) -> tuple[int, str]:
        return self.index, self.role

    def offer(self, leaf: Tensor, room: tuple[Tensor, Tensor]) -> None:
        """Room for the sums, where the call's are those of the parameter ``leaf`` as it stands."""
        if self.side.tensor is leaf and precise(leaf).dtype == room[0].dtype:
            self.call.room[self.role] = room

    def rows(self, layout: str, which: slice, leaf: Tensor) -> Tensor | None:
        """Per-sample gradients ``[b, ...]`` of the parameter ``leaf`` through this call."""
        count = len(range(*which.indices(self.call.samples)))
        if not self.call.reached:
            return precise(leaf.detach()).new_zeros(count, *leaf.shape)
        self.call.check()
        rows = self.call.rows(self.role, layout, which)
        if rows is None or rows.shape != (count, *self.side.tensor.shape):
            return None
        return rows if self.side.tensor is leaf else pulled_back(self.side.tensor, leaf, rows)

    def totals(self, layout: str, leaf: Tensor) -> Totals:
        """Their sums, for a parameter whose entries are moved at most."""
        if not self.call.reached:
            zero = torch.zeros_like(precise(leaf.detach()))
            return Totals(zero, zero, zero.new_zeros(self.call.samples))
        self.call.check()
        found = self.call.totals(self.role, layout)
        if self.side.tensor is leaf:
            return found
        first, second = pulled_back(self.side.tensor, leaf, torch.stack([found.first, found.second]))
        return Totals(first, second, found.norms)


def pulled_back(tensor: Tensor, leaf: Tensor, rows: Tensor) -> Tensor:
    """Gradients in ``leaf`` from gradients ``[b, ...]`` in a tensor made of it."""
    outer = rows.to(tensor.dtype)
    with torch.enable_grad():
        try:
            found = torch.autograd.grad(tensor, leaf, outer, is_grads_batched=True, retain_graph=True)[0]
        except RuntimeError:  # a derivative that does not know batches
            found = torch.stack([torch.autograd.grad(tensor, leaf, row, retain_graph=True)[0] for row in outer])
    return precise(found)


class Pass:
    """The calls of one forward pass, and the gradients that came back.

    Args:
        ready: Called between forward and backward pass with the recorder; what it returns is called with each use
            as soon as its gradient is there.
    """

    def __init__(
        self,
        objective: Objective,
        weights: Weights,
        batch: Batch,
        dtype: torch.dtype | None,
        ready: Callable[[Pass], Callable[[Call], None] | None],
    ) -> None:
        self.objective, self.weights, self.batch, self.dtype = objective, weights, batch, dtype
        self.samples = sample_count(batch)
        objective.inside(weights, lambda: self._run(ready), twice=False)

    def _run(self, ready: Callable[[Pass], Callable[[Call], None] | None]) -> None:
        self.recorder = Recorder(self.weights.chosen, self.objective.model, self.samples)
        try:
            self._there_and_back(ready)
        finally:
            self.recorder.let_go()

    def _there_and_back(self, ready: Callable[[Pass], Callable[[Call], None] | None]) -> None:
        with self.recorder:
            found = self.objective.totals(self.batch, self.dtype)
        loss = found.sum()
        if not bool(torch.isfinite(loss)):
            where = self.objective.first_bad_batch(self.weights, self.dtype)
            raise NonFiniteError(f"{where}; there are no gradients at these weights")
        arrived = ready(self)
        if arrived is not None:
            self.recorder.arrived = arrived
        if self.recorder.roots and loss.requires_grad:
            torch.autograd.grad(loss, self.recorder.roots, allow_unused=True)

    @property
    def path(self) -> tuple[object, ...]:
        return self.recorder.path

    def uses(self) -> list[list[Use]]:
        """For each parameter the calls in which it is."""
        found: list[list[Use]] = [[] for _ in self.weights.chosen]
        for index, call in enumerate(self.recorder.calls):
            for role, side in call.sides.items():
                for position in side.positions:
                    found[position].append(Use(call, index, role, side))
        return found

    def rows(self, position: int, uses: list[Use], layouts: list[str], which: slice) -> Tensor | None:
        """Per-sample gradients ``[b, ...]`` of one parameter, summed over its uses."""
        leaf = self.weights.chosen[position]
        total: Tensor | None = None
        for use, layout in zip(uses, layouts, strict=True):
            rows = use.rows(layout, which, leaf)
            if rows is None:
                return None
            total = rows if total is None else total + rows
        if total is None:
            count = len(range(*which.indices(self.samples)))
            total = precise(leaf.detach()).new_zeros(count, *leaf.shape)
        return total

    def totals(self, position: int, uses: list[Use], layouts: list[str]) -> Totals:
        """Sums over all samples of the per-sample gradients of one parameter."""
        leaf = self.weights.chosen[position]
        if not uses:
            zero = torch.zeros_like(precise(leaf.detach()))
            return Totals(zero, zero, zero.new_zeros(self.samples))
        if simple(uses):
            return uses[0].totals(layouts[0], leaf)

        def rows(which: slice) -> Tensor:
            found = self.rows(position, uses, layouts, which)
            if found is None:
                raise NotCovered("samples cannot be told apart")
            return found

        return totals.in_pieces(rows, self.samples, leaf.shape)


def simple(uses: list[Use]) -> bool:
    """Whether squares need no sum over several uses before they are taken."""
    return len(uses) == 1 and uses[0].side.moved


def at_once(call: Call) -> bool:
    """Whether a call's gradient is whole as soon as any of it has come."""
    return len(call.deltas) == 1
