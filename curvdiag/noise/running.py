"""The gradient noise scale of a training run, from gradient norms that the loop has anyway."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from curvdiag.errors import ArgumentError
from curvdiag.estimate import Estimate
from curvdiag.noise.squares import Squares

Accumulation = Literal["mean", "sum", "samples"]


class RunningNoiseScale:
    """``B_simple = tr(C) / |G|^2`` from the norms of a small and a large batch's gradient at each step.

    With ``E|G_B|^2 = |G|^2 + tr(C) / B`` two batch sizes give both without bias (McCandlish et al. 2018, appendix A).
    Each is averaged with exponential weights before the ratio is taken.

    With gradient accumulation, ``.grad`` after the first micro-batch is the small gradient and at the end the large
    one, so nothing is copied::

        noise = RunningNoiseScale()
        for micro_batch in micro_batches:
            (loss(model, micro_batch) / len(micro_batches)).backward()
            noise.observe(model, samples=len(micro_batch))
        noise.step()  # where the optimizer steps

    Under ``DistributedDataParallel`` and FSDP2, :class:`~curvdiag.noise.rank_noise_scale.RankNoiseScale` does all of
    this by itself. By hand: the small gradient is a rank's own, before it is averaged over the ranks, and the large one
    is the average. Under ``DistributedDataParallel`` with ``no_sync()`` on all micro-batches but the last, the loop
    above does it with ``noise.step(ranks=world_size)``.

    Args:
        decay: Of the averages; their memory is about ``1 / (1 - decay)`` steps.
        accumulation: What ``.grad`` holds after all micro-batches. ``"mean"``: the mean of their mean losses, each
            having been divided by their number. ``"sum"``: the sum of their mean losses. ``"samples"``: the sum of all
            samples' losses over their number. It cannot be told from the norms.
        divisor: The number that each loss was divided by, under ``"mean"``, where it is not the number of
            micro-batches of the step (the last step of an epoch may have fewer).

    Raises:
        ArgumentError: An argument is out of its range.
    """

    def __init__(self, decay: float = 0.99, *, accumulation: Accumulation = "mean", divisor: int | None = None) -> None:
        if not 0 <= decay < 1:
            raise ArgumentError(f"the decay lies between 0 and 1, not {decay}")
        if accumulation not in ("mean", "sum", "samples"):
            raise ArgumentError(f'accumulation is "mean", "sum" or "samples", not {accumulation!r}')
        if divisor is not None and (accumulation != "mean" or divisor < 1):
            raise ArgumentError('divisor is a positive number, and goes with accumulation="mean"')
        self.decay, self.accumulation, self.divisor = decay, accumulation, divisor
        self.updates = 0
        self.skipped = 0
        self._weight = self._weight_squares = 0.0
        # Weighted means of (|G|^2, tr C), and weighted sums of squared deviations and of their product.
        self._means = [0.0, 0.0]
        self._spread = [0.0, 0.0, 0.0]
        self._clear()

    def _clear(self) -> None:
        self._sizes: list[int] = []
        self._first: Tensor | None = None
        self._last: Tensor | None = None

    def observe(
        self, parameters: nn.Module | Tensor | Iterable[Tensor], samples: int, *, scale: float | Tensor = 1.0
    ) -> None:
        """Read ``||.grad||^2`` after a micro-batch's backward pass; waits for no device.

        Args:
            parameters: A model, or parameters. Sharded ones would give the norm of one shard; use :meth:`update`.
            samples: Of this micro-batch.
            scale: What the loss was multiplied by: ``scaler.get_scale()`` with a ``GradScaler``.
        """
        if samples < 1:
            raise ArgumentError(f"a micro-batch holds at least one sample, not {samples}")
        square = _grad_square(parameters) / torch.as_tensor(scale, dtype=torch.float64).square()
        if self._first is None:
            self._first = square
        self._last = square
        self._sizes.append(int(samples))

    def step(self, ranks: int = 1) -> None:
        """Use what was observed since the last step.

        One micro-batch on one rank is one batch size, which tells nothing: such a step is skipped.

        Args:
            ranks: How many ranks the last backward pass averaged over; each with as many samples as this one.
        """
        sizes, first, last = self._sizes, self._first, self._last
        self._clear()
        if first is None or last is None or (len(sizes) == 1 and ranks == 1):
            self.skipped += 1
            return
        count, total = len(sizes), sum(sizes)
        if self.accumulation == "samples":
            small, large, big = (total / sizes[0]) ** 2, 1.0, float(total)
        else:
            # The mean of means of unequal batches is as noisy as one batch of this size.
            big = count**2 / sum(1 / size for size in sizes)
            divisor = (self.divisor or count) if self.accumulation == "mean" else 1
            small, large = float(divisor) ** 2, (divisor / count) ** 2
        if not big * ranks > sizes[0]:
            self.skipped += 1
            return
        self.update(small * float(first), large * float(last), sizes[0], big * ranks)

    def update(self, small_norm_sq: float, big_norm_sq: float, small_batch: float, big_batch: float) -> None:
        """One step's squared norms of two mean gradients. Norms that are not finite (a skipped step) are left out.

        Args:
            small_norm_sq, big_norm_sq: Squared norms of the gradients of mean losses.
            small_batch, big_batch: Their numbers of samples.

        Raises:
            ArgumentError: The batches are not one smaller than the other.
        """
        if not 0 < small_batch < big_batch:
            raise ArgumentError(f"two batch sizes are needed, the smaller first, not {small_batch} and {big_batch}")
        square, trace = two_batches(float(small_norm_sq), float(big_norm_sq), small_batch, big_batch)
        if not (math.isfinite(square) and math.isfinite(trace)):
            self.skipped += 1
            return
        self.updates += 1
        kept = self.decay * self._weight
        self._weight = kept + 1.0
        self._weight_squares = self.decay**2 * self._weight_squares + 1.0
        shifts = [square - self._means[0], trace - self._means[1]]
        pairs = (shifts[0] * shifts[0], shifts[1] * shifts[1], shifts[0] * shifts[1])
        # West's update (1979); weights that start from nothing correct the bias of the first averages.
        self._spread = [
            self.decay * old + pair * kept / self._weight for old, pair in zip(self._spread, pairs, strict=True)
        ]
        self._means = [mean + shift / self._weight for mean, shift in zip(self._means, shifts, strict=True)]

    @property
    def value(self) -> Estimate:
        """``B_simple``; NaN while the average of ``|G|^2`` is not positive.

        The standard error takes the steps as independent: the spread of both averages, carried through the ratio to
        first order. What drifts within the memory of the averages counts as spread. ``samples`` is the effective
        number of steps ``(sum w)^2 / sum w^2``.
        """
        square, trace = self._means
        if not square > 0:
            return Estimate(math.nan, math.nan, self._effective())
        ratio = trace / square
        of_square, of_trace, both = self._covariance()
        variance = (of_trace - 2 * ratio * both + ratio**2 * of_square) / square**2
        return Estimate(ratio, _root(variance), self._effective())

    @property
    def gradient_square(self) -> Estimate:
        """``|G|^2``, without bias; may be negative."""
        return Estimate(self._mean(0), _root(self._covariance()[0]), self._effective())

    @property
    def trace(self) -> Estimate:
        """``tr C``, without bias; may be negative."""
        return Estimate(self._mean(1), _root(self._covariance()[1]), self._effective())

    def _mean(self, which: int) -> float:
        return self._means[which] if self.updates else math.nan

    def _effective(self) -> int:
        return max(1, round(self._weight**2 / self._weight_squares)) if self.updates else 1

    def _covariance(self) -> tuple[float, float, float]:
        """Variances of the two averages, and their covariance."""
        share = self._weight_squares / self._weight**2 if self.updates else 1.0
        if self.updates < 2 or share >= 1:
            return math.nan, math.nan, math.nan
        a, b, c = (sums / self._weight / (1 - share) * share for sums in self._spread)
        return a, b, c

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers; what was observed since the last step is not among them."""
        return {
            "decay": self.decay,
            "updates": self.updates,
            "skipped": self.skipped,
            "weight": self._weight,
            "weight_squares": self._weight_squares,
            "means": list(self._means),
            "spread": list(self._spread),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state, with its decay.

        Raises:
            ArgumentError: It is not the state of a running noise scale.
        """
        missing = set(self.state_dict()) - set(state)
        if missing:
            raise ArgumentError(f"not the state of a RunningNoiseScale: it lacks {', '.join(sorted(missing))}")
        self.decay, self.updates, self.skipped = state["decay"], int(state["updates"]), int(state["skipped"])
        self._weight, self._weight_squares = float(state["weight"]), float(state["weight_squares"])
        self._means, self._spread = list(state["means"]), list(state["spread"])
        self._clear()

    def __repr__(self) -> str:
        return f"RunningNoiseScale({self.value}, {self.updates} steps, decay={self.decay})"


def two_batches(small_norm_sq: float, big_norm_sq: float, small_batch: float, big_batch: float) -> tuple[float, float]:
    """``|G|^2`` and ``tr C`` without bias, from ``|G_B|^2`` at two batch sizes."""
    square = (big_batch * big_norm_sq - small_batch * small_norm_sq) / (big_batch - small_batch)
    trace = (small_norm_sq - big_norm_sq) / (1 / small_batch - 1 / big_batch)
    return square, trace


def _grad_square(parameters: nn.Module | Tensor | Iterable[Tensor]) -> Tensor:
    if isinstance(parameters, nn.Module):
        parameters = parameters.parameters()
    squares = Squares()
    for p in [parameters] if isinstance(parameters, Tensor) else parameters:
        if p.grad is not None:
            squares.add(p.grad)
    total = squares.total()
    if total is None:
        raise ArgumentError("no parameter has a gradient: call observe after backward() and before zero_grad()")
    return total


def _root(variance: float) -> float:
    return math.sqrt(max(variance, 0.0)) if not math.isnan(variance) else math.nan
