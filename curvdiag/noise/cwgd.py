"""Curvature-weighted gradient diversity: gradient noise measured in units of the curvature."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch

from curvdiag.distributed import collectively
from curvdiag.errors import ArgumentError
from curvdiag.noise.cwgd_diagonal import diagonal_form
from curvdiag.noise.cwgd_full import full_form
from curvdiag.noise.cwgd_result import CWGD, DiagonalCWGD, FullCWGD, Negative
from curvdiag.noise.moments import GradientMoments, gradient_moments
from curvdiag.noise.signed_sums import hessian_of, require_present_weights, signed_sums
from curvdiag.objective import Objective
from curvdiag.operators.hessian import Hessian
from curvdiag.seeds import Seed, resolve_seed
from curvdiag.spectrum.lanczos import Progress
from curvdiag.spectrum.trace import diagonal

__all__ = ["CWGD", "DiagonalCWGD", "FullCWGD", "cwgd"]

# Sets of probes that the jackknife of the diagonal form leaves out in turn; each is a vector of size P in memory.
GROUPS = 10


@collectively
def cwgd(
    objective: Objective,
    form: Literal["full", "diagonal"] = "full",
    *,
    starts: int = 8,
    delta: float | None = None,
    steps: int = 32,
    max_steps: int = 512,
    probes: int = 20,
    floor: float | None = None,
    negative: Negative = "abs",
    seed: Seed = 0,
    hessian: Hessian | None = None,
    moments: GradientMoments | None = None,
    dtype: torch.dtype | None = None,
    memory: int | None = None,
    micro_batch: int | None = None,
    progress: Progress | None = None,
) -> CWGD:
    """``2 tr(H^-1 C)``, in one of two forms that stay finite where ``H`` is not positive definite.

    For positive definite ``H`` it is ``E ||H^(-1/2) (g_i - g_j)||^2`` over independent pairs of the probe set's
    samples (Hamza and Goel, arXiv:2606.30455). ``C`` is divided by ``N``.

    - ``"full"``: ``2 tr((|H| + delta)^-1 C)`` by Lanczos quadrature started at random-sign sums of the centred
      per-sample gradients, whose covariance is exactly ``C``. Its standard error is across the starts. It takes some
      hundreds to thousands of products, the more the smaller ``delta``.
    - ``"diagonal"``: ``2 sum_k sigma_k^2 / lambda_k`` as published, with Hutchinson's estimate of the diagonal of
      ``H``: as many products as probes. It tells the full form only where ``H`` is nearly diagonal, and what the
      noise of the probes does to it is in the result (``bias``, ``lost_share``). Its standard error is across the
      probes.

    Args:
        objective: Its losses must be known for each sample.
        form: See above.
        starts, delta, steps, max_steps: As in :func:`~curvdiag.noise.cwgd_full.full_form`.
        probes: Random signs of the diagonal form. The published ones are about 20.
        floor, negative: As in :func:`~curvdiag.noise.cwgd_diagonal.diagonal_form`; the paper names neither.
        seed: An integer, or a generator that advances.
        hessian: Of this objective; its graphs then serve ``H`` and ``C``. Made here if not given.
        moments: Those of this objective at these weights, where they are known already (the diagonal form).
        dtype, memory, micro_batch: As in :class:`~curvdiag.operators.Hessian`, where none is given.
        progress: Called with (products done, products planned) of each run.

    Returns:
        A :class:`FullCWGD` or :class:`DiagonalCWGD`.

    Raises:
        LossError: The loss gives only a mean, or BatchNorm in train mode couples the samples.
        ArgumentError: An argument is out of its range.
        StaleWeightsError: The Hessian is at other weights than the moments (the diagonal form).
        NonFiniteError: A product held NaN or infinite numbers.
    """
    if form not in ("full", "diagonal"):
        raise ArgumentError(f'the form of CWGD is "full" or "diagonal", not {form!r}')
    count = starts if form == "full" else probes
    if isinstance(count, bool) or int(count) != count or count < 1:
        raise ArgumentError(f"CWGD needs a positive number of random vectors, not {count!r}")
    operator = hessian_of(objective, hessian, dtype=dtype, memory=memory, micro_batch=micro_batch)
    if form == "full":
        sums = signed_sums(operator, starts, seed)
        return full_form(operator, sums, delta=delta, steps=steps, max_steps=max_steps, progress=progress)
    require_present_weights(operator)
    moments = moments or gradient_moments(objective, dtype=dtype)
    groups, sizes = _diagonals(operator, probes, seed, progress)
    variances = moments.diagonal.cpu().double().numpy()
    return diagonal_form(variances, groups, sizes, floor=floor, negative=negative)


def _diagonals(operator: Hessian, probes: int, seed: Seed, progress: Progress | None) -> tuple[np.ndarray, np.ndarray]:
    """Hutchinson's diagonal from disjoint sets of probes ``[G, P]``, and how many each has."""
    generator = torch.Generator().manual_seed(resolve_seed(seed) % 2**63)
    sizes = np.full(min(GROUPS, probes), probes // min(GROUPS, probes))
    sizes[: probes % len(sizes)] += 1
    narrow = np.float64 if operator.dtype == torch.float64 else np.float32
    rows = [diagonal(operator, int(size), generator, progress=progress).value.astype(narrow) for size in sizes]
    return np.stack(rows), sizes
