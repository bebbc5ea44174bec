"""Per-sample gradients of a whole objective, group by group: their sums, or themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from curvdiag.data import Batch, can_cut, merge, sample_count, signature, take
from curvdiag.errors import ArgumentError, LossError
from curvdiag.memory import free_bytes
from curvdiag.objective import Objective
from curvdiag.samples import totals
from curvdiag.samples.calls import Call, NotCovered
from curvdiag.samples.one_by_one import by_backward, by_vmap
from curvdiag.samples.passes import Pass, Use, at_once, simple
from curvdiag.samples.plan import Plan, plan_of, without_rules
from curvdiag.samples.totals import Totals
from curvdiag.weights import Weights

LARGEST_GROUP = 1024
SHARE = 1 << 30
"""Most samples, and most bytes of activations, that batches are merged up to."""

SMALL = 1 << 26
"""Bytes of activations for which nobody asks how much memory is free: the answer takes most of a millisecond."""


def per_sample_gradients(
    objective: Objective,
    weights: Weights | None = None,
    *,
    dtype: torch.dtype | None = None,
    chunk: int | None = None,
    positions: Sequence[int] | None = None,
) -> Iterator[Tensor]:
    """Per-sample gradients ``g_i = (N / Z) grad t_i`` as rows ``[b, P]``, in the order of the objective's samples.

    Their mean is the objective's gradient. One forward and one backward pass for a batch, whatever ``chunk`` is.

    On several ranks each goes through the samples that it holds, ``objective.first_sample`` and those after it, by
    itself; with the factor above, which is of all of them, the mean over all ranks' rows is the gradient. Only the
    picture of the weights, where none is given, is taken on all ranks together.

    Args:
        weights: Where; by default the model's present weights.
        dtype: To compute in.
        chunk: Most rows at a time; by default as many as take an eighth of the free memory.
        positions: Only these parameters, by their place in ``objective.parameters``.

    Raises:
        LossError: The loss gives only a mean, or BatchNorm in train mode couples the samples.
    """
    require_samples(objective, "per-sample gradients")
    if chunk is not None and (not isinstance(chunk, int) or chunk < 1):
        raise ArgumentError(f"chunk is a number of samples, at least 1, not {chunk}")
    return rows_from(objective, weights or objective.weights(dtype=dtype), dtype, chunk, positions)


def require_samples(objective: Objective, what: str) -> None:
    """Refuse an objective without losses of single samples.

    Raises:
        LossError
    """
    if not objective.per_sample:
        raise LossError(f"{what} need the loss of each sample: {objective.why()}")


def rows_from(
    objective: Objective,
    weights: Weights,
    dtype: torch.dtype | None,
    chunk: int | None,
    positions: Sequence[int] | None,
    start: int = 0,
) -> Iterator[Tensor]:
    """The rows of :func:`per_sample_gradients` from sample ``start`` on; batches before it are not passed through."""
    wanted = list(range(len(weights.chosen))) if positions is None else list(positions)
    scale = objective.size / objective.total_weight
    numbers = sum(weights.chosen[p].numel() for p in wanted)
    kind = result_dtype(objective, dtype)
    if chunk is None:
        chunk = max(1, free_bytes(objective.device) // (16 * max(1, numbers) * kind.itemsize))
    for batch in objective.batches:
        size = sample_count(batch)
        if start < size:
            group = Group(objective, weights, batch, dtype, wanted)
            group.run(keep=True)
            for first in range(start, size, chunk):
                rows = group.rows(slice(first, min(first + chunk, size)))
                yield torch.cat([row.reshape(len(row), -1).to(kind) for row in rows], dim=1).mul_(scale)
        start = max(0, start - size)


def result_dtype(objective: Objective, dtype: torch.dtype | None) -> torch.dtype:
    """The type of results: the computation's, and at least single precision."""
    return torch.promote_types(dtype or objective.dtype, torch.float32)


Room = Sequence[tuple[Tensor, Tensor]]
"""For each parameter where the sums of its gradients and of their squares may be written."""


def all_totals(
    objective: Objective, weights: Weights, dtype: torch.dtype | None, room: Room = ()
) -> Iterator[tuple[int, list[Totals], Plan]]:
    """Group by group: its samples, the sums of ``grad t_i`` by parameter, and how each was computed.

    Args:
        room: For the sums of the first group, as far as they fit.
    """
    positions = list(range(len(weights.chosen)))
    for batch in _merged(objective, weights, dtype):
        group = Group(objective, weights, batch, dtype, positions, room)
        yield group.samples, group.totals(), group.plan
        room = ()


def _merged(objective: Objective, weights: Weights, dtype: torch.dtype | None) -> Iterator[Batch]:
    """The batches, neighbours merged as far as memory allows: fewer and larger matrix products."""
    if len(objective.batches) == 1 or not objective.can_regroup:
        yield from objective.batches
        return
    plan = Group(objective, weights, objective.batches[0], dtype, []).look_ahead()
    # Beside what the calls keep, a graph holds about as much again.
    each = 3 * plan.numbers_per_sample * result_dtype(objective, dtype).itemsize
    if each == 0:
        most = 1
    elif each * min(objective.local_size, LARGEST_GROUP) <= SMALL:
        most = LARGEST_GROUP
    else:
        most = min(LARGEST_GROUP, int(min(SHARE, free_bytes(objective.device) // 8) // each))
    group: list[Batch] = []
    size, kind = 0, ""
    for batch in objective.batches:
        own_size, own_kind = sample_count(batch), signature(batch)
        if group and (size + own_size > most or own_kind != kind):
            yield merge(group)
            group, size = [], 0
        group.append(batch)
        size, kind = size + own_size, own_kind
    yield merge(group)


class Group:
    """Some samples that pass through the model together.

    Args:
        positions: The parameters that are asked for.
        room: For the sums of each parameter of ``weights``; none if empty.
    """

    def __init__(
        self,
        objective: Objective,
        weights: Weights,
        batch: Batch,
        dtype: torch.dtype | None,
        positions: Sequence[int],
        room: Room = (),
    ) -> None:
        self.objective, self.weights, self.batch, self.dtype = objective, weights, batch, dtype
        self.positions, self.room = positions, room
        self.samples = sample_count(batch)
        self.passed: Pass | None = None
        self.uses: list[list[Use]] = []
        self.plan = without_rules(weights)
        self._found: dict[int, Totals] = {}

    def look_ahead(self) -> Plan:
        """The plan alone, cached: from a forward pass of a few samples."""
        cache = self.objective.__dict__.setdefault("_sample_plan_ahead", {})
        key = self.weights.names, self.dtype, self.objective.mode
        if key not in cache:
            self.run(keep=True)
            cache[key] = self.plan
        return cache[key]

    def run(self, *, keep: bool) -> None:
        """The pass; with ``keep`` gradients stay with their calls, else they are summed as they come."""
        try:
            self.passed = Pass(self.objective, self.weights, self.batch, self.dtype, lambda p: self._ready(p, keep))
        except NotCovered:
            self.passed, self._found = None, {}
            self.plan = without_rules(self.weights)
        except _Nothing:
            self.passed = None

    def _ready(self, passed: Pass, keep: bool) -> Callable[[Call], None] | None:
        self.plan = plan_of(self.objective, self.weights, self.batch, self.dtype, passed.path)
        if "rule" not in self.plan.ways:
            raise _Nothing
        self.uses = passed.uses()
        if keep:
            return None
        soon: dict[int, list[int]] = {}
        late: set[int] = set()
        for position in self.plan.positions("rule"):
            for use in self.uses[position]:
                if simple(self.uses[position]) and at_once(use.call):
                    soon.setdefault(id(use.call), []).append(position)
                else:
                    late.add(id(use.call))

        def arrived(call: Call) -> None:
            for position in soon.get(id(call), []):
                self._found[position] = self._sum(passed, position)
            if id(call) not in late:
                call.forget()

        return arrived

    def _sum(self, passed: Pass, position: int) -> Totals:
        uses = self.uses[position]
        if self.room and simple(uses):
            uses[0].offer(self.weights.chosen[position], self.room[position])
        return passed.totals(position, uses, self.plan.laid_out(uses))

    def totals(self) -> list[Totals]:
        """Sums over the group's samples, for each parameter asked for."""
        self.run(keep=False)
        if self.passed is not None:
            try:
                for position in self.plan.positions("rule"):
                    if position not in self._found:
                        self._found[position] = self._sum(self.passed, position)
            except NotCovered:
                self.plan = without_rules(self.weights)
                self._found = {}
        self.passed = None
        left = [p for p in self.positions if p not in self._found]
        if left:
            for part in self._slowly(left):
                for position, rows in zip(left, part, strict=True):
                    new, old = totals.of_rows(rows), self._found.get(position)
                    self._found[position] = new if old is None else old + new
        return [self._found[p] for p in self.positions]

    def rows(self, which: slice) -> list[Tensor]:
        """Per-sample gradients of some samples, for each parameter asked for."""
        found: dict[int, Tensor] = {}
        for position in self.positions:
            if self.passed is not None and self.plan.ways[position] == "rule":
                uses = self.uses[position]
                try:
                    rows = self.passed.rows(position, uses, self.plan.laid_out(uses), which)
                except NotCovered:
                    continue
                if rows is not None:
                    found[position] = rows
        left = [p for p in self.positions if p not in found]
        if left:
            parts = list(self._slowly(left, which))
            found.update({p: torch.cat(column) for p, column in zip(left, zip(*parts, strict=True), strict=True)})
        return [found[p] for p in self.positions]

    def _slowly(self, positions: list[int], which: slice | None = None) -> Iterator[list[Tensor]]:
        """Without rules: ``vmap`` where every parameter allows it, else one backward pass a sample."""
        batch, samples = self.batch, range(self.samples)
        if which is not None and can_cut(batch) and not self.plan.together:
            batch, samples = take(batch, which), range(len(range(self.samples)[which]))
        elif which is not None:
            samples = range(self.samples)[which]
        if all(self.plan.ways[p] == "vmap" for p in positions):
            yield from by_vmap(self.objective, self.weights, batch, self.dtype, positions)
        else:
            together = self.plan.together
            yield from by_backward(
                self.objective, self.weights, batch, self.dtype, positions, together=together, samples=samples
            )


class _Nothing(Exception):
    """No parameter takes a rule: the backward pass would be for nothing."""
