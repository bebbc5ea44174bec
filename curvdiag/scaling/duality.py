"""The activity-weight duality of a fully connected layer, and the noise covariance that it predicts.

Zhang, Yang and Tu, arXiv:2602.05600. The partner of a sample p is the nearest other sample of its class in the layer's
input space. To the layer's output its step ``da = a_partner - a_p`` equals the dual weight change

    dw_p = (W da) a_p^T / |a_p|^2,        (W + dw_p) a_p = W a_partner.

To first order the gradient at the changed weights differs by ``u_p = h_p dw_p = A_p (W da) a_p^T``. Two mini-batches of
B samples, the second holding the partners of the first, then have gradients that differ by the mean of ``u_p``, and
half the mean square of a difference is a covariance. Per sample, that is multiplied by B, this predicts:

- ``"whole"``: ``1/2 (1/B) E sum_pq u_p u_q^T = 1/2 E[u u^T] + (B-1)/2 E[u] E[u]^T``, over all pairs of drawn samples;
- ``"same-sample"``: its part with p = q, ``1/2 E[u u^T]``. The rest would vanish if being a partner were mutual;
- ``"decoupled"``: ``1/2 E_p[h_p S h_p]`` with ``S = E[dw dw^T]``, as if changes did not depend on ``h_p``;
- ``"isotropic"``: ``sigma_w^2 / 2 E[h_p^2]`` with ``sigma_w^2 = tr S / D``: the published relation;
- ``"pairs"``: ``1/2 E[(g_partner - g_p)(g_partner - g_p)^T]`` as measured. It shows what is lost by taking the nearest
  of the class: for partners drawn from all samples it would be C itself.

A dual change lies along its own ``a_p``, the one input that ``h_p`` looks at; isotropic changes share their size among
all of them. Where steps are unrelated to ``A_p`` and all inputs equally long, the isotropic part's trace is therefore
that of the same-sample part over the number of inputs. Shapes, not sizes, compare.
How the partners are paired into batches is our reading of the paper, whose own derivation could not be obtained.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from curvdiag.errors import ArgumentError, NonFiniteError, TooLargeError
from curvdiag.memory import free_bytes, human_bytes
from curvdiag.results import Result
from curvdiag.scaling.dual_changes import Changes, ChangeStatistics, FirstOrder
from curvdiag.scaling.kronecker import CHUNK, KroneckerLayer
from curvdiag.scaling.power_law import DirectionSamples


@dataclass(frozen=True)
class Prediction(Result):
    """One predicted covariance beside the measured C, both per sample.

    Attributes:
        trace_ratio: Its trace over ``tr C``.
        cosine: ``tr(prediction C)`` over both Frobenius norms; NaN without dense matrices.
        along: ``v_k^T prediction v_k`` ``[n]``; None without directions.
        exponent: Slope of ``log along`` in ``log v_k^T H v_k`` by least squares, where both are positive; else NaN.
    """

    trace_ratio: float
    cosine: float
    along: np.ndarray | None
    exponent: float


@dataclass(frozen=True)
class Duality(Result):
    """What the activity-weight duality says about the gradient noise of one layer.

    Attributes:
        predictions: By name, see the module: ``"whole"``, ``"same-sample"``, ``"decoupled"``, ``"isotropic"``,
            ``"pairs"``.
        first_order: How well first-order changes meet the true ones: ``"weight change"`` against the gradient at
            ``W + dw_p``, ``"partner"`` against the partner's gradient, and ``"partner with input"`` against it too,
            once the input in the outer product is the partner's as well.
        changes: How large and how isotropic the dual weight changes are.
        noise: ``v_k^T C v_k`` ``[n]`` on all samples; None without directions.
        curvature: ``v_k^T H v_k`` ``[n]`` likewise.
        noise_exponent: Slope of log noise in log curvature by least squares; NaN without directions.
        noise_trace: ``tr C``.
        batch_size: ``B`` of the whole prediction.
        size: ``D``, the number of weights.
        samples: Samples with a partner and an input that is not zero, over which predictions are averaged.
        without_partner: Samples left out since no other sample has their class.
        zero_inputs: Samples left out since their input is zero.
    """

    predictions: dict[str, Prediction]
    first_order: dict[str, FirstOrder]
    changes: ChangeStatistics
    noise: np.ndarray | None
    curvature: np.ndarray | None
    noise_exponent: float
    noise_trace: float
    batch_size: int
    size: int
    samples: int
    without_partner: int
    zero_inputs: int

    figure = "duality"

    def __str__(self) -> str:
        lines = [
            f"activity-weight duality, {self.samples:,} samples with partners, {self.size:,} weights: {self.changes}"
        ]
        for name, p in self.predictions.items():
            slope = "" if math.isnan(p.exponent) else f", exponent {p.exponent:.3f} (C {self.noise_exponent:.3f})"
            similar = "" if math.isnan(p.cosine) else f", cosine {p.cosine:.3f}"
            lines.append(f"  {name}: {p.trace_ratio:.3g} of tr C{similar}{slope}")
        lines += [f"  first order, {name}: {f}" for name, f in self.first_order.items()]
        if self.without_partner or self.zero_inputs:
            lines.append(f"  left out: {self.without_partner} without a partner, {self.zero_inputs} with zero input")
        return "\n".join(lines)


def activity_weight_duality(
    weight: Tensor,
    activations: Tensor,
    labels: Tensor,
    output_gradients: Tensor,
    output_hessians: Tensor,
    *,
    directions: Tensor | None = None,
    partners: Tensor | None = None,
    batch_size: int = 50,
    dense: bool = True,
    covariance: Tensor | None = None,
    along: DirectionSamples | None = None,
) -> Duality:
    """The dual weight changes of a layer ``z = W a`` and the covariances they predict, in float64.

    Beyond ``z`` the loss of samples of one class must be one and the same function of ``z``: no connection around the
    layer, no other input. A bias changes nothing.

    Args:
        weight: ``W`` ``[out, in]``.
        activations: ``a_p`` ``[N, in]``.
        labels: Classes ``[N]``.
        output_gradients: Derivatives of each sample's loss in ``z`` ``[N, out]``, ``g_p = delta_p a_p^T``.
        output_hessians: Second derivatives ``[N, out, out]``, ``h_p = A_p kron a_p a_p^T``.
        directions: Columns ``[D, n]`` in the layout of ``W.reshape(-1)`` along which everything is told too.
        partners: Index of the partner of each sample ``[N]``, -1 for none; nearest of its class by default.
        batch_size: ``B`` of the whole prediction; 1 makes it the same-sample part. The published MNIST runs have 50.
        dense: Build each ``D x D`` matrix, for the cosines; without it they are NaN.
        covariance: The layer's C ``[D, D]``, where it is known already.
        along: What the layer's samples do along the directions, where that is known already.

    Raises:
        ArgumentError: Shapes disagree, or no sample has a partner.
        NonFiniteError: An input holds NaN or infinite numbers.
        TooLargeError: The dense matrices do not fit into the free memory.
    """
    given = (weight, activations, output_gradients, output_hessians)
    w, a, delta, curved = (x.detach().double() for x in given)
    _check(w, a, labels, delta, curved, directions, batch_size)
    layer = KroneckerLayer(a, delta, curved)
    if dense:
        _check_memory(layer)
    changes = Changes.of(w, a, labels, delta, curved, partners)
    statistics = changes.statistics()
    mean = layer.gradient()
    trace = float((_squares(delta) * _squares(a)).mean() - mean @ mean)
    noise = curvature = None
    if directions is not None:
        along = along or layer.along(directions.double(), squares=False)
        noise, curvature = along.noise.numpy(), along.curvature.numpy()
    if dense and covariance is None:
        covariance = layer.covariance()

    def predict(moment: _Moment) -> Prediction:
        matrix = moment.matrix() if dense else None
        values = None if directions is None else moment.along(directions.to(a), matrix).cpu().numpy()
        similar = math.nan
        if matrix is not None and covariance is not None:
            similar = _ratio(float((matrix * covariance).sum()), float(matrix.norm() * covariance.norm()))
        return Prediction(_ratio(moment.trace(), trace), similar, values, _slope(values, curvature))

    predictions = {name: predict(moment) for name, moment in _moments(changes, statistics, batch_size).items()}
    return Duality(
        predictions=predictions,
        first_order=changes.first_order(),
        changes=statistics,
        noise=noise,
        curvature=curvature,
        noise_exponent=_slope(noise, curvature),
        noise_trace=trace,
        batch_size=batch_size,
        size=layer.size,
        samples=len(changes.inputs),
        without_partner=changes.without_partner,
        zero_inputs=changes.zero_inputs,
    )


@dataclass(frozen=True)
class _Moment:
    """``(1/n) sum_i F_i kron a_i a_i^T + m m^T``, or ``(1/2n) sum_i d_i d_i^T`` for the rows of ``changes``."""

    changes: Changes
    blocks: Tensor | None
    mean: Tensor | None = None

    @property
    def layer(self) -> KroneckerLayer:
        assert self.blocks is not None
        return KroneckerLayer(self.changes.inputs, self.changes.responses, self.blocks)

    def trace(self) -> float:
        if self.blocks is None:
            return float(self.changes.differences_squared().mean()) / 2
        own = (self.blocks.diagonal(dim1=1, dim2=2).sum(1) * _squares(self.changes.inputs)).mean()
        return float(own) + (0.0 if self.mean is None else float(self.mean @ self.mean))

    def matrix(self) -> Tensor:
        if self.blocks is not None:
            found = self.layer.hessian()
            return found if self.mean is None else found.addr_(self.mean, self.mean)
        size = self.changes.weights_count
        found = self.changes.inputs.new_zeros(size, size)
        for rows in self.changes.differences(max(1, CHUNK // size)):
            found.addmm_(rows.T, rows, alpha=0.5 / len(self.changes.inputs))
        return found

    def along(self, directions: Tensor, matrix: Tensor | None) -> Tensor:
        if matrix is not None:
            return ((matrix @ directions) * directions).sum(0)
        if self.blocks is not None:
            found = self.layer.along(directions, squares=False).curvatures.mean(0).to(directions)
            return found if self.mean is None else found + (self.mean @ directions).square()
        parts = self.changes.differences(max(1, CHUNK // self.changes.weights_count))
        return torch.stack([(rows @ directions).square().sum(0) for rows in parts]).sum(0) / (
            2 * len(self.changes.inputs)
        )


def _moments(changes: Changes, statistics: ChangeStatistics, batch_size: int) -> dict[str, _Moment]:
    hessians, lengths = changes.output_hessians, _squares(changes.inputs)[:, None, None]
    own = changes.responses[:, :, None] * changes.responses[:, None] / 2
    mean = (changes.responses.T @ changes.inputs).reshape(-1) / len(changes.inputs)
    scale = statistics.sigma_w_squared / 2
    return {
        "whole": _Moment(changes, own, mean * math.sqrt((batch_size - 1) / 2)),
        "same-sample": _Moment(changes, own),
        "decoupled": _Moment(changes, hessians @ changes.seen_by_inputs() @ hessians / 2),
        "isotropic": _Moment(changes, scale * lengths * (hessians @ hessians)),
        "pairs": _Moment(changes, None),
    }


def _slope(y: np.ndarray | None, x: np.ndarray | None) -> float:
    if y is None or x is None:
        return math.nan
    used = (x > 0) & (y > 0)
    if used.sum() < 2:
        return math.nan
    a, b = np.log(x[used]), np.log(y[used])
    a = a - a.mean()
    return _ratio(float(a @ b), float(a @ a))


def _squares(rows: Tensor) -> Tensor:
    return rows.square().sum(1)


def _ratio(above: float, below: float) -> float:
    return above / below if below > 0 else math.nan


def _check(
    w: Tensor, a: Tensor, labels: Tensor, delta: Tensor, curved: Tensor, directions: Tensor | None, batch_size: int
) -> None:
    n, (outputs, inputs) = len(a), w.shape if w.ndim == 2 else (-1, -1)
    expected = ((n, inputs), (n,), (n, outputs), (n, outputs, outputs))
    found = tuple(tuple(x.shape) for x in (a, labels, delta, curved))
    if found != expected:
        raise ArgumentError(
            f"for a weight of shape {tuple(w.shape)} activations, labels, output gradients and output Hessians have "
            f"the shapes {expected}, not {found}"
        )
    if directions is not None and (directions.ndim != 2 or len(directions) != w.numel()):
        raise ArgumentError(f"directions are columns [{w.numel()}, n], not of shape {tuple(directions.shape)}")
    if batch_size < 1:
        raise ArgumentError(f"batch_size is a number of samples, at least 1, not {batch_size}")
    if not all(bool(x.isfinite().all()) for x in (w, a, delta, curved)):
        raise NonFiniteError("the weights, activations or output derivatives of the layer hold NaN or infinite numbers")


def _check_memory(layer: KroneckerLayer) -> None:
    need, free = 5 * 8 * layer.size**2, free_bytes(layer.activations.device)
    if need > free:
        raise TooLargeError(
            f"dense covariances of {layer.size:,} weights need {human_bytes(need)}, more than the {human_bytes(free)} "
            "free; dense=False gives traces and what lies along directions without a matrix"
        )
