"""Any schedule, slower where the curvature has become more anisotropic."""

from __future__ import annotations

import math
from typing import Any

from curvdiag.errors import ArgumentError
from curvdiag.schedules.following import Following
from curvdiag.schedules.measured_lr import WrappedLR, optimizer_of
from curvdiag.schedules.source import Measured
from curvdiag.spectrum import MEASURES, Anisotropy


class AnisotropyLR(WrappedLR):
    """The rate of any schedule, times ``(a_ref / a)^k``, clipped: slower where anisotropy ``a`` is above its reference.

    No published rule exists. This one is a guess, ``k = 1/2`` included, to be compared with the plain schedule.

    Some measures fall with anisotropy (``stable_rank``, ``participation_ratio``, ``intrinsic_dimension``,
    ``effective_rank``): for them ``a`` is one over the measure, so that the factor is ``(measure / reference)^k``, and
    ``a_ref`` is still given as a value of the measure. ``log a`` is smoothed, not ``a``, so that a measure and its
    inverse give the same.

    Until the first measurement the rates are the wrapped schedule's own. A measurement that is NaN, fails, or is not
    positive (a negative mass of zero, say, which has no ratio) is logged, and the last one held.

    With a monitor whose cadence reads the clock (``OverheadBudget``, its default) two runs differ, and a resumed one is
    not bit-identical: give it ``every=``.

    Args:
        scheduler: Any learning-rate schedule. It is stepped by this one; do not step it yourself.
        source: A monitor that measures ``"anisotropy"``, or a function that gives the number, an
            :class:`~curvdiag.spectrum.Anisotropy`, its ``measures``, or a measurement of a monitor.
        measure: Any of :data:`curvdiag.spectrum.MEASURES`. The effective rank is positive for every matrix but zero,
            and does not hang on the single largest eigenvalue; the condition number is undefined where there is
            negative curvature.
        k: The exponent; 0 changes nothing, and a negative one makes the rate rise with anisotropy.
        a_ref: Value of the measure at which the rate is left as it is; the first measurement if not given.
        low, high: Bounds of the factor.
        smoothing: Weight of the old value, in [0, 1).
        refresh: Call a function every so many steps; a monitor has a cadence of its own.

    Raises:
        ArgumentError: An argument is out of its range, ``scheduler`` is none, or the monitor does not measure
            anisotropy.

    Attributes:
        reference: ``a_ref``, or the first measurement; None before it.
        factor: What the wrapped schedule's rates are multiplied by.
    """

    remembered = ("reference", "factor")

    def __init__(
        self,
        scheduler: Any,
        source: Measured,
        *,
        measure: str = "effective_rank",
        k: float = 0.5,
        a_ref: float | None = None,
        low: float = 0.1,
        high: float = 10.0,
        smoothing: float = 0.5,
        refresh: int = 1,
    ) -> None:
        optimizer_of(scheduler, "AnisotropyLR")
        if measure not in MEASURES:
            raise ArgumentError(f"AnisotropyLR: measure is one of {', '.join(MEASURES)}, not {measure!r}")
        if not math.isfinite(k):
            raise ArgumentError(f"AnisotropyLR: the exponent k is a finite number, not {k}")
        if not 0 < low <= high < math.inf:
            raise ArgumentError(f"AnisotropyLR: the factor is clipped to 0 < low <= high, not to {low} and {high}")
        if a_ref is not None and not (a_ref > 0 and math.isfinite(a_ref)):
            raise ArgumentError(f"AnisotropyLR: a_ref is a positive value of {measure}, not {a_ref}")
        self.measure, self.k, self.low, self.high = measure, float(k), float(low), float(high)
        self.reference = None if a_ref is None else float(a_ref)
        self.factor = 1.0
        following = Following(
            source,
            {measure: f"curv/anisotropy/{measure}"},
            needs=["anisotropy"],
            refresh=refresh,
            owner="AnisotropyLR",
            name="anisotropy",
            smoothing=smoothing,
            inside=lambda answer: answer.measures if isinstance(answer, Anisotropy) else answer,
        )
        super().__init__(scheduler, following)

    def take(self, numbers: dict[str, float]) -> str:
        value = numbers[self.measure]
        if not value > 0:
            return f"{self.measure} = {value:g} is not positive, and has no ratio to a reference"
        self.reference = value if self.reference is None else self.reference
        smooth = self.following.followed.take({"log": math.log(value)})["log"]
        rise = smooth - math.log(self.reference)
        exponent = -self.k * (rise if MEASURES[self.measure].rises else -rise)
        # Clipped before the exponential, which overflows.
        self.factor = math.exp(min(max(exponent, math.log(self.low)), math.log(self.high)))
        return ""

    def change(self, rates: list[float]) -> list[float]:
        return [rate * self.factor for rate in rates]

    def choice(self) -> dict[str, float]:
        return {"factor": self.factor}
