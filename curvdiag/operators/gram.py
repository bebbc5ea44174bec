"""The whole nonzero spectrum of C from the matrix of products of centred per-sample gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from curvdiag.errors import ArgumentError, TooLargeError
from curvdiag.memory import free_bytes, human_bytes
from curvdiag.objective import Objective
from curvdiag.results import Result
from curvdiag.samples.factors import factors
from curvdiag.samples.streaming import require_samples, result_dtype, rows_from
from curvdiag.weights import Weights

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = 1 << 13
"""Entries of gradients that are taken to double precision at a time."""


@dataclass(frozen=True)
class Gram(Result):
    """Products of centred per-sample gradients, ``(g_i - g) . (g_j - g) / N``; with C's nonzero eigenvalues.

    Attributes:
        matrix: ``[N, N]``, float64, times the mini-batch scale.
        values: Its eigenvalues ``[N]``, descending. The smallest is zero, because the rows are centred. The others are
            those of C, which has ``size - N + 1`` zeros more, or where ``size < N`` fewer.
        size: P.
    """

    matrix: Tensor
    values: Tensor
    size: int

    figure = "spectra"

    def plot(self, ax: Axes | None = None, **options: Any) -> Axes:
        """Eigenvalues by rank."""
        from curvdiag import plotting

        return plotting.spectra({"C": self.values.cpu().numpy()}, ax=ax, **options)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and lists, without the matrix."""
        plain = super().to_dict()
        del plain["matrix"]
        return plain

    def __str__(self) -> str:
        largest = ", ".join(f"{value:.4g}" for value in self.values[:5].tolist())
        return f"{len(self.values)} eigenvalues of C ({self.size:,} parameters), largest {largest}"


def gram(
    objective: Objective,
    weights: Weights,
    dtype: torch.dtype | None,
    positions: Sequence[int],
    scale: float = 1.0,
    *,
    memory: int | None = None,
) -> Gram:
    """The Gram matrix at ``weights``, over the parameters at ``positions``.

    Gradients are in ``dtype``, products in double precision. Those of linear layers with one row a sample are outer
    products, and never made. Where all gradients do not fit into ``memory`` bytes
    (half of what is free), pairs of groups of samples are taken in turn, and the gradients made again.

    Raises:
        LossError: The loss gives only a mean, or BatchNorm in train mode couples the samples.
        TooLargeError: Not even the matrix fits.
        ArgumentError: The samples lie on several ranks.
    """
    require_samples(objective, "Gram matrices")
    if not objective.ranks.alone:
        raise ArgumentError(
            "the Gram matrix needs products of all pairs of samples, which lie on several ranks: use top_eigenpairs, "
            "spectral_density or trace, whose products with C are summed over the ranks, or an objective of all "
            "samples on one rank, without group="
        )
    count, size = objective.size, sum(weights.chosen[p].numel() for p in positions)
    room = free_bytes(objective.device) // 2 if memory is None else memory
    needed = 3 * 8 * count**2  # the matrix, its centred form and the eigenvalue solver's copy
    if needed > room:
        raise TooLargeError(
            f"the Gram matrix of {count:,} samples needs {human_bytes(needed)} and {human_bytes(room)} are free: "
            "measure on fewer samples, or take spectral_density or top_eigenpairs, which need no such matrix"
        )
    number = result_dtype(objective, dtype).itemsize
    found = factors(objective, weights, dtype, positions, (room - needed) // (4 * number))
    rest = [position for position in positions if position not in found]
    row = max(1, sum(weights.chosen[p].numel() for p in rest)) * number
    taken = number * count * sum(own.width for own in found.values())
    products = _products(objective, weights, dtype, rest, (room - needed - taken) // row)
    for own in found.values():
        products += own.products()
    # Centred twice: products with the mean gradient go from rows and from columns.
    products -= products.mean(0, keepdim=True)
    products -= products.mean(1, keepdim=True)
    matrix = (products + products.T).mul_(scale / (2 * count))
    return Gram(matrix, torch.linalg.eigvalsh(matrix).flip(0), size)


def _products(
    objective: Objective, weights: Weights, dtype: torch.dtype | None, positions: Sequence[int], rows: int
) -> Tensor:
    """``g_i . g_j`` ``[N, N]``, with at most ``rows`` gradients in memory."""
    count = objective.size
    out = torch.zeros(count, count, dtype=torch.float64, device=objective.device)
    # A share for the gradients that stay, one for those that pass, and one each for putting them together.
    piece = min(count, max(1, rows // 4))
    for start in range(0, count, piece) if positions else ():
        own: Tensor | None = None
        at = start
        for other in _from(objective, weights, dtype, positions, start, piece):
            own = other if own is None else own
            here, there = slice(start, start + len(own)), slice(at, at + len(other))
            product = _product(own, other)
            out[here, there] = product
            out[there, here] = product.T
            at += len(other)
    return out


def _from(
    objective: Objective, weights: Weights, dtype: torch.dtype | None, positions: Sequence[int], start: int, piece: int
) -> Iterator[Tensor]:
    """The gradients from sample ``start`` on, in pieces of as many rows; the last may have fewer."""
    held: list[Tensor] = []
    for part in rows_from(objective, weights, dtype, piece, positions, start):
        while len(part):
            room = piece - sum(map(len, held))
            held.append(part[:room])
            part = part[room:]
            if sum(map(len, held)) == piece:
                yield held[0] if len(held) == 1 else torch.cat(held)
                held = []
    if held:
        yield torch.cat(held)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right.T`` in double precision."""
    total = torch.zeros(len(left), len(right), dtype=torch.float64, device=left.device)
    for one, other in zip(left.split(COLUMNS, dim=1), right.split(COLUMNS, dim=1), strict=True):
        wide = one.double()
        total.addmm_(wide, (wide if left is right else other.double()).T)
    return total
