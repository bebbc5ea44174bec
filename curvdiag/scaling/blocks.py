"""A block of parameters as the scaling test sees it: its leading eigenvectors, its samples along them, H and C.

Three forms with the same methods: dense matrices in float64, the factors of a fully connected layer, products alone.
"""

from __future__ import annotations

import abc
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from curvdiag.errors import ArgumentError, TooLargeError
from curvdiag.memory import human_bytes
from curvdiag.objective import Objective
from curvdiag.operators.hessian import Hessian
from curvdiag.operators.noise import NoiseCovariance
from curvdiag.samples import per_sample_gradients
from curvdiag.scaling.alike import free_on_each
from curvdiag.scaling.directions import direction_samples
from curvdiag.scaling.kronecker import KroneckerLayer
from curvdiag.scaling.power_law import DirectionSamples
from curvdiag.scaling.rank_gram import values_on_ranks
from curvdiag.spectrum.eigen import top_eigenpairs
from curvdiag.spectrum.lanczos import Progress

Array = NDArray[np.float64]
Method = Literal["auto", "dense", "kronecker", "matrix-free"]

# Orders up to which "auto" takes dense matrices: their eigenvectors take seconds to a few minutes on one core.
DENSE_LIMIT = 3000
KRONECKER_LIMIT = 6000

# Samples up to which the eigenvalues of C are taken from the products of per-sample gradients.
GRAM_LIMIT = 2000


@dataclass(frozen=True)
class Basis:
    """Orthonormal directions, those of largest curvature first.

    Attributes:
        curvatures: ``v_k^T H v_k`` ``[n]`` on the data that the basis is taken from, descending, float64.
        vectors: Columns ``[P, n]``.
        notes: What to know about them.
    """

    curvatures: Tensor
    vectors: Tensor
    notes: tuple[str, ...] = ()

    def positive(self, directions: int | None) -> Basis:
        """The first ``directions`` (or all) whose curvature is positive beyond rounding."""
        kept = int((self.curvatures > 1e-13 * float(self.curvatures[0])).sum()) if self.curvatures[0] > 0 else 0
        if kept == 0:
            raise ArgumentError("the Hessian has no positive eigenvalue here: there is no curvature to compare with")
        notes = self.notes
        if directions is not None and directions > kept:
            notes += (f"{directions:,} directions were asked for, and only {kept:,} have positive curvature",)
        n = min(kept, directions or kept)
        return Basis(self.curvatures[:n], self.vectors[:, :n].contiguous(), notes)


class Block(abc.ABC):
    """One block over one set of samples, those of all ranks; its methods are called on all of them."""

    method: str
    default_directions: int

    def __init__(self, objective: Objective, *, squares: bool, progress: Progress | None) -> None:
        self.objective, self.squares, self.progress = objective, squares, progress

    @property
    def size(self) -> int:
        return self.objective.parameters.size

    @property
    def samples(self) -> int:
        return self.objective.size

    def over(self, objective: Objective) -> Block:
        """The same block in the same form over other samples."""
        return type(self)(objective, squares=self.squares, progress=self.progress)

    @abc.abstractmethod
    def eigenvectors(self, count: int, start: Tensor | None = None) -> Basis:
        """The ``count`` leading eigenvectors of the Hessian."""

    @abc.abstractmethod
    def along(self, vectors: Tensor) -> DirectionSamples:
        """What every sample does along the columns of ``[P, n]``."""

    @property
    @abc.abstractmethod
    def hessian(self) -> Any:
        """The Hessian: a float64 matrix, or an operator."""

    @property
    @abc.abstractmethod
    def covariance(self) -> Any:
        """The covariance of per-sample gradients: a float64 matrix, or an operator."""

    def largest_curvature(self) -> float | None:
        """The largest eigenvalue of any sample's Hessian, where all of these are known to be positive semi-definite."""
        return None

    def spectra(self) -> tuple[Array, Array] | None:
        """All eigenvalues of H and of C, descending, where they are matrices."""
        return None

    def noise_eigenvalues(self) -> Array | None:
        """All eigenvalues of C that are not zero, where they can be had."""
        spectra = self.spectra()
        return None if spectra is None else spectra[1]

    @abc.abstractmethod
    def coordinates(self, count: int) -> Basis:
        """The ``count`` coordinates of largest curvature, as unit vectors."""


class _WithMatrices(Block):
    """Blocks whose H and C are matrices."""

    default_directions = 1000  # as in the published fits

    def eigenvectors(self, count: int, start: Tensor | None = None) -> Basis:
        values, vectors = self._eigen
        leading, ranks = vectors[:, :count], self.objective.ranks
        if not ranks.alone:  # where eigenvalues are close rounding turns their vectors, on each processor as it likes
            leading = ranks.first_(leading.contiguous(), "eigenvectors of the first rank")
        return Basis(values[:count], leading)

    @functools.cached_property
    def _eigen(self) -> tuple[Tensor, Tensor]:
        matrix, ranks = self.hessian, self.objective.ranks
        with ranks.together("eigenvectors of a matrix"):
            values, vectors = torch.linalg.eigh(matrix)
        return ranks.first_(values.flip(0), "eigenvalues of the first rank"), vectors.flip(1)

    def spectra(self) -> tuple[Array, Array]:
        return self._eigen[0].cpu().numpy(), self._noise_eigenvalues

    @functools.cached_property
    def _noise_eigenvalues(self) -> Array:
        return torch.linalg.eigvalsh(self.covariance).flip(0).cpu().numpy()

    def coordinates(self, count: int) -> Basis:
        values, order = self.hessian.diagonal().sort(descending=True, stable=True)
        vectors = torch.zeros(self.size, min(count, self.size), dtype=torch.float64, device=values.device)
        vectors[order[:count], torch.arange(vectors.shape[1], device=values.device)] = 1.0
        return Basis(values[:count], vectors)


class DenseBlock(_WithMatrices):
    """Any block, by ``P`` Hessian products and all per-sample gradients, in float64."""

    method = "dense"

    @functools.cached_property
    def hessian(self) -> Tensor:
        matrix = Hessian(self.objective, dtype=torch.float64).dense()
        return (matrix + matrix.T) / 2

    @functools.cached_property
    def covariance(self) -> Tensor:
        objective, ranks = self.objective, self.objective.ranks
        weights = objective.weights(dtype=torch.float64)

        def gradients() -> Iterator[Tensor]:
            return per_sample_gradients(objective, weights, dtype=torch.float64)

        def add_up() -> Tensor:
            total = torch.zeros(self.size, dtype=torch.float64, device=objective.device)
            for rows in gradients():
                total += rows.sum(0) / self.samples
            return total

        mean = ranks.sum("mean gradient", add_up)

        def add_squares() -> Tensor:
            out = torch.zeros(self.size, self.size, dtype=torch.float64, device=objective.device)
            for rows in gradients():
                centred = rows - mean
                out.addmm_(centred.T, centred, alpha=1 / self.samples)
            return out

        return ranks.sum("covariance of gradients", add_squares)

    def along(self, vectors: Tensor) -> DirectionSamples:
        return direction_samples(
            self.objective, vectors, squares=self.squares, dtype=torch.float64, progress=self.progress
        )


class KroneckerBlock(_WithMatrices):
    """The weight of one fully connected layer, by its factors, in float64."""

    method = "kronecker"

    def __init__(self, objective: Objective, *, squares: bool, progress: Progress | None) -> None:
        super().__init__(objective, squares=squares, progress=progress)
        self.layer = KroneckerLayer.of(objective)

    @functools.cached_property
    def hessian(self) -> Tensor:
        return self.layer.hessian()

    @functools.cached_property
    def covariance(self) -> Tensor:
        return self.layer.covariance()

    def along(self, vectors: Tensor) -> DirectionSamples:
        return self.layer.along(vectors, squares=self.squares)

    def largest_curvature(self) -> float | None:
        return self.layer.largest_curvature()


class MatrixFreeBlock(Block):
    """Any block of any size, by products alone, in the given type."""

    method = "matrix-free"
    default_directions = 50

    def __init__(
        self, objective: Objective, *, squares: bool, progress: Progress | None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(objective, squares=squares, progress=progress)
        self.dtype = dtype

    def noise_eigenvalues(self) -> Array | None:
        if self.samples > GRAM_LIMIT:
            return None
        if not self.objective.ranks.alone:
            return values_on_ranks(self.objective, self.dtype)
        try:
            values = self.covariance.gram().values[: min(self.samples, self.size)]
        except TooLargeError:
            return None
        return values.double().cpu().numpy()

    def over(self, objective: Objective) -> Block:
        return MatrixFreeBlock(objective, squares=self.squares, progress=self.progress, dtype=self.dtype)

    @functools.cached_property
    def hessian(self) -> Hessian:
        return Hessian(self.objective, dtype=self.dtype)

    @functools.cached_property
    def covariance(self) -> NoiseCovariance:
        return NoiseCovariance(self.objective, graphs=self.hessian)

    def eigenvectors(self, count: int, start: Tensor | None = None) -> Basis:
        need = (3 * min(count, self.size) + 16) * self.size * self.hessian.dtype.itemsize
        free = free_on_each(self.objective)
        if need > free:
            raise TooLargeError(
                f"{count:,} eigenvectors of {self.size:,} parameters need about {human_bytes(need)}, more than the "
                f"{human_bytes(free)} free; ask for fewer directions, or give a block"
            )
        pairs = top_eigenpairs(self.hessian, count, start=start, progress=self.progress)
        notes: tuple[str, ...] = ()
        if not bool(pairs.converged.all()):
            missing = int((~pairs.converged).sum())
            notes = (
                f"{missing} of {len(pairs.converged)} eigenvectors did not converge; the fit holds in the basis "
                "that was found",
            )
        return Basis(pairs.values, pairs.vectors, notes)

    def along(self, vectors: Tensor) -> DirectionSamples:
        return direction_samples(
            self.objective, vectors, squares=self.squares, dtype=self.dtype, progress=self.progress
        )

    def coordinates(self, count: int) -> Basis:
        raise TooLargeError(
            f"basis='parameter' needs the exact diagonal of H, since errors of a stochastic one flatten the fit; for "
            f"{self.size:,} parameters that takes as many products: give a block=, or method='dense' where its "
            "matrices fit, or use basis='hessian'"
        )


def open_block(
    objective: Objective,
    method: Method,
    *,
    squares: bool,
    dtype: torch.dtype | None,
    progress: Progress | None,
) -> Block:
    """The block of all the objective's parameters, in the form that was asked for, or that suits it and fits.

    Raises:
        TooLargeError: Matrices were asked for and do not fit.
        ArgumentError: A Kronecker layer was asked for and the block is none; or an unknown method.
    """
    if method not in ("auto", "dense", "kronecker", "matrix-free"):
        raise ArgumentError(f"method is 'auto', 'dense', 'kronecker' or 'matrix-free', not {method!r}")
    size, free = objective.parameters.size, free_on_each(objective)
    fits = MATRICES * 8 * size**2 <= free
    if method in ("dense", "kronecker") and not fits:
        raise _too_large(size, free)
    if method == "kronecker" or (method == "auto" and size <= KRONECKER_LIMIT and fits):
        try:
            return KroneckerBlock(objective, squares=squares, progress=progress)
        except (ArgumentError, TooLargeError):
            if method == "kronecker":
                raise
    if method == "dense" or (method == "auto" and size <= DENSE_LIMIT and fits):
        return DenseBlock(objective, squares=squares, progress=progress)
    return MatrixFreeBlock(objective, squares=squares, progress=progress, dtype=dtype)


# Matrices that are there at once: H and C of all samples and of a half, eigenvectors, and what eigh works in.
MATRICES = 10


def _too_large(size: int, free: int) -> TooLargeError:
    return TooLargeError(
        f"the test of a block of {size:,} parameters by dense matrices needs about "
        f"{human_bytes(MATRICES * 8 * size**2)}, more than the {human_bytes(free)} free; "
        "use method='matrix-free', or a smaller block="
    )
