"""Dense truths by double differentiation in one flat vector, in float64, on a copy of the model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

Loss = Callable[[nn.Module], Tensor]


class _Risk(nn.Module):
    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):  # The fused kernels have no second derivative.
            return self.loss(self.model)


def chosen(model: nn.Module) -> list[str]:
    """The trainable parameters, each once, in the model's own order."""
    return [name for name, tensor in model.named_parameters() if tensor.requires_grad]


def risk(
    model: nn.Module, loss: Loss, names: Sequence[str] | None = None, mode: str = "eval"
) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """The loss as a function of the flat vector of the named parameters, and that vector now."""
    twin = copy.deepcopy(model).double().train(mode == "train")
    for module in twin.modules():
        if hasattr(module, "plain"):
            module.plain = True
    named = dict(twin.named_parameters())
    names = list(names) if names is not None else chosen(model)
    shapes = [named[name].shape for name in names]
    whole = _Risk(twin, loss)

    def value(flat: Tensor) -> Tensor:
        parts = flat.split([shape.numel() for shape in shapes])
        views = {f"model.{n}": p.view(s) for n, p, s in zip(names, parts, shapes, strict=True)}
        return functional_call(whole, views, ())

    return value, torch.cat([named[name].detach().reshape(-1) for name in names])


def criterion_loss(criterion: Callable[..., Tensor], batch: Any) -> Loss:
    inputs, targets = (part.double() if part.is_floating_point() else part for part in batch)
    return lambda model: criterion(model(inputs), targets)


def dense_hessian(model: nn.Module, loss: Loss, names: Sequence[str] | None = None, mode: str = "eval") -> Tensor:
    value, flat = risk(model, loss, names, mode)
    return torch.autograd.functional.hessian(value, flat)


def dense_gradient(model: nn.Module, loss: Loss, names: Sequence[str] | None = None, mode: str = "eval") -> Tensor:
    value, flat = risk(model, loss, names, mode)
    return torch.autograd.functional.jacobian(value, flat)


def true_value(model: nn.Module, loss: Loss, mode: str = "eval") -> float:
    value, flat = risk(model, loss, None, mode)
    with torch.no_grad():
        return float(value(flat))


def relative(result: Tensor, truth: Tensor) -> float:
    """Relative error in the Frobenius norm; infinite where shapes disagree or the truth is zero."""
    if result.shape != truth.shape or not truth.norm() > 0:
        return float("inf")
    return float((result.double() - truth.double()).norm() / truth.double().norm())
