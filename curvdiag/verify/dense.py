"""The whole matrix and LAPACK's eigenvalues, by a way that shares no code with curvdiag's operators."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from curvdiag.verify.problems import Problem


@dataclass(frozen=True)
class Dense:
    """A symmetric matrix ``[P, P]`` in float64, and what is known of it exactly."""

    matrix: Tensor

    @classmethod
    def hessian(cls, problem: Problem) -> Dense:
        """Of the cross-entropy averaged over all samples at once, by differentiating one flat vector twice."""
        named = {name: p.detach() for name, p in problem.model.named_parameters()}
        sizes = [p.numel() for p in named.values()]

        def risk(flat: Tensor) -> Tensor:
            parts = zip(named.items(), flat.split(sizes), strict=True)
            weights = {name: part.view(p.shape) for (name, p), part in parts}
            losses = [
                F.cross_entropy(functional_call(problem.model, weights, (x,)), y, reduction="none")
                for x, y in problem.batches
            ]
            return torch.cat([loss.reshape(-1) for loss in losses]).mean()

        matrix = torch.autograd.functional.hessian(risk, torch.cat([p.reshape(-1) for p in named.values()]))
        return cls((matrix + matrix.T) / 2)

    @property
    def size(self) -> int:
        return len(self.matrix)

    @cached_property
    def _decomposition(self) -> tuple[Tensor, Tensor]:
        return torch.linalg.eigh(self.matrix)

    @property
    def eigenvalues(self) -> Tensor:
        """``[P]``, ascending."""
        return self._decomposition[0]

    @property
    def eigenvectors(self) -> Tensor:
        """Columns ``[P, P]``."""
        return self._decomposition[1]

    @property
    def scale(self) -> float:
        """The spectral norm."""
        return float(self.eigenvalues.abs().max())

    @property
    def by_magnitude(self) -> Tensor:
        """Eigenvalues by descending absolute value."""
        return self.eigenvalues[self.eigenvalues.abs().argsort(descending=True)]

    @property
    def trace(self) -> float:
        return float(self.eigenvalues.sum())

    def projector(self, threshold: float) -> Dense:
        """The projector onto the eigenvectors of eigenvalues above ``threshold``; its trace counts them."""
        above = self.eigenvectors[:, self.eigenvalues > threshold]
        return Dense(above @ above.T)

    def spread(self) -> float:
        """Standard deviation of ``z^T H z`` for random signs ``z``: ``sqrt(2 sum_{i != j} H_ij^2)``."""
        squares = self.matrix.square()
        return math.sqrt(2 * float(squares.sum() - squares.diagonal().sum()))

    def widest_gap(self) -> float:
        """The middle of the widest gap between neighbouring eigenvalues below the largest."""
        gaps = self.eigenvalues[:-1].diff()
        at = int(gaps.argmax())
        return float(self.eigenvalues[at : at + 2].mean())
