"""Traces of two matrices and of their products, from the same probes, so that ratios of them carry their error."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from curvdiag.distributed import collectively
from curvdiag.errors import ArgumentError, NonFiniteError
from curvdiag.estimate import Estimate
from curvdiag.memory import free_bytes
from curvdiag.noise.jackknife import jackknife
from curvdiag.operators.base import LinearMap, linear_map
from curvdiag.seeds import Seed, resolve_seed
from curvdiag.spectrum.lanczos import Progress
from curvdiag.spectrum.vectors import NON_FINITE, product, working_dtype

# Vectors of size P that one probe needs at once: itself, Hz, Cz, CHz, HCz, and what a product takes.
VECTORS_A_PROBE = 8
GROUP = 8


@dataclass(frozen=True)
class JointTraces:
    """Samples of traces, each an array ``[probes]``; one exact number each where both matrices are dense.

    Attributes:
        h, c: ``tr H`` and ``tr C``.
        hh, cc: ``tr H^2`` and ``tr C^2``, the squared Frobenius norms.
        hc: ``tr(HC)``.
        commuted: ``||CH - HC||_F^2``; zeros where it was not asked for.
        exact: Whether there is no sampling error.
    """

    h: np.ndarray
    c: np.ndarray
    hh: np.ndarray
    cc: np.ndarray
    hc: np.ndarray
    commuted: np.ndarray
    exact: bool

    @property
    def table(self) -> np.ndarray:
        """All samples ``[6, probes]``, in the order of the attributes."""
        return np.stack([self.h, self.c, self.hh, self.cc, self.hc, self.commuted])

    def means(self) -> Means:
        return Means(*self.table.mean(axis=1).tolist())

    def estimate(self, function: Callable[[Means], float]) -> Estimate:
        """A function of the means, with its error by the jackknife over the probes."""
        value = function(self.means())
        if self.exact:
            return Estimate.exact(value)
        table, n = self.table, len(self.h)
        without = (table.sum(axis=1, keepdims=True) - table) / max(n - 1, 1)
        return jackknife(value, np.array([function(Means(*column)) for column in without.T.tolist()]))


class Means(NamedTuple):
    """The traces themselves, by the names of :class:`JointTraces`."""

    h: float
    c: float
    hh: float
    cc: float
    hc: float
    commuted: float


@collectively
def joint_traces(H: Any, C: Any, probes: int, seed: Seed, commuted: bool, progress: Progress | None) -> JointTraces:
    """Exact from two dense matrices; else from 4 products for each random-sign probe, 2 without the commutator.

    Raises:
        ArgumentError: The sizes differ, or there is no probe.
        NonFiniteError: A matrix or product held NaN or infinite numbers.
    """
    if tuple(H.shape) != tuple(C.shape):
        raise ArgumentError(f"H {tuple(H.shape)} and C {tuple(C.shape)} are not matrices over the same parameters")
    dense = isinstance(H, Tensor | np.ndarray) and isinstance(C, Tensor | np.ndarray)
    if dense:
        table = _dense_traces(H, C, commuted)
    elif isinstance(probes, bool) or int(probes) != probes or probes < 1:
        raise ArgumentError(f"a matrix-free estimate needs at least 1 probe, not {probes!r}")
    else:
        table = _probed_traces(linear_map(H), linear_map(C), int(probes), resolve_seed(seed), commuted, progress)
    if not all(np.isfinite(x).all() for x in table.values()):
        raise NonFiniteError(NON_FINITE)
    return JointTraces(**table, exact=dense)


def _dense_traces(H: Any, C: Any, commuted: bool) -> dict[str, np.ndarray]:
    for matrix in (H, C):
        linear_map(matrix)  # refuses what is not a square real matrix
    h = torch.as_tensor(H).detach().double()
    c = torch.as_tensor(C).detach().to(h)
    found = {"h": h.trace(), "c": c.trace(), "hh": h.square().sum(), "cc": c.square().sum(), "hc": (h * c).sum()}
    found["commuted"] = torch.zeros(())
    if commuted:
        image = c @ h
        found["commuted"] = (image - image.T).square().sum()  # HC is the transpose of CH
    return {name: np.array([float(x)]) for name, x in found.items()}


def _probed_traces(
    H: LinearMap, C: LinearMap, probes: int, seed: int, commuted: bool, progress: Progress | None
) -> dict[str, np.ndarray]:
    dtype = torch.promote_types(working_dtype(H), working_dtype(C))
    space = H.space
    need = VECTORS_A_PROBE * space.longest * dtype.itemsize
    room = space.fitting(free_bytes(H.device), 2 * need, H.device)
    group, each = max(1, min(GROUP, room)), 4 if commuted else 2
    parts: dict[str, list[Tensor]] = {}
    for first in range(0, probes, group):
        count = min(group, probes - first)
        z = space.rademacher(count, seed=seed, first=first, dtype=dtype, device=H.device)
        hz, cz = product(H, z), product(C, z.to(C.device)).to(z)
        found = {
            "h": space.dots(z, hz),
            "c": space.dots(z, cz),
            "hh": space.dots(hz, hz),
            "cc": space.dots(cz, cz),
            "hc": space.dots(hz, cz),
            "commuted": torch.zeros(count),
        }
        if commuted:
            difference = product(C, hz.to(C.device)).to(z) - product(H, cz)
            found["commuted"] = space.dots(difference, difference)
        for name, x in found.items():
            parts.setdefault(name, []).append(x.cpu())
        if progress is not None:
            progress(each * (first + count), each * probes)
    return {name: torch.cat(x).double().numpy() for name, x in parts.items()}
