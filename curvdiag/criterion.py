"""What a loss is made of: one number and one weight for each sample, or only a mean over all of them.

For samples ``i`` with totals ``t_i`` and counts ``c_i`` the value on a batch is ``sum t_i / sum c_i``. A count is
1 for a plain mean, a sample's class weight, or its number of tokens that are not padding.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curvdiag.data import Batch, map_tensors, sample_count, tensors_of
from curvdiag.errors import LossError

SUM_REMEDY = (
    "the curvature of a sum is the batch size times that of the mean; use reduction='mean' "
    "(and multiply by the number of samples if the sum is what you want)"
)


Known = tuple[bool, str, bool]
"""Whether single samples can be told apart, why not, and whether they count by their labels."""


class CriterionLoss:
    """``criterion(model(inputs), targets)`` taken apart into samples.

    Attributes:
        per_sample: Whether single samples can be told apart; known after :meth:`inspect`.
        note: Why they cannot, in words.
    """

    def __init__(self, criterion: Callable[..., Tensor]) -> None:
        self.criterion = criterion
        self.per_sample = False
        self.note = ""
        self.unreduced: Callable[..., Tensor] | None = _with_reduction_none(criterion)
        self.labels = _class_settings(criterion)

    def to(self, device: torch.device, dtype: torch.dtype | None) -> CriterionLoss:
        """The same loss with the criterion's own tensors (class weights) moved."""
        twin = copy.copy(self)
        twin.criterion = _moved(self.criterion, device, dtype)
        twin.unreduced = _moved(self.unreduced, device, dtype) if self.unreduced is not None else None
        return twin

    def learn(self, seen: Any) -> None:
        """Take over what ``seen``, a moved copy, found out in :meth:`inspect`."""
        self.per_sample, self.note, self.labels = seen.per_sample, seen.note, seen.labels
        self.unreduced = self.criterion if seen.unreduced is seen.criterion else seen.unreduced and self.unreduced

    def known(self) -> Known:
        """What :meth:`inspect` has found out, for other processes."""
        return self.per_sample, self.note, self.labels is not None

    def adopt(self, known: Known) -> None:
        """Take over what another process found out about the same criterion."""
        self.per_sample, self.note, by_labels = known
        self.labels = self.labels if by_labels else None

    def value(self, model: nn.Module, batch: Batch) -> Tensor:
        """What the criterion itself returns, as a scalar."""
        return self._mean(call_model(model, batch[0]), batch)

    def has_weight(self, batch: Batch) -> bool:
        """Whether any sample of the batch counts; none does where every target is ignored."""
        return bool(self.counts_of(batch).sum() > 0)

    def counts_alike(self, one: Batch, other: Batch) -> bool:
        """Whether a sample of ``one`` has as many targets as a sample of ``other``."""
        return [t.shape[1:] for t in tensors_of(one[1])] == [t.shape[1:] for t in tensors_of(other[1])]

    def _mean(self, outputs: Any, batch: Batch) -> Tensor:
        result = self.criterion(outputs, batch[1])
        return result if result.ndim == 0 else _samples(result, sample_count(batch)).mean()

    def inspect(self, model: nn.Module, batch: Batch) -> tuple[float, Tensor | None]:
        """Find out from one batch whether samples can be told apart.

        Returns:
            The criterion's value there, and the totals of the samples if they can.
        """
        outputs, targets = call_model(model, batch[0]), batch[1]
        raw = self.criterion(outputs, targets)
        if not isinstance(raw, Tensor):
            raise LossError(f"the criterion returned {type(raw).__name__}, not a tensor")
        _refuse_integers(raw)
        if raw.ndim:
            self.per_sample, self.unreduced, self.labels = True, self.criterion, None
            return float(_samples(raw, sample_count(batch)).mean()), self._apart(raw, batch)
        if self.unreduced is None:
            _refuse_sum(self.criterion, outputs, targets, raw)
            self.note = "the criterion gives only a mean; return per-sample losses (reduction='none') instead"
            return float(raw), None
        self.per_sample = True
        self._confirm(raw, outputs, targets, batch)
        return float(raw), self._apart(self.unreduced(outputs, targets), batch) if self.per_sample else None

    def confirm(self, model: nn.Module, batch: Batch) -> None:
        """Look at another batch: one may hold padding or ignored labels where the first had none."""
        if self.per_sample and self.in_doubt:
            outputs = call_model(model, batch[0])
            self._confirm(self.criterion(outputs, batch[1]), outputs, batch[1], batch)

    @property
    def in_doubt(self) -> bool:
        """Whether the criterion is not one of PyTorch's own, whose means are known."""
        criterion: Any = self.criterion
        while isinstance(criterion, functools.partial):
            criterion = criterion.func
        home = (criterion if inspect.isfunction(criterion) else type(criterion)).__module__
        return self.unreduced is not self.criterion and not home.startswith("torch.nn.")

    def _confirm(self, mean: Tensor, outputs: Any, targets: Any, batch: Batch) -> None:
        if not self._is_mean_of_samples(mean, outputs, targets, batch):
            _refuse_sum(self.criterion, outputs, targets, mean)
            self.per_sample, self.unreduced, self.labels = False, None, None
            self.note = (
                "the criterion's mean is not that of its losses with reduction='none'; give the loss per sample with "
                "Objective.from_loss(..., weight=...)"
            )

    def _is_mean_of_samples(self, mean: Tensor, outputs: Any, targets: Any, batch: Batch) -> bool:
        assert self.unreduced is not None
        try:
            losses = self.unreduced(outputs, targets)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception:  # a criterion that has a reduction and does not know "none"
            return False
        if not isinstance(losses, Tensor) or losses.ndim == 0 or losses.shape[0] % sample_count(batch):
            return False
        totals, weight = self._apart(losses, batch), self.counts_of(batch).sum()
        tolerance = 100 * torch.finfo(mean.dtype).eps * float(totals.abs().sum() / weight)
        return not bool(torch.isfinite(mean)) or abs(float(totals.sum() / weight) - float(mean)) <= tolerance

    def totals(self, model: nn.Module, batch: Batch) -> Tensor:
        """``t_i`` as ``[B]``, or as a scalar where only the mean is known."""
        outputs = call_model(model, batch[0])
        if self.per_sample:
            assert self.unreduced is not None
            return self._apart(self.unreduced(outputs, batch[1]), batch)
        return self._mean(outputs, batch) * float(self.counts(batch))

    def counts(self, batch: Batch) -> Tensor:
        """``c_i`` as ``[B]``, or their sum as a scalar where only the mean is known; float64, on the CPU."""
        counts = self.counts_of(batch)
        return counts if self.per_sample else counts.sum()

    def counts_of(self, batch: Batch) -> Tensor:
        targets = batch[1]
        if self.labels is None or not isinstance(targets, Tensor) or targets.dtype.is_floating_point:
            return torch.ones(sample_count(batch), dtype=torch.float64)
        weight, ignore_index = self.labels
        kept = targets != ignore_index
        each = kept.double() if weight is None else weight.to(targets.device).double()[targets * kept] * kept
        return each.reshape(sample_count(batch), -1).sum(1).cpu()

    def _apart(self, losses: Tensor, batch: Batch) -> Tensor:
        count = sample_count(batch)
        by_class = isinstance(batch[1], Tensor) and not batch[1].dtype.is_floating_point
        if (self.labels is not None and by_class) or _reduction(self.criterion) == "batchmean":
            return losses.reshape(count, -1).sum(1)
        return _samples(losses, count)


class FunctionLoss:
    """``loss(model, batch)``, whatever it does inside."""

    def __init__(
        self, loss: Callable[[nn.Module, Any], Tensor], weight: Callable[[Any], Tensor | float] | None
    ) -> None:
        self.loss, self.weight = loss, weight
        self.per_sample = False
        self.note = ""

    def to(self, device: torch.device, dtype: torch.dtype | None) -> FunctionLoss:
        return self

    def learn(self, seen: Any) -> None:
        """Take over what ``seen``, a moved copy, found out in :meth:`inspect`."""
        self.per_sample, self.note = seen.per_sample, seen.note

    def known(self) -> Known:
        return self.per_sample, self.note, False

    def adopt(self, known: Known) -> None:
        self.per_sample, self.note, _ = known

    def confirm(self, model: nn.Module, batch: Batch) -> None:
        """Nothing: a function's shape and weights are checked when it is used."""

    def counts_alike(self, one: Batch, other: Batch) -> bool:
        """Whether a sample of ``one`` counts as much as a sample of ``other``: unknown where their shapes differ."""
        return False

    def value(self, model: nn.Module, batch: Batch) -> Tensor:
        """The mean over the batch, as a scalar."""
        raw = self.loss(model, batch)
        if raw.ndim == 0:
            return raw
        counts = self._weights(batch).to(raw.device, raw.dtype)
        return (_samples(raw, sample_count(batch)) * counts).sum() / counts.sum()

    def has_weight(self, batch: Batch) -> bool:
        """Whether any sample of the batch counts."""
        return bool(self._weights(batch).sum() > 0)

    def inspect(self, model: nn.Module, batch: Batch) -> tuple[float, Tensor | None]:
        """Find out from one batch whether samples can be told apart; as :meth:`CriterionLoss.inspect`."""
        raw = self.loss(model, batch)
        if not isinstance(raw, Tensor):
            raise LossError(f"loss(model, batch) returned {type(raw).__name__}, not a tensor")
        _refuse_integers(raw)
        self.per_sample = raw.ndim > 0
        if not self.per_sample:
            self.note = "loss(model, batch) gives only a mean; return one loss for each sample instead"
            return float(raw), None
        totals = self._apart(raw, batch)
        return float(totals.sum() / self._weights(batch).sum()), totals

    def totals(self, model: nn.Module, batch: Batch) -> Tensor:
        """``t_i`` as ``[B]``, or as a scalar where only the mean is known."""
        if not self.per_sample:
            return self.value(model, batch) * float(self.counts(batch))
        raw = self.loss(model, batch)
        if raw.ndim == 0:
            raise LossError("the loss was one for each sample on the first batch, and is a scalar on another")
        return self._apart(raw, batch)

    def _apart(self, raw: Tensor, batch: Batch) -> Tensor:
        return _samples(raw, sample_count(batch)) * self.counts(batch).to(raw.device, raw.dtype)

    def counts(self, batch: Batch) -> Tensor:
        """``c_i`` as ``[B]``, or their sum as a scalar where only the mean is known; float64, on the CPU."""
        counts = self._weights(batch)
        if not self.per_sample:
            return counts.sum()
        if counts.shape != (sample_count(batch),):
            raise LossError(
                f"weight(batch) must give one weight for each of {sample_count(batch)} samples, not shape "
                f"{tuple(counts.shape)}"
            )
        return counts

    def _weights(self, batch: Batch) -> Tensor:
        if self.weight is None:
            return torch.ones(sample_count(batch), dtype=torch.float64)
        return torch.as_tensor(self.weight(batch), dtype=torch.float64).detach().cpu()


Loss = CriterionLoss | FunctionLoss


def call_model(model: nn.Module, inputs: Any) -> Any:
    """``model(inputs)``, with a tuple or mapping of inputs unpacked into the model's arguments."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple | list) else model(inputs)


def _refuse_integers(loss: Tensor) -> None:
    if not loss.dtype.is_floating_point:
        raise LossError(f"the loss is {loss.dtype}; expected a real floating-point tensor")


def _samples(losses: Tensor, count: int) -> Tensor:
    """Per-sample means ``[B]`` of losses ``[B, ...]`` or ``[B * n, ...]``."""
    if losses.shape[0] % count:
        raise LossError(
            f"the loss has shape {tuple(losses.shape)} for a batch of {count} samples; expected a scalar mean, or a "
            f"first dimension of {count} or a multiple of it"
        )
    return losses.reshape(count, -1).mean(1)


def _with_reduction_none(criterion: Callable[..., Tensor]) -> Callable[..., Tensor] | None:
    """The criterion without its reduction where it has one by PyTorch's convention, else None."""
    reduction = _reduction(criterion)
    if reduction is None:
        return None
    if reduction == "sum":
        raise LossError(f"the criterion has reduction='sum': {SUM_REMEDY}")
    if not isinstance(criterion, nn.Module):
        return functools.partial(criterion, reduction="none")
    twin = copy.copy(criterion)
    twin.reduction = "none"  # type: ignore[assignment]
    return twin


def _reduction(criterion: Callable[..., Tensor]) -> str | None:
    """A module's ``reduction``, or a function's default for it."""
    if isinstance(criterion, nn.Module):
        reduction = getattr(criterion, "reduction", None)
        return reduction if isinstance(reduction, str) else None
    try:
        known = inspect.signature(criterion).parameters
    except (TypeError, ValueError):
        return None
    return str(known["reduction"].default) if "reduction" in known else None


def _class_settings(criterion: Callable[..., Tensor]) -> tuple[Tensor | None, int] | None:
    """Class weights and ignored label of a criterion over class labels; None for any other."""
    if isinstance(criterion, nn.CrossEntropyLoss | nn.NLLLoss):
        return criterion.weight, criterion.ignore_index
    keywords: dict[str, Any] = {}
    while isinstance(criterion, functools.partial):
        if criterion.args:
            return None
        keywords = {**criterion.keywords, **keywords}
        criterion = criterion.func
    if criterion in (F.cross_entropy, F.nll_loss):
        return keywords.get("weight"), keywords.get("ignore_index", -100)
    return None


def _refuse_sum(criterion: Callable[..., Tensor], outputs: Any, targets: Any, value: Tensor) -> None:
    """A sum doubles when each sample is given twice; a mean does not."""
    try:
        twice = criterion(*(map_tensors(lambda t: torch.cat([t, t]), part) for part in (outputs, targets)))
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception:  # a criterion that takes nothing but this batch cannot be asked
        return
    once, double = float(value), float(twice)
    if abs(once) > 0 and abs(double - 2 * once) < 1e-3 * abs(once):
        raise LossError(f"the criterion returns a sum over samples: {SUM_REMEDY}")


def _moved(criterion: Any, device: torch.device, dtype: torch.dtype | None) -> Any:
    if isinstance(criterion, nn.Module):
        own = [*criterion.parameters(), *criterion.buffers()]
        if all(t.device == device and (dtype is None or t.dtype == dtype) for t in own):
            return criterion
        return copy.deepcopy(criterion).to(device=device, dtype=dtype)
    if isinstance(criterion, functools.partial):

        def move(t: Tensor) -> Tensor:
            return t.to(device=device, dtype=dtype if t.dtype.is_floating_point else None)

        return functools.partial(criterion.func, *criterion.args, **map_tensors(move, criterion.keywords))
    return criterion
