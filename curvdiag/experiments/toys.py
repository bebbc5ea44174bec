"""The two quadratics of the l_p paper, as functions, as modules and as Objectives.

Xu and Yang, arXiv:2606.02078. Their start points are not known. The optimum is (1, 4); in the strongly anisotropic one
the curvatures are 200 and 0.05, in the weakly anisotropic one 1.2 and 0.8.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from curvdiag.objective import Objective
from curvdiag.optim.direction import exponent

OPTIMUM = (1.0, 4.0)


@dataclass(frozen=True)
class Toy:
    """``f = 1/2 sum_i c_i (r_i . (theta - optimum))^2`` in two dimensions.

    Attributes:
        name: Of the problem.
        curvatures: ``c``, the eigenvalues of the Hessian.
        gd_lr, sign_lr: The published rates of gradient descent and of signGD.
        angle: By which the eigenvectors ``r_i`` are turned from the axes, in radians; 0 as published.
    """

    name: str
    curvatures: tuple[float, float]
    gd_lr: float
    sign_lr: float
    angle: float = 0.0

    @property
    def condition_number(self) -> float:
        return max(self.curvatures) / min(self.curvatures)

    @property
    def optimum(self) -> Tensor:
        return torch.tensor(OPTIMUM, dtype=torch.float64)

    @property
    def eigenvectors(self) -> Tensor:
        """``r_i`` as rows."""
        c, s = math.cos(self.angle), math.sin(self.angle)
        return torch.tensor([[c, s], [-s, c]], dtype=torch.float64)

    @property
    def hessian(self) -> Tensor:
        """``[2, 2]``, the same everywhere."""
        rows = self.eigenvectors
        return rows.T @ torch.diag(torch.tensor(self.curvatures, dtype=torch.float64)) @ rows

    def value(self, theta: Tensor) -> Tensor:
        """``f`` at points ``[..., 2]``."""
        away = theta - self.optimum
        return 0.5 * ((away @ self.hessian) * away).sum(-1)

    def gradient(self, theta: Tensor) -> Tensor:
        """Of ``f`` at points ``[..., 2]``."""
        return (theta - self.optimum) @ self.hessian

    def distance(self, theta: Tensor) -> Tensor:
        """From the optimum, of points ``[..., 2]``."""
        return torch.linalg.vector_norm(theta - self.optimum, dim=-1)

    def rate(self, p: float) -> float:
        """A rate for LPSGD at one ``p``: that of gradient descent at 2, of signGD at infinity, and between.

        The published rates are of these two only. With ``u = g / |g|^rho`` a rate has the units of
        ``theta / g^(1 - rho)``, which ``sign_lr^rho gd_lr^(1 - rho)`` has.
        """
        rho = exponent(p)
        return self.sign_lr**rho * self.gd_lr ** (1 - rho)

    def turned(self, angle: float) -> Toy:
        """The same with its eigenvectors turned."""
        return replace(self, angle=angle)

    def starts(self, count: int, seed: int = 0) -> Tensor:
        """Points ``[count, 2]``: the optimum and independent Gaussians of standard deviation 2 in each coordinate.

        All directions from the optimum are equally likely, and only on the direction the predicted decreases depend
        (but for ``eps``).
        """
        generator = torch.Generator().manual_seed(seed)
        return self.optimum + 2 * torch.randn(count, 2, dtype=torch.float64, generator=generator)

    def module(self, start: Tensor) -> Point:
        """A model whose parameter is a point, at ``start``."""
        return Point(start)

    def objective(self, module: nn.Module) -> Objective:
        """``f`` as a linear regression on two samples, one for each eigenvector, so that it has a GaussNewton too."""
        scale = torch.tensor(self.curvatures, dtype=torch.float64).sqrt()
        inputs = scale.unsqueeze(1) * self.eigenvectors
        return Objective(module, nn.MSELoss(), (inputs, inputs @ self.optimum))


class Point(nn.Module):
    """``inputs @ theta``."""

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.theta = nn.Parameter(start.detach().clone())

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs @ self.theta


STRONG = Toy("strong anisotropy", (200.0, 0.05), gd_lr=0.002, sign_lr=0.05)
WEAK = Toy("weak anisotropy", (1.2, 0.8), gd_lr=0.8, sign_lr=0.2)
TOYS = (STRONG, WEAK)
