"""What the callbacks of all frameworks share: a monitor on an optimizer, schedules stepped after it, their state."""

from __future__ import annotations

import copy
import dataclasses
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from curvdiag.distributed import ranks_of
from curvdiag.errors import ArgumentError
from curvdiag.monitor import CurvatureMonitor, Measurement
from curvdiag.monitor.training import as_number, was_skipped
from curvdiag.objective import Objective
from curvdiag.record import RunStore
from curvdiag.schedules.p_scheduler import PScheduler, group_names

Store: TypeAlias = str | os.PathLike[str] | RunStore | None
Schedules: TypeAlias = Callable[[Optimizer, CurvatureMonitor], Any]
"""``schedules(optimizer, monitor)`` gives a schedule or a list of them; each has ``step()``, ``state_dict()`` and
``load_state_dict()``."""

Groups: TypeAlias = list[dict[str, Any]]
"""The settings of an optimizer's parameter groups, without the parameters."""


class Session:
    """One training run: a monitor that follows an optimizer, and schedules that follow the monitor.

    The monitor measures right after an optimizer step, then the schedules are stepped; both in hooks of the optimizer,
    so that gradient accumulation, skipped steps and several optimizers need no attention.

    Args:
        objective: What is measured.
        optimizer: Whose steps are counted.
        store: As in :class:`~curvdiag.monitor.CurvatureMonitor`.
        schedules: Makes the schedules, or None.
        arguments: Further arguments of the monitor.
        begun_with: The settings of the parameter groups at the very start of the training, where the optimizer holds
            those of a checkpoint by now: schedules take their first values from them. See :func:`groups_of`.
        state: What :meth:`state_dict` gave for a checkpoint; without its ``"schedules"`` these begin anew.
        steps_done: Steps that the training had done before it was watched; without effect where there is a state.
        share: Where several processes train together and schedules must choose alike on all of them:
            ``share(measurement)`` gives on every one what the first one passed. The first measures, and the others,
            which have ``measures=False``, wait for it.
        measures: Whether this process measures, and writes. Where the objective is that of several ranks, all measure
            together, the first one writes, and neither this nor ``share`` is needed.

    Raises:
        ArgumentError: As the monitor's; or ``share`` is given and the cadence reads the clock, so that processes would
            not agree on when to wait.

    Attributes:
        monitor: The monitor.
        schedules: The schedules, in the order of stepping.
    """

    def __init__(
        self,
        objective: Objective,
        optimizer: Optimizer,
        store: Store,
        *,
        schedules: Schedules | None = None,
        arguments: Mapping[str, Any] | None = None,
        begun_with: Groups | None = None,
        state: Mapping[str, Any] | None = None,
        steps_done: int = 0,
        share: Callable[[Measurement | None], Measurement | None] | None = None,
        measures: bool = True,
    ) -> None:
        given = dict(arguments or {})
        together = not objective.holders.alone  # then the monitor sees to it
        if not (measures or together):  # the first process writes for all
            store = None
            given.pop("loggers", None)
        if share is None or together:
            self.monitor = CurvatureMonitor(objective, store, **given)
        else:
            self.monitor = SharedMonitor(objective, store, share=share, measures=measures, **given)
        self.monitor.steps_done = steps_done
        if state is not None:
            self.monitor.load_state_dict(state["monitor"])
        self.optimizer = optimizer
        self.schedules: list[Any] = []
        self._hook: Any = None
        self._told = 0, len(self.monitor.recorded)
        try:
            self._start(schedules, begun_with, state)
        except BaseException:
            self.close()
            raise

    def _start(self, schedules: Schedules | None, begun_with: Groups | None, state: Mapping[str, Any] | None) -> None:
        self.monitor.attach(self.optimizer)
        if schedules is None:
            return
        states = [] if state is None else state.get("schedules", [])
        now = groups_of(self.optimizer)
        if states and begun_with is not None:
            set_groups(self.optimizer, begun_with)
        self.schedules = _as_list(schedules(self.optimizer, self.monitor))
        if states:  # else they begin now
            self._load_schedules(states)
            set_groups(self.optimizer, now)
        follow = self._after_step
        if "torch._dynamo" in sys.modules:  # a compiled optimizer step must not compile the schedules into itself
            follow = torch.compiler.disable(follow)
        self._hook = self.optimizer.register_step_post_hook(follow)

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        if was_skipped(optimizer):
            return
        latest = self.monitor.latest
        measured = latest is not None and latest.step == self.monitor.steps_done
        for schedule in self.schedules:
            schedule.step()
            if measured:  # a record at each step would be a transaction at each step
                self._record(schedule)

    def _record(self, schedule: Any) -> None:
        """What a schedule chose, where it does not record that itself."""
        name = _snake(type(schedule).__name__)
        recorded = self.monitor.recorded
        if recorded and recorded[-1][0] == self.monitor.steps_done:
            own = [key for key in recorded[-1][1] if key.startswith(f"schedule/{name}/")]
            if own:
                return
        entry = "p" if isinstance(schedule, PScheduler) else "lr"
        optimizer = getattr(schedule, "optimizer", self.optimizer)
        values = zip(group_names(optimizer), optimizer.param_groups, strict=True)
        chosen = {f"schedule/{name}/{entry}/{group}": as_number(settings.get(entry)) for group, settings in values}
        self.monitor.record({key: value for key, value in chosen.items() if value is not None})

    def news(self) -> list[tuple[int, dict[str, float]]]:
        """What was measured and recorded since the last call: steps and plain numbers, in the order of the steps."""
        measured, recorded = self._told
        found: dict[int, dict[str, float]] = {}
        for measurement in self.monitor.history[measured:]:
            numbers = {key: float(value) for key, value in measurement.scalars.items()}
            found.setdefault(measurement.step, {}).update(numbers)
        for step, numbers in self.monitor.recorded[recorded:]:
            found.setdefault(step, {}).update(numbers)
        self._told = len(self.monitor.history), len(self.monitor.recorded)
        return sorted(found.items())

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs, in plain numbers and strings; also after :meth:`close`."""
        states = [[type(schedule).__name__, schedule.state_dict()] for schedule in self.schedules]
        return {"monitor": self.monitor.state_dict(), "schedules": copy.deepcopy(states)}

    def _load_schedules(self, states: Sequence[Sequence[Any]]) -> None:
        held, made = [name for name, _ in states], [type(schedule).__name__ for schedule in self.schedules]
        if held != made:
            raise ArgumentError(
                f"the checkpoint holds the states of the schedules {held}, and schedules= made {made}: "
                "resume with the same schedules, in the same order"
            )
        for schedule, (_, state) in zip(self.schedules, states, strict=True):
            schedule.load_state_dict(state)

    def close(self) -> None:
        """Follow the optimizer no more, and close the run file if it was given as a path; harmless when repeated."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        if not self.monitor.closed:
            self.monitor.close()


class SharedMonitor(CurvatureMonitor):
    """A monitor of several processes that train together: the first one measures, and all hold the same numbers.

    Args:
        share, measures: As in :class:`Session`.
        arguments: Of :class:`~curvdiag.monitor.CurvatureMonitor`.
    """

    def __init__(
        self,
        *arguments: Any,
        share: Callable[[Measurement | None], Measurement | None],
        measures: bool,
        **options: Any,
    ) -> None:
        super().__init__(*arguments, **options)
        self._share, self._measures = share, measures
        if self.depends_on_clock:
            self.close()
            raise ArgumentError(
                "with schedules on several processes all must know when one of them measures, and the cadence "
                f"{self.cadence!r} reads the clock: give every= or another cadence in steps"
            )

    def measure(self) -> Measurement | None:
        """Measure, or wait for the numbers of the process that does."""
        measurement: Measurement | None = None
        if not self._measures:
            measurement = self._share(None)
            if measurement is not None:
                self.history.append(measurement)
            return measurement
        try:
            measurement = super().measure()
        finally:  # the others wait, whatever went wrong here
            self._share(None if measurement is None else dataclasses.replace(measurement, densities={}))
        return measurement


def made_by(function: Callable[..., Any], *given: Any) -> Objective:
    """The objective that a function of the user's makes."""
    made = function(*given)
    if not isinstance(made, Objective):
        raise ArgumentError(f"objective= is a function that returns an Objective, not {type(made).__name__}")
    return made


def require_trained(objective: Objective, model: nn.Module) -> None:
    """Refuse an objective, made beforehand, of a model that this training does not move."""
    if not {id(one) for one in objective.model.parameters()} & {id(one) for one in model.parameters()}:
        raise ArgumentError(
            "the objective is of another model than the one that the Trainer trains; give a function that makes it, "
            "which gets the one that is trained"
        )


def made_on_all(make: Callable[[], Objective], *, first: bool, needed: bool) -> tuple[Objective | None, bool]:
    """What ``make`` gives on each of the processes that train together, and whether they measure together.

    Where the first one's objective is of that process alone, that of another may be missing, unless it is needed.

    Args:
        make: Makes the objective, or raises.
        first: Whether this is the first process.
        needed: Whether each process needs one of its own.

    Raises:
        Exception: What ``make`` raised.
        ArgumentError, DistributedError: They measure together, and not all of them do; or it failed on another one.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return make() if first or needed else None, False
    everybody, made, failure = ranks_of("world"), None, None
    try:
        with everybody.together("making of the objective"):
            made = make()
    except Exception as error:
        failure = error
    kinds = everybody.gather(None if made is None else made.holders.count, "comparison of objectives")
    together = kinds[0] is not None and kinds[0] > 1
    if failure is not None and (kinds[0] is None or together or needed):
        raise failure
    if together and set(kinds) != {everybody.count}:
        listed = ", ".join(f"{kind} on process {i}" for i, kind in enumerate(kinds))
        raise ArgumentError(
            f"the objective is that of {listed}, and {everybody.count} train: give "
            'Objective(..., group="world") on every one of them'
        )
    return made, together


def refuse_shards(strategy: str, *, with_function: bool = False) -> NoReturn:
    way = ""
    if with_function:
        way = 'give objective= a function that makes one of all processes, Objective(..., group="world"); or '
    raise ArgumentError(
        f"CurvatureCallback cannot measure under {strategy}, which gives each process a part of the weights only: {way}"
        "use one device or DDP, or measure the checkpoints afterwards"
    )


def groups_of(optimizer: Optimizer) -> Groups:
    """The settings of the parameter groups, to be given back by :func:`set_groups`."""
    groups = optimizer.param_groups
    return [{key: _copied(value) for key, value in group.items() if key != "params"} for group in groups]


def set_groups(optimizer: Optimizer, groups: Groups) -> None:
    """Give the parameter groups the settings they had; a tensor is filled, since compiled steps hold on to it."""
    for group, settings in zip(optimizer.param_groups, groups, strict=False):
        for key, value in settings.items():
            if isinstance(group.get(key), Tensor) and isinstance(value, Tensor):
                with torch.no_grad():
                    group[key].copy_(value)
            else:
                group[key] = _copied(value)


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else copy.copy(value)


def _as_list(made: Any) -> list[Any]:
    schedules = list(made) if isinstance(made, list | tuple) else [] if made is None else [made]
    needed = ("step", "state_dict", "load_state_dict")
    for schedule in schedules:
        missing = [name for name in needed if not callable(getattr(schedule, name, None))]
        if missing:
            raise ArgumentError(
                f"schedules= gives a schedule or a list of them, and {type(schedule).__name__} has no "
                f"{' and no '.join(missing)}"
            )
    return schedules


def _snake(name: str) -> str:
    """``CosineP`` as ``cosine_p``, ``AnisotropyLR`` as ``anisotropy_lr``."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()
