"""Second derivatives of a loss in the model's outputs, in closed form where the criterion is one of PyTorch's.

All are of the objective's share ``sum_i t_i / total_weight`` of one batch, and none is ever a matrix over classes.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curvdiag.criterion import CriterionLoss, Loss
from curvdiag.data import Batch, place
from curvdiag.objective import Objective

Product = Callable[[Tensor], Tensor]
"""A symmetric matrix over outputs, as its product with a tensor of their shape."""

Rule = Callable[[Objective, Tensor, Batch, torch.dtype | None], Product | None]
"""The matrix over outputs at given outputs of a batch; None where only differentiating twice will do."""

Family = Literal["categorical", "bernoulli", "gaussian"]


@dataclass(frozen=True)
class Criterion:
    """One of PyTorch's criteria that is the negative log-likelihood of a distribution, and its settings.

    Attributes:
        family: Distribution of the targets given the outputs.
        weight: Weight of each class, or of each element.
        pos_weight: Weight of positive targets.
        ignore_index: Class label that does not count.
        label_smoothing: Share of each target that is spread over all classes.
    """

    family: Family
    weight: Tensor | None = None
    pos_weight: Tensor | None = None
    ignore_index: int = -100
    label_smoothing: float = 0.0


def recognised(loss: Loss) -> Criterion | None:
    """What criterion a loss is, if it is cross-entropy, squared error or binary cross-entropy with logits."""
    criterion: Any = loss.criterion if isinstance(loss, CriterionLoss) else None
    if isinstance(criterion, nn.Module):
        # A subclass with a forward pass of its own may be anything.
        family = _MODULES.get(type(criterion).forward)
        return Criterion(family, **{name: getattr(criterion, name) for name in _SETTINGS[family]}) if family else None
    settings: dict[str, Any] = {}
    while isinstance(criterion, functools.partial):
        if criterion.args:
            return None
        settings = {**criterion.keywords, **settings}
        criterion = criterion.func
    family = _FUNCTIONS.get(criterion) if inspect.isfunction(criterion) else None
    settings.pop("reduction", None)
    return Criterion(family, **settings) if family and settings.keys() <= _SETTINGS[family] else None


def closed_form(objective: Objective, outputs: Tensor, batch: Batch, dtype: torch.dtype | None) -> Product | None:
    """The Hessian of the loss in the outputs ``[B, C, ...]``, where the criterion is known.

    For cross-entropy with probabilities ``p`` it is ``s (diag p - p p^T)`` at each position, where ``s`` sums the
    weights of the classes, each times its share in the target.
    """
    loss = objective.loss(dtype)
    known = recognised(loss)
    targets = None if known is None else place(batch, objective.device, dtype)[1]
    if known is None or targets is None or not fits(known, outputs, targets):
        return None
    scale = share(objective, loss, known, targets)
    if known.family == "categorical":
        return categorical(outputs, scale * _strength(known, outputs, targets))
    if known.family == "gaussian":
        return lambda vector: 2 * scale * vector
    diagonal = outputs.sigmoid() * (-outputs).sigmoid() * scale
    if known.pos_weight is not None:
        diagonal = diagonal * (1 + (known.pos_weight - 1) * targets)
    return functools.partial(torch.mul, diagonal if known.weight is None else diagonal * known.weight)


def fits(known: Criterion, outputs: Tensor, targets: Any) -> bool:
    """Whether targets have the shape that belongs to the outputs, with nothing broadcast."""
    if not isinstance(targets, Tensor) or outputs.ndim < (2 if known.family == "categorical" else 1):
        return False
    if known.family == "categorical" and not targets.dtype.is_floating_point:
        return targets.shape == outputs.shape[:1] + outputs.shape[2:]
    return targets.shape == outputs.shape


def share(objective: Objective, loss: Loss, known: Criterion, targets: Tensor) -> float:
    """The factor with which the criterion's value at one position (without its weights) enters the objective."""
    by_class = known.family == "categorical"
    labels = by_class and not targets.dtype.is_floating_point
    if labels and isinstance(loss, CriterionLoss) and loss.labels is not None:
        return 1 / objective.total_weight
    positions = targets[0].numel() // (targets.shape[1] if by_class and not labels else 1)
    return 1 / (objective.total_weight * max(1, positions))


def categorical(outputs: Tensor, strength: Tensor) -> Product:
    """``s (diag p - p p^T)`` at each position, for logits ``[B, C, ...]`` and strengths ``[B, ...]``."""
    probabilities, strength = outputs.softmax(1), strength.unsqueeze(1)

    def product(vector: Tensor) -> Tensor:
        weighted = probabilities * vector
        weighted -= probabilities * weighted.sum(1, keepdim=True)
        return weighted.mul_(strength)

    return product


def counted(known: Criterion, outputs: Tensor, targets: Tensor) -> Tensor:
    """1 at each position whose label counts and 0 where it is ignored, ``[B, ...]``."""
    if targets.dtype.is_floating_point:
        return torch.ones_like(outputs[:, 0])
    return (targets != known.ignore_index).to(outputs.dtype)


def _strength(known: Criterion, outputs: Tensor, targets: Tensor) -> Tensor:
    """Sum over classes of the target's share times the class weight, ``[B, ...]``."""
    classes, smoothing = outputs.shape[1], known.label_smoothing
    kept = counted(known, outputs, targets)
    if known.weight is None:
        if not targets.dtype.is_floating_point:
            return kept
        return (1 - smoothing) * targets.sum(1) + smoothing
    weight = known.weight.to(outputs.dtype)
    if targets.dtype.is_floating_point:
        own = torch.einsum("bc...,c->b...", targets, weight)
    else:
        own = weight[torch.where(kept > 0, targets, 0)]
    return kept * ((1 - smoothing) * own + smoothing / classes * weight.sum())


_SETTINGS: dict[Family, set[str]] = {
    "categorical": {"weight", "ignore_index", "label_smoothing"},
    "bernoulli": {"weight", "pos_weight"},
    "gaussian": set(),
}
_MODULES: dict[Any, Family] = {
    nn.CrossEntropyLoss.forward: "categorical",
    nn.BCEWithLogitsLoss.forward: "bernoulli",
    nn.MSELoss.forward: "gaussian",
}
_FUNCTIONS: dict[Any, Family] = {
    F.cross_entropy: "categorical",
    F.binary_cross_entropy_with_logits: "bernoulli",
    F.mse_loss: "gaussian",
}
