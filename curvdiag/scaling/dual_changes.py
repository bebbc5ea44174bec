"""Partner samples of a fully connected layer, and the weight changes that equal the steps to them.

All in float64, by factors: ``dw_p = w_p a_p^T`` with ``w_p = W (a_partner - a_p) / |a_p|^2``. See
:mod:`curvdiag.scaling.duality`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from curvdiag.errors import ArgumentError
from curvdiag.results import Result
from curvdiag.scaling.kronecker import CHUNK, KroneckerLayer

# Up to this order all eigenvalues are computed: about half a minute on one core.
SPECTRUM_LIMIT = 5000


@dataclass(frozen=True)
class FirstOrder(Result):
    """How well predicted changes of the gradient meet the true ones, over all samples together.

    Attributes:
        error: Root of the summed squares of true less predicted, over those of the true ones.
        cosine: Summed inner products over the roots of both sums of squares.
    """

    error: float
    cosine: float

    def __str__(self) -> str:
        return f"relative error {self.error:.3g}, cosine {self.cosine:.3f}"


@dataclass(frozen=True)
class ChangeStatistics(Result):
    """The second moment ``S = E[dw dw^T]`` ``[D, D]`` of the dual weight changes.

    Attributes:
        sigma_w_squared: ``tr S / D``.
        participation: ``(tr S)^2 / (D tr S^2)``, 1 where S is isotropic, 1/D where it is of rank one.
        mean_share: ``|E[dw]|^2 / tr S``.
        spectrum: Eigenvalues of S, descending, without zeros that follow from fewer samples than weights; None where
            both exceed ``SPECTRUM_LIMIT``.
        top_shares: Share of ``tr S`` in the 1, 10 and 100 largest of them; empty without the spectrum.
    """

    sigma_w_squared: float
    participation: float
    mean_share: float
    spectrum: np.ndarray | None
    top_shares: dict[int, float]

    def __str__(self) -> str:
        shares = ", ".join(f"{100 * share:.3g} % in the top {k}" for k, share in self.top_shares.items())
        return (
            f"dual weight changes have variance {self.sigma_w_squared:.3g}, participation {self.participation:.3g} of D"
            + (f", {shares}" if shares else "")
        )


def nearest_partners(activations: Tensor, labels: Tensor) -> Tensor:
    """Index ``[N]`` of the nearest other sample of the same class by Euclidean distance; -1 where there is none.

    Of several equally near ones, as duplicates are, the first.
    """
    partners = torch.full_like(labels, -1, dtype=torch.long)
    for label in labels.unique():
        members = (labels == label).nonzero()[:, 0]
        if len(members) < 2:
            continue
        own = activations[members]
        step = max(1, CHUNK // len(members))
        for first in range(0, len(members), step):
            rows = own[first : first + step]
            # Not through inner products: near partners would be lost in rounding.
            distance = torch.cdist(rows, own, compute_mode="donot_use_mm_for_euclid_dist")
            here = torch.arange(len(rows), device=rows.device)
            distance[here, first + here] = math.inf
            partners[members[first : first + step]] = members[distance.argmin(1)]
    return partners


def dual_weight_changes(weight: Tensor, activations: Tensor, partners: Tensor) -> Tensor:
    """``dw_p = W (a_partner - a_p) a_p^T / |a_p|^2`` ``[N, out, in]``; ``(W + dw_p) a_p = W a_partner``.

    Args:
        weight: ``[out, in]``.
        activations: ``[N, in]``, none of them zero.
        partners: Indices ``[N]``, none of them -1.
    """
    factors = (activations[partners] - activations) @ weight.T / activations.square().sum(1, keepdim=True)
    return factors[:, :, None] * activations[:, None]


@dataclass(frozen=True)
class Changes:
    """The samples that have a dual weight change, ``n`` of them.

    Attributes:
        inputs: ``a_p`` ``[n, in]``.
        steps: ``a_partner - a_p`` ``[n, in]``.
        output_gradients: ``delta_p`` ``[n, out]``.
        partner_gradients: Those of the partners.
        output_hessians: ``A_p`` ``[n, out, out]``.
        factors: ``w_p`` ``[n, out]``, ``dw_p = w_p a_p^T``.
        responses: ``A_p W (a_partner - a_p)`` ``[n, out]``, ``h_p dw_p = response a_p^T``.
        without_partner, zero_inputs: How many samples were left out, and why.
    """

    inputs: Tensor
    steps: Tensor
    output_gradients: Tensor
    partner_gradients: Tensor
    output_hessians: Tensor
    factors: Tensor
    responses: Tensor
    without_partner: int
    zero_inputs: int

    @classmethod
    def of(
        cls, weight: Tensor, a: Tensor, labels: Tensor, delta: Tensor, curved: Tensor, partners: Tensor | None
    ) -> Changes:
        """From the layer's tensors; without ``partners`` the nearest ones.

        Raises:
            ArgumentError: The partners are not indices, or no sample is left.
        """
        if partners is None:
            partners = nearest_partners(a, labels.to(a.device))
        partners = partners.to(a.device)
        if partners.shape != (len(a),) or int(partners.min()) < -1 or int(partners.max()) >= len(a):
            raise ArgumentError(f"partners are {len(a)} indices of samples, or -1 for none")
        lengths = a.square().sum(1)
        alone, zero = partners < 0, lengths == 0
        used = (~alone & ~zero).nonzero()[:, 0]
        if not len(used):
            raise ArgumentError(
                f"none of {len(a)} samples has both another sample of its class ({int(alone.sum())} have none) and an "
                "input that is not zero; measure on more samples of fewer classes"
            )
        partner = partners[used]
        steps = a[partner] - a[used]
        moved = steps @ weight.T
        return cls(
            inputs=a[used],
            steps=steps,
            output_gradients=delta[used],
            partner_gradients=delta[partner],
            output_hessians=curved[used],
            factors=moved / lengths[used, None],
            responses=(curved[used] @ moved[:, :, None])[:, :, 0],
            without_partner=int(alone.sum()),
            zero_inputs=int((zero & ~alone).sum()),
        )

    @property
    def weights_count(self) -> int:
        return self.inputs.shape[1] * self.factors.shape[1]

    def statistics(self) -> ChangeStatistics:
        """How large and how isotropic the changes are."""
        n, size = len(self.inputs), self.weights_count
        total = float((_dots(self.factors, self.factors) * _dots(self.inputs, self.inputs)).mean())
        mean = float(((self.factors.T @ self.inputs) / n).square().sum())
        spectrum = self._spectrum() if min(n, size) <= SPECTRUM_LIMIT else None
        squares = self._square_trace() if spectrum is None else float(spectrum @ spectrum)
        shares = {}
        if spectrum is not None and total > 0:
            shares = {k: float(spectrum[:k].sum()) / total for k in (1, 10, 100) if k < size}
        return ChangeStatistics(
            total / size,
            total**2 / (size * squares) if squares > 0 else math.nan,
            mean / total if total > 0 else math.nan,
            spectrum,
            shares,
        )

    def first_order(self) -> dict[str, FirstOrder]:
        """First-order changes of the gradient against true ones, each a sum of two outer products."""
        turned = self.partner_gradients - self.output_gradients
        missed = turned - self.responses
        a, step, arrived = self.inputs, self.steps, self.inputs + self.steps
        nothing = torch.zeros_like(missed), a
        predicted = (self.responses, a), nothing
        with_input = (self.responses, a), (self.output_gradients + self.responses, step)
        true = (turned, a), (self.partner_gradients, step)
        return {
            "weight change": _first_order(((turned, a), nothing), predicted, ((missed, a), nothing)),
            "partner": _first_order(true, predicted, ((missed, a), (self.partner_gradients, step))),
            "partner with input": _first_order(true, with_input, ((missed, arrived), nothing)),
        }

    def differences(self, chunk: int) -> Iterator[Tensor]:
        """``g_partner - g_p`` in groups of rows ``[few, D]``."""
        turned = self.partner_gradients - self.output_gradients
        for first in range(0, len(self.inputs), chunk):
            part = slice(first, first + chunk)
            rows = turned[part, :, None] * self.inputs[part, None]
            rows += self.partner_gradients[part, :, None] * self.steps[part, None]
            yield rows.flatten(1)

    def differences_squared(self) -> Tensor:
        """``|g_partner - g_p|^2`` ``[n]``."""
        true = (self.partner_gradients - self.output_gradients, self.inputs), (self.partner_gradients, self.steps)
        return _inner(true, true)

    def seen_by_inputs(self) -> Tensor:
        """``(I kron a_p)^T S (I kron a_p)`` ``[n, out, out]``: what ``h_p = A_p kron a_p a_p^T`` sees of S."""
        n, inputs, outputs = len(self.inputs), self.inputs.shape[1], self.factors.shape[1]
        found = self.inputs.new_empty(n, outputs**2)
        by_inputs = n > inputs**2  # S itself, rearranged, is then less than all pairs of samples
        chunk = max(1, CHUNK // max(inputs**2 if by_inputs else n, outputs**2))
        parts = [slice(first, first + chunk) for first in range(0, n, chunk)]
        if by_inputs:
            moment = self.inputs.new_zeros(inputs**2, outputs**2)
            for part in parts:
                moment.addmm_(_outer(self.inputs[part]).T, _outer(self.factors[part]), alpha=1 / n)
            for part in parts:
                found[part] = _outer(self.inputs[part]) @ moment
        else:
            for part in parts:
                total = torch.zeros_like(found[part])
                for other in parts:
                    met = (self.inputs[part] @ self.inputs[other].T).square()
                    total.addmm_(met, _outer(self.factors[other]), alpha=1 / n)
                found[part] = total
        return found.reshape(n, outputs, outputs)

    def _spectrum(self) -> np.ndarray:
        n = len(self.inputs)
        if self.weights_count <= n:
            blocks = _outer(self.factors).reshape(n, self.factors.shape[1], -1)
            matrix = KroneckerLayer(self.inputs, self.factors, blocks).hessian()
        else:
            matrix = (self.factors @ self.factors.T) * (self.inputs @ self.inputs.T) / n
        return torch.linalg.eigvalsh(matrix).flip(0).clamp(min=0).cpu().numpy()

    def _square_trace(self) -> float:
        """``tr S^2``, the mean over pairs of samples of ``(dw_p . dw_q)^2``."""
        n, total = len(self.inputs), 0.0
        step = max(1, CHUNK // n)
        for first in range(0, n, step):
            part = slice(first, first + step)
            met = (self.factors[part] @ self.factors.T) * (self.inputs[part] @ self.inputs.T)
            total += float(met.square().sum())
        return total / n**2


Outer = tuple[Tensor, Tensor]
Sum = tuple[Outer, Outer]
"""``x a^T + y b^T`` for each sample, by its factors ``(x, a), (y, b)``."""


def _inner(left: Sum, right: Sum) -> Tensor:
    return torch.stack([_dots(x, y) * _dots(a, b) for x, a in left for y, b in right]).sum(0)


def _first_order(true: Sum, predicted: Sum, missed: Sum) -> FirstOrder:
    size, length = float(_inner(true, true).sum()), float(_inner(predicted, predicted).sum())
    error, both = float(_inner(missed, missed).sum()), float(_inner(true, predicted).sum())
    return FirstOrder(
        math.sqrt(max(error, 0.0) / size) if size > 0 else math.nan,
        both / math.sqrt(size * length) if size > 0 and length > 0 else math.nan,
    )


def _dots(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum(1)


def _outer(rows: Tensor) -> Tensor:
    return (rows[:, :, None] * rows[:, None]).flatten(1)
