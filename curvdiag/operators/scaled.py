"""A symmetric operator seen through a diagonal scaling of its coordinates."""

from __future__ import annotations

import torch
from torch import Tensor

from curvdiag.errors import ArgumentError, NonFiniteError
from curvdiag.operators.base import SymmetricOperator
from curvdiag.space import Space


class Scaled(SymmetricOperator):
    """``S A S`` for a symmetric operator ``A`` and a diagonal ``S``, such as ``D^(-1/2) H D^(-1/2)``.

    That one has the eigenvalues of ``D^-1 H``, which decide how steps ``lr * g / D`` behave. Products are of ``A``'s
    own type, but never kept in less than single precision. ``cost`` is that of ``A``, which does the work.

    Args:
        operator: ``A``, of order ``P``.
        scale: The diagonal of ``S``, ``[P]``, or what ``A.space`` has of it here; copied. Zeros take a coordinate out.

    Raises:
        ArgumentError: ``operator`` is no operator, or ``scale`` is not a vector of ``P`` real numbers.
        NonFiniteError: ``scale`` holds NaN or infinite numbers.
    """

    def __init__(self, operator: SymmetricOperator, scale: Tensor) -> None:
        if not isinstance(operator, SymmetricOperator):
            raise ArgumentError(
                f"Scaled takes an operator such as Hessian(objective), not {type(operator).__name__}; scale a dense "
                "matrix yourself: scale[:, None] * matrix * scale"
            )
        local = operator.space.local
        if not isinstance(scale, Tensor) or scale.shape != (local,) or not scale.dtype.is_floating_point:
            given = f"{scale.dtype} {tuple(scale.shape)}" if isinstance(scale, Tensor) else type(scale).__name__
            raise ArgumentError(f"scale is a real floating-point tensor of shape ({local},), not {given}")
        self.operator = operator
        self.size, self.device, self.cost = operator.size, operator.device, operator.cost
        self.dtype = torch.promote_types(operator.dtype, torch.float32)
        self.scale = scale.detach().to(device=self.device, dtype=self.dtype, copy=True)
        if not bool(self.scale.isfinite().all()):
            bad = int((~self.scale.isfinite()).sum())
            raise NonFiniteError(f"{bad} of {local:,} entries of scale are not finite in {self.dtype}")

    @property
    def space(self) -> Space:
        return self.operator.space

    def apply(self, rows: Tensor) -> Tensor:
        inside = (rows * self.scale).to(self.operator.dtype)
        return self.operator.apply(inside).to(self.dtype) * self.scale

    def refresh(self) -> None:
        self.operator.refresh()

    def __repr__(self) -> str:
        return f"Scaled({self.operator!r})"
