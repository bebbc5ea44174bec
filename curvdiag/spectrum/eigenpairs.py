"""Eigenpairs and how sure they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from curvdiag.results import Result

Which = Literal["LA", "SA", "LM", "BE"]
"""Largest, smallest, largest by magnitude, or both ends."""


@dataclass(frozen=True)
class Eigenpairs(Result):
    """Approximate eigenpairs of a symmetric matrix.

    Attributes:
        values: Ritz values ``[k]``, float64: descending for LA and BE, descending by magnitude for LM,
            ascending for SA.
        vectors: Unit vectors ``[P, k]``, each contiguous in memory; where the weights are sharded, what this rank holds
            of them, ``[local, k]``.
        residuals: ``||H v - lambda v||`` ``[k]``, absolute. The matrix has an eigenvalue within that distance.
        converged: Which residuals ``[k]`` met the tolerance.
        matvecs: Products made.
        which: Which pairs they are, as in :func:`top_eigenpairs`; ``"LM"`` from :func:`power_iteration`.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    converged: Tensor
    matvecs: int
    which: Which = "LA"

    figure = "eigenpairs"

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and lists, without the vectors."""
        plain = super().to_dict()
        del plain["vectors"]
        return plain

    def __str__(self) -> str:
        lines = [
            f"{value:14.6g} ± {residual:.2g}{'' if done else '  (not converged)'}"
            for value, residual, done in zip(
                self.values.tolist(), self.residuals.tolist(), self.converged.tolist(), strict=True
            )
        ]
        return "\n".join([f"{len(lines)} eigenpairs ({self.which}) from {self.matvecs} products", *lines])
