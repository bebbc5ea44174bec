"""The other route to C @ v and GGN @ v: forward mode with dual numbers, then one backward pass through a kept graph."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from nets import Batches
from torch import Tensor, nn
from torch.func import functional_call


def forward_mode(model: nn.Module, batches: Batches) -> dict[str, Callable[[Tensor], Tensor]]:
    """Products of flat vectors with C and with the Gauss-Newton matrix of cross-entropy, all samples as one batch.

    The graph for the backward pass is kept, as ours is; dual numbers keep nothing, and take the forward pass again.
    """
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    parameters = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    leaves = list(parameters.values())
    outputs = functional_call(model, parameters, (x,))
    losses = _by_sample(F.cross_entropy(outputs, y, reduction="none"))
    probabilities = outputs.detach().softmax(1)
    size = len(x)

    def tangent(vector: Tensor) -> Tensor:
        with torch.no_grad(), forward_ad.dual_level():
            parts = vector.split([p.numel() for p in leaves])
            dual = {
                name: forward_ad.make_dual(p.detach(), part.view_as(p))
                for (name, p), part in zip(parameters.items(), parts, strict=True)
            }
            moved = forward_ad.unpack_dual(functional_call(model, dual, (x,))).tangent
        if moved is None:
            raise RuntimeError("forward mode lost the tangent on its way through the model")
        return moved

    def gathered(of: Tensor, weights: Tensor) -> Tensor:
        found = torch.autograd.grad(of, leaves, weights, retain_graph=True)
        return torch.cat([part.reshape(-1) for part in found])

    def covariance(vector: Tensor) -> Tensor:
        moved = tangent(vector)
        # d l = (p - onehot) . dz for each position, averaged over the positions of a sample.
        slopes = (probabilities * moved).sum(1) - moved.gather(1, y[:, None]).squeeze(1)
        along = _by_sample(slopes)
        return gathered(losses, (along - along.mean()) / size)

    def gauss_newton(vector: Tensor) -> Tensor:
        moved = tangent(vector)
        curved = probabilities * (moved - (probabilities * moved).sum(1, keepdim=True))
        return gathered(outputs, curved / y.numel())

    return {"C @ v": covariance, "GGN @ v": gauss_newton}


def _by_sample(values: Tensor) -> Tensor:
    return values if values.ndim == 1 else values.flatten(1).mean(1)
