"""The published update rules as plain loops over Python numbers, in double precision, from the papers' formulas."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

Vector = np.ndarray


def power_direction(g: float, p: float, eps: float = 1e-8) -> float:
    """``g / (|g| + eps)^((p-2)/(p-1))``."""
    rho = 1.0 if math.isinf(p) else (p - 2) / (p - 1)
    return g / (abs(g) + eps) ** rho if g != 0 else 0.0


def conjugate_norm(gradients: Sequence[Vector], p: float) -> float:
    """``||g||_q`` over all entries of all gradients, ``1/p + 1/q = 1``."""
    q = 1.0 if math.isinf(p) else p / (p - 1)
    return math.fsum(abs(float(x)) ** q for g in gradients for x in g.ravel()) ** (1 / q)


def sign(x: float) -> float:
    return float((x > 0) - (x < 0))


def by_entry(rule: Callable[..., float], *arrays: Vector) -> Vector:
    found = [rule(*map(float, entries)) for entries in zip(*(a.ravel() for a in arrays), strict=True)]
    return np.array(found, dtype=np.float64).reshape(arrays[0].shape)


def lpsgd(theta, gradients, *, lr, p, eps=1e-8, wd=0.0, dual=False):
    """One step of all parameters of a group; ``theta`` and ``gradients`` are lists of arrays."""
    rho = 1.0 if math.isinf(p) else (p - 2) / (p - 1)
    length = conjugate_norm(gradients, p) ** rho if dual else 1.0
    step = lambda t, g: (1 - lr * wd) * t - lr * length * power_direction(g, p, eps)  # noqa: E731
    return [by_entry(step, t, g) for t, g in zip(theta, gradients, strict=True)]


def lpsgdm(theta, gradients, m, *, lr, p, beta, eps=1e-8, wd=0.0):
    m = [by_entry(lambda a, g: beta * a + (1 - beta) * g, a, g) for a, g in zip(m, gradients, strict=True)]
    step = lambda t, a: (1 - lr * wd) * t - lr * power_direction(a, p, eps)  # noqa: E731
    return [by_entry(step, t, a) for t, a in zip(theta, m, strict=True)], m


def lion(theta, gradients, m, *, lr, betas, wd=0.0):
    one, two = betas
    step = lambda t, g, a: t - lr * (sign(one * a + (1 - one) * g) + wd * t)  # noqa: E731
    theta = [by_entry(step, t, g, a) for t, g, a in zip(theta, gradients, m, strict=True)]
    return theta, [by_entry(lambda a, g: two * a + (1 - two) * g, a, g) for a, g in zip(m, gradients, strict=True)]


def signsgd(theta, gradients, *, lr, wd=0.0):
    return [by_entry(lambda t, g: t - lr * (sign(g) + wd * t), t, g) for t, g in zip(theta, gradients, strict=True)]


def gsgd(theta, gradients, *, lr, t, total, wd=0.0):
    step = lambda x, g: x - lr * (sign(g) * abs(g) ** ((t - 1) / total) + wd * x)  # noqa: E731
    return [by_entry(step, x, g) for x, g in zip(theta, gradients, strict=True)]


SHAPES = ((3, 4), (5,), (), (0, 3), (2, 1, 3))


def parameters(seed: int, dtype: torch.dtype = torch.float64, shapes=SHAPES) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def set_gradients(tensors: Sequence[Tensor], seed: int, *, zeros: bool = True) -> None:
    """Gradients over twelve orders of magnitude, a tenth of them zero."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in tensors:
        size = torch.rand(tensor.shape, generator=generator, dtype=torch.float64) * 12 - 10
        value = 10**size * torch.randn(tensor.shape, generator=generator, dtype=torch.float64).sign()
        keep = torch.rand(tensor.shape, generator=generator) > (0.1 if zeros else -1)
        tensor.grad = (value * keep).to(tensor.dtype)


def arrays(tensors: Sequence[Tensor]) -> list[Vector]:
    return [tensor.detach().double().numpy().copy() for tensor in tensors]


def assert_close(tensors: Sequence[Tensor], truth: Sequence[Vector], rtol: float, atol: float = 0.0) -> None:
    for tensor, array in zip(tensors, truth, strict=True):
        np.testing.assert_allclose(tensor.detach().double().numpy(), array, rtol=rtol, atol=atol)
