"""The gradient noise scale of a run on several ranks, from the gradients that they average anyway."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any, Protocol, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from curvdiag.distributed import ranks_of
from curvdiag.errors import ArgumentError, CurvdiagWarning, DistributedError
from curvdiag.estimate import Estimate
from curvdiag.noise.backward_passes import BackwardPass, Hook
from curvdiag.noise.listeners import listen, several
from curvdiag.noise.rank_sums import WAYS, RankAccumulation, micro_batches, two_norms
from curvdiag.noise.running import RunningNoiseScale

# Steps whose sums stay on a GPU before they are read, unless somebody asks sooner.
KEPT = 100


class Scaler(Protocol):
    """``torch.amp.GradScaler``, as far as it is used: without waiting for the device."""

    def scale(self, outputs: Tensor) -> Tensor: ...


class RankNoiseScale:
    """``B_simple = tr(C) / |G|^2`` at each step of training under DDP or FSDP2, at no extra pass.

    Every rank makes one. The small batch is what one rank's backward pass sees, the large one is what all ranks
    average::

        model = DistributedDataParallel(net)  # or fully_shard(net)
        optimizer = torch.optim.AdamW(model.parameters())
        noise = RankNoiseScale(model, optimizer)  # the one line
        for batch in loader:
            loss(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
            monitor.record({"noise/scale_ranks": noise.value})  # if there is a CurvatureMonitor

    Squared norms are taken of each rank's own gradient in each backward pass, in front of the reduction, and of the
    mean behind it, before ``backward()`` returns: so before clipping, and before a ``GradScaler`` divides. One
    all-reduce of seven numbers goes with each reduction, and no number of the training changes. The small norm is the
    mean over all ranks and micro-batches, which is less noisy than one rank's. The estimate is
    :class:`~curvdiag.noise.running.RunningNoiseScale`'s, with its standard errors, and without bias as long as each
    rank draws its samples independently. Micro-batches and ranks may be of unequal sizes. All ranks hold the same
    value. A step has one backward pass for each micro-batch.

    Steps with infinite gradients are left out, as are those that a ``GradScaler`` skips, and all since DDP's ``join()``
    was first used. On a single rank only steps of several micro-batches count. What measurements do to the model is no
    part of it.

    Args:
        model: Wrapped in ``DistributedDataParallel``, or with ``fully_shard`` applied; compiled or not.
        optimizer: Whose steps are counted, and whose parameters; or several that step together.
        samples: In one backward pass on this rank: a number, or a function that is called at its end, or set the
            attribute before it. None takes the first dimension of the first tensor that goes into the model.
        decay: Of the averages; their memory is about ``1 / (1 - decay)`` steps.
        accumulation: What the losses were divided by before ``backward()``. ``"mean"``: mean losses by the number of
            micro-batches of the step, or by ``divisor``. ``"sum"``: mean losses by nothing. ``"samples"``: sums over
            samples by this rank's samples in the step. ``"global"``: sums over samples by all ranks' samples in the
            step, times the number of ranks, which undoes DDP's division: the exact mean over unequal ranks.
        divisor: For ``"mean"``, where it is not the number of micro-batches.
        scale: What the losses were multiplied by: a number, a function without arguments, or the ``GradScaler`` itself,
            which is asked without waiting for the device.

    The ranks' gradients have to be averaged: with ``set_gradient_divide_factor``, or a communication hook that does
    something else, the numbers are wrong. Under FSDP2 with ``MixedPrecisionPolicy(param_dtype=torch.bfloat16)`` the own
    gradients are those in bfloat16, before they are cast for the reduction; with ``reduce_dtype=torch.bfloat16`` the
    mean is what comes out of a reduction in bfloat16. Rounding them adds about ``1e-6`` of a squared norm, which is of
    no account unless ``B_simple`` is far below the batch. With FSDP2's ``CPUOffloadPolicy`` the gradients' copies to
    the CPU are waited for.

    Raises:
        ArgumentError: The model is not spread over ranks, a parameter of the optimizer is none of those that are
            averaged, or an argument is out of its range.
        DistributedError: The ranks give different arguments.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Iterable[Optimizer],
        samples: int | Callable[[], int] | None = None,
        *,
        decay: float = 0.99,
        accumulation: RankAccumulation = "mean",
        divisor: float | None = None,
        scale: float | Callable[[], float | Tensor] | Scaler = 1.0,
    ) -> None:
        if accumulation not in WAYS:
            raise ArgumentError(f"accumulation is one of {', '.join(WAYS)}, not {accumulation!r}")
        if divisor is not None and (accumulation != "mean" or not divisor > 0):
            raise ArgumentError('divisor is a positive number, and goes with accumulation="mean"')
        if isinstance(samples, int) and samples < 1:
            raise ArgumentError(f"a backward pass sees at least one sample, not {samples}")
        optimizers = several(optimizer)
        self.samples, self.scale = samples, scale
        self.accumulation, self.divisor = accumulation, divisor
        self._running = RunningNoiseScale(decay)
        self._told: set[str] = set()
        self._waiting: list[Tensor] = []
        self._forget()
        self._passes = listen(model, optimizers, self._heard)
        self._agree()
        for one in optimizers:
            self._passes.keep(one.register_step_pre_hook(Hook(self._step_begins)))
            self._passes.keep(one.register_step_post_hook(Hook(self._take)))

    # What was found

    @property
    def value(self) -> Estimate:
        """``B_simple`` in samples; NaN while the average of ``|G|^2`` is not positive."""
        return self._read().value

    @property
    def gradient_square(self) -> Estimate:
        """``|G|^2``, without bias; may be negative."""
        return self._read().gradient_square

    @property
    def trace(self) -> Estimate:
        """``tr C``, without bias; may be negative."""
        return self._read().trace

    @property
    def updates(self) -> int:
        """Steps that were used."""
        return self._read().updates

    @property
    def skipped(self) -> int:
        """Steps that told nothing."""
        return self._read().skipped

    @property
    def ranks(self) -> int:
        """Ranks whose gradients are averaged."""
        return self._passes.ranks

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, the same on all ranks."""
        return self._read().state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state, on all ranks, with its decay.

        Raises:
            ArgumentError: It is not the state of a noise scale.
        """
        self._running.load_state_dict(state)
        self._waiting.clear()
        self._forget()

    def close(self) -> None:
        """Remove all hooks; what was found stays."""
        self._read()
        self._passes.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"RankNoiseScale({self.value}, {self.updates} steps of {self.ranks} ranks)"

    def _agree(self) -> None:
        settings = (self._running.decay, self.accumulation, len(self._passes.parameters))
        try:
            for group in self._passes.groups:
                ranks_of(group).agree("noise scales (decay, accumulation, number of parameters)", settings)
        except DistributedError:
            self._passes.close()
            raise

    # What is heard

    def _forget(self) -> None:
        self._sizes: list[float] = []
        self._own: Tensor | None = None
        self._sums: Tensor | None = None  # of all ranks, after the last reduction of the step

    def _heard(self, one: BackwardPass) -> None:
        if one.fresh:
            if self._sums is not None:  # a GradScaler skipped the last step
                self._running.skipped += 1
            self._forget()
        size = self._size(one)
        unit = size if self.accumulation in ("samples", "global") else 1.0
        own = one.own / self._scale(one.own).square() / unit**2
        self._own = own if self._own is None else self._own + own
        self._sizes.append(size)
        if one.reduced is not None:
            self._sums = self._exchange(self._own, one.reduced)

    def _exchange(self, own: Tensor, reduced: Tensor) -> Tensor | None:
        """The sums of all ranks, on all of them: a row for :func:`two_norms`."""
        if self._passes.alone:
            self._tell("join", "steps under join() are left out of the noise scale: not all ranks take part in them")
            return None
        known = micro_batches(self._sizes, self.accumulation, self.divisor)
        sums = known.sums(self.ranks)
        reduced = reduced / self._scale(reduced).square()
        # Filled in by kernels: a copy from the host would wait for the device.
        parts = [own * known.divisor**2, *(torch.full_like(reduced, number) for number in sums), reduced]
        row = torch.stack(parts)
        for group in self._passes.groups:
            dist.all_reduce(row, group=group)
        return row

    def _step_begins(self, *_: Any) -> None:
        if self._sums is not None:  # else the backward pass may come in the closure
            self._take()

    def _take(self, *_: Any) -> None:
        """The optimizer steps: what was exchanged last is the step's."""
        if self._sums is not None:
            self._waiting.append(self._sums)
        elif self._sizes:
            self._running.skipped += 1
        self._forget()
        if self._waiting and (self._waiting[0].device.type == "cpu" or len(self._waiting) >= KEPT):
            self._read()

    def _read(self) -> RunningNoiseScale:
        """Wait for the device, and use the steps since the last time."""
        rows = torch.stack(self._waiting).tolist() if self._waiting else []
        self._waiting.clear()
        for row in rows:
            self._update(row)
        return self._running

    def _update(self, row: list[float]) -> None:
        norms = two_norms(row, self.accumulation, self.ranks)
        small, large = norms.small_batch, norms.large_batch
        if large > small * (1 + 1e-9) and not norms.large == 0 < norms.small:
            self._running.update(*norms)
            return
        self._running.skipped += 1
        if norms.large == 0 < norms.small:
            self._tell(
                "gone",
                "no gradient is left after the backward pass, as where optimizers step within it; such steps are left "
                "out of the noise scale",
            )
        elif large > 0:  # not NaN
            self._tell(
                "alone",
                "one rank with one micro-batch a step has only one batch size, which tells no noise scale: use several "
                "ranks or micro-batches, or noise_scale(objective), which measures it",
            )

    def _size(self, one: BackwardPass) -> float:
        """Samples of a pass; NaN where they are not known, which leaves the step out on all ranks."""
        given = self.samples
        size = float(given() if callable(given) else given) if given is not None else math.nan
        if given is None and one.lengths and len(set(one.lengths)) == 1:
            size = float(one.lengths[0])
        if size >= 1:
            return size
        self._tell(
            "samples",
            f"the number of samples of a backward pass is not known: samples={given!r}, and inputs of lengths "
            f"{list(one.lengths)} went into the model; such steps are left out of the noise scale on all ranks; give "
            "samples= as a number or a function",
        )
        return math.nan

    def _scale(self, like: Tensor) -> Tensor:
        one = torch.ones((), dtype=torch.float32, device=like.device)
        if hasattr(self.scale, "scale"):
            return self.scale.scale(one).to(like.dtype)
        scale = self.scale() if callable(self.scale) else self.scale
        return scale.detach().to(like.device, like.dtype) if isinstance(scale, Tensor) else one.to(like.dtype) * scale

    def _tell(self, kind: str, message: str) -> None:
        if kind not in self._told:
            self._told.add(kind)
            warnings.warn(message, CurvdiagWarning, stacklevel=2)
