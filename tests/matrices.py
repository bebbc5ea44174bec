"""Dense symmetric matrices with spectra like those of networks: a few large outliers, a bulk at zero, negatives."""

from __future__ import annotations

import torch
from torch import Tensor


def with_spectrum(eigenvalues: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A symmetric float64 matrix with these eigenvalues in a random basis, and the basis as columns."""
    size = len(eigenvalues)
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    matrix = (basis * eigenvalues.double()) @ basis.T
    return (matrix + matrix.T) / 2, basis


def heavy_tailed(size: int = 400, outliers: int = 10, seed: int = 0) -> Tensor:
    """Outliers from 50 down to 5/3, then a bulk near zero, a third of it negative."""
    generator = torch.Generator().manual_seed(seed)
    top = 50 * torch.logspace(0, -1.5, outliers, dtype=torch.float64)
    bulk = torch.randn(size - outliers, generator=generator, dtype=torch.float64).abs() ** 3 * 0.01 - 0.002
    return torch.cat([top, bulk]).sort(descending=True).values


class Foreign:
    """Another library's operator: a shape and a product with one vector, nothing more."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix
        self.shape = tuple(matrix.shape)
        self.dtype = matrix.dtype

    def __matmul__(self, vector: Tensor) -> Tensor:
        return self.matrix @ vector
