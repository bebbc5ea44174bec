"""PredictedDecreaseP: the p whose direction promises the largest decrease of the loss, by slope and curvature."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer

from curvdiag.errors import ArgumentError, CurvdiagError, LossError, NonFiniteError
from curvdiag.gradients import gradient as gradient_of
from curvdiag.monitor import CurvatureMonitor
from curvdiag.objective import Objective
from curvdiag.operators import GaussNewton, Hessian
from curvdiag.schedules.p_directions import Layout
from curvdiag.schedules.p_scheduler import EUCLIDEAN, PScheduler, group_names, require_p
from curvdiag.schedules.predicted_decrease import candidates, predicted_decrease
from curvdiag.schedules.source import Choice, Followed, Source, warn_of_ranks

log = logging.getLogger(__name__)

Curvature = Literal["gauss-newton", "hessian"]
OPERATORS: dict[str, Any] = {"gauss-newton": GaussNewton, "hessian": Hessian}
JOINT = "p"
"""Under which the one ``p`` of all groups is followed."""

Slope: TypeAlias = Callable[[], tuple[Tensor, Any] | None]
"""A function that gives a gradient ``[P]`` and an operator ``[P, P]`` at the present weights, or None for nothing new.

Both lie over the parameters of the optimizer one after the other, in the order of its groups.
"""


class PredictedDecreaseP(PScheduler):
    """Follows the ``p`` that would decrease the loss most.

    ::

        schedule = PredictedDecreaseP(optimizer, Objective(model, criterion, probe_batch), every=50)
        ...
        optimizer.step()
        schedule.step()

    For each ``p`` of a short grid, the direction ``d_p = g / (|g| + eps)^rho`` is the one that the optimizer would
    take, and ``(g . d_p)^2 / (2 d_p^T A d_p)`` what the best step along it would gain, with ``A`` the curvature; see
    :func:`~curvdiag.schedules.predicted_decrease.predicted_decrease`. The ``p`` with the largest wins, and the group's
    ``p`` is the smoothed winner. For LPSGDM the direction is that of its momentum, and ``g`` stays the gradient; before
    its first step, and for parameters that have no momentum yet, the direction is that of the gradient. Candidates
    that lead uphill or meet no positive curvature are left out; where none is left ``p`` is held.

    The winner depends on the point, and may jump from one end of the grid to the other in a step, even on a quadratic:
    ``curvdiag reproduce geometry``. Hence the smoothing, which keeps ``p`` from following noise; where there is none it
    is no gain. No rate enters: what is compared is the best step along each direction, not the one that the
    optimizer's rate will make.

    With a monitor whose cadence reads the clock (``OverheadBudget``, its default) two runs differ, and a resumed one is
    not bit-identical: give it ``every=``.

    Like the monitor it leaves no trace in the training, and what fails is logged while ``p`` is held. A measurement
    costs a gradient, the operator's graphs, and a product for each of the ``k`` candidates, all at once: about ``2 k``
    gradients of the objective, and ``2 k`` vectors of memory beside them. The operator is made anew at the present
    weights each time and freed.

    Args:
        optimizer: Every group has a ``"p"``, as those of LPSGD and LPSGDM.
        source: An Objective, which is measured at construction and then every ``every`` steps. Or a CurvatureMonitor,
            after each of whose measurements its objective is measured here too; until the first ``p`` is ``p_max``.
            Or a function of no arguments that gives ``(gradient, operator)`` over the parameters of the optimizer one
            after the other, in the order of its groups, or None.
        p_max: As in :class:`PScheduler`: one number or one for each group, by default each group's present ``p``.
        every: Calls of :meth:`step` between two measurements, 1 if not given; not with a monitor, which has a cadence.
        grid: Values of ``p`` to compare. Those above ``p_max`` are left out. By default 2, 3, 4, 6, 8, 12, ... and
            ``p_max``.
        curvature: ``"gauss-newton"``, which is never negative where the loss is convex in the outputs, or
            ``"hessian"``.
        per_group: Each group has its own ``p``, chosen by its own block of the curvature; as many products for each
            group. By default all groups share one (up to their ``p_max``), chosen along the joint direction, in which
            each group counts with its learning rate.
        smoothing: Weight of the old value against the new winner, in [0, 1).
        options: Further arguments of the operator: ``memory``, ``micro_batch``, ``outputs``, ``dtype``, ...

    Raises:
        ArgumentError: As PScheduler; ``source``, ``grid``, ``every``, ``curvature`` or ``smoothing`` mean nothing; a
            group maximises; the objective and the optimizer share no parameters.
        LossError: The loss has no Gauss-Newton matrix.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        source: Objective | CurvatureMonitor | Slope,
        p_max: float | Sequence[float] | None = None,
        *,
        every: int | None = None,
        grid: Sequence[float] | None = None,
        curvature: Curvature = "gauss-newton",
        per_group: bool = False,
        smoothing: float = 0.9,
        options: Mapping[str, Any] | None = None,
        last_epoch: int = -1,
    ) -> None:
        name = type(self).__name__
        require_p(optimizer, name)
        _check(optimizer, source, every, curvature, name)
        self.curvature, self.per_group, self.options = curvature, per_group, dict(options or {})
        self.objective: Objective | None = source.objective if isinstance(source, CurvatureMonitor) else None
        if isinstance(source, Objective):
            self.objective = source
            warn_of_ranks(name, source.holders)
        self._slope = source if callable(source) else None
        self._grid = _grid(grid)
        self._followed = Followed(smoothing)
        self._attempted, self._note = False, ""
        self._seen: dict[str, float] = {}
        self._winners: dict[str, float] = {}
        self._trigger = Source(source, {}, needs=(), owner=name) if isinstance(source, CurvatureMonitor) else None
        monitor = source if isinstance(source, CurvatureMonitor) else None
        self._source = Source(
            self._measure, {"measured": ""}, needs=(), refresh=every or 1, owner=name, monitor=monitor
        )
        Layout.of(optimizer, self.objective)
        if self.objective is not None:
            self._try(self.objective)
        super().__init__(optimizer, p_max, last_epoch)
        if self._grid is not None and self._grid[1] > min(self.base_ps):
            raise ArgumentError(
                f"{name}: fewer than two values of grid={self._grid} are at most p_max = {min(self.base_ps):g}"
            )

    @property
    def history(self) -> list[Choice]:
        """What it saw and chose at each measurement: predicted decreases by ``p`` (NaN: left out), the winner, the
        smoothed ``p`` of each group, and why it was held, if it was; oldest first."""
        return list(self._followed.history)

    @property
    def age(self) -> int | None:
        """How many calls of :meth:`step` ago the last measurement succeeded; None before the first."""
        return None if self._source.read_at is None else self.last_epoch - self._source.read_at

    def factors(self) -> list[float]:
        """``(p - 2) / (p_max - 2)`` for each group; 1 before the first measurement."""
        found = []
        for name, base in zip(group_names(self.optimizer), self.base_ps, strict=True):
            p = min(self._followed.values.get(self._unit(name), base), base)
            found.append((p - EUCLIDEAN) / (base - EUCLIDEAN) if base > EUCLIDEAN else 1.0)
        return found

    def step(self) -> None:
        """Measure if that is due, and set ``p``."""
        self._join()
        step, due = self.last_epoch + 1, True
        if self._trigger is not None:
            due = self._trigger.read(step) is not None
        self._attempted, self._note, self._seen, self._winners = False, "", {}, {}
        succeeded = due and self._source.read(step) is not None
        self._followed.take(self._winners if succeeded else {})
        super().step()
        if self._attempted:
            self._tell(self._note if succeeded else self._source.complaint)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs, in plain numbers and strings, the history included."""
        return {
            **super().state_dict(),
            "followed": self._followed.state_dict(),
            "source": self._source.state_dict(),
            "trigger": None if self._trigger is None else self._trigger.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue; load the states of the optimizer and of the monitor too, in any order."""
        self._followed.load_state_dict(state["followed"])
        self._source.load_state_dict(state["source"])
        if self._trigger is not None and state["trigger"] is not None:
            self._trigger.load_state_dict(state["trigger"])
        super().load_state_dict(state)

    def _unit(self, group: str) -> str:
        """Under which name the ``p`` of a group is followed."""
        return group if self.per_group else JOINT

    def _tell(self, note: str) -> None:
        chosen = {f"p/{k}": p for k, p in zip(group_names(self.optimizer), self.get_last_p(), strict=True)}
        self._followed.history.append(Choice(self.last_epoch, self._seen, chosen, note))
        if not self._winners:
            return
        listed = ", ".join(f"{p:.4g}" for p in chosen.values())
        won = ", ".join(f"{p:g}" for p in self._winners.values())
        log.info("PredictedDecreaseP at step %d: %s wins; p = %s", self.last_epoch, won, listed)
        if self._trigger is not None:
            scalars = {key: value for key, value in {**self._seen, **chosen}.items() if math.isfinite(value)}
            self._trigger.record({f"schedule/predicted_decrease_p/{key}": value for key, value in scalars.items()})

    def _measure(self) -> float | None:
        """Find the winners, on all ranks or on none. The source calls it, and survives what it raises."""
        self._attempted = True
        if self.objective is None or self.objective.holders.alone:
            return self._find()
        try:
            with self.objective.holders.together(f"measurement of {type(self).__name__}"):
                return self._find()
        except Exception:
            self._winners = {}  # one rank may have come further than another
            raise

    def _find(self) -> float | None:
        found = self._slope() if self._slope is not None else self._slope_and_curvature()
        if found is None:
            self._attempted = False
            return None
        gradient, operator = found
        layout = Layout.of(self.optimizer, self.objective)
        for unit, groups in self._groups(layout).items():
            winner = self._winner(layout, gradient, operator, groups, unit)
            if winner is not None:
                self._winners[unit] = winner
        without = [unit for unit in self._groups(layout) if unit not in self._winners]
        why = "no candidate leads downhill and meets positive curvature"
        if not self._winners:
            raise CurvdiagError(why)
        self._note = f"group {', '.join(without)} held: {why}" if without else ""
        return 1.0

    def _groups(self, layout: Layout) -> dict[str, list[int]]:
        """Which parameter groups share one ``p``, by unit; without those that the objective does not hold."""
        held = [index for index, parts in enumerate(layout.parts) if parts]
        if not self.per_group:
            return {JOINT: held}
        names = group_names(self.optimizer)
        return {names[index]: [index] for index in held}

    def _slope_and_curvature(self) -> tuple[Tensor, Any]:
        objective, dtype = self.objective, self._dtype
        assert objective is not None
        batches = list(objective.micro_batches(self.options.get("micro_batch")))
        weights = objective.weights(dtype=dtype)
        slope = objective.ranks.sum("slope", lambda: gradient_of(objective, weights, batches, dtype))
        return slope, self._operator(objective)

    def _winner(
        self, layout: Layout, gradient: Tensor, operator: Any, groups: Sequence[int], unit: str
    ) -> float | None:
        """The best ``p`` for these groups together; None where no candidate is left."""
        top = max(self.base_ps[index] for index in groups)
        grid = candidates(top) if self._grid is None else [p for p in self._grid if p <= top]
        rows = layout.directions(self.optimizer, gradient, grid, groups, self.base_ps)
        decreases = dict(zip(grid, predicted_decrease(operator, gradient, rows.T).tolist(), strict=True))
        suffix = f"/{unit}" if self.per_group else ""
        self._seen |= {f"decrease/{p:g}{suffix}": value for p, value in decreases.items()}
        left = [p for p in grid if math.isfinite(decreases[p])]
        if not left:
            return None
        winner = max(left, key=lambda p: decreases[p])  # of equal ones the smallest
        self._seen[f"winner{suffix}"] = winner
        return winner

    @property
    def _dtype(self) -> torch.dtype | None:
        """Half precision is too coarse to compare candidates in."""
        assert self.objective is not None
        half = self.objective.dtype in (torch.float16, torch.bfloat16)
        return self.options.get("dtype", torch.float32 if half else None)

    def _operator(self, objective: Objective) -> Any:
        return OPERATORS[self.curvature](objective, **{**self.options, "dtype": self._dtype})

    def _try(self, objective: Objective) -> None:
        """Raise now what would fail at every measurement."""
        try:
            self._operator(objective)
        except LossError as error:
            if self.curvature == "hessian":
                raise
            raise LossError(f'{error}; or give {type(self).__name__} curvature="hessian"') from error
        except (NonFiniteError, RuntimeError, MemoryError):
            pass  # may be over at the next measurement; the first one logs it


def _check(optimizer: Optimizer, source: Any, every: Any, curvature: Any, name: str) -> None:
    if not isinstance(source, Objective | CurvatureMonitor) and not callable(source):
        raise ArgumentError(
            f"{name} follows an Objective, a CurvatureMonitor, or a function that gives a gradient and an operator, "
            f"not {type(source).__name__}"
        )
    if curvature not in OPERATORS:
        raise ArgumentError(f"{name}: curvature is 'gauss-newton' or 'hessian', not {curvature!r}")
    if every is not None and isinstance(source, CurvatureMonitor):
        raise ArgumentError(f"{name} measures whenever the monitor does; leave every= out, and give it to the monitor")
    if every is not None and (isinstance(every, bool) or not isinstance(every, int) or every < 1):
        raise ArgumentError(f"{name}: every is a number of steps, at least 1, not {every!r}")
    for index, group in enumerate(optimizer.param_groups):
        if group.get("maximize"):
            raise ArgumentError(
                f"{name} compares decreases, and parameter group {index} maximises: minimise the negative instead"
            )


def _grid(grid: Sequence[float] | None) -> list[float] | None:
    if grid is None:
        return None
    found = sorted({float(p) for p in grid})
    if len(found) < 2 or not all(EUCLIDEAN <= p < math.inf for p in found):
        raise ArgumentError(f"grid is two or more finite values of p of at least 2, not {list(grid)}")
    return found
