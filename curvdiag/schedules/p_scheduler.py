"""The base of p-schedules: the manners of PyTorch's learning-rate schedulers, for ``p``."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch.optim import Optimizer

from curvdiag.errors import ArgumentError
from curvdiag.schedules.chain import set_entry

log = logging.getLogger(__name__)

EUCLIDEAN = 2.0


class PScheduler:
    """Moves the ``p`` of an optimizer's parameter groups between 2 and ``p_max``.

    A schedule gives a factor in [0, 1] for each group, and ``p = 2 + (p_max - 2) * factor``. As with learning rates,
    making a schedule sets its first value, and :meth:`step` is called after the optimizer's, on its own or by
    ``torch.optim.lr_scheduler.ChainedScheduler``, beside any schedule of the rate.

    Several p-schedules of one optimizer chain: their factors multiply, in whatever order they are stepped. One that is
    to count no more is taken out by :meth:`detach`. A parameter group that is added later joins at the next step, with
    its own ``p`` as its ``p_max``.

    To resume, make optimizer and schedules as before, in the same order, and load the states of all.

    Args:
        optimizer: Every group has a ``"p"``, as those of LPSGD and LPSGDM.
        p_max: One number, or one for each group; if not given, that of the schedules there are, or else each group's
            ``p`` before any schedule (its ``"initial_p"``).
        last_epoch: -1 to begin; where it is not, the groups have an ``"initial_p"``.

    Raises:
        ArgumentError: A group has no ``p``; ``p_max`` is below 2, not finite, below the group's ``p``, or not that of
            the optimizer's other p-schedules.

    Attributes:
        base_ps: ``p_max`` of each group.
        last_epoch: Calls of :meth:`step` so far.
    """

    infinite = False  # whether p_max may be infinite: any factor but one would then be lost
    lowers = False  # whether p_max may be below the p that the optimizer was given

    def __init__(
        self, optimizer: Optimizer, p_max: float | Sequence[float] | None = None, last_epoch: int = -1
    ) -> None:
        self._owner = type(self).__name__
        require_p(optimizer, self._owner)
        for index, group in enumerate(optimizer.param_groups):
            if last_epoch != -1 and "initial_p" not in group:
                raise ArgumentError(
                    f"{self._owner}: parameter group {index} has no 'initial_p' to go on from at "
                    f"last_epoch={last_epoch}; load the optimizer's state first, or leave last_epoch out"
                )
            group.setdefault("initial_p", float(group["p"]))
        self.optimizer = optimizer
        self.base_ps = self._bases(p_max)
        self._warn_of_others(begins=last_epoch == -1)
        self.last_epoch = last_epoch
        self._factors = [1.0] * len(self.base_ps)
        self._last_p: list[float] = []
        self.step()

    def factors(self) -> list[float]:
        """The factor of each group at :attr:`last_epoch`."""
        raise NotImplementedError

    def step(self) -> None:
        """Go on by one epoch, or by one optimizer step: whichever the schedule counts."""
        self._join()
        self.last_epoch += 1
        self._factors = [float(factor) for factor in self.factors()]
        self._set()

    def get_last_p(self) -> list[float]:
        """The ``p`` of each group as this schedule last set it."""
        return list(self._last_p)

    def detach(self) -> None:
        """Take this schedule's factor out of ``p``, which the others, if there are any, go on to set."""
        others = [schedule for schedule in _schedules(self.optimizer) if schedule is not self]
        _schedules(self.optimizer)[:] = others
        if others:
            others[-1]._set()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs, in plain numbers; beside the optimizer's own state."""
        return {
            "last_epoch": self.last_epoch,
            "base_ps": list(self.base_ps),
            "factors": list(self._factors),
            "last_p": list(self._last_p),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue; load the optimizer's state too, in either order.

        Raises:
            ArgumentError: The state is of more parameter groups than the optimizer has.
        """
        groups = len(self.optimizer.param_groups)
        if len(state["base_ps"]) > groups:
            raise ArgumentError(
                f"{self._owner}: the state is of {len(state['base_ps'])} parameter groups and the optimizer has "
                f"{groups}; call add_param_group for those that were added during the training, then load"
            )
        self.last_epoch, self.base_ps = state["last_epoch"], list(state["base_ps"])
        self._factors = list(state["factors"])
        self._join()
        self._set()
        self._last_p = list(state["last_p"])

    def _set(self) -> None:
        """Give every group its ``p``: the product of what all schedules of the optimizer make of it."""
        together = _schedules(self.optimizer)
        if self not in together:
            together.append(self)
        for index, (group, base) in enumerate(zip(self.optimizer.param_groups, self.base_ps, strict=True)):
            factor = math.prod(one._factors[index] for one in together if index < len(one._factors))
            # A factor of one is taken out of the formula, since an infinite p is one that may be held.
            set_entry(group, "p", base if factor == 1 else EUCLIDEAN + (base - EUCLIDEAN) * factor)
        self._last_p = [float(group["p"]) for group in self.optimizer.param_groups]

    def _bases(self, p_max: float | Sequence[float] | None) -> list[float]:
        groups, others = self.optimizer.param_groups, _schedules(self.optimizer)
        for one in others:
            one._join()
        if p_max is None:
            bases = list(others[0].base_ps) if others else [float(group["initial_p"]) for group in groups]
        elif isinstance(p_max, Sequence):
            if len(p_max) != len(groups):
                raise ArgumentError(f"{self._owner}: {len(p_max)} values of p_max for {len(groups)} parameter groups")
            bases = [float(value) for value in p_max]
        else:
            bases = [float(p_max)] * len(groups)
        for index, base in enumerate(bases):
            self._check(index, base, "" if p_max is not None else "; give p_max=")
            if base < groups[index]["initial_p"] and not (self.lowers or others):
                raise ArgumentError(
                    f"{self._owner}: p_max={base:g} is below p={float(groups[index]['initial_p']):g} of parameter "
                    f"group {index}; give the optimizer a p of at most p_max"
                )
        if others and bases != others[0].base_ps:
            raise ArgumentError(
                f"{self._owner}: p_max is {bases} here and {others[0].base_ps} in the {type(others[0]).__name__} of "
                "this optimizer, and their factors multiply; leave p_max out here, or detach() the other schedule"
            )
        return bases

    def _warn_of_others(self, *, begins: bool) -> None:
        others = _schedules(self.optimizer)
        if not others:
            return
        names = ", ".join(type(one).__name__ for one in others)
        log.info("%s chains with %s of the same optimizer: their factors multiply", self._owner, names)
        stepped = [type(one).__name__ for one in others if one.last_epoch > 0]
        if stepped and begins:  # as where a cell of a notebook is run again
            log.warning(
                "%s begins after %s was stepped, whose factor goes on to count: where it is replaced, call its "
                "detach() first",
                self._owner,
                ", ".join(stepped),
            )

    def _check(self, index: int, base: float, remedy: str) -> None:
        initial = float(self.optimizer.param_groups[index]["initial_p"])
        if not initial >= EUCLIDEAN:
            raise ArgumentError(f"{self._owner}: parameter group {index} has p={initial:g}; p is at least 2")
        if not base >= EUCLIDEAN:
            raise ArgumentError(f"{self._owner}: p_max is at least 2, and is {base:g} in parameter group {index}")
        if not (math.isfinite(base) or self.infinite):
            raise ArgumentError(
                f"{self._owner}: p_max is infinite in parameter group {index}; it takes a finite one{remedy}"
            )

    def _join(self) -> None:
        """Take in the parameter groups that were added since."""
        groups = self.optimizer.param_groups
        if len(groups) < len(self.base_ps):
            raise ArgumentError(
                f"{self._owner} drives {len(self.base_ps)} parameter groups, and the optimizer has {len(groups)} now"
            )
        require_p(self.optimizer, self._owner)
        for index in range(len(self.base_ps), len(groups)):
            group = groups[index]
            group.setdefault("initial_p", float(group["p"]))
            self._check(index, float(group["initial_p"]), "; give add_param_group a finite p")
            self.base_ps.append(float(group["initial_p"]))
            self._factors.append(1.0)


def require_p(optimizer: Optimizer, schedule: str) -> None:
    """Raise an error that says what to do unless every parameter group has a ``p``."""
    if not isinstance(optimizer, Optimizer):
        raise ArgumentError(f"{schedule} drives an optimizer, not {type(optimizer).__name__}")
    for index, group in enumerate(optimizer.param_groups):
        if "p" not in group:
            raise ArgumentError(
                f"{schedule} drives p, and parameter group {index} of {type(optimizer).__name__} has none; "
                "use LPSGD or LPSGDM"
            )


def group_names(optimizer: Optimizer) -> list[str]:
    """What to call each parameter group: its ``"name"``, or its number where it has none of its own."""
    names = [str(group.get("name", index)) for index, group in enumerate(optimizer.param_groups)]
    times = Counter(names)
    return [name if times[name] == 1 else str(index) for index, name in enumerate(names)]


def _schedules(optimizer: Optimizer) -> list[PScheduler]:
    """The p-schedules of an optimizer, in the order in which they were made; it holds them itself, not its state."""
    found: list[PScheduler] = optimizer.__dict__.setdefault("_curvdiag_p_schedules", [])
    return found
