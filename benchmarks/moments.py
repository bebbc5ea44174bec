"""Ways to the moments of per-sample gradients, each over the same batches: ours, ``vmap``, and BackPACK."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from nets import Batches
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from curvdiag import Objective
from curvdiag.noise.moments import gradient_moments

TARGETS = {"MLP": 1.8, "ResNet": 2.5, "GPT": 1.8}
"""Most gradients that ours may take."""

Moments = tuple[Tensor, Tensor, Tensor]
"""Mean ``[P]``, diagonal of the covariance ``[P]``, norms ``[N]``."""


def candidates(model: nn.Module, batches: Batches) -> dict[str, Callable[[], Moments]]:
    """Each as a call without arguments that gives the same figures; BackPACK only where it supports the net."""
    model.eval()
    objective = Objective(model, nn.CrossEntropyLoss(), batches=batches)

    def ours() -> Moments:
        found = gradient_moments(objective)
        return found.mean, found.diagonal, found.norms

    calls: dict[str, Callable[[], Moments]] = {"curvdiag": ours, "vmap": by_vmap(model, batches)}
    for name, only_sums in (("BackPACK, sums of squares", True), ("BackPACK, per-sample gradients", False)):
        call = backpack(model, batches, only_sums=only_sums)
        if call is not None:
            calls[name] = call
    return calls


def by_vmap(model: nn.Module, batches: Batches) -> Callable[[], Moments]:
    """Per-sample gradients by ``torch.func``, batch by batch."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    buffers = {name: b.detach() for name, b in model.named_buffers()}
    size = sum(len(x) for x, _ in batches)

    def loss(own: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, (own, buffers), (x[None],)), y[None])

    each = vmap(grad(loss), in_dims=(None, 0, 0))

    def moments() -> Moments:
        first = {name: torch.zeros_like(p) for name, p in parameters.items()}
        second = {name: torch.zeros_like(p) for name, p in parameters.items()}
        norms = []
        for x, y in batches:
            squares = x.new_zeros(len(x), dtype=torch.float32)
            for name, rows in each(parameters, x, y).items():
                first[name] += rows.sum(0)
                squared = rows.square_()
                second[name] += squared.sum(0)
                squares += squared.flatten(1).sum(1)
            norms.append(squares)
        return _finish(list(first.values()), list(second.values()), norms, size)

    return moments


def backpack(model: nn.Module, batches: Batches, *, only_sums: bool) -> Callable[[], Moments] | None:
    """BackPACK's own extensions on a twin of the model; None where it does not know a module.

    Args:
        only_sums: ``SumGradSquared`` and ``BatchL2Grad``, else ``BatchGrad``, of which the sums are taken here.
    """
    from backpack import backpack as watch
    from backpack import extend
    from backpack.extensions import BatchGrad, BatchL2Grad, SumGradSquared

    # Its converter is for second-order extensions, and fails on the ResNet and the GPT.
    twin, lossf = extend(copy.deepcopy(model)).eval(), extend(nn.CrossEntropyLoss())
    extensions = [SumGradSquared(), BatchL2Grad()] if only_sums else [BatchGrad()]
    size = sum(len(x) for x, _ in batches)

    def moments() -> Moments:
        first: list[Tensor] = []
        second: list[Tensor] = []
        norms = []
        for x, y in batches:
            twin.zero_grad()
            with watch(*extensions):
                lossf(twin(x), y).backward()
            count, squares, parameters = len(x), torch.zeros(len(x)), list(twin.parameters())
            ones, twos = [], []
            for p in parameters:
                ones.append(p.grad * count)
                if only_sums:
                    twos.append(p.sum_grad_squared * count**2)
                    squares += p.batch_l2 * count**2
                    del p.sum_grad_squared, p.batch_l2
                else:
                    squared = (p.grad_batch * count).square_()
                    del p.grad_batch
                    twos.append(squared.sum(0))
                    squares += squared.flatten(1).sum(1)
            first = [a + b for a, b in zip(first, ones, strict=True)] if first else ones
            second = [a + b for a, b in zip(second, twos, strict=True)] if second else twos
            norms.append(squares)
        return _finish(first, second, norms, size)

    try:
        moments()
    except (AttributeError, NotImplementedError, RuntimeError):  # a parameter that got no such gradient
        return None
    return moments


def _finish(first: list[Tensor], second: list[Tensor], norms: list[Tensor], size: int) -> Moments:
    mean = torch.cat([t.reshape(-1) for t in first]) / size
    diagonal = torch.cat([t.reshape(-1) for t in second]) / size - mean.square()
    return mean, diagonal, torch.cat(norms).sqrt()
