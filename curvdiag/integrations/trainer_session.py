"""A session inside the Transformers Trainer, and its state as text."""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch.optim import Optimizer

from curvdiag.errors import ArgumentError, CurvdiagWarning
from curvdiag.integrations.common import Session, groups_of
from curvdiag.monitor.training import was_skipped
from curvdiag.schedules.p_scheduler import PScheduler


class TrainerSession(Session):
    """A session whose schedules are stepped after the Trainer's own, which sets the learning rate anew at each step."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._due = False
        self._warned = False
        state = options.get("state") or {}
        self._without_loss: list[int] = list(state.get("without_loss", []))
        super().__init__(*arguments, **options)
        self._moves_rates = any(not isinstance(one, PScheduler) for one in self.schedules)
        self._rates = [group["lr"] for group in groups_of(self.optimizer)]
        self._theirs: list[float] | None = None

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        self._due = not was_skipped(optimizer)

    def step_schedules(self, theirs: Any) -> None:
        """Step the schedules, which go on from the rates that they left.

        Args:
            theirs: The Trainer's schedule.
        """
        if self._moves_rates:
            self._notice(theirs)
            for group, rate in zip(self.optimizer.param_groups, self._rates, strict=False):
                _set_rate(group, rate)
        if not self._due:
            return
        self._due = False
        super()._after_step(self.optimizer)
        self._rates = [group["lr"] for group in groups_of(self.optimizer)]

    def news(self) -> list[tuple[int, dict[str, float]]]:
        found = super().news()
        self._without_loss += [step for step, _ in found]
        return found

    def write_loss(self, loss: float) -> None:
        """Write the mean that the Trainer logs beside what was measured in the steps that it is of.

        Into the run file only: the Trainer's reports hold its losses, and W&B under the same key.
        """
        for step in self._without_loss if not self.monitor.closed else ():
            self.monitor._recorder.numbers(step, {"train/loss": loss}, None)
        self._without_loss = []

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "without_loss": list(self._without_loss)}

    def _notice(self, theirs: Any) -> None:
        now = [float(rate) for rate in theirs.get_last_lr()] if hasattr(theirs, "get_last_lr") else None
        if self._theirs is not None and now != self._theirs and not self._warned:
            self._warned = True
            message = (
                "the Trainer's own schedule moves the learning rate too, and that of schedules= takes its place; give "
                "lr_scheduler_type='constant'"
            )
            warnings.warn(message, CurvdiagWarning, stacklevel=4)
        self._theirs = now


def inner_optimizer(optimizer: Any) -> Optimizer:
    """The optimizer inside accelerate's."""
    while isinstance(getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = optimizer.optimizer
    if not isinstance(optimizer, Optimizer):
        raise ArgumentError(f"there is no optimizer whose steps could be followed, but {type(optimizer).__name__}")
    return optimizer


def packed(state: Mapping[str, Any]) -> str:
    """A state as text that JSON keeps as it is: keys that are numbers, tuples and tensors included."""
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def unpacked(text: str) -> dict[str, Any]:
    """What was :func:`packed`; nothing in it is executed."""
    state: dict[str, Any] = torch.load(io.BytesIO(base64.b64decode(text)), weights_only=True)
    return state


def _set_rate(group: dict[str, Any], rate: Any) -> None:
    if isinstance(group["lr"], torch.Tensor):
        with torch.no_grad():
            group["lr"].copy_(torch.as_tensor(rate))
    else:
        group["lr"] = rate
