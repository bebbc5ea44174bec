"""Squared norms of gradients, piece by piece, without waiting for a device."""

from __future__ import annotations

import torch
from torch import Tensor

from curvdiag.spectrum.vectors import PIECE, row_dots, wide_dtype


class Squares:
    """The sum of squares of the numbers of tensors, in float64; nothing is read before it is asked for.

    One kernel for each tensor: hooks run between those of the backward pass.
    """

    def __init__(self) -> None:
        self._squares: list[Tensor] = []
        self._norms: list[Tensor] = []

    def add(self, tensor: Tensor) -> None:
        """Add a tensor: of any shape, dense or sparse, in any floating precision."""
        values = tensor.detach()
        values = values.coalesce().values() if values.is_sparse else values
        if values.device.type != "cpu":
            wide = torch.float64 if values.dtype == torch.float64 else torch.float32
            self._norms.append(torch.linalg.vector_norm(values, dtype=wide))
            return
        if values.ndim > 1 and not values.is_contiguous():  # linear layers' are transposed: in the order of memory,
            values = values.permute(sorted(range(values.ndim), key=values.stride, reverse=True))  # nothing is copied
        flat = values.reshape(-1)
        flat = flat if flat.dtype in (torch.float32, torch.float64) else flat.float()
        short = len(flat) <= PIECE or flat.dtype == torch.float64
        self._squares.append(torch.dot(flat, flat) if short else row_dots(flat[None], flat[None])[0])

    def total(self) -> Tensor | None:
        """The sum so far, a scalar tensor; None where nothing was added."""
        on_cpu, elsewhere = _sum(self._squares), _sum(self._norms, squared=True)
        if on_cpu is None or elsewhere is None:
            return elsewhere if on_cpu is None else on_cpu
        return elsewhere + on_cpu.to(elsewhere.device)


def _sum(scalars: list[Tensor], *, squared: bool = False) -> Tensor | None:
    """The sum of scalars of several types and devices, or of their squares; on the device of the first."""
    kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for scalar in scalars:
        kinds.setdefault((scalar.device, scalar.dtype), []).append(scalar)
    total: Tensor | None = None
    for (device, _), group in kinds.items():
        wide = torch.stack(group).to(wide_dtype(device))
        part = (wide.square() if squared else wide).sum()
        total = part if total is None else total + part.to(total.device)
    return total
