"""Randomised estimates of trace, diagonal and Frobenius norm.

In all of them ``probes`` counts products, so that methods compare at equal cost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from curvdiag.distributed import collectively
from curvdiag.errors import ArgumentError, NonFiniteError
from curvdiag.estimate import Estimate
from curvdiag.memory import free_bytes
from curvdiag.modes import outside_modes
from curvdiag.operators.base import LinearMap, linear_map
from curvdiag.seeds import Seed, resolve_seed
from curvdiag.spectrum.density import square_root
from curvdiag.spectrum.lanczos import Progress
from curvdiag.spectrum.range import all_finite, orthonormal_range, small
from curvdiag.spectrum.vectors import NON_FINITE, forms, product, working_dtype

# Vectors that go into one product: enough to share a graph among, few enough to hold.
GROUP = 8


@outside_modes
@collectively
def trace(
    op: Any,
    *,
    method: Literal["hutchinson", "hutch++", "xtrace"] = "hutchinson",
    probes: int = 24,
    seed: Seed = 0,
    progress: Progress | None = None,
) -> Estimate:
    """``tr(H)``, from ``probes`` products whatever the method.

    - ``"hutchinson"``: mean of ``z^T H z`` over random signs; the variance of one probe is
      ``2 sum_{i != j} H_ij^2``. Needs no memory beyond a few vectors.
    - ``"hutch++"`` (Meyer, Musco, Musco and Woodruff 2021): a third of the products finds a subspace, a third
      takes the trace there exactly, a third probes the rest; the standard error is that of the last third.
    - ``"xtrace"`` (Epperly, Tropp and Webber 2024): each of ``probes // 2`` test vectors in turn probes what the
      subspace of the others leaves; the standard error is the authors', across these estimates. They share most
      of their subspaces, so on a flat spectrum it is too small, the more the larger ``probes / P`` (by a fifth at
      36 / 60, where intervals of 95 % cover 87 %).

    The last two are exact where ``probes >= P``, at ``P`` products; they hold about ``probes`` vectors of size
    ``P``, and are far better where few eigenvalues dominate.

    Args:
        op: Any square symmetric object with ``shape`` and ``@``.
        method: See above.
        probes: Products to spend; Hutch++ needs 3, XTrace 4 (and an odd one over is not spent).
        seed: An integer, or a generator that advances.
        progress: Called with (products done, products planned).

    Raises:
        ArgumentError: An unknown method, or too few probes for it.
        NonFiniteError: A product held NaN or infinite numbers.
    """
    methods = {"hutchinson": (_hutchinson, 1), "hutch++": (_hutchpp, 3), "xtrace": (_xtrace, 4)}
    if method not in methods:
        raise ArgumentError(f'the method is "hutchinson", "hutch++" or "xtrace", not {method!r}')
    estimate, least = methods[method]
    run = _Products(op, _count(probes, least, f"the trace by {method}"), progress)
    if method != "hutchinson" and run.operator.size <= probes:
        return run.exact_trace()
    return estimate(run, probes, resolve_seed(seed))


@outside_modes
@collectively
def diagonal(op: Any, probes: int = 24, seed: Seed = 0, *, progress: Progress | None = None) -> Estimate:
    """The diagonal of ``H``: the mean of ``z * (H z)`` over random signs ``z`` (Bekas, Kokiopoulou and Saad 2007).

    The value and the standard error are NumPy float64 arrays ``[P]``; where the weights are sharded, what this rank
    holds of them, ``[local]``. One probe has the variance
    ``sum_{j != i} H_ij^2`` in entry ``i``: a diagonal matrix is exact from a single one.

    Raises:
        ArgumentError: ``probes`` is not positive.
        NonFiniteError: A product held NaN or infinite numbers.
    """
    run = _Products(op, _count(probes, 1, "the diagonal"), progress)
    mean = torch.zeros(run.space.local, dtype=torch.float64)
    squares = torch.zeros_like(mean)
    seen = 0
    for signs, images in run.rademacher(probes, resolve_seed(seed)):
        for sample in (signs * images).cpu().double():
            # Welford's update: no difference of large numbers.
            seen += 1
            shift = sample - mean
            mean += shift / seen
            squares += shift * (sample - mean)
    spread = squares / (seen - 1) / seen if seen > 1 else torch.full_like(squares, float("nan"))
    return Estimate(mean.numpy(), spread.sqrt().numpy(), seen)


@outside_modes
@collectively
def frobenius_norm(op: Any, probes: int = 24, seed: Seed = 0, *, progress: Progress | None = None) -> Estimate:
    """``||H||_F``: the root of the mean of ``||H z||^2`` over random signs; the root's error to first order.

    Raises:
        ArgumentError: ``probes`` is not positive.
        NonFiniteError: A product held NaN or infinite numbers.
    """
    run = _Products(op, _count(probes, 1, "the Frobenius norm"), progress)
    squares = [run.space.dots(images, images) for _, images in run.rademacher(probes, resolve_seed(seed))]
    return square_root(Estimate.from_samples(_finite(torch.cat(squares))))


class _Products:
    """Products with a few rows at a time, counted and checked."""

    def __init__(self, op: Any, planned: int, progress: Progress | None) -> None:
        self.operator: LinearMap = linear_map(op)
        self.space = self.operator.space
        self.planned, self.progress, self.done = planned, progress, 0
        vector, device = self.space.longest * self.dtype.itemsize, self.operator.device
        self.group = max(1, min(GROUP, self.space.fitting(free_bytes(device), 4 * vector, device)))

    @property
    def dtype(self) -> torch.dtype:
        return working_dtype(self.operator)

    def __call__(self, rows: Tensor) -> Tensor:
        return self._in_groups(product, rows)

    def forms(self, rows: Tensor) -> Tensor:
        """``v^T H v`` of each row, which counts as a product."""
        return self._in_groups(forms, rows)

    def _in_groups(self, function: Callable[[LinearMap, Tensor], Tensor], rows: Tensor) -> Tensor:
        parts = []
        for part in rows.split(self.group):
            parts.append(function(self.operator, part))
            self.done += len(part)
            if self.progress is not None:
                self.progress(self.done, self.planned)
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def exact_trace(self) -> Estimate:
        """The sum of the diagonal, one product for each entry."""
        op = self.operator
        self.planned = op.size
        unit = self.space.part(torch.eye(op.size, dtype=self.dtype, device=op.device))
        return Estimate.exact(float(_finite(self.forms(unit)).sum()))

    def groups(self, count: int, seed: int) -> Iterator[Tensor]:
        """Random signs ``[few, local]``, of which one group at a time is in memory."""
        for start in range(0, count, self.group):
            yield self.signs(min(self.group, count - start), seed, start)

    def rademacher(self, count: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Groups of random signs and their products, both ``[few, local]``."""
        for rows in self.groups(count, seed):
            images = self(rows)
            if not all_finite(self.space, images):
                raise NonFiniteError(NON_FINITE)
            yield rows, images

    def signs(self, count: int, seed: int, first: int = 0) -> Tensor:
        return self.space.rademacher(count, seed=seed, first=first, dtype=self.dtype, device=self.operator.device)


def _hutchinson(run: _Products, probes: int, seed: int) -> Estimate:
    samples = [run.forms(signs) for signs in run.groups(probes, seed)]
    return Estimate.from_samples(_finite(torch.cat(samples)))


def _hutchpp(run: _Products, probes: int, seed: int) -> Estimate:
    sketch, space = probes // 3, run.space
    basis, _, rank = orthonormal_range(space, run(run.signs(sketch, seed)))
    basis = basis[:rank]
    known = float(_finite(run.forms(basis)).sum()) if rank else 0.0
    rest = run.signs(probes - 2 * sketch, seed, sketch)
    # Twice, for rounding: what is left of the basis in the rest would count the large eigenvalues again.
    for _ in range(2):
        rest = rest - space.components(basis, rest) @ basis
    residual = Estimate.from_samples(_finite(run.forms(rest)))
    return Estimate(known + residual.value, residual.standard_error, residual.samples)


def _xtrace(run: _Products, probes: int, seed: int) -> Estimate:
    count, size, space = probes // 2, run.operator.size, run.space
    # Directions uniform on the sphere, as the normalisation below supposes.
    tests = space.gaussian(count, seed=seed, dtype=run.dtype, device=run.operator.device)
    tests *= (size**0.5 / space.dots(tests, tests).sqrt())[:, None].to(tests)
    basis, triangle, rank = orthonormal_range(space, run(tests))
    if rank == 0:
        return Estimate.from_samples(np.zeros(count))
    images = run(basis[:rank])
    q = basis[:rank]
    # From here on everything is small: [rank, rank] or [rank, count].
    inside = small(space.components(q, images))
    inside = (inside + inside.T) / 2
    tested = small(space.components(tests, q))
    out = _removed_directions(triangle)
    # Row i of what follows belongs to the subspace without test vector i.
    kept = tested - out * (out * tested).sum(0)
    trace_without = inside.trace() - (out * (inside @ out)).sum(0)
    quadratic = (tested * triangle).sum(0) - 2 * (kept * triangle).sum(0) + (kept * (inside @ kept)).sum(0)
    dimension = rank - out.square().sum(0)
    length = size - kept.square().sum(0)
    scale = torch.where(size - dimension > 0.5, (size - dimension) / length.clamp(min=1e-12 * size), 0.0)
    return Estimate.from_samples(_finite(trace_without + scale * quadratic))


def _removed_directions(triangle: Tensor) -> Tensor:
    """Unit vectors ``[rank, k]``: what the span of the columns of ``triangle`` loses without column i.

    Zero where it loses nothing, because the other columns span it too.
    """
    dual = torch.linalg.pinv(triangle).T
    # Column i is missed exactly where its dual vector sees it alone.
    own = (dual * triangle).sum(0)
    return torch.where(own > 1 - 1e-6, dual / dual.norm(dim=0).clamp(min=1e-300), 0.0)


def _finite(samples: Tensor) -> np.ndarray:
    if not bool(samples.isfinite().all()):
        raise NonFiniteError(NON_FINITE)
    return samples.cpu().double().numpy()


def _count(probes: int, least: int, what: str) -> int:
    if isinstance(probes, bool) or int(probes) != probes or probes < least:
        raise ArgumentError(f"{what} needs at least {least} probes, not {probes!r}")
    return int(probes)
