"""Per-sample gradients without rules: the whole model for each sample, by ``vmap`` or by one backward pass each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.func import grad, vmap

from curvdiag.data import Batch, can_cut, map_tensors, sample_count, take, tensors_of
from curvdiag.gradients import gradients
from curvdiag.memory import free_bytes
from curvdiag.objective import Objective
from curvdiag.samples.calls import precise
from curvdiag.sandbox import with_tensors
from curvdiag.weights import Weights


def by_vmap(
    objective: Objective, weights: Weights, batch: Batch, dtype: torch.dtype | None, positions: Sequence[int]
) -> Iterator[list[Tensor]]:
    """Gradients of ``t_i`` in the parameters at ``positions``, ``[b, ...]`` each, a few samples at a time."""
    names = [weights.names[p] for p in positions]
    chosen = {name: weights.chosen[p].detach() for name, p in zip(names, positions, strict=True)}
    count = sample_count(batch)
    size = sum(t.numel() * t.element_size() for t in chosen.values())
    piece = max(1, min(count, free_bytes(objective.device) // (16 * max(1, size)), (1 << 28) // max(1, size)))
    rest = {name: t.detach() for name, t in weights.tensors().items() if name not in chosen}

    def total(own: dict[str, Tensor], *parts: Tensor) -> Tensor:
        filled = iter(parts)
        one = map_tensors(lambda t: t if t.ndim == 0 else next(filled).unsqueeze(0), batch)
        # Buffers that a forward pass writes into are its own.
        held = {**{name: t.clone() for name, t in rest.items()}, **own}
        return with_tensors(objective.model, held, lambda: objective.totals(one, dtype)).sum()

    for start in range(0, count, piece):
        some = take(batch, slice(start, start + piece))
        columns = [t for t in tensors_of(some) if t.ndim]

        def run(columns: list[Tensor] = columns) -> dict[str, Tensor]:
            each = vmap(grad(total), in_dims=(None, *[0] * len(columns)))
            return each(chosen, *columns)

        found = objective.inside(weights, run, twice=False)
        yield [precise(found[name].detach()) for name in names]


def by_backward(
    objective: Objective,
    weights: Weights,
    batch: Batch,
    dtype: torch.dtype | None,
    positions: Sequence[int],
    *,
    together: bool = False,
    samples: Sequence[int] | None = None,
) -> Iterator[list[Tensor]]:
    """The same by one backward pass for each sample, with nothing assumed.

    Args:
        together: The forward pass sees the whole batch each time; so it must where the batch cannot be cut.
        samples: Only these.
    """
    together = together or not can_cut(batch)
    for i in range(sample_count(batch)) if samples is None else samples:
        if together:
            found = _in_the_batch(objective, weights, batch, dtype, i)
        else:
            found = gradients(objective, weights, [take(batch, slice(i, i + 1))], dtype)
            found = [None if g is None else g * objective.total_weight for g in found]
        leaves = [weights.chosen[p].detach() for p in positions]
        own = [found[p] for p in positions]
        yield [
            precise(torch.zeros_like(leaf) if g is None else g).unsqueeze(0)
            for g, leaf in zip(own, leaves, strict=True)
        ]


def _in_the_batch(
    objective: Objective, weights: Weights, batch: Batch, dtype: torch.dtype | None, sample: int
) -> list[Tensor | None]:
    leaves = weights.replaced(weights.chosen)

    def backward() -> None:
        total = objective.totals(batch, dtype)[sample]
        if total.requires_grad:
            total.backward()

    objective.inside(leaves, backward, twice=False)
    return [t.grad for t in leaves.chosen]
