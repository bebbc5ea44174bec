"""The empirical risk at fixed weights: model, loss, data and the parameters of interest."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from curvdiag.criterion import CriterionLoss, FunctionLoss, Loss
from curvdiag.data import Batch, can_cut, place, read_batches, sample_count
from curvdiag.distributed import Group, Ranks, collectively, ranks_of
from curvdiag.distributed.sharded_gradient import ShardedGradient
from curvdiag.distributed.sharded_model import sharded_model
from curvdiag.errors import ArgumentError, DataError
from curvdiag.gradients import gradient
from curvdiag.inspection_of_objective import inspected
from curvdiag.parameters import Parameters, Selection
from curvdiag.portions import cut_batches, halves
from curvdiag.sandbox import Mode, sandbox, unwrap, with_tensors
from curvdiag.weights import Weights, same_on_all

if TYPE_CHECKING:
    from curvdiag.spectrum.forecast import MeasurementPlan


class Objective:
    """The mean loss of a model over fixed data, as a function of some of its parameters.

    The value is ``(1/N) sum_i w_i l_i`` over all ``N`` samples of all batches: ragged last batches count by
    their samples. Where the criterion's mean is not a plain mean (class weights, ``ignore_index``, padded
    tokens) sample ``i`` carries the weight ``w_i`` that makes it so, with mean 1.

    The objective looks at the live model; an operator made from it takes a picture of the weights.

    Args:
        model: Any module; ``torch.compile``, ``DataParallel`` and ``DistributedDataParallel`` are unwrapped.
        criterion: A module or function of ``(outputs, targets)``: a mean, or one loss per sample.
        data: One batch ``(inputs, targets)``, or a re-iterable of batches. A tensor, mapping or tuple is one
            batch; a DataLoader, list or other re-iterable holds batches; a list of two whose first element is
            a tensor is one batch. Batches are read once, here, and kept.
        params: Glob, list of globs, or predicate of ``(name, tensor)``; by default all that require gradients.
        mode: ``"eval"``, or ``"train"`` for curvature with BatchNorm's batch statistics.
        batch, batches: Say outright which of the two ``data`` is.
        keep_bytes: Most bytes of batches to keep; a quarter of the free memory by default.
        group: The processes that measure together, each with the same model and with ``data`` of its own: a process
            group, or ``"world"`` for all. All make the same calls, and get the same numbers: those of the data of all
            ranks, one rank's after the other's. By default this process measures alone. Of sharded weights (DTensors:
            ``fully_shard``, tensor parallelism) these are the ranks whose data differ, ``mesh["dp"].get_group()`` of a
            mesh of several dimensions; they are measured by ``Hessian(objective, method="finite-difference")`` alone.

    Attributes:
        size: ``N``, the number of samples, those of all ranks.
        total_weight: Sum of the samples' counts (tokens, class weights), ``N`` for a plain mean.
        ranks: The processes that measure together.
        local_size: Samples held by this process; ``size`` where it is alone.
        first_sample: Place of the first of them among all.
        notes: What was noticed about the data and the loss.

    Raises:
        DataError, LossError, ParameterError, NonFiniteError, NotDeterministicError, TooLargeError
        DistributedError: Another rank failed, or has another model.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Callable[..., Tensor],
        data: Any = None,
        *,
        params: Selection | None = None,
        mode: Mode = "eval",
        batch: Any = None,
        batches: Any = None,
        keep_bytes: int | None = None,
        group: Group = None,
    ) -> None:
        self.ranks = ranks_of(group)
        with self.ranks.together("making of an objective"):
            kept, notes = read_batches(data, batch=batch, batches=batches, pairs=True, keep_bytes=keep_bytes)
            self._set_up(model, CriterionLoss(criterion), kept, notes, params, mode)

    @classmethod
    def from_loss(
        cls,
        model: nn.Module,
        loss: Callable[[nn.Module, Any], Tensor],
        data: Any = None,
        *,
        weight: Callable[[Any], Tensor | float] | None = None,
        params: Selection | None = None,
        mode: Mode = "eval",
        batch: Any = None,
        batches: Any = None,
        keep_bytes: int | None = None,
        group: Group = None,
    ) -> Objective:
        """An objective from ``loss(model, batch)``, for everything that is not a criterion of outputs and targets.

        Args:
            loss: Returns losses ``[B]`` or ``[B, ...]`` (averaged over the trailing dimensions), or their mean. A
                mean serves curvature; what needs single samples refuses it.
            weight: ``weight(batch)`` gives each sample's count ``[B]`` (its tokens), or for a mean the count of
                the whole batch. By default every sample counts 1.
        """
        objective = cls.__new__(cls)
        objective.ranks = ranks_of(group)
        with objective.ranks.together("making of an objective"):
            kept, notes = read_batches(data, batch=batch, batches=batches, pairs=False, keep_bytes=keep_bytes)
            objective._set_up(model, FunctionLoss(loss, weight), kept, notes, params, mode)
        return objective

    @classmethod
    def from_huggingface(cls, model: nn.Module, batches: Any, **options: Any) -> Objective:
        """A Transformers model's own loss on collated batches (dicts with labels), a weight for each sequence.

        Options: ``label_smoothing``, ``params``, ``mode``, ``keep_bytes``, ``group``; see
        :func:`curvdiag.language_models.huggingface_objective`, which this is.
        """
        from curvdiag.language_models import huggingface_objective  # which builds on this class

        return huggingface_objective(model, batches, **options)

    def _set_up(
        self,
        model: nn.Module,
        loss: Loss,
        batches: list[Batch],
        notes: list[str],
        params: Selection | None,
        mode: Mode,
    ) -> None:
        if mode not in ("eval", "train"):
            raise ArgumentError(f"mode is 'eval' or 'train', not {mode!r}")
        self.model = unwrap(model)
        self.mode = mode
        self.shards = sharded_model(self.model, self.ranks)
        self.parameters = Parameters.of(self.model, params)
        self.batches = batches
        self._loss = loss
        self._moved_losses: dict[torch.dtype | None, Loss] = {}
        if not self.ranks.alone:
            self.ranks.agree("chosen parameters", self.parameters.in_short())
            self.ranks.agree("modes", mode)
        if self.shards is not None:
            self.shards.compare_data(batches)
        self._loss.learn(inspected(self))
        self.notes = tuple(notes + ([loss.note] if loss.note else []))
        self._count()

    def _count(self) -> None:
        weight = float(sum(self._loss.counts(batch).sum() for batch in self.batches))
        _ = self.ranks.neighbours  # asked for by all ranks here, so that it is known wherever one of them needs it
        told = self.ranks.gather((sum(map(sample_count, self.batches)), weight), "counting of samples")
        counts = [count for count, _ in told]
        self.size, self.total_weight = sum(counts), sum(weight for _, weight in told)
        self.local_size, self.first_sample = counts[self.ranks.rank], sum(counts[: self.ranks.rank])
        if not self.total_weight > 0:
            raise DataError("the weights of all samples add up to zero: every target is ignored or has class weight 0")

    @property
    def sharded(self) -> bool:
        """Whether the weights are spread over ranks (DTensors), each of which then holds a part of every vector."""
        return self.shards is not None

    @property
    def holders(self) -> Ranks:
        """The ranks that hold the weights, or the data, together."""
        return self.ranks if self.shards is None else self.shards.ranks

    @property
    def device(self) -> torch.device:
        if self.shards is not None:
            return self.shards.device
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The type of a flat vector: the widest among the chosen parameters."""
        return functools.reduce(torch.promote_types, {tensor.dtype for tensor in self._live})

    @property
    def _live(self) -> list[Tensor]:
        if self.shards is not None:
            return list(self.shards.live(self.parameters.names))
        found = dict(self.model.named_parameters(remove_duplicate=False))
        return [found[name] for name in self.parameters.names]

    @property
    def per_sample(self) -> bool:
        """Whether single samples have losses of their own that other samples do not touch."""
        return self._loss.per_sample and not self.couples_samples

    @property
    def couples_samples(self) -> bool:
        """Whether BatchNorm makes the samples of a batch depend on each other."""
        norms = (module for module in self.model.modules() if isinstance(module, _BatchNorm))
        return any(self.mode == "train" or norm.running_mean is None for norm in norms)

    @property
    def can_regroup(self) -> bool:
        """Whether batches may be merged and cut without changing the value."""
        return self.per_sample and all(can_cut(batch) for batch in self.batches)

    @collectively
    def weights(self, *, dtype: torch.dtype | None = None, share: bool = False) -> Weights:
        """A picture of the live model; with ``share`` its own memory, else copies (in ``dtype``).

        On several ranks it is the same on all: buffers, which training leaves different, are those of the first.

        Raises:
            ArgumentError: The weights are sharded.
            DistributedError: The ranks have different weights.
        """
        if self.shards is not None:
            raise self.shards.refuse_whole()
        picture = Weights.of(self.model, self.parameters.names, dtype=dtype, share=share)
        return picture if self.ranks.alone else same_on_all(picture, self.ranks)

    def inside(self, weights: Weights, function: Callable[[], Any], *, twice: bool) -> Any:
        """``function()`` in the sandbox, while the model holds ``weights``."""
        with sandbox(self.model, self.mode, self.device, twice=twice):
            return with_tensors(self.model, weights.tensors(), function)

    def totals(self, batch: Batch, dtype: torch.dtype | None = None) -> Tensor:
        """Per-sample totals ``[B]`` (or one for the batch), to be called :meth:`inside`.

        The objective is the sum of all totals over ``total_weight``.
        """
        return self._moved(dtype).totals(self.model, place(batch, self.device, dtype))

    def loss(self, dtype: torch.dtype | None = None) -> Loss:
        """What the loss is made of, with its own tensors on the model's device (and in ``dtype``)."""
        return self._moved(dtype)

    def with_loss(self, loss: Loss, batches: list[Batch]) -> Objective:
        """The same model, parameters and weights of samples, with another loss of other batches."""
        twin = copy.copy(self)
        twin._loss, twin._moved_losses, twin.batches = loss, {}, batches
        return twin

    def _moved(self, dtype: torch.dtype | None) -> Loss:
        if dtype not in self._moved_losses:
            self._moved_losses[dtype] = self._loss.to(self.device, dtype)
        return self._moved_losses[dtype]

    @collectively
    def value(self) -> float:
        """The empirical risk at the model's present weights."""
        if self.shards is not None:
            found = ShardedGradient(self, self.shards, self.batches)
            with found.borrowed():
                return found.value()

        def add_up() -> float:
            with torch.no_grad():
                return float(sum(self.totals(batch).double().sum() for batch in self.batches))

        own: float = self.inside(self.weights(), add_up, twice=False)
        return self.ranks.total(own, "loss") / self.total_weight

    @collectively
    def gradient(self) -> Tensor:
        """The gradient ``[P]`` at the model's present weights; of sharded ones, what this rank holds of it."""
        if self.shards is not None:
            return ShardedGradient(self, self.shards, self.batches).here()
        weights = self.weights()
        return self.ranks.sum("gradient", lambda: gradient(self, weights, self.batches))

    def split(self, seed: int = 0) -> tuple[Objective, Objective]:
        """Two objectives over disjoint random halves of the samples; the first takes the odd one.

        Raises:
            DataError: There is only one sample, or a batch cannot be cut by sample.
        """
        return halves(self, seed)

    @collectively
    def restricted_to(self, selection: Selection) -> Objective:
        """The same risk as a function of fewer parameters; the others stay as they are.

        Raises:
            ParameterError: The selection matches nothing.
        """
        block = copy.copy(self)
        block.parameters = self.parameters.subset(self.parameters.select(selection, self._live))
        self.ranks.agree("chosen parameters", block.parameters.in_short())
        block.__dict__.pop("_graph_bytes", None)  # the graphs of other parameters hold other things
        return block

    def micro_batches(self, micro_batch: int | None) -> Iterator[Batch]:
        """The batches, cut into pieces of at most ``micro_batch`` samples.

        Raises:
            LossError: They cannot be cut: BatchNorm couples their samples, or the loss gives only a mean.
        """
        return cut_batches(self, micro_batch)

    def first_bad_batch(self, weights: Weights, dtype: torch.dtype | None) -> str:
        """Where the loss stops being finite, in words."""

        def look() -> str:
            for index, batch in enumerate(self.batches):
                totals = self.totals(batch, dtype).detach()
                if not bool(torch.isfinite(totals).all()):
                    return f"the loss on batch {index} is {float(totals[~torch.isfinite(totals)].sum())}"
            return "the loss is finite and its gradient is not, summed over all batches"

        return self.inside(weights, look, twice=False)

    def plan(self, quantity: str = "density", **options: Any) -> MeasurementPlan:
        """What a density of this objective will take; :func:`curvdiag.spectrum.forecast.plan_density` has the options.

        ``print(objective.plan(steps=80, probes=4, deflate=10))`` shows vectors, graphs, time and bytes before anything
        of that size is made. It costs a few gradients of at most 32 samples.

        ``objective.plan(world_size=8)`` adds what each of 8 ranks would take, with all weights on every rank or with
        sharded ones (``sharded=False`` or ``True`` for only one of them): memory, traffic and time for a product. It
        needs no other process. Times are of ranks like this machine; ``hardware="H100"`` (or ``"A100"``, ``"H200"``)
        takes those of such GPUs in nodes of eight, ``flops=`` a second, ``bandwidth=`` in bytes a second and
        ``latency=`` in seconds what is known better. See ``docs/scale.md``.

        Raises:
            ArgumentError: Another quantity, or options that make no sense.
        """
        from curvdiag.spectrum.forecast import plan_density  # a room further on, entered only when asked

        if quantity != "density":
            raise ArgumentError(f"only a 'density' can be planned, not {quantity!r}; its products are most of the rest")
        return plan_density(self, **options)

    def why(self) -> str:
        """Why single samples cannot be told apart, and what to do about it."""
        if self.couples_samples:
            return "BatchNorm in train mode couples the samples of a batch; use mode='eval'"
        if not self._loss.per_sample:
            return self._loss.note
        return "its tensors do not all have the samples as first dimension"

    def __repr__(self) -> str:
        batches = f"{len(self.batches)} batch{'es' * (len(self.batches) > 1)}"
        samples = f"{self.size:,} samples in {batches}"
        if not self.ranks.alone:
            samples = f"{self.size:,} samples on {self.ranks.count} ranks, {self.local_size:,} in {batches} here"
        about = f"{samples}, {self.parameters.size:,} parameters, mode={self.mode!r}"
        return f"Objective({type(self.model).__name__}, {about})"
