"""The direction of steepest descent in the l_p norm, up to its length: ``g / (|g| + eps)^rho``, ``rho = (p-2)/(p-1)``.

Xu and Yang, "Beyond l2-norm and l_inf-norm: A Curvature-Inspired l_p-Norm Scheme for Deep Neural Networks",
arXiv:2606.02078. The step ``d_i = -eta ||g||_q^rho g_i / |g_i|^rho`` with ``1/p + 1/q = 1`` is the exact minimiser of
``<eta g, d> + 1/2 ||d||_p^2``; the optimizers leave the factor ``||g||_q^rho`` to the learning rate unless told
otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor

from curvdiag.errors import ArgumentError
from curvdiag.optim.buckets import buckets, is_plain

HALVES = (torch.float16, torch.bfloat16)
Direction = Callable[..., list[Tensor]]
"""What a step follows: called with lists of gradients and, where there is a state, of moments, which change in place.

A list has one device and one dtype. The gradients are left as they are, and so may be returned; half-precision ones may
come back as single-precision directions.
"""


def lp_direction(gradient: Tensor, p: float, *, eps: float = 1e-8) -> Tensor:
    """``g / (|g| + eps)^rho`` with ``rho = (p-2)/(p-1)``, entry by entry.

    ``p = 2`` gives ``gradient`` itself, ``p = inf`` its signs where ``eps`` does not matter. It is computed as ``g
    exp(-rho log(|g| + eps))``, cheaper than a power; a rounding of the logarithm becomes a relative error of the
    result. In single precision that is within ``4e-6`` where the logarithm is below 32 in size (``eps >= 1e-13``),
    and four times that at most. Entries of zero stay zero. Half precision is computed in single
    precision, where ``eps`` does not vanish, and rounded once.

    Args:
        gradient: Any shape, real.
        p: From 2 to infinity.
        eps: Where entries below it are to count as zeros; 0 acts as the smallest normal number.

    Raises:
        ArgumentError: ``p`` is below 2 or no number, ``eps`` is negative, or the gradient is not real.
    """
    if not gradient.is_floating_point():
        raise ArgumentError(
            f"the direction of a {gradient.dtype} tensor is not defined: pass a real floating-point one"
        )
    if not isinstance(eps, Real) or not 0 <= eps < math.inf:
        raise ArgumentError(f"eps must be a finite number of at least 0, not {eps!r}")
    return LpDirection(exponent(p), float(eps))([gradient])[0].to(gradient.dtype)


def dual_norm(gradients: Sequence[Tensor], p: float) -> Tensor:
    """``||g||_q`` with ``1/p + 1/q = 1`` of all gradients together, 0-dimensional, without waiting for the device.

    Scaled by the largest entry, so that no power under- or overflows. It lies on the device of the first gradient;
    gradients on several devices make them wait for each other.

    Raises:
        ArgumentError: ``p`` is below 2 or no number.
    """
    q = 2 - exponent(p)
    gradients = [gradient for gradient in gradients if gradient.numel()]
    if not gradients:
        return torch.zeros(())
    home = gradients[0].device
    dtype = torch.float64 if any(gradient.dtype == torch.float64 for gradient in gradients) else torch.float32
    parts = [part for (part,) in buckets((gradient,) for gradient in gradients)]
    extremes = [_largest(gradient).to(home, dtype) for part in parts for gradient in part]
    largest = torch.stack(extremes).amax().clamp_min(torch.finfo(dtype).tiny)
    powers = [_sum_of_powers(part, largest, q).to(home, dtype) for part in parts]
    return largest * torch.stack(powers).sum() ** (1 / q)


def _largest(gradient: Tensor) -> Tensor:
    if not is_plain(gradient):
        return _gathered(gradient.abs().amax())
    # Two extremes, since a norm or an absolute value would take several times as long.
    least, most = torch.aminmax(gradient)
    return torch.maximum(-least, most)


def _sum_of_powers(gradients: list[Tensor], largest: Tensor, q: float) -> Tensor:
    """Of ``(|g| / largest)^q``."""
    shares = list(torch._foreach_abs([widened(gradient) for gradient in gradients]))
    torch._foreach_div_(shares, largest.to(shares[0].device, shares[0].dtype))
    # The logarithm of a zero is -inf, and its exponential zero again.
    torch._foreach_log_(shares)
    torch._foreach_mul_(shares, q)
    torch._foreach_exp_(shares)
    return torch.stack([_gathered(share.sum()) for share in shares]).sum()


def _gathered(number: Tensor) -> Tensor:
    """That of all shards, where the tensor was a ``DTensor``."""
    return number.full_tensor() if hasattr(number, "full_tensor") else number


def exponent(p: float) -> float:
    """``rho = (p-2)/(p-1)``: 0 at ``p = 2``, 1 at infinity.

    Raises:
        ArgumentError: ``p`` is below 2, NaN, or no number.
    """
    if not isinstance(p, Real) or not p >= 2:
        raise ArgumentError(f"p must be a number from 2 (SGD) to infinity (signSGD), not {p!r}")
    return 1.0 if p == math.inf else (float(p) - 2) / (float(p) - 1)


@dataclass(frozen=True)
class LpDirection:
    """``factor * g / (|g| + eps)^rho``; ``rho = 1`` without ``eps`` is the sign."""

    rho: float
    eps: float = 0.0
    factor: Tensor | None = None

    def __call__(self, gradients: list[Tensor]) -> list[Tensor]:
        if self.rho == 0:
            return gradients
        gradients = [widened(gradient) for gradient in gradients]
        if self.rho == 1 and self.eps == 0:
            found = list(torch._foreach_sign(gradients))
        else:
            found = list(torch._foreach_abs(gradients))
            torch._foreach_add_(found, self._floor(found[0]))
            if self.rho == 1:
                found = list(torch._foreach_div(gradients, found))
            else:
                torch._foreach_log_(found)
                torch._foreach_mul_(found, -self.rho)
                torch._foreach_exp_(found)
                found = list(torch._foreach_mul(found, gradients))  # Autograd needs the exponential.
        if self.factor is not None:
            torch._foreach_mul_(found, self.factor.to(found[0].device, found[0].dtype))
        return found

    def preconditioner(self, vector: Tensor) -> Tensor:
        """``D`` of the step ``-lr vector / D``: ``(|vector| + eps)^rho / factor``, in at least single precision."""
        vector = widened(vector)
        found = ((vector.abs() + self._floor(vector)).log_() * self.rho).exp_()
        return found if self.factor is None else found / self.factor.to(found.device, found.dtype)

    def _floor(self, like: Tensor) -> float:
        # A smaller number would be lost, and the zeros that it is there for would become 0 / 0.
        return max(self.eps, torch.finfo(like.dtype).tiny)


def widened(tensor: Tensor) -> Tensor:
    """Half precision as single."""
    return tensor.float() if tensor.dtype in HALVES else tensor
