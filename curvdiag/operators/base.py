"""Symmetric matrices known only by their products, and the one door through which algorithms use them."""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator
from torch import Tensor

from curvdiag.errors import ArgumentError, TooLargeError
from curvdiag.memory import free_bytes, human_bytes
from curvdiag.space import Space, WholeSpace


@dataclass
class Cost:
    """What an operator has done so far.

    Attributes:
        matvecs: Products with one vector (a product with ``k`` vectors counts ``k``), quadratic forms among them.
        graphs: Graphs built: one forward and one differentiable backward pass over a group of batches each.
        seconds: Time spent in both.
    """

    matvecs: int = 0
    graphs: int = 0
    seconds: float = 0.0


class SymmetricOperator(abc.ABC):
    """A real symmetric matrix ``[P, P]`` given by its products.

    ``op @ v`` takes a vector ``[P]`` or several as columns ``[P, k]`` and returns the same shape.
    Subclasses implement :meth:`apply`, whose vectors are rows ``[k, P]``, each contiguous in memory. Where each rank
    holds pieces of the weights, vectors are what :attr:`space` has of them here.
    """

    size: int
    dtype: torch.dtype
    device: torch.device
    cost: Cost

    @abc.abstractmethod
    def apply(self, rows: Tensor) -> Tensor:
        """Products with the rows of a contiguous ``[k, P]`` tensor, as new rows ``[k, P]``."""

    def refresh(self) -> None:  # noqa: B027 - most operators own their weights and have nothing to check
        """Check, once per algorithm, that the operator still means what it meant when it was made."""

    @property
    def space(self) -> Space:
        """Where its vectors live: whole, in this process alone, unless a subclass says otherwise."""
        return WholeSpace(self.size)

    @property
    def shape(self) -> tuple[int, int]:
        return self.size, self.size

    def __len__(self) -> int:
        return self.size

    def __matmul__(self, other: Tensor) -> Tensor:
        self._check_shape(other)
        self.refresh()
        with torch.inference_mode(False):
            products = self.apply(self._rows(other))
        return products[0] if other.ndim == 1 else products.T

    def quadratic_form(self, vectors: Tensor) -> Tensor:
        """``v^T H v`` in float64: a number for a vector ``[P]``, numbers ``[k]`` for the columns of ``[P, k]``.

        For an exact Hessian this takes about three quarters of a product's time where the second backward pass can
        stop half way: not with custom functions, checkpoints, hooks, complex numbers, or GroupNorm, nor compiled.
        For ``C`` and the Gauss-Newton matrix it takes about 0.6 of one. Everything else takes the product.
        """
        self._check_shape(vectors)
        self.refresh()
        with torch.inference_mode(False):
            forms = self.forms(self._rows(vectors))
        return forms[0] if vectors.ndim == 1 else forms

    def forms(self, rows: Tensor) -> Tensor:
        """``v^T H v`` ``[k]`` in float64 for the rows of a contiguous ``[k, P]`` tensor."""
        return self.space.dots(rows, self.apply(rows))

    def _check_shape(self, other: Tensor) -> None:
        if not isinstance(other, Tensor):
            raise ArgumentError(f"expected a tensor of {self.size} rows, got {type(other).__name__}")
        local = self.space.local
        if other.ndim not in (1, 2) or other.shape[0] != local:
            held = "" if local == self.size else f", of whose vectors this rank holds {local} numbers,"
            raise ArgumentError(
                f"cannot multiply a {self.size} x {self.size} operator{held} with a tensor of shape "
                f"{tuple(other.shape)}"
            )

    def _rows(self, columns: Tensor) -> Tensor:
        """A vector, or columns, as contiguous rows ``[k, local]`` of the operator's type."""
        rows = columns.detach().to(device=self.device, dtype=self.dtype)
        return rows.contiguous()[None] if rows.ndim == 1 else rows.T.contiguous()

    def matvec(self, vector: Tensor) -> Tensor:
        """Product with one vector ``[P]``."""
        return self @ vector

    def matmat(self, vectors: Tensor) -> Tensor:
        """Products with the columns of ``[P, k]``."""
        return self @ vectors

    def dense(self, *, chunk: int = 64) -> Tensor:
        """The whole matrix ``[P, P]``, from ``P`` products; on every rank, where there are several.

        Raises:
            TooLargeError: The matrix does not fit into the free memory of the operator's device.
        """
        space = self.space
        need, free = self.size**2 * self.dtype.itemsize, space.fitting(free_bytes(self.device), 1, self.device)
        if need > free:
            raise TooLargeError(
                f"a dense {type(self).__name__} of {self.size:,} parameters needs {human_bytes(need)}, more than the "
                f"{human_bytes(free)} free; use spectral_density, top_eigenpairs or block(...)"
            )
        self.refresh()
        with torch.inference_mode(False), space.ranks.together("dense matrix"):
            matrix = torch.empty(self.shape, dtype=self.dtype, device=self.device)
            for first in range(0, self.size, chunk):
                last = min(first + chunk, self.size)
                rows = torch.zeros(last - first, self.size, dtype=self.dtype, device=self.device)
                rows[torch.arange(last - first), torch.arange(first, last)] = 1.0
                matrix[first:last] = space.gathered(self.apply(space.part(rows)))
        return matrix

    def to_scipy(self) -> LinearOperator:
        """The same matrix for :mod:`scipy.sparse.linalg`, with NumPy vectors on the CPU.

        Raises:
            ArgumentError: Each rank holds a part of every vector, which SciPy's arithmetic does not know.
        """
        if not self.space.whole:
            raise ArgumentError(
                "SciPy works on whole vectors, and of this operator's each rank holds a part: use spectral_density, "
                "top_eigenpairs or trace, or dense() for a small matrix"
            )

        def multiply(x: np.ndarray) -> np.ndarray:
            product = (self @ torch.from_numpy(np.ascontiguousarray(x))).cpu()
            return product.numpy() if product.dtype != torch.bfloat16 else product.float().numpy()

        dtype = np.dtype("float64" if self.dtype == torch.float64 else "float32")
        return LinearOperator(self.shape, matvec=multiply, matmat=multiply, rmatvec=multiply, dtype=dtype)


@dataclass(frozen=True)
class LinearMap:
    """Any symmetric operator as the algorithms see it: rows ``[k, local]`` in, rows ``[k, local]`` out.

    Attributes:
        size: Order ``P`` of the matrix.
        space: Where the vectors live, and how long they are here; whole in this process alone where it is not given.
        forms: ``v^T H v`` ``[k]`` of rows, where there is a cheaper way than a product.
    """

    apply: Callable[[Tensor], Tensor]
    size: int
    dtype: torch.dtype
    device: torch.device
    space: Space = None  # type: ignore[assignment]
    forms: Callable[[Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        if self.space is None:
            object.__setattr__(self, "space", WholeSpace(self.size))


def linear_map(op: Any) -> LinearMap:
    """The products of any square object with ``shape`` and ``@``.

    Takes a :class:`SymmetricOperator`, a dense tensor or NumPy array, a SciPy sparse matrix or
    ``LinearOperator``, or another library's operator. Objects of NumPy's world are fed NumPy arrays.

    Raises:
        ArgumentError: The object is not square or cannot be multiplied.
    """
    shape = getattr(op, "shape", None)
    if shape is None or len(shape) != 2 or shape[0] != shape[1]:
        raise ArgumentError(f"expected a square matrix or operator, got {type(op).__name__} of shape {shape}")
    size = int(shape[0])
    if isinstance(op, SymmetricOperator):
        op.refresh()
        return LinearMap(op.apply, size, op.dtype, op.device, op.space, op.forms)
    if isinstance(op, Tensor):
        if not op.dtype.is_floating_point:
            raise ArgumentError(f"a dense operator needs a real floating-point dtype, not {op.dtype}")
        matrix = op.detach()
        return LinearMap(lambda rows: rows @ matrix.T, size, matrix.dtype, matrix.device)
    if isinstance(op, np.ndarray | LinearOperator) or type(op).__module__.startswith("scipy."):
        dtype = torch.float32 if np.dtype(op.dtype or float) == np.float32 else torch.float64

        def through_numpy(rows: Tensor) -> Tensor:
            columns = np.ascontiguousarray(rows.numpy().T)
            return torch.from_numpy(np.ascontiguousarray(np.asarray(op @ columns).T)).to(dtype)

        return LinearMap(through_numpy, size, dtype, torch.device("cpu"))
    dtype = getattr(op, "dtype", None) or torch.get_default_dtype()
    if not isinstance(dtype, torch.dtype):
        dtype = torch.float32 if np.dtype(dtype) == np.float32 else torch.float64
    device = torch.device(getattr(op, "device", None) or "cpu")

    def foreign(rows: Tensor) -> Tensor:
        return torch.stack([torch.as_tensor(op @ row) for row in rows])

    return LinearMap(foreign, size, dtype, device)
