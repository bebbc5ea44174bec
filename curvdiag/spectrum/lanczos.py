"""Lockstep Lanczos: one product a step for several start vectors, and little else.

Each start vector ``z`` gets its own tridiagonal matrix T; the eigenvalues of T with the squared first
components of its eigenvectors are the Gauss quadrature of ``z^T f(H) z`` (Golub and Welsch 1969).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from scipy.linalg import eigh_tridiagonal
from torch import Tensor

from curvdiag.errors import ArgumentError, NonFiniteError, TooLargeError
from curvdiag.memory import free_bytes, human_bytes
from curvdiag.operators.base import LinearMap, linear_map
from curvdiag.space import Space
from curvdiag.spectrum.vectors import NON_FINITE, product, remove_components, working_dtype

if TYPE_CHECKING:
    from curvdiag.spectrum.projection import Projection

Reorthogonalize = Literal["none", "partial", "full"]
Progress = Callable[[int, int], object]
"""Called with (products done, products planned); what it raises ends the computation."""

# A new direction shorter than this many roundings of the largest coefficient so far is rounding itself.
BREAKDOWN = 8.0


class Position(NamedTuple):
    """Where a run stands: the last two vectors ``[k, P]`` and the numbers ``[k]`` that the next step needs."""

    previous: Tensor | None
    current: Tensor
    beta: Tensor
    scale: Tensor


@dataclass(frozen=True)
class Tridiagonal:
    """The tridiagonal matrices of ``k`` start vectors.

    Attributes:
        alphas: Diagonals ``[k, m]``, float64 on the CPU.
        betas: Off-diagonals ``[k, m]``; ``betas[:, m - 1]`` is the norm of the residual after the last step.
        norms: Lengths ``[k]`` of the start vectors.
        lengths: How many steps ``[k]`` each start vector took before its Krylov space was exhausted.
        basis: The Lanczos vectors ``[k, m, P]`` where the policy stored them, else ``None``.
        matvecs: Products made, with those of the run that this one goes on with.
        position: Where a resumable run stands, else ``None``.
    """

    alphas: np.ndarray
    betas: np.ndarray
    norms: np.ndarray
    lengths: np.ndarray
    basis: Tensor | None
    matvecs: int
    position: Position | None = None

    def quadrature(self) -> tuple[np.ndarray, np.ndarray]:
        """Nodes and weights ``[k, m]``, ascending along each row, the weights of a row adding up to 1.

        Rows that ended early are padded with their last node at weight 0.
        """
        nodes, weights = np.zeros_like(self.alphas), np.zeros_like(self.alphas)
        for i, n in enumerate(self.lengths):
            theta, vectors = eigh_tridiagonal(self.alphas[i, :n], self.betas[i, : n - 1])
            nodes[i, :n], nodes[i, n:] = theta, theta[-1]
            weights[i, :n] = vectors[0] ** 2 / np.sum(vectors[0] ** 2)
        return nodes, weights

    def only(self, i: int) -> Tridiagonal:
        """The run of start vector ``i`` alone, without its basis."""
        position = self.position
        if position is not None and len(self.norms) > 1:
            previous, *rest = (None if part is None else part[i : i + 1].clone() for part in position)
            position = Position(previous, *rest)  # type: ignore[arg-type]
        one = slice(i, i + 1)
        own = self.alphas[one], self.betas[one], self.norms[one], self.lengths[one]
        return Tridiagonal(*own, None, self.matvecs // len(self.norms), position)


def lanczos(
    op: Any,
    starts: Tensor | Tridiagonal,
    steps: int,
    *,
    reorthogonalize: Reorthogonalize = "none",
    progress: Progress | None = None,
    resumable: bool = False,
    projection: Projection | None = None,
) -> Tridiagonal:
    """Run Lanczos from each row of ``starts`` ``[k, P]``, in lockstep; rows ``[k, local]`` of a shared vector.

    The loop holds no data-dependent branch, so nothing waits for the device: a start vector whose Krylov space
    is exhausted goes on as a zero vector, and its tridiagonal matrix is cut at the end.

    Args:
        op: Any square object with ``shape`` and ``@``.
        starts: Start vectors, not zero; or a resumable run of this operator, which then goes on, the same to the last
            bit as if it had not stopped. Left unchanged.
        steps: Products for each start vector, those of a run that goes on among them; more than ``P`` are clipped to
            ``P``.
        reorthogonalize: ``"none"`` keeps three vectors for each start; a converged eigenvalue then appears as
            several copies that share its weight (Greenbaum 1989), so quadrature stays right. ``"partial"`` stores
            the basis and makes one Gram-Schmidt pass against it at each step; ``"full"`` makes two, which is
            orthogonal to rounding level whatever the spectrum (Giraud et al. 2005). Passes at some steps only
            are not offered: on a heavy-tailed spectrum in float32 orthogonality is lost between them.
        progress: Called after each step.
        resumable: Keep the last two vectors of each start, to go on from.
        projection: Keeps the new vectors out of a subspace at the steps when it is due, for start vectors outside it.

    Raises:
        ArgumentError: Wrong shapes or options, a zero start vector, or a run that cannot go on.
        NonFiniteError: A product held NaN or infinite numbers.
        TooLargeError: The stored basis does not fit into memory.
    """
    operator = op if isinstance(op, LinearMap) else linear_map(op)
    dtype = working_dtype(operator)
    space = operator.space
    if isinstance(starts, Tensor) and (starts.ndim != 2 or starts.shape[1] != space.local or not len(starts)):
        raise ArgumentError(f"start vectors are rows [k, {space.local}], not of shape {tuple(starts.shape)}")
    if isinstance(steps, bool) or int(steps) != steps or steps < 1:
        raise ArgumentError(f"Lanczos takes a positive number of steps, not {steps!r}")
    if reorthogonalize not in ("none", "partial", "full"):
        raise ArgumentError(f'reorthogonalize is "none", "partial" or "full", not {reorthogonalize!r}')
    if (resumable or isinstance(starts, Tridiagonal)) and reorthogonalize != "none":
        raise ArgumentError('a run goes on from its last two vectors: it takes reorthogonalize="none"')
    steps, k = min(int(steps), operator.size), len(starts.norms if isinstance(starts, Tridiagonal) else starts)
    basis = None if reorthogonalize == "none" else _allocate(k, steps, operator, dtype)
    run = Recurrence(starts if isinstance(starts, Tridiagonal) else starts.to(operator.device, dtype), space)
    del starts  # a caller that gave them away needs no room for them
    if run.done > steps:
        raise ArgumentError(
            f"this Lanczos run has taken {run.done} steps, more than the {steps} that it is to have taken"
        )
    if projection is not None:
        run.scale = run.scale.clamp(min=projection.scale)
    for j in range(run.done, steps):
        against: Callable[[Tensor], None] | None = None
        if projection is not None:
            against = projection.at(j)
        if basis is not None:
            basis[:, j] = run.current
            passes = 2 if reorthogonalize == "full" else 1
            against = functools.partial(_reorthogonalise, space, basis[:, : j + 1], passes, against)
        run.advance(product(operator, run.current), against)
        if progress is not None:
            progress((j + 1) * k, steps * k)
    return run.result(basis=basis, resumable=resumable)


class Recurrence:
    """Lockstep Lanczos under way: its caller makes the products, so that one loop can serve many matrices.

    Nothing here waits for the device before :meth:`coefficients` or :meth:`result`.

    Args:
        starts: Start vectors ``[k, local]``, or a resumable run, which goes on. Left unchanged.
        space: Of the matrix's vectors.

    Attributes:
        current: The vectors ``[k, local]`` to be multiplied next: of length 1, or zero where a Krylov space is
            exhausted.
        done: Steps taken.

    Raises:
        ArgumentError: The run kept no vectors to go on from, or is of another order.
    """

    def __init__(self, starts: Tensor | Tridiagonal, space: Space) -> None:
        self.space = space
        self.previous: Tensor | None = None
        if isinstance(starts, Tridiagonal):
            self.previous, self.current, self.beta, self.scale = _left_at(starts, space.local)
            self.norms = torch.from_numpy(starts.norms).to(self.beta)
            old = (list(torch.from_numpy(part.T.copy()).to(self.beta)) for part in (starts.alphas, starts.betas))
            self.alphas, self.betas = old
        else:
            self.current = starts.detach().clone(memory_format=torch.contiguous_format)
            self.norms = space.dots(self.current, self.current).sqrt()
            self.current.mul_((1 / self.norms).to(self.current.dtype)[:, None])
            self.beta = self.scale = torch.zeros_like(self.norms)
            self.alphas, self.betas = [], []
        self.finite = torch.ones_like(self.norms, dtype=torch.bool)

    @property
    def done(self) -> int:
        return len(self.alphas)

    def advance(self, fresh: Tensor, orthogonalise: Callable[[Tensor], None] | None = None) -> None:
        """Take one step with the products ``[k, local]`` of :attr:`current`, which are overwritten and kept.

        Args:
            orthogonalise: Called with the new directions, before their lengths are taken, to clean them in place.
        """
        dtype, current = fresh.dtype, self.current
        # Subtracting the older vector before taking the diagonal entry is the stable order (Paige 1972).
        if self.previous is not None:
            fresh.addcmul_(self.previous, self.beta.to(dtype)[:, None], value=-1)
        alpha = self.space.dots(current, fresh)
        fresh.addcmul_(current, alpha.to(dtype)[:, None], value=-1)
        if orthogonalise is not None:
            orthogonalise(fresh)
        beta = self.space.dots(fresh, fresh).sqrt()
        self.finite = self.finite & alpha.isfinite() & beta.isfinite()
        self.scale = torch.maximum(self.scale, torch.maximum(alpha.abs(), beta))
        alive = beta > BREAKDOWN * torch.finfo(dtype).eps * self.scale
        self.beta = torch.where(alive, beta, 0.0)
        self.alphas.append(alpha)
        self.betas.append(self.beta)
        fresh.mul_(torch.where(alive, 1 / self.beta, 0.0).to(dtype)[:, None])
        self.previous, self.current = current, fresh

    def coefficients(self) -> tuple[np.ndarray, np.ndarray]:
        """Diagonals and off-diagonals ``[k, m]`` so far; this waits for the device."""
        alphas, betas = (_on_host(torch.stack(part)).T for part in (self.alphas, self.betas))
        return alphas, betas

    def result(self, *, basis: Tensor | None = None, resumable: bool = False) -> Tridiagonal:
        """The tridiagonal matrices so far; this waits for the device.

        Raises:
            ArgumentError: A start vector was zero or not finite.
            NonFiniteError: A product was not finite.
        """
        if not bool((self.norms.isfinite() & (self.norms > 0)).all()):
            raise ArgumentError("a start vector of Lanczos is zero, or holds NaN or infinite numbers")
        if not bool(self.finite.all()):
            raise NonFiniteError(NON_FINITE)
        alphas, betas = self.coefficients()
        ended = betas == 0
        return Tridiagonal(
            alphas=alphas,
            betas=betas,
            norms=_on_host(self.norms),
            lengths=np.where(ended.any(axis=1), ended.argmax(axis=1) + 1, self.done),
            basis=basis,
            matvecs=self.done * len(self.norms),
            position=Position(self.previous, self.current, self.beta, self.scale) if resumable else None,
        )


def largest_weight(alphas: list[float], betas: list[float], point: float) -> float:
    """The most that an eigenvalue at ``point`` can weigh in the start vector of a Lanczos run, given its coefficients.

    With the run's orthonormal polynomials ``p_j`` and ``q = sum_j p_j(point) p_j``, the weight is at most the integral
    of ``q^2`` over ``q(point)^2``, which is ``1 / sum_j p_j(point)^2``: the Christoffel function (Akhiezer 1965, The
    Classical Moment Problem). Outside the Ritz values it falls with the distance from them, so what it says of a point
    there holds beyond.

    Args:
        alphas: Diagonal of the tridiagonal matrix ``[m]``.
        betas: Its off-diagonal, then the norm of the last residual ``[m]``, all positive.
        point: Where.
    """
    last, now, beta, total = 0.0, 1.0, 0.0, 1.0
    for alpha, following in zip(alphas, betas, strict=True):
        last, now, beta = now, ((point - alpha) * now - beta * last) / following, following
        total += now * now
    return 1 / total


def chance_of_hiding(weight: float, size: int) -> float:
    """How likely a random start vector ``[size]`` has no more than ``weight`` of its squared length along a direction.

    A component of a random unit vector is about normal with variance ``1 / size``. NaN where ``weight`` is.
    """
    return math.erf(math.sqrt(weight * size / 2))


def _left_at(run: Tridiagonal, length: int) -> Position:
    """Where a run with vectors of this length can go on from.

    Raises:
        ArgumentError: It cannot.
    """
    if run.position is None:
        raise ArgumentError("this Lanczos run kept no vectors to go on from: make it with resumable=True")
    own = run.position.current.shape[1]
    if own != length:
        raise ArgumentError(
            f"a Lanczos run with a matrix whose vectors hold {own} numbers cannot go on with one of another order, "
            f"whose vectors hold {length}"
        )
    return run.position


def _reorthogonalise(
    space: Space, basis: Tensor, passes: int, first: Callable[[Tensor], None] | None, fresh: Tensor
) -> None:
    if first is not None:
        first(fresh)
    for _ in range(passes):
        for vector, older in zip(fresh, basis, strict=True):
            remove_components(space, vector, older)


def _on_host(tensor: Tensor) -> np.ndarray:
    return tensor.cpu().numpy().astype(np.float64)


def _allocate(k: int, steps: int, operator: LinearMap, dtype: torch.dtype) -> Tensor:
    space, device = operator.space, operator.device
    need, free = k * steps * space.longest * dtype.itemsize, free_bytes(device)
    if space.fitting(free, need, device) < 1:
        free = space.fitting(free, 1, device)
        raise TooLargeError(
            f"a stored Lanczos basis of {k} x {steps} vectors of {space.longest:,} numbers needs "
            f'{human_bytes(need)}, more than the {human_bytes(free)} free; use reorthogonalize="none", '
            "fewer steps or fewer start vectors"
        )
    return torch.zeros(k, steps, space.local, dtype=dtype, device=device)
