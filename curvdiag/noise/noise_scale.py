"""The gradient noise scale: the batch size at which the noise of a gradient is as large as the gradient.

McCandlish, Kaplan, Amodei and the OpenAI Dota team 2018, arXiv:1812.06162.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from curvdiag.distributed import collectively
from curvdiag.errors import ArgumentError, NonFiniteError
from curvdiag.estimate import Estimate
from curvdiag.modes import outside_modes
from curvdiag.noise.jackknife import jackknife
from curvdiag.noise.moments import GradientMoments, gradient_moments
from curvdiag.noise.sample_products import SampleProducts, sample_products
from curvdiag.noise.signed_sums import hessian_of, require_present_weights, signed_sums
from curvdiag.objective import Objective
from curvdiag.operators.base import linear_map
from curvdiag.operators.hessian import Hessian
from curvdiag.results import Result
from curvdiag.seeds import Seed
from curvdiag.spectrum.vectors import NON_FINITE, product, row_dots, working_dtype

# Share of g^T H g that may be noise of the mean gradient before a note says so.
MUCH = 0.1


class NoiseCurvature(NamedTuple):
    """``tr(H C)`` across random signs, ``g^T H g``, and the products with ``H`` that they took."""

    trace: Estimate
    gradient: float
    matvecs: int


@dataclass(frozen=True)
class NoiseScale(Result):
    """Noise scales of per-sample gradients, in samples.

    The estimates for the population have jackknife standard errors over the samples. What involves curvature is of
    the probe set as it is, with a standard error across the random signs that estimate ``tr(H C)``.

    Attributes:
        b_simple: ``tr(C) / ||g||^2`` of the population: ``tr C`` divided by ``N - 1``, and the noise that the mean of
            ``N`` samples carries taken off ``||g||^2``. NaN where nothing is left of it; ``notes`` says so.
        b_simple_probe: The same ratio of the probe set itself, exact there. Its ``||g||^2`` holds ``tr(C) / N`` of
            noise, so that pure noise gives about ``N``.
        trace: ``tr C`` of the population, without bias.
        gradient_square: ``||g||^2`` of the population, without bias; may be negative.
        probe_square: ``||g||^2`` of the probe set.
        b_noise: ``tr(H C) / (g^T H g)`` of the probe set; NaN where the curvature along the gradient is not positive,
            None where it was not asked for, as the next three.
        trace_hc: ``tr(H C)``, ``C`` divided by ``N``.
        gradient_curvature: ``g^T H g``, exact.
        matvecs: Products with ``H``.
        samples: ``N``.
        notes: What stands in the way of a number.
    """

    b_simple: Estimate
    b_simple_probe: Estimate
    trace: Estimate
    gradient_square: Estimate
    probe_square: float
    b_noise: Estimate | None
    trace_hc: Estimate | None
    gradient_curvature: float | None
    matvecs: int
    samples: int
    notes: tuple[str, ...] = ()

    figure = "estimate"

    @property
    def population_curvature(self) -> Estimate | None:
        """``g^T H g`` of the population, without bias, as :attr:`gradient_square`; may be negative.

        What the noise of the mean gradient of ``N`` samples adds, ``tr(H C) / (N - 1)`` with ``C`` divided by ``N``, is
        taken off. ``H`` is that of the probe set. None where curvature was not asked for.
        """
        if self.trace_hc is None or self.gradient_curvature is None:
            return None
        noise, others = self.trace_hc, self.samples - 1
        return Estimate(self.gradient_curvature - noise.value / others, noise.standard_error / others, noise.samples)

    def step(self, batch_size: float) -> Estimate:
        """The learning rate at which a step of SGD of this batch size gains most, in the quadratic model.

        ``||g||^2 / (g^T H g + tr(H C) / B)``, which is ``(||g||^2 / (g^T H g)) / (1 + B_noise / B)``. NaN where the
        denominator is not positive: the model then has no best step.

        Raises:
            ArgumentError: The scale was measured without curvature, or the batch size is not positive.
        """
        if self.trace_hc is None or self.gradient_curvature is None:
            raise ArgumentError("the best step needs curvature: noise_scale(..., curvature=True)")
        if not batch_size > 0:
            raise ArgumentError(f"a batch size is a positive number of samples, not {batch_size}")
        noise = self.trace_hc
        bottom = self.gradient_curvature + noise.value / batch_size
        if not bottom > 0:
            return Estimate(math.nan, math.nan, noise.samples)
        step = self.probe_square / bottom
        return Estimate(step, step / bottom * noise.standard_error / batch_size, noise.samples)

    def plot(self, ax: Any = None, **options: Any) -> Any:
        """Draw ``b_simple`` with its interval."""
        return self.b_simple.plot(ax, **{"label": "B_simple", **options})

    def __str__(self) -> str:
        lines = [
            f"Gradient noise of {self.samples:,} samples",
            f"  B_simple = tr C / |g|^2   {self.b_simple}",
            f"    of the probe set        {self.b_simple_probe}",
            f"    tr C                    {self.trace}",
            f"    |g|^2                   {self.gradient_square}",
        ]
        if self.gradient_curvature is not None:
            lines += [
                f"  B_noise = tr HC / gHg     {self.b_noise}",
                f"    tr HC                   {self.trace_hc}",
                f"    gHg                     {self.gradient_curvature:.6g}",
            ]
        return "\n".join(lines + [f"  note: {note}" for note in self.notes])


@outside_modes
@collectively
def noise_scale(
    objective: Objective,
    *,
    curvature: bool = False,
    starts: int = 32,
    seed: Seed = 0,
    hessian: Hessian | None = None,
    moments: GradientMoments | None = None,
    dtype: torch.dtype | None = None,
    memory: int | None = None,
    micro_batch: int | None = None,
) -> NoiseScale:
    """Noise scales at the model's present weights.

    ``B_simple`` costs about four gradients, and curvature two more for each start.

    Args:
        objective: Its losses must be known for each sample; at least three samples.
        curvature: Measure ``B_noise`` too.
        starts: Random-sign sums that estimate ``tr(H C)``; at least 3 for an interval.
        seed: Of the signs: an integer, or a generator that advances.
        hessian: Of this objective; its graphs then serve both. Made here if not given.
        moments: Those of this objective at these weights, where they are known already.
        dtype, memory, micro_batch: As in :class:`~curvdiag.operators.Hessian`, where none is given.

    Raises:
        LossError: The loss gives only a mean, or BatchNorm in train mode couples the samples.
        ArgumentError: Fewer than three samples, no start, the Hessian of another objective, or moments that are not of
            this objective at these weights.
        StaleWeightsError: The Hessian is at other weights than the model's present ones.
        NonFiniteError: A product held NaN or infinite numbers.
    """
    moments = moments or gradient_moments(objective, dtype=dtype)
    products = sample_products(objective, moments=moments, dtype=dtype, micro_batch=micro_batch)
    if not curvature:
        return simple_noise_scale(products)
    if isinstance(starts, bool) or int(starts) != starts or starts < 1:
        raise ArgumentError(f"tr(HC) needs at least one start, not {starts!r}")
    operator = hessian_of(objective, hessian, dtype=dtype, memory=memory, micro_batch=micro_batch)
    require_present_weights(operator)
    sums = signed_sums(operator, int(starts), seed)
    return simple_noise_scale(products, along_noise(operator, moments.mean, sums))


def simple_noise_scale(products: SampleProducts, curvature: NoiseCurvature | None = None) -> NoiseScale:
    """The scales from norms and products of per-sample gradients, and from curvature if there is any."""
    n, mean_square, trace = products.samples, products.mean_square, products.trace
    others_square, others_trace = products.without_each()
    unbiased_trace, others_unbiased = trace * n / (n - 1), others_trace * (n - 1) / (n - 2)
    square = mean_square - unbiased_trace / n
    others = others_square - others_unbiased / (n - 1)
    gradient_square = jackknife(square, others)
    notes = list(_curvature_notes(curvature, n))
    if square <= 0 or bool((others <= 0).any()):
        simple = Estimate(math.nan, math.nan, n)
        notes.append(
            f"|g|^2 cannot be told from its noise: {n:,} samples are too few against the noise scale of at least "
            f"{trace / mean_square if mean_square > 0 else math.inf:.3g}; measure on more"
        )
    else:
        simple = jackknife(unbiased_trace / square, others_unbiased / others)
        if square < 2 * gradient_square.standard_error:
            notes.append("|g|^2 is less than two standard errors from zero: B_simple is known from below only")
    if mean_square > 0:
        probe = jackknife(trace / mean_square, others_trace / others_square)
    else:
        probe = Estimate(math.inf, math.nan, n)
    return NoiseScale(
        simple,
        probe,
        jackknife(unbiased_trace, others_unbiased),
        gradient_square,
        mean_square,
        b_noise=None if curvature is None else noise_over_gradient(curvature),
        trace_hc=None if curvature is None else curvature.trace,
        gradient_curvature=None if curvature is None else curvature.gradient,
        matvecs=0 if curvature is None else curvature.matvecs,
        samples=n,
        notes=tuple(notes),
    )


def along_noise(op: Any, gradient: Tensor, sums: Tensor) -> NoiseCurvature:
    """``tr(H C)`` from rows ``sums`` ``[k, P]`` of covariance ``C``, and ``g^T H g`` for the gradient ``[P]``.

    ``E[b^T H b] = tr(H C)``. Hutchinson's ``z^T H C z`` costs a product more and varies no less: its variance holds
    ``tr(HCHC) + ||HC||_F^2`` where this one holds ``2 tr(HCHC)``.
    """
    operator = linear_map(op)
    rows = torch.cat([gradient.detach()[None].to(sums), sums])
    values = []
    for row in rows.to(operator.device, working_dtype(operator)).split(1):
        values.append(row_dots(row, product(operator, row)))
    found = torch.cat(values)
    if not bool(found.isfinite().all()):
        raise NonFiniteError(NON_FINITE)
    return NoiseCurvature(Estimate.from_samples(found[1:].cpu()), float(found[0]), len(rows))


def noise_over_gradient(curvature: NoiseCurvature) -> Estimate:
    """``B_noise`` from its parts; NaN where ``g^T H g`` is not positive."""
    if not curvature.gradient > 0:
        return Estimate(math.nan, math.nan, curvature.trace.samples)
    trace = curvature.trace
    return Estimate(trace.value / curvature.gradient, trace.standard_error / curvature.gradient, trace.samples)


def _curvature_notes(curvature: NoiseCurvature | None, n: int) -> list[str]:
    if curvature is None:
        return []
    if not curvature.gradient > 0:
        return [f"g^T H g = {curvature.gradient:.3g} is not positive: B_noise means nothing here"]
    share = curvature.trace.value / n / curvature.gradient
    if abs(share) > 1:
        added = f"adds about {curvature.trace.value / n:.3g} to g^T H g = {curvature.gradient:.3g}"
        return [f"the noise of the mean of {n:,} samples {added}: B_noise says nothing of the population"]
    if abs(share) > MUCH:
        return [f"about {share:.0%} of g^T H g is noise of the mean of {n:,} samples: B_noise is too small by as much"]
    return []
