"""The bases of learning-rate schedules that follow a measurement: PyTorch's own schedulers in every other respect."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from curvdiag.errors import ArgumentError
from curvdiag.schedules.chain import Chain, set_entry
from curvdiag.schedules.following import Following
from curvdiag.schedules.p_scheduler import group_names
from curvdiag.schedules.source import Choice


class MeasuredSchedule:
    """What both bases share. A subclass says how it takes new numbers in, and names what it must remember."""

    remembered: ClassVar[tuple[str, ...]] = ()
    """Attributes, plain numbers or None, that belong into a checkpoint."""
    following: Following
    optimizer: Optimizer
    last_epoch: int

    @property
    def age(self) -> int | None:
        """How old the measurement is that it goes by, in steps of this schedule since it was read; None before any."""
        read_at = self.following.read_at
        return None if read_at is None else max(0, self.last_epoch - read_at)

    @property
    def history(self) -> list[Choice]:
        """What it saw and chose, and why it held what it had: an entry for each reading, oldest first."""
        return list(self.following.followed.history)

    def take(self, numbers: dict[str, float]) -> str:
        """Take in a new measurement; why it cannot be used, or an empty string."""
        raise NotImplementedError

    def choice(self) -> dict[str, float]:
        """What follows from it, for the history, beside the rates."""
        return {}

    def _look(self, step: int) -> None:
        self.following.look(step, self.take)

    def _note(self) -> None:
        if self.following.news is None:  # reading a rate that is a tensor may wait for the device
            return
        named = zip(group_names(self.optimizer), self.optimizer.param_groups, strict=True)
        self.following.chose({**self.choice(), **{f"lr/{name}": float(group["lr"]) for name, group in named}})

    def _measured(self) -> dict[str, Any]:
        return {"following": self.following.state_dict(), **{name: getattr(self, name) for name in self.remembered}}

    def _load_measured(self, state: Mapping[str, Any]) -> None:
        self.following.load_state_dict(state["following"])
        for name in self.remembered:
            setattr(self, name, state[name])


class FactorLR(MeasuredSchedule, LRScheduler):
    """A learning rate that is the initial one times a factor for each group, which other schedules may multiply.

    Alone it has its closed form to the last bit; in ``ChainedScheduler`` and ``SequentialLR`` it behaves as PyTorch's
    chainable schedules do. A parameter group that is added later joins at the next step, with its rate of then as its
    initial one.

    Args:
        optimizer: Whose rates are moved.
        following: What it follows.
        last_epoch: -1 to begin. Otherwise the closed form goes on after that epoch, without the work of other
            schedules, and measurements begin anew; a checkpoint holds both.
    """

    def __init__(self, optimizer: Optimizer, following: Following, last_epoch: int = -1) -> None:
        self.following = following
        self._chain: Chain | None = None
        super().__init__(optimizer, last_epoch)

    def factors(self) -> list[float]:
        """The factor of each group at :attr:`last_epoch`."""
        raise NotImplementedError

    def get_lr(self) -> list[Any]:
        """The rates at :attr:`last_epoch`; reading :meth:`get_last_lr` is what a training script wants."""
        bases = [float(lr) for lr in self.base_lrs]
        if self._chain is None:
            self._chain = Chain(self.optimizer, "lr", 0.0, bases)
            return self._chain.values(self.optimizer, self.factors(), alone=self.last_epoch > 0)
        if self._is_initial:  # SequentialLR begins again
            self._chain.begin(self.optimizer, bases)
        return self._chain.values(self.optimizer, self.factors())

    def _get_closed_form_lr(self) -> list[Any]:
        """What SequentialLR asks for where this schedule takes over from another."""
        assert self._chain is not None
        return self._chain.values(self.optimizer, self.factors(), alone=True)

    def _update_lr(self, epoch: int | None = None) -> None:
        if epoch is not None:  # the count of steps says nothing now
            self.following.renew()
        self._join()
        self._look(self.last_epoch + 1 if epoch is None else epoch)
        super()._update_lr(epoch)
        assert self._chain is not None
        self._chain.settle(self.optimizer)
        self._note()

    def _join(self) -> None:
        """Take in the parameter groups that were added since."""
        for group in self.optimizer.param_groups[len(self.base_lrs) :]:
            assert self._chain is not None
            group.setdefault("initial_lr", float(group["lr"]))
            self.base_lrs.append(float(group["lr"]))
            self._chain.join(float(group["lr"]))

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs, beside the optimizer's own state: plain numbers."""
        assert self._chain is not None
        return {
            "last_epoch": self.last_epoch,
            "_step_count": self._step_count,
            "_last_lr": [float(lr) for lr in self._last_lr],
            "base_lrs": [float(lr) for lr in self.base_lrs],
            "chain": self._chain.state_dict(),
            "measured": self._measured(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue. Make the schedule first, then load its state, the optimizer's and the monitor's, in any order."""
        assert self._chain is not None
        self._chain.load_state_dict(state_dict["chain"])
        self._load_measured(state_dict["measured"])
        self.last_epoch, self._step_count = state_dict["last_epoch"], state_dict["_step_count"]
        self._last_lr, self.base_lrs = list(state_dict["_last_lr"]), list(state_dict["base_lrs"])


class WrappedLR(MeasuredSchedule, LRScheduler):
    """Any learning-rate schedule, whose rates are changed after each of its steps.

    The wrapped schedule goes on from its own rates, as though nobody had changed them.

    Args:
        scheduler: Any scheduler with ``optimizer`` and ``step``, ``ReduceLROnPlateau`` and other wrapped ones included.
            It is stepped by this one; do not step it yourself.
        following: What this one follows.
    """

    def __init__(self, scheduler: Any, following: Following) -> None:
        self.scheduler, self.following = scheduler, following
        self.optimizer = scheduler.optimizer
        self._schedulers = [scheduler]  # where SequentialLR looks for what it must undo
        self.last_epoch = 0
        self._finish()

    def change(self, rates: list[float]) -> list[float]:
        """The rates to use where the wrapped schedule wants ``rates``."""
        raise NotImplementedError

    @property
    def base_lrs(self) -> list[Any]:  # type: ignore[override]
        """The rates before any schedule."""
        return [group.get("initial_lr", group["lr"]) for group in self.optimizer.param_groups]

    @property
    def wanted_lrs(self) -> list[float]:
        """What the wrapped schedule asked for last."""
        return list(self._wanted)

    def step(self, *arguments: Any, **options: Any) -> None:
        """Step the wrapped schedule with these arguments, and change what it gives."""
        self._restore()
        self.last_epoch += 1
        try:
            self.scheduler.step(*arguments, **options)
        finally:  # where it refuses the arguments the rate is still not left as it was restored
            self._finish()

    def get_lr(self) -> list[Any]:
        """As :meth:`get_last_lr`: only a step changes anything."""
        return self.get_last_lr()

    def _initial_step(self) -> None:  # SequentialLR begins again
        self.scheduler._initial_step()
        self.last_epoch = 0
        self._finish()

    def _update_lr(self, epoch: int | None = None) -> None:  # SequentialLR hands over to this one
        self.scheduler._update_lr(epoch)
        self.last_epoch = self.last_epoch + 1 if epoch is None else epoch
        self.following.renew()
        self._finish()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs beside the optimizer's own state, the wrapped schedule's state included."""
        return {
            "last_epoch": self.last_epoch,
            "wanted": list(self._wanted),
            "left": list(self._left),
            "scheduler": self.scheduler.state_dict(),
            "measured": self._measured(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue. Make the schedule first, then load its state, the optimizer's and the monitor's, in any order."""
        self._wanted, self._left = list(state_dict["wanted"]), list(state_dict["left"])
        self.last_epoch, self._last_lr = state_dict["last_epoch"], list(state_dict["left"])
        self.scheduler.load_state_dict(state_dict["scheduler"])
        self._load_measured(state_dict["measured"])

    def _restore(self) -> None:
        """Give the groups the rates that the wrapped schedule left; what others did meanwhile stays as a factor."""
        for group, wanted, left in zip(self.optimizer.param_groups, self._wanted, self._left, strict=False):
            now = float(group["lr"])
            if now == left:
                set_entry(group, "lr", wanted)
            elif left:
                set_entry(group, "lr", now * (wanted / left))

    def _finish(self) -> None:
        """Change what the wrapped schedule gave."""
        groups = self.optimizer.param_groups
        self._look(self.last_epoch)
        # Read back from the groups, since a tensor rounds what it is given.
        self._wanted = [float(group["lr"]) for group in groups]
        for group, rate in zip(groups, self.change(list(self._wanted)), strict=True):
            set_entry(group, "lr", rate)
        self._left = [float(group["lr"]) for group in groups]
        rates = [group["lr"] for group in groups]
        self._last_lr = [rate.clone() if isinstance(rate, Tensor) else rate for rate in rates]
        self._note()


def optimizer_of(scheduler: Any, owner: str) -> Optimizer:
    """The optimizer of a schedule that is to be wrapped.

    Raises:
        ArgumentError: It is no learning-rate schedule.
    """
    optimizer = getattr(scheduler, "optimizer", None)
    if not isinstance(optimizer, Optimizer) or not callable(getattr(scheduler, "step", None)):
        raise ArgumentError(
            f"{owner} wraps a learning-rate scheduler, not {type(scheduler).__name__}; for a constant rate wrap "
            "torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1)"
        )
    return optimizer
