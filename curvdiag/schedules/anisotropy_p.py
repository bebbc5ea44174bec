"""AnisotropyP: p follows the measured anisotropy of the curvature."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch.optim import Optimizer

from curvdiag.errors import ArgumentError
from curvdiag.monitor import CurvatureMonitor
from curvdiag.schedules.anisotropy_scale import AnisotropyScale, geometric_mean, read_measure
from curvdiag.schedules.layer_weights import LayerWeights
from curvdiag.schedules.p_scheduler import PScheduler, group_names, require_p
from curvdiag.schedules.source import Choice, Followed, Measured, Source

log = logging.getLogger(__name__)

ISOTROPIC = 1e-3
"""A first measurement this close to ``a_low``, in its logarithm, is isotropic, and no ``a_high``."""


class AnisotropyP(PScheduler):
    """``p = 2 + (p_max - 2) clip(log(a / a_low) / log(a_high / a_low), 0, 1)``, with ``a`` a measure of anisotropy.

    Isotropic curvature gives ``p = 2``, plain SGD; curvature as anisotropic as ``a_high`` gives ``p_max``. The measures
    are those of :func:`curvdiag.spectrum.anisotropy`. For one that falls with anisotropy the formula is the same, with
    ``a_high < a_low``: low and high are said of the anisotropy, and both logarithms change sign. No published rule
    exists; the published schedule is :class:`~curvdiag.schedules.CosineP`.

    ::

        monitor = CurvatureMonitor(objective, every=100).attach(optimizer)
        schedule = AnisotropyP(optimizer, monitor)
        for batch in batches:
            ...
            optimizer.step()
            schedule.step()

    Before the first measurement ``p`` is ``p_max``, where the published schedule starts, and what the first measurement
    gives as long as ``a_high`` is not given. Where a measurement fails, is NaN or comes no more, the last one is held;
    each is logged, and :attr:`age` says how old it is. With a monitor whose cadence reads the clock
    (``OverheadBudget``, the default) two runs differ, and a resumed one is not bit-identical: give it ``every=``.

    What it saw and chose is logged at level INFO, listed in :attr:`history`, and written into the monitor's run under
    ``schedule/anisotropy_p/a`` (``.../a/<group>`` per layer) and ``schedule/anisotropy_p/p/<group>``.

    Args:
        optimizer: Every group has a ``"p"``.
        source: A monitor that measures ``"anisotropy"`` (``per_layer``: ``"layer_anisotropy"``); or a function that
            gives a number, an Estimate, an :class:`~curvdiag.spectrum.Anisotropy` or its ``measures``, a measurement of
            a monitor, or None for nothing new. ``per_layer`` it gives a mapping with one of them for each group, by
            its ``"name"`` or its number.
        p_max: As in :class:`~curvdiag.schedules.PScheduler`.
        measure: Any of ``MEASURES``. By default the effective rank: it has a positive value for every matrix but zero,
            indefinite and small ones included. So has the stable rank, which hangs on the largest eigenvalue alone.
        a_low: Where ``p = 2``. By default the isotropic value of the measure: 1, or ``P``, which is the size of the
            monitor's objective, of the Anisotropy, or else the number of the optimizer's parameters. The isotropic
            value of ``"negative_mass"`` is 0, which has no logarithm: give one. Per layer each layer has its own.
        a_high: Where ``p = p_max``; the first measurement by default, for each group its own ``per_layer``. While the
            measurements are isotropic ``p`` is 2, and the first that is not becomes ``a_high``. The anisotropy of many
            nets rises from their initial weights; then ``p`` stays at ``p_max``, and a number from a trial run serves
            better.
        smoothing: Weight of the old value in [0, 1), at each measurement, of the clipped ratio of logarithms: one wild
            measurement moves ``p`` no further than from one end of its range to the other. The first is taken as it is.
        monotone: ``"down"``: ``p`` never rises, from the first measurement on; ``"up"``: it never falls.
        per_layer: Each group by the anisotropy of its own layers: their geometric mean, each layer with the number of
            its parameters in the group. A layer below ``a_low`` counts as ``a_low``. A group is held where one of its
            layers is missing or NaN, and the others are not.
        refresh: Call a function every so many steps.

    Raises:
        ArgumentError: An argument means nothing; the monitor does not measure what is needed; and as in
            :class:`~curvdiag.schedules.PScheduler`.

    Attributes:
        a_high: Where ``p = p_max``, given or found: one number, or with ``per_layer`` one for each group; None where
            nothing was measured.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        source: Measured,
        p_max: float | Sequence[float] | None = None,
        *,
        measure: str = "effective_rank",
        a_low: float | None = None,
        a_high: float | None = None,
        smoothing: float = 0.5,
        monotone: Literal[False, "down", "up"] = False,
        per_layer: bool = False,
        refresh: int = 1,
    ) -> None:
        require_p(optimizer, "AnisotropyP")
        if monotone not in (False, "down", "up"):
            raise ArgumentError(f"monotone is False, 'down' (p never rises) or 'up', not {monotone!r}")
        self.optimizer, self.measure, self.monotone, self.per_layer = optimizer, measure, monotone, per_layer
        self._scale = AnisotropyScale(measure, a_low, a_high)
        self._followed = Followed(smoothing)
        # Below, a unit is what is measured as one: the number of a group with per_layer, else the empty string.
        self._highs: dict[str, float] = {}
        self._chosen: dict[str, float] = {}
        self._sizes: dict[str, int] = {}
        self._told: set[tuple[str, str]] = set()
        self._layers: LayerWeights | None = None
        keys, needs = {"": f"curv/anisotropy/{measure}"}, "anisotropy"
        if per_layer:
            keys, needs = {}, "layer_anisotropy"
            if isinstance(source, CurvatureMonitor):
                self._layers = LayerWeights(source.objective)
                keys = {layer: f"curv/layer/{layer}/anisotropy/{measure}" for layer in self._layers.sizes}
                if measure == "top_ratio":
                    raise ArgumentError("a monitor measures no top_ratio of single layers; choose another measure")
        self._source = Source(
            source, keys, needs=[needs], refresh=refresh, owner="AnisotropyP", pick=self._pick, partial=per_layer
        )
        self._check_ends()
        super().__init__(optimizer, p_max)

    @property
    def a_high(self) -> float | list[float | None] | None:
        highs = [self._highs.get(unit, self._scale.high) for unit in self._units()]
        return highs if self.per_layer else highs[0]

    @property
    def history(self) -> list[Choice]:
        """What it saw and chose at each measurement, and why it held what it had, oldest first."""
        return list(self._followed.history)

    @property
    def age(self) -> int | None:
        """How many calls of :meth:`step` ago the last measurement was taken up; None before the first."""
        return None if self._source.read_at is None else self.last_epoch - self._source.read_at

    def factors(self) -> list[float]:
        """``(p - 2) / (p_max - 2)`` for each group; 1 before the first measurement."""
        return [self._chosen.get(unit, 1.0) for unit in self._units()]

    def step(self) -> None:
        """Take up a new measurement, if there is one, and set ``p``."""
        found = self._source.read(self.last_epoch + 1)
        seen = {} if found is None else self._seen(found)
        for unit, (a, low) in seen.items():
            self._choose(unit, a, low)
        super().step()
        if seen or self._source.noticed:
            self._tell({unit: a for unit, (a, _) in seen.items()})

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs, the history and a measurement not yet taken up included."""
        return {
            **super().state_dict(),
            "a_high": dict(self._highs),
            "chosen": dict(self._chosen),
            "sizes": dict(self._sizes),
            "followed": self._followed.state_dict(),
            "source": self._source.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue; load the states of the optimizer and of the monitor too, in any order."""
        super().load_state_dict(state)
        self._highs, self._chosen, self._sizes = (dict(state[name]) for name in ("a_high", "chosen", "sizes"))
        self._followed.load_state_dict(state["followed"])
        self._source.load_state_dict(state["source"])

    def _units(self) -> list[str]:
        """The unit of each group."""
        return [str(index) if self.per_layer else "" for index in range(len(self.optimizer.param_groups))]

    def _seen(self, found: Mapping[str, float]) -> dict[str, tuple[float, float]]:
        """``a`` and its ``a_low`` for those units that were measured."""
        if self._layers is None:
            return {unit: (a, self._scale.low_of(self._size(unit))) for unit, a in found.items()}
        lows = {layer: self._scale.low_of(size) for layer, size in self._layers.sizes.items()}
        values = {layer: self._scale.no_less_than(a, lows[layer]) for layer, a in found.items()}
        seen = {}
        for unit, group in zip(self._units(), self.optimizer.param_groups, strict=True):
            weights = self._layers.of(group)
            if not weights:
                self._once("empty", unit, "its parameters are not among those that the monitor measures; p is held")
            elif weights.keys() <= values.keys():
                seen[unit] = geometric_mean(values, weights), geometric_mean(lows, weights)
        return seen

    def _size(self, unit: str) -> int:
        """The order of the matrix that a unit is measured by."""
        if isinstance(self._source.source, CurvatureMonitor):
            return self._source.source.objective.parameters.size
        groups = zip(self._units(), self.optimizer.param_groups, strict=True)
        return self._sizes.get(unit) or sum(p.numel() for u, group in groups if u == unit for p in group["params"])

    def _choose(self, unit: str, a: float, low: float) -> None:
        """Smooth the factor that ``a`` gives; the first anisotropic ``a`` is the high end where none is given."""
        scale = self._scale
        high = self._highs.get(unit, scale.high)
        if high is None and a > 0 and scale.excess(a, low) > ISOTROPIC:
            high = self._highs[unit] = a
            log.info("AnisotropyP: a_high = %.6g%s", a, self._of(unit))
        if high is None:
            new = 0.0 if scale.excess(a, low) <= ISOTROPIC else 1.0
            self._once("first", unit, f"the first {self.measure}, {a:.6g}, is no a_high; give a_high=")
        elif not scale.excess(high, low) > 0:
            self._once("ends", unit, f"a_high = {high:g} is no more anisotropic than a_low = {low:g}; p is held")
            return
        else:
            new = scale.fraction(a, low, high)
        factor = self._followed.take({unit: new})[unit]
        if self.monotone and unit in self._chosen:
            factor = (min if self.monotone == "down" else max)(factor, self._chosen[unit])
        self._chosen[unit] = factor

    def _tell(self, seen: Mapping[str, float]) -> None:
        """Log, remember and record what was seen and chosen."""
        names = group_names(self.optimizer)
        chosen = {f"p/{name}": p for name, p in zip(names, self.get_last_p(), strict=True)}
        numbers = {f"a/{names[int(unit)]}" if unit else "a": a for unit, a in seen.items()}
        self._followed.history.append(Choice(self.last_epoch, numbers, chosen, self._source.noticed))
        if seen:
            listed = ", ".join(f"{name} = {value:.6g}" for name, value in (numbers | chosen).items())
            log.info("AnisotropyP, step %d, by %s: %s", self.last_epoch, self.measure, listed)
            self._source.record({f"schedule/anisotropy_p/{name}": n for name, n in (numbers | chosen).items()})

    def _once(self, kind: str, unit: str, message: str) -> None:
        if (kind, unit) not in self._told:
            self._told.add((kind, unit))
            log.warning("AnisotropyP%s: %s", self._of(unit), message)

    def _of(self, unit: str) -> str:
        return f" of parameter group {group_names(self.optimizer)[int(unit)]}" if unit else ""

    def _pick(self, answer: Any) -> dict[str, float]:
        """The numbers in a function's answer, by unit."""
        if not self.per_layer:
            answer = {"": answer}
        elif not isinstance(answer, Mapping):
            raise ArgumentError(
                f"with per_layer=True the function gives a mapping by group, not {type(answer).__name__}"
            )
        units = {name: str(index) for index, name in enumerate(group_names(self.optimizer))}
        units |= {unit: unit for unit in self._units()}
        found = {}
        for name, value in answer.items():
            if str(name) not in units:
                raise ArgumentError(f"there is no parameter group {name!r}; there are {', '.join(units)}")
            if value is not None:
                unit = units[str(name)]
                found[unit], size = read_measure(value, self.measure)
                if size is not None:
                    self._sizes[unit] = size
        return found

    def _check_ends(self) -> None:
        """Raise where a given ``a_high`` cannot be right, as far as the sizes are known."""
        scale, lows = self._scale, []
        if self._layers is not None:
            known = {layer: scale.low_of(size) for layer, size in self._layers.sizes.items()}
            groups = [self._layers.of(group) for group in self.optimizer.param_groups]
            lows = [geometric_mean(known, weights) for weights in groups if weights]
        elif isinstance(self._source.source, CurvatureMonitor) or scale.low_of(1) == scale.low_of(2):
            lows = [scale.low_of(self._size(unit)) for unit in self._units()]
        for low in lows:
            scale.check_high(low)
