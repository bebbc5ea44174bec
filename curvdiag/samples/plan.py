"""Which way each parameter's per-sample gradients are computed: a rule that was seen to be right, or a slower way.

Nothing is trusted. The first time that a forward pass takes a path, the rules are tried on three of its samples, in
double precision and at weights moved a little (so that no gradient is zero by accident), against one backward pass
for each sample. Parameters for which they agree take the rules from then on; the others do not.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from curvdiag.data import Batch, can_cut, sample_count, take
from curvdiag.objective import Objective
from curvdiag.samples import totals
from curvdiag.samples.calls import NotCovered
from curvdiag.samples.one_by_one import by_backward, by_vmap
from curvdiag.samples.passes import Pass, Use, simple
from curvdiag.weights import Weights

Way = Literal["rule", "vmap", "backward"]
PROBES = 3
COMBINATIONS = 27
"""Most ways to lay out the samples that are tried for one parameter."""


@dataclass(frozen=True)
class Plan:
    """What was found out about one path through the model.

    Attributes:
        ways: One for each parameter.
        layouts: Where the samples lie, for each call and role.
        together: Single backward passes need the whole batch.
        numbers_per_sample: Entries of the activations and gradients that the calls keep.
    """

    ways: tuple[Way, ...]
    layouts: dict[tuple[int, str], str] = field(default_factory=dict)
    together: bool = False
    numbers_per_sample: float = 0.0

    def positions(self, way: Way) -> list[int]:
        return [p for p, w in enumerate(self.ways) if w == way]

    def laid_out(self, uses: Sequence[Use]) -> list[str]:
        return [self.layouts.get(use.key, "first") for use in uses]


def without_rules(weights: Weights, *, together: bool = False) -> Plan:
    """One backward pass for each sample, for every parameter."""
    slowest: Way = "backward"
    return Plan((slowest,) * len(weights.chosen), together=together)


def plan_of(
    objective: Objective, weights: Weights, batch: Batch, dtype: torch.dtype | None, path: tuple[object, ...]
) -> Plan:
    """The plan for ``path``, found out once for each objective."""
    plans: dict[Any, Plan] = objective.__dict__.setdefault("_sample_plans", {})
    key = (path, weights.names, sample_count(batch) == 1, objective.mode, dtype, objective.device)
    if key not in plans:
        plans[key] = _find_out(objective, weights, batch, dtype, path)
    return plans[key]


def _find_out(
    objective: Objective, weights: Weights, batch: Batch, dtype: torch.dtype | None, path: tuple[object, ...]
) -> Plan:
    probes = _probes(batch, objective)
    strayed = False
    tries = [(probe, _moved(weights), torch.float64) for probe in probes]
    for probe, own, precision in (*tries, (probes[0], weights, dtype)):
        try:
            trial = Pass(objective, own, probe, precision, lambda _: None)
            if trial.path != path:
                strayed = True
                continue
            return _judge(trial)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception:  # a model that knows one precision only, or does what no rule can follow
            continue
    return without_rules(weights, together=strayed)


def _probes(batch: Batch, objective: Objective) -> list[Batch]:
    """Three samples, and the same in the opposite order: a model that sorts them leaves one of these as it is."""
    count = sample_count(batch)
    if not can_cut(batch) or count <= PROBES:
        return [batch]
    device = objective.device if not isinstance(batch, Tensor) else batch.device
    chosen = [0, count // 2, count - 1]
    return [take(batch, torch.tensor(order, device=device)) for order in (chosen, chosen[::-1])]


def _moved(weights: Weights) -> Weights:
    """The weights in double precision, each tensor moved by a tenth of its size."""
    generator = torch.Generator().manual_seed(0)

    def move(tensor: Tensor) -> Tensor:
        wide = tensor.detach().double()
        size = 0.1 * float(wide.square().mean().sqrt()) if wide.numel() else 0.0
        noise = torch.randn(wide.shape, generator=generator, dtype=torch.float64).to(wide.device)
        return (wide + (size or 0.1) * noise).requires_grad_()

    def widen(tensor: Tensor) -> Tensor:
        return tensor.detach().double() if tensor.dtype.is_floating_point else tensor

    fixed = {name: widen(t) for name, t in weights.fixed.items()}
    buffers = {name: widen(t) for name, t in weights.buffers.items()}
    return Weights(tuple(move(t) for t in weights.chosen), fixed, buffers, weights.names)


def _judge(trial: Pass) -> Plan:
    """Compare the rules with one backward pass for each of the first samples."""
    objective, weights, probe, dtype = trial.objective, trial.weights, trial.batch, trial.dtype
    checked = range(min(PROBES, trial.samples))
    everything = range(len(weights.chosen))
    rows = list(by_backward(objective, weights, probe, dtype, everything, together=True, samples=checked))
    truth = [torch.cat(column) for column in zip(*rows, strict=True)]
    judge = _Judge(truth, trial)
    uses = trial.uses()
    ways: list[Way] = ["backward"] * len(truth)
    layouts: dict[tuple[int, str], str] = {}
    # Those with a zero gradient tell nothing; they follow the others in their call.
    for position in sorted(everything, key=judge.vanishes):
        if position in trial.recorder.hidden:
            continue
        for choice in _choices(uses[position], layouts, followed=judge.vanishes(position)):
            if judge.agrees(position, uses[position], choice):
                ways[position] = "rule"
                layouts.update({use.key: layout for use, layout in zip(uses[position], choice, strict=True)})
                break
    left = [position for position, way in enumerate(ways) if way != "rule"]
    if left and can_cut(probe):
        for position in judge.agreeing_by_vmap(left):
            ways[position] = "vmap"
    numbers = sum(
        tensor.numel()
        for call in trial.recorder.calls
        for name, tensor in (*(("", delta) for delta in call.deltas), *call.arguments.items())
        if isinstance(tensor, Tensor) and name not in call.given
    )
    return Plan(tuple(ways), layouts, numbers_per_sample=numbers / trial.samples)


def _choices(uses: list[Use], known: dict[tuple[int, str], str], *, followed: bool) -> list[tuple[str, ...]]:
    """Layouts to try for a parameter's uses, the likeliest first."""
    options = []
    for use in uses:
        if not use.call.reached:
            options.append(["first"])
            continue
        own = use.call.layouts(use.role)
        others = [layout for (index, _), layout in known.items() if index == use.index and layout in own]
        options.append(others[:1] if followed and others else own)
    return list(itertools.islice(itertools.product(*options), COMBINATIONS))


class _Judge:
    """Whether per-sample gradients are those of single backward passes."""

    def __init__(self, truth: list[Tensor], trial: Pass) -> None:
        self.truth, self.trial = truth, trial
        self.checked = len(truth[0])
        self.sizes = [t.reshape(len(t), -1).norm(dim=1) for t in truth]
        self.whole = torch.stack([s.double() for s in self.sizes]).norm(dim=0)
        narrow = trial.weights.chosen[0].dtype
        self.relative = {torch.float64: 1e-9, torch.float32: 1e-3}.get(narrow, 5e-2)
        self.floor = self.relative * 1e-3

    def vanishes(self, position: int) -> bool:
        return bool((self.sizes[position] <= self.floor * self.whole).all())

    def same(self, position: int, rows: Tensor) -> bool:
        error = (rows - self.truth[position]).reshape(self.checked, -1).norm(dim=1)
        return bool((error <= self.relative * self.sizes[position] + self.floor * self.whole).all())

    def agrees(self, position: int, uses: list[Use], layouts: tuple[str, ...]) -> bool:
        trial = self.trial
        try:
            rows = trial.rows(position, uses, list(layouts), slice(0, trial.samples))
        except NotCovered:
            return False
        if rows is None or not self.same(position, rows[: self.checked]):
            return False
        if not simple(uses):
            return True
        found, wanted = trial.totals(position, uses, list(layouts)), totals.of_rows(rows)
        pairs = ((found.first, wanted.first), (found.second, wanted.second), (found.norms, wanted.norms))
        sizes = (self.whole.sum(), self.whole.square().sum(), self.whole.square().sum())
        return all(
            bool((a - b).norm() <= self.relative * b.norm() + self.floor * size)
            for (a, b), size in zip(pairs, sizes, strict=True)
        )

    def agreeing_by_vmap(self, positions: list[int]) -> list[int]:
        trial = self.trial
        try:
            parts = list(by_vmap(trial.objective, trial.weights, trial.batch, trial.dtype, positions))
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception:  # control flow that looks at values, functions that vmap does not know
            return []
        rows = [torch.cat(column)[: self.checked] for column in zip(*parts, strict=True)]
        return [p for p, own in zip(positions, rows, strict=True) if self.same(p, own)]
