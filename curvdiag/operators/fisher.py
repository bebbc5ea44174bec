"""The Fisher matrix of the distribution whose negative log-likelihood the criterion is."""

from __future__ import annotations

import functools
import math
import time
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from curvdiag.criterion import CriterionLoss
from curvdiag.data import Batch, place
from curvdiag.distributed import collectively
from curvdiag.errors import ArgumentError, LossError
from curvdiag.objective import Objective
from curvdiag.operators.base import Cost
from curvdiag.operators.graphs import GraphEngine
from curvdiag.operators.objective_operator import ObjectiveOperator
from curvdiag.operators.output_graph import OutputGraph
from curvdiag.operators.output_hessian import Criterion, Product, categorical, counted, fits, recognised, share
from curvdiag.seeds import Seed, resolve_seed, stream

LABELS = 2
"""The kind of random stream that labels are drawn from."""


class Fisher(ObjectiveOperator):
    """``F``: the mean over predicted labels of ``E[grad log p(y) grad log p(y)^T]``, with ``y`` drawn from the model.

    Cross-entropy is the negative log-likelihood of a categorical distribution at each position, binary cross-entropy
    with logits that of a Bernoulli distribution for each output, and ``MSELoss`` over ``c`` outputs that of normal
    distributions of variance ``c/2`` around them. The labels of the data are not used, except that positions with
    ``ignore_index`` count for nothing. With ``method="exact"`` the expectation is in closed form, and ``F`` equals
    :class:`GaussNewton`.

    With ``"monte-carlo"`` labels are drawn once, so that it is one positive semi-definite matrix and unbiased:
    ``E`` becomes a mean over ``draws``. One draw is one predicted label (a token, one of several outputs). Labels
    are independent given the inputs, so the products of gradients of different ones, whose mean is zero, are left out.
    They depend on the seed, the sample and the model alone, however the samples lie in batches.

    Args:
        objective: Its criterion is one of those three, without class weights, label smoothing or ``pos_weight``.
        method: How the expectation over labels is taken.
        draws: Labels drawn for each prediction; a product costs the same for any number.
        seed: An integer, or a generator that gives one.
        dtype, share, memory, micro_batch: As in :class:`~curvdiag.operators.Hessian`.

    Raises:
        LossError: The criterion is not the negative log-likelihood of a known distribution.

    Source: Martens, "New insights and perspectives on the natural gradient method", 2020, sections 5 and 9.
    """

    @collectively
    def __init__(
        self,
        objective: Objective,
        *,
        method: Literal["exact", "monte-carlo"] = "exact",
        draws: int = 1,
        seed: Seed = 0,
        dtype: torch.dtype | None = None,
        share: bool = False,
        memory: int | None = None,
        micro_batch: int | None = None,
    ) -> None:
        if method not in ("exact", "monte-carlo"):
            raise ArgumentError(f"method is 'exact' or 'monte-carlo', not {method!r}")
        if isinstance(draws, bool) or not isinstance(draws, int) or draws < 1:
            raise ArgumentError(f"draws is a number of labels for each prediction, at least 1, not {draws!r}")
        _refuse_other_criteria(objective)
        started = time.perf_counter()
        super().__init__(objective, dtype, share, memory)
        exact = method == "exact"
        source = objective if exact else _with_draws(objective, draws, resolve_seed(seed))
        build = functools.partial(OutputGraph, rule=_expected if exact else _sampled)
        self._engine = GraphEngine(source, self._weights, dtype, memory, micro_batch, build)
        self.method, self.draws = method, draws
        self.cost = Cost(0, self._engine.graphs_built, time.perf_counter() - started)

    def _multiply(self, rows: Tensor) -> Tensor:
        return self._engine.multiply(rows, self._positions)

    def __repr__(self) -> str:
        how = self.method if self.method == "exact" else f"{self.draws} drawn labels"
        return f"Fisher({self.size:,} parameters, {how}, {self.dtype}, {self.plan})"


def _refuse_other_criteria(objective: Objective) -> None:
    loss, known = objective.loss(), recognised(objective.loss())
    remedy = "use GaussNewton, which needs no distribution, or EmpiricalFisher"
    if not isinstance(loss, CriterionLoss):
        raise LossError(
            "an objective from_loss does not say of which distribution its loss is the negative log-likelihood: give "
            f"the criterion to Objective(model, criterion, data), or {remedy}"
        )
    if known is None:
        criterion = loss.criterion
        name = type(criterion).__name__ if isinstance(criterion, nn.Module) else getattr(criterion, "__name__", "it")
        raise LossError(
            f"the criterion ({name}) is not known as the negative log-likelihood of a distribution of labels, which "
            "cross-entropy, MSELoss and BCEWithLogitsLoss are (squared errors of probabilities, for one, belong to "
            f"none over classes), so that there is no Fisher matrix: {remedy}"
        )
    if known.weight is not None or known.pos_weight is not None:
        raise LossError(
            f"a loss with class weights is not a negative log-likelihood, and has no Fisher matrix: {remedy}"
        )
    if known.label_smoothing:
        raise LossError(f"a loss with label smoothing is not a negative log-likelihood of labels: {remedy}")


def _expected(objective: Objective, outputs: Tensor, batch: Batch, dtype: torch.dtype | None) -> Product:
    """The Fisher matrix of the distributions at given outputs, times a vector."""
    known, targets, scale = _distribution(objective, outputs, place(batch, objective.device, dtype)[1], dtype)
    if known.family == "categorical":
        return categorical(outputs, scale * counted(known, outputs, targets))
    if known.family == "gaussian":
        return lambda vector: 2 * scale * vector
    diagonal = scale * outputs.sigmoid() * (-outputs).sigmoid()
    return lambda vector: diagonal * vector


def _sampled(objective: Objective, outputs: Tensor, batch: Batch, dtype: torch.dtype | None) -> Product:
    """The same with drawn labels: a mean over them of the outer products of gradients in the outputs."""
    labels, numbers = place(batch, objective.device, dtype)[1]
    known, targets, scale = _distribution(objective, outputs, labels, dtype)
    uniform = (numbers.double() + 0.5) / 2**53
    if known.family == "gaussian":
        diagonal = 2 * scale * torch.special.ndtri(uniform).square().mean(1).to(outputs.dtype)
        return lambda vector: diagonal * vector
    if known.family == "bernoulli":
        chance = outputs.sigmoid()
        drawn = uniform < chance.double().unsqueeze(1)
        slopes = scale * (chance.unsqueeze(1) - drawn.to(outputs.dtype)).square().mean(1)
        return lambda vector: slopes * vector
    probabilities, drawn = outputs.softmax(1), _drawn_classes(outputs, uniform)
    strength = (scale * counted(known, outputs, targets) / drawn.shape[1]).unsqueeze(1)

    def product(vector: Tensor) -> Tensor:
        # (p - e_y) . v for each drawn label, and the sum of (p - e_y) times it.
        dots = (probabilities * vector).sum(1, keepdim=True) - vector.gather(1, drawn)
        total = probabilities * dots.sum(1, keepdim=True)
        return total.scatter_add_(1, drawn, -dots).mul_(strength)

    return product


def _drawn_classes(outputs: Tensor, uniform: Tensor) -> Tensor:
    """Labels ``[B, draws, ...]`` of logits ``[B, C, ...]``: where ``uniform`` falls among summed probabilities."""
    labels = torch.empty(uniform.shape, dtype=torch.int64, device=outputs.device)
    for sample, logits in enumerate(outputs):  # one at a time, for the sake of vocabularies
        summed = logits.double().softmax(0).cumsum(0).movedim(0, -1).contiguous()
        wanted = uniform[sample].movedim(0, -1).contiguous() * summed[..., -1:]
        found = torch.searchsorted(summed, wanted, right=True).clamp_max(len(logits) - 1)
        labels[sample] = found.movedim(-1, 0)
    return labels


def _distribution(
    objective: Objective, outputs: Tensor, targets: Tensor, dtype: torch.dtype | None
) -> tuple[Criterion, Tensor, float]:
    """The criterion, its targets, and the weight of one position in the objective."""
    loss = objective.loss(dtype)
    known = recognised(loss)
    if known is None or not fits(known, outputs, targets):
        raise LossError(
            f"targets of shape {tuple(targets.shape)} are not one for each prediction of outputs of shape "
            f"{tuple(outputs.shape)} (classes lie along dimension 1), so that nothing says what a label is"
        )
    return known, targets, share(objective, loss, known, targets)


class _Drawn(CriterionLoss):
    """A criterion whose targets come with random numbers ``[B, draws, ...]``, one for each label to be drawn."""

    def __init__(self, loss: CriterionLoss) -> None:
        vars(self).update(vars(loss))

    def totals(self, model: nn.Module, batch: Batch) -> Tensor:
        return super().totals(model, _plain(batch))

    def counts(self, batch: Batch) -> Tensor:
        return super().counts(_plain(batch))


def _plain(batch: Batch) -> Batch:
    inputs, targets = batch
    return (inputs, targets[0]) if isinstance(targets, tuple) else batch


def _with_draws(objective: Objective, draws: int, seed: int) -> Objective:
    """The objective with random numbers beside its targets, which are cut and merged with their samples."""
    loss = objective.loss()
    known = recognised(loss)
    assert isinstance(loss, CriterionLoss)
    assert known is not None
    batches, sample = [], objective.first_sample
    for inputs, targets in objective.batches:
        by_class = known.family == "categorical" and targets.dtype.is_floating_point
        shape = (draws, *targets.shape[2 if by_class else 1 :])
        numbers = [_numbers(seed, sample + i, shape) for i in range(len(targets))]
        sample += len(numbers)
        batches.append((inputs, (targets, torch.stack(numbers).to(targets.device))))
    return objective.with_loss(_Drawn(loss), batches)


def _numbers(seed: int, sample: int, shape: tuple[int, ...]) -> Tensor:
    """Integers below ``2**53``, which no change of precision touches."""
    raw = stream(seed, sample, LABELS).random_raw(math.prod(shape))
    return torch.from_numpy((raw >> np.uint64(11)).astype(np.int64)).reshape(shape)
