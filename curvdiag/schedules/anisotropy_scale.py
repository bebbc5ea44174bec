"""Where a measure of anisotropy lies between isotropic and as anisotropic as it gets, in its logarithm."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from curvdiag.errors import ArgumentError
from curvdiag.monitor import Measurement
from curvdiag.schedules.source import as_float
from curvdiag.spectrum import MEASURES, Anisotropy


@dataclass(frozen=True)
class AnisotropyScale:
    """A measure, and its ends where they are given.

    For a measure that falls with anisotropy the high end is the smaller number: low and high are said of the
    anisotropy.

    Attributes:
        measure: Any of ``MEASURES``.
        low: The end where ``p = 2``; the isotropic value if None.
        high: The end where ``p = p_max``; to be found if None.

    Raises:
        ArgumentError: The measure is unknown; an end is not positive, or is needed and not given.
    """

    measure: str
    low: float | None = None
    high: float | None = None

    def __post_init__(self) -> None:
        if self.measure not in MEASURES:
            raise ArgumentError(f"there is no measure {self.measure!r} of anisotropy; there are {', '.join(MEASURES)}")
        for name, value in (("a_low", self.low), ("a_high", self.high)):
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ArgumentError(f"{name} is a positive number, since it has a logarithm, not {value}")
        if self.low is None and not MEASURES[self.measure].isotropic(1) > 0:
            raise ArgumentError(
                f"the isotropic value of {self.measure} is 0, which has no logarithm; give a_low=, the value up to "
                "which p is 2, such as 0.01"
            )

    @property
    def rises(self) -> bool:
        """Whether the measure grows with anisotropy."""
        return MEASURES[self.measure].rises

    def low_of(self, size: int) -> float:
        """The low end for a matrix of this order."""
        return MEASURES[self.measure].isotropic(size) if self.low is None else self.low

    def excess(self, a: float, low: float) -> float:
        """How much more anisotropic ``a`` is than ``low``, in its logarithm; the limit of it where ``a`` is zero."""
        ratio = math.log(a / low) if a > 0 else -math.inf
        return ratio if self.rises else -ratio

    def fraction(self, a: float, low: float, high: float) -> float:
        """``clip(log(a / low) / log(high / low), 0, 1)``; ``high`` is the more anisotropic of the ends."""
        return min(max(self.excess(a, low) / self.excess(high, low), 0.0), 1.0)

    def no_less_than(self, a: float, low: float) -> float:
        """``a``, or ``low`` where ``a`` is less anisotropic."""
        return max(a, low) if self.rises else min(a, low)

    def check_high(self, low: float) -> None:
        """Raise unless a given high end is more anisotropic than ``low``."""
        if self.high is not None and not self.excess(self.high, low) > 0:
            raise ArgumentError(
                f"a_high={self.high:g} is no more anisotropic than a_low={low:g}: {self.measure} "
                f"{'rises' if self.rises else 'falls'} with anisotropy"
            )


def read_measure(answer: Any, measure: str) -> tuple[float, int | None]:
    """The measure in what a function gave, and the order of its matrix where that is known.

    Args:
        answer: A number, an Estimate, an Anisotropy, its ``measures``, or a measurement of a monitor.
        measure: Any of ``MEASURES``.

    Raises:
        ArgumentError: It does not hold the measure, or a negative one.
    """
    size = None
    if isinstance(answer, Measurement):
        answer = answer.scalars
    if isinstance(answer, Anisotropy):
        answer, size = answer.measures, answer.size
    if isinstance(answer, Mapping):
        names = [name for name in (measure, f"curv/anisotropy/{measure}") if name in answer]
        if not names:
            raise ArgumentError(f"there is no {measure} in what the function gave: {', '.join(map(str, answer))}")
        answer = answer[names[0]]
    number = as_float(answer)
    if number < 0:
        raise ArgumentError(f"{measure} is never negative, and the function gave {number:g}")
    return number, size


def geometric_mean(values: Mapping[str, float], weights: Mapping[str, float]) -> float:
    """``exp(sum w log a / sum w)`` over the names of ``weights``; zero where a value is."""
    if min(values[name] for name in weights) <= 0:
        return 0.0
    total = math.fsum(weight * math.log(values[name]) for name, weight in weights.items())
    return math.exp(total / math.fsum(weights.values()))
