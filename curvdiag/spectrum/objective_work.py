"""An objective in numbers, for a plan: what small graphs and gradients took, and how FSDP2 would group its weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import flop_registry

from curvdiag.data import Batch, sample_count
from curvdiag.gradients import gradients
from curvdiag.objective import Objective
from curvdiag.operators.live_bytes import LiveBytes
from curvdiag.operators.plan import GraphBytes, calibration, first_samples, largest, through
from curvdiag.operators.trial import Trial
from curvdiag.operators.watching import Watching
from curvdiag.spectrum.collectives import Units, units_of
from curvdiag.spectrum.scale import Work
from curvdiag.weights import Weights


def work_of(
    objective: Objective, tried: Trial, pieces: Sequence[Batch], dtype: torch.dtype | None, itemsize: int
) -> Work:
    """What a density of the objective is made of; a gradient or two of few samples are taken for it.

    Args:
        tried: What small graphs took.
        pieces: The data, as they pass through the model.
        dtype: Of the copies.
        itemsize: Bytes of one number of a vector.
    """
    piece, model = largest(pieces), objective.model
    few, many = calibration(sample_count(piece), cut=objective.can_regroup)
    weights = objective.weights(dtype=dtype)
    held = {n: _most_held(objective, weights, first_samples(piece, n), dtype) for n in {few, many}}
    numbers = {id(t): t.numel() for t in (*model.parameters(), *model.buffers())}
    return Work(
        size=objective.parameters.size,
        weights=sum(numbers.values()),
        samples=objective.size,
        flops=_operations(objective, weights, first_samples(piece, few), dtype) / few or None,
        graph=tried.graph,
        walking=tried.passing,
        activations=through(few, held[few], many, held[many]) if few < many else GraphBytes(0.0, held[many] / many),
        units=sharding_of(model),
        batch=max(objective.ranks.gather(max(map(sample_count, pieces)), "plan")),
        itemsize=itemsize,
        product_seconds=tried.product,
        gradient_seconds=tried.gradient,
        dot_seconds=tried.dot,
    )


def sharding_of(model: nn.Module) -> Units:
    """The groups in which FSDP2 gathers the weights, or would: one for each child of a list or sequence of modules."""
    shapes = [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()]
    owners = [name for name, module in model.named_modules() if name and _already(module)]
    return units_of(shapes, owners or blocks_of(model))


def blocks_of(model: nn.Module) -> list[str]:
    """Children of the outermost lists and sequences of at least two modules with parameters."""
    found: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList | nn.Sequential) and not any(name.startswith(f"{o}.") for o in found):
            children = [child for child, inner in module.named_children() if next(inner.parameters(), None) is not None]
            if len(children) > 1 and name not in found:
                found += [f"{name}.{child}".lstrip(".") for child in children]
    return found


def _already(module: nn.Module) -> bool:
    """Whether FSDP2 has made a group of the module; asked by name, since importing FSDP2 takes its time."""
    return any(base.__name__ == "FSDPModule" for base in type(module).__mro__)


class _Operations(Watching):
    """Counts the multiplications and additions of matrix products and convolutions."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.total += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=result)
        return result


def _operations(objective: Objective, weights: Weights, batch: Batch, dtype: torch.dtype | None) -> float:
    """Operations of a gradient; attention as it is written down, since not every fused kernel is counted."""

    def gradient() -> None:
        total = objective.totals(batch, dtype).sum()
        torch.autograd.grad(total, weights.chosen, allow_unused=True)

    with _Operations() as counter:
        objective.inside(weights, gradient, twice=True)
    return float(counter.total)


def _most_held(objective: Objective, weights: Weights, batch: Batch, dtype: torch.dtype | None) -> float:
    """Bytes that a gradient holds at most beside the gradient itself."""
    with LiveBytes() as counter:
        gradients(objective, weights, [batch], dtype)
    return max(0.0, counter.peak() - sum(weight.nbytes for weight in weights.chosen))
