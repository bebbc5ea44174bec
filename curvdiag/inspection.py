"""What is found out about an objective when it is made: is its loss finite, deterministic, and a mean over what?"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from curvdiag.criterion import SUM_REMEDY, Loss
from curvdiag.data import Batch, can_cut, can_merge, merge, place, sample_count, take
from curvdiag.errors import CurvdiagError, LossError, NonFiniteError, NotDeterministicError
from curvdiag.sandbox import random_fingerprint


def inspect_loss(
    loss: Loss,
    model: nn.Module,
    batches: Sequence[Batch],
    device: torch.device,
    *,
    coupled: bool,
    several: bool = False,
) -> None:
    """Learn the loss from the first batch that counts, and compare it with itself there and with the others.

    To be called in the sandbox, with gradients off.

    Args:
        coupled: BatchNorm couples the samples of a batch, which therefore cannot be cut.
        several: Other processes hold further batches, so that it is enough if those count.

    Raises:
        NonFiniteError: The loss is NaN or infinite.
        NotDeterministicError: It differs between two passes.
        LossError: It is a sum, or a mean over something unknown.
    """
    index = next((i for i, batch in enumerate(batches) if loss.has_weight(batch)), None if several else 0)
    if index is None:
        return
    first = place(batches[index], device, None)
    before = random_fingerprint()
    one, totals = loss.inspect(model, first)
    drew = random_fingerprint() != before
    if not math.isfinite(one):
        raise NonFiniteError(
            f"the loss on batch {index} is {one}; there is no curvature at these weights: look for a learning "
            "rate that is too high, or for bad values in the batch"
        )
    repeated, note = (False, "") if totals is None or coupled else _compare_samples(loss, model, first, totals)
    if not repeated:
        value = loss.value(model, first)
        if not _equal(one, float(value), value.dtype):
            raise NotDeterministicError(
                f"the same weights and batch gave the losses {one:.8g} and {float(value):.8g}; {_blame(model, drew)}"
            )
    others = [i for i, batch in enumerate(batches) if i != index and loss.has_weight(batch)]
    for i in others:
        loss.confirm(model, place(batches[i], device, None))
    if coupled:
        return
    if loss.per_sample:
        if note:
            loss.per_sample, loss.note = False, note
        return
    unweighted = getattr(loss, "weight", None) is None
    if unweighted and not all(can_merge(batches[index], batches[i]) for i in others):
        apart = [i for i in others if not can_merge(batches[index], batches[i])]
        if not all(loss.counts_alike(batches[index], batches[i]) for i in apart):
            raise LossError(UNKNOWN_WEIGHTS)
    sample = others[:: max(1, len(others) // FEW)][:FEW]
    for i in [index, *sample]:
        _compare_means(loss, model, place(batches[i], device, None), several=several or bool(others))
    for i in sample if unweighted else []:
        if can_merge(batches[index], batches[i]):
            compare_batches(loss, model, first, place(batches[i], device, None))


FEW = 8
"""So many further batches, spread over the data, are compared with the first where a loss gives only a mean."""


def _compare_samples(loss: Loss, model: nn.Module, batch: Batch, whole: Tensor) -> tuple[bool, str]:
    """Compare the losses of samples, ``whole``, with those in both halves of the batch.

    Returns:
        Whether all was as before to rounding, which a loss that is not deterministic never is; and why the losses are
        to be used as one mean from then on, if they are.
    """
    if sample_count(batch) < 2 or not can_cut(batch):
        return False, ""
    try:
        apart = torch.cat([loss.totals(model, half) for half in _split(batch, sample_count(batch) // 2)])
    except (CurvdiagError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # the loss takes only batches of this size
        return False, f"the loss cannot be taken of half a batch ({type(error).__name__}: {error})"
    if apart.shape != whole.shape or not _close(apart, whole, whole):
        return False, "samples of a batch change each other's losses"
    return _equal(float(apart.double().sum()), float(whole.double().sum()), whole.dtype), ""


def _equal(one: float, other: float, dtype: torch.dtype) -> bool:
    """The same number, to rounding."""
    return abs(one - other) <= 100 * torch.finfo(dtype).eps * max(abs(one), abs(other))


def _compare_means(loss: Loss, model: nn.Module, batch: Batch, *, several: bool) -> None:
    """The mean over a batch is the mean over its parts, weighted as the loss says, and not their sum."""
    unweighted = several and getattr(loss, "weight", None) is None
    count = sample_count(batch)
    if not can_cut(batch) and unweighted:
        raise LossError(
            "the loss gives a mean, and the tensors of a batch have different first dimensions, so that nothing "
            "says how much each batch counts: give weight=, a function of the batch"
        )
    if count < 2 or not can_cut(batch):
        return
    mean = loss.value(model, batch)
    sums = []
    for cut in sorted({count // 2, 1}, reverse=True):  # a coincidence at one cut is none at another
        halves = _split(batch, cut)
        try:
            parts = torch.stack([loss.value(model, half) for half in halves])
        except (CurvdiagError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception:  # the loss takes only batches of this size
            return
        weights = torch.stack([loss.counts(half).sum() for half in halves]).to(parts)
        if _close((weights * parts).sum() / weights.sum(), mean, torch.cat([parts, mean[None]])):
            if cut > 1 or count <= 3:
                return
            continue
        sums.append(_close(parts.sum(), mean, parts))
    if sums and all(sums):
        raise LossError(f"the loss is a sum over samples: {SUM_REMEDY}")
    if sums and unweighted:
        raise LossError(UNKNOWN_WEIGHTS)


UNKNOWN_WEIGHTS = (
    "the loss gives one number for a batch, and that of two batches together is not the mean of theirs, weighted by "
    "samples (a mean over tokens? a contrastive loss?), so that nothing says how much each batch counts: give "
    "Objective.from_loss(..., weight=...), a function of the batch that gives its number of tokens, or of samples; or "
    "return one loss for each sample"
)


def compare_batches(loss: Loss, model: nn.Module, one: Batch, other: Batch) -> None:
    """Two batches together have the mean of both, weighted by their samples; padding alike within each hides there."""
    try:
        values = torch.stack([loss.value(model, batch) for batch in (one, other, merge([one, other]))])
        single = loss.value(model, take(one, slice(0, 1)))  # means that cancel to zero have no scale of their own
    except (CurvdiagError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception:  # the loss takes only batches of this size
        return
    weights = torch.stack([loss.counts(batch).sum() for batch in (one, other)]).to(values)
    if not _close((weights * values[:2]).sum() / weights.sum(), values[2], torch.cat([values, single[None]])):
        raise LossError(UNKNOWN_WEIGHTS)


def _split(batch: Batch, cut: int) -> tuple[Batch, Batch]:
    return take(batch, slice(0, cut)), take(batch, slice(cut, sample_count(batch)))


def _close(a: Tensor, b: Tensor, scale: Tensor) -> bool:
    tolerance = max(1e-3, 10 * torch.finfo(b.dtype).eps)
    return bool((a - b).abs().max() <= tolerance * scale.abs().max())


def _blame(model: nn.Module, drew: bool) -> str:
    active = [name or type(module).__name__ for name, module in model.named_modules() if _dropout(module) > 0]
    if active:
        return f"dropout is active in {', '.join(active[:5])}: measure with mode='eval'"
    if drew:
        return (
            "the forward pass draws random numbers: F.dropout without training=self.training, noise or "
            "augmentation inside the model or the loss; switch it off for the measurement"
        )
    return "the forward pass keeps a state of its own, or uses kernels that are not deterministic"


def _dropout(module: nn.Module) -> float:
    """The dropout probability of a module in train mode: a dropout layer's, or a recurrent or attention layer's own."""
    if not module.training:
        return 0.0
    rate = getattr(module, "p" if isinstance(module, nn.modules.dropout._DropoutNd) else "dropout", 0.0)
    return float(rate) if isinstance(rate, int | float) else 0.0
