"""Jacobians of a model's outputs by one backward pass for each output, and the Gauss-Newton matrix made of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel


def jacobian(model: nn.Module, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs ``[B, ...]`` in eval mode, and their Jacobian ``[B, ..., P]`` by one backward pass for each output."""
    flags = [(m, m.training) for m in model.modules()]
    model.eval()
    leaves = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters() if p.requires_grad}
    with sdpa_kernel(SDPBackend.MATH):
        outputs = functional_call(model, leaves, (inputs,))
    rows = []
    for output in outputs.flatten():
        found = torch.autograd.grad(output, list(leaves.values()), retain_graph=True, allow_unused=True)
        parts = zip(found, leaves.values(), strict=True)
        rows.append(torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in parts]))
    for module, flag in flags:
        module.training = flag
    return outputs.detach(), torch.stack(rows).view(*outputs.shape, -1)


def dense_gauss_newton(model: nn.Module, criterion: Callable[..., Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
    """``J^T (hess of the criterion's mean in all outputs at once) J``."""
    outputs, rows = jacobian(model, batch[0])
    hessian = torch.autograd.functional.hessian(lambda z: criterion(z, batch[1]), outputs)
    rows = rows.flatten(0, -2)
    return rows.T @ hessian.reshape(len(rows), len(rows)) @ rows
