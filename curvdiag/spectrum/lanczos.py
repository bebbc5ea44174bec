"""Lockstep Lanczos: one product a step for several start vectors, and little else.

Each start vector ``z`` gets its own tridiagonal matrix T; the eigenvalues of T with the squared first
components of its eigenvectors are the Gauss quadrature of ``z^T f(H) z`` (Golub and Welsch 1969).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from scipy.linalg import eigh_tridiagonal
from torch import Tensor

from curvdiag.errors import ArgumentError, NonFiniteError, TooLargeError
from curvdiag.memory import free_bytes, human_bytes
from curvdiag.operators.base import LinearMap, linear_map

Reorthogonalize = Literal["none", "partial", "full"]
Progress = Callable[[int, int], object]
"""Called with (products done, products planned); what it raises ends the computation."""

# A new direction shorter than this many roundings of the largest coefficient so far is rounding itself.
BREAKDOWN = 8.0
# On a CPU torch.dot of long float32 vectors has an error that grows with their length (about 1e-5 at 8e6 numbers,
# and vector_norm's square 5e-4); over pieces of this length it stays at rounding level.
PIECE = 1 << 18

NON_FINITE = (
    "a product of the operator with a finite vector holds NaN or infinite numbers; look at the loss, the weights "
    "and the gradient of the probe batch for NaN, infinity or overflow"
)


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


def lanczos(
    op: Any,
    starts: Tensor | Tridiagonal,
    steps: int,
    *,
    reorthogonalize: Reorthogonalize = "none",
    progress: Progress | None = None,
    resumable: bool = False,
) -> Tridiagonal:
    """Run Lanczos from each row of ``starts`` ``[k, P]``, in lockstep.

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

    Raises:
        ArgumentError: Wrong shapes or options, a zero start vector, or a run that cannot go on.
        NonFiniteError: A product held NaN or infinite numbers.
        TooLargeError: The stored basis does not fit into memory.
    """
    operator = op if isinstance(op, LinearMap) else linear_map(op)
    dtype = working_dtype(operator)
    if isinstance(starts, Tensor) and (starts.ndim != 2 or starts.shape[1] != operator.size or not len(starts)):
        raise ArgumentError(f"start vectors are rows [k, {operator.size}], not of shape {tuple(starts.shape)}")
    if isinstance(steps, bool) or int(steps) != steps or steps < 1:
        raise ArgumentError(f"Lanczos takes a positive number of steps, not {steps!r}")
    if reorthogonalize not in ("none", "partial", "full"):
        raise ArgumentError(f'reorthogonalize is "none", "partial" or "full", not {reorthogonalize!r}')
    if (resumable or isinstance(starts, Tridiagonal)) and reorthogonalize != "none":
        raise ArgumentError('a run goes on from its last two vectors: it takes reorthogonalize="none"')
    steps, k = min(int(steps), operator.size), len(starts.norms if isinstance(starts, Tridiagonal) else starts)
    basis = None if reorthogonalize == "none" else _allocate(k, steps, operator, dtype)

    previous: Tensor | None = None
    if isinstance(starts, Tridiagonal):
        done = starts.alphas.shape[1]
        previous, current, beta, scale = _left_at(starts, operator, steps)
        norms = torch.from_numpy(starts.norms).to(beta)
    else:
        done, current = 0, starts.detach().to(device=operator.device, dtype=dtype, copy=True).contiguous()
        norms = row_dots(current, current).sqrt()
        current.mul_((1 / norms).to(dtype)[:, None])
        beta = scale = torch.zeros_like(norms)
    alphas, betas = norms.new_zeros(steps, k), norms.new_zeros(steps, k)
    if isinstance(starts, Tridiagonal):
        alphas[:done], betas[:done] = (torch.from_numpy(old.T).to(norms) for old in (starts.alphas, starts.betas))
    finite = torch.ones_like(norms, dtype=torch.bool)

    for j in range(done, steps):
        fresh = product(operator, current)
        # Subtracting the older vector before taking the diagonal entry is the stable order (Paige 1972).
        if previous is not None:
            fresh.addcmul_(previous, beta.to(dtype)[:, None], value=-1)
        alpha = row_dots(current, fresh)
        fresh.addcmul_(current, alpha.to(dtype)[:, None], value=-1)
        if basis is not None:
            basis[:, j] = current
            for _ in range(2 if reorthogonalize == "full" else 1):
                for i in range(k):
                    remove_components(fresh[i], basis[i, : j + 1])
        beta = row_dots(fresh, fresh).sqrt()
        finite = finite & alpha.isfinite() & beta.isfinite()
        scale = torch.maximum(scale, torch.maximum(alpha.abs(), beta))
        alive = beta > BREAKDOWN * torch.finfo(dtype).eps * scale
        beta = torch.where(alive, beta, 0.0)
        alphas[j], betas[j] = alpha, beta
        fresh.mul_(torch.where(alive, 1 / beta, 0.0).to(dtype)[:, None])
        previous, current = current, fresh
        if progress is not None:
            progress((j + 1) * k, steps * k)

    if not bool((norms.isfinite() & (norms > 0)).all()):
        raise ArgumentError("a start vector of Lanczos is zero, or holds NaN or infinite numbers")
    if not bool(finite.all()):
        raise NonFiniteError(NON_FINITE)
    ended = (betas == 0).cpu().numpy()
    lengths = np.where(ended.any(axis=0), ended.argmax(axis=0) + 1, steps)
    return Tridiagonal(
        alphas=alphas.T.cpu().numpy().astype(np.float64),
        betas=betas.T.cpu().numpy().astype(np.float64),
        norms=norms.cpu().numpy().astype(np.float64),
        lengths=lengths,
        basis=basis,
        matvecs=steps * k,
        position=Position(previous, current, beta, scale) if resumable else None,
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


def working_dtype(operator: LinearMap) -> torch.dtype:
    """Vectors are never kept in less than single precision, whatever the operator computes in."""
    return operator.dtype if operator.dtype in (torch.float32, torch.float64) else torch.float32


def product(operator: LinearMap, rows: Tensor) -> Tensor:
    """``operator.apply(rows)`` as fresh contiguous rows that the caller may overwrite."""
    result = operator.apply(rows.to(operator.dtype)).detach()
    if result.shape != rows.shape:
        raise ArgumentError(
            f"the operator turns vectors of shape {tuple(rows.shape)} into {tuple(result.shape)}; "
            "a square operator keeps the shape"
        )
    result = result.to(device=rows.device, dtype=rows.dtype).contiguous()
    # An identity-like operator may hand its argument back.
    return result.clone() if result.data_ptr() == rows.data_ptr() else result


def row_dots(x: Tensor, y: Tensor) -> Tensor:
    """Inner products ``[k]`` of corresponding rows, without temporaries, added up in float64."""
    wide = torch.float32 if x.device.type == "mps" else torch.float64  # MPS has no float64
    piece = PIECE if x.device.type == "cpu" and x.dtype == torch.float32 else max(1, x.shape[1])
    return torch.stack([_dot(x[i], y[i], piece, wide) for i in range(len(x))])


def remove_components(vector: Tensor, basis: Tensor) -> Tensor:
    """Subtract from ``vector`` ``[P]``, in place, its components along the rows of ``basis``; returns them."""
    components = torch.mv(basis, vector)
    vector.addmv_(basis.T, components, alpha=-1)
    return components


def _dot(x: Tensor, y: Tensor, piece: int, wide: torch.dtype) -> Tensor:
    if len(x) <= piece:
        return torch.dot(x, y).to(wide)
    parts = [torch.dot(a, b) for a, b in zip(x.split(piece), y.split(piece), strict=True)]
    return torch.stack(parts).sum(dtype=wide)


def _left_at(run: Tridiagonal, operator: LinearMap, steps: int) -> Position:
    """Where a run can go on from, to ``steps`` in all.

    Raises:
        ArgumentError: It cannot.
    """
    if run.position is None:
        raise ArgumentError("this Lanczos run kept no vectors to go on from: make it with resumable=True")
    order, done = run.position.current.shape[1], run.alphas.shape[1]
    if order != operator.size:
        raise ArgumentError(f"a Lanczos run with a matrix of order {order} cannot go on with one of {operator.size}")
    if steps < done:
        raise ArgumentError(f"this Lanczos run has taken {done} steps, more than the {steps} that it is to have taken")
    return run.position


def _allocate(k: int, steps: int, operator: LinearMap, dtype: torch.dtype) -> Tensor:
    need, free = k * steps * operator.size * dtype.itemsize, free_bytes(operator.device)
    if need > free:
        raise TooLargeError(
            f"a stored Lanczos basis of {k} x {steps} vectors of {operator.size:,} numbers needs "
            f'{human_bytes(need)}, more than the {human_bytes(free)} free; use reorthogonalize="none", '
            "fewer steps or fewer start vectors"
        )
    return torch.zeros(k, steps, operator.size, dtype=dtype, device=operator.device)
