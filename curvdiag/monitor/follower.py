"""What follows a training run: it counts the steps of an optimizer, and measures when the cadence says so."""

from __future__ import annotations

import abc
import sys
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor
from torch.optim import Optimizer

from curvdiag.distributed import ALONE, Ranks
from curvdiag.errors import ArgumentError
from curvdiag.monitor.agreement import require_agreement
from curvdiag.monitor.cadence import Cadence
from curvdiag.monitor.clock import Clock
from curvdiag.monitor.decision import Decision
from curvdiag.monitor.training import as_number, was_skipped

if TYPE_CHECKING:
    from curvdiag.monitor.measurement import Measurement


class Follower(abc.ABC):
    """Counts steps and knows their time, epoch and loss. A subclass says what :meth:`measure` does.

    Args:
        cadence: When to measure.
        steps_per_epoch: To know epochs without calls of :meth:`epoch`.
        ranks: Those that follow the same training and measure together.

    Attributes:
        steps_done: Optimizer steps counted so far.
        clock: Seconds of the run, and of its measurements.
        ranks: As given.
    """

    def __init__(self, cadence: Cadence, steps_per_epoch: float | None, ranks: Ranks = ALONE) -> None:
        self.steps_per_epoch, self.ranks = steps_per_epoch, ranks
        self.steps_done = 0
        self.clock = Clock()
        self._decision = Decision(cadence, self.clock, ranks)
        self._agreed = False
        self._optimizer: Optimizer | None = None
        self._hook: Any = None
        self._epoch: float | None = None
        self._loss: float | Tensor | None = None
        self._loss_step = 0

    @property
    def cadence(self) -> Cadence:
        """When to measure; another one may take its place, on all ranks at the same step."""
        return self._decision.cadence

    @cadence.setter
    def cadence(self, cadence: Cadence) -> None:
        self._decision.cadence = cadence
        self._decision.renew()

    @abc.abstractmethod
    def measure(self) -> Measurement | None:
        """Measure now, whatever the cadence says."""

    @abc.abstractmethod
    def _in_common(self) -> dict[str, str]:
        """What must be the same on all ranks, in words by name."""

    def _agree(self) -> None:
        """Compare with the other ranks, once: at the first step, or at a measurement before it."""
        if not self._agreed and not self.ranks.alone:
            require_agreement(self.ranks, self._in_common())
        self._agreed = True

    def attach(self, optimizer: Optimizer) -> Self:
        """Count the steps of ``optimizer``, and measure after those that the cadence chooses."""
        if self._optimizer is not None:
            raise ArgumentError("this monitor is attached already; detach() it first, or make another")
        self._optimizer = optimizer
        follow = self._after_step
        if "torch._dynamo" in sys.modules:  # a compiled optimizer step must not compile the measurement into itself
            follow = torch.compiler.disable(follow)
        self._hook = optimizer.register_step_post_hook(follow)
        self.clock.start()
        return self

    def detach(self) -> None:
        """Stop following the optimizer; what was measured stays."""
        if self._hook is not None:
            self._hook.remove()
        self._optimizer = self._hook = None

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        if not was_skipped(optimizer):
            self.step()

    def step(self, loss: float | Tensor | None = None) -> Measurement | None:
        """Count one optimizer step, and measure if the cadence says so; for loops without :meth:`attach`."""
        self.clock.start()
        self.steps_done += 1
        if loss is not None:
            self.observe_loss(loss)
        self._agree()
        return self.measure() if self._decision.due(self.steps_done) else None

    def epoch(self, number: float) -> None:
        """Say which epoch the training is in; recorded with the measurements that follow."""
        self._epoch = float(number)

    def observe_loss(self, loss: float | Tensor) -> None:
        """Say what the training loss is. A tensor is read only when a measurement is recorded."""
        # A copy, because loops reuse and rescale the tensor that they log.
        self._loss = loss.detach().clone() if isinstance(loss, Tensor) else float(loss)
        self._loss_step = self.steps_done

    @property
    def depends_on_clock(self) -> bool:
        """Whether the steps at which it measures depend on how fast the machine is, as with ``OverheadBudget``.

        Then a second run, or one resumed from a checkpoint, may measure at other steps, and what reads the
        measurements goes another way.
        """
        return self._decision.reads_clock

    def _present_epoch(self) -> float | None:
        return self.steps_done / self.steps_per_epoch if self.steps_per_epoch else self._epoch

    def _present_loss(self) -> float | None:
        """The loss of the present step; an older one is not its own."""
        return as_number(self._loss) if self.steps_done - self._loss_step <= 1 else None
