"""What the figures of C against H share: which fit is meant, what it is called, how its series look."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from curvdiag.errors import ArgumentError
from curvdiag.plotting.style import BLUE, LINES, ORANGE

if TYPE_CHECKING:
    from curvdiag.scaling.power_law import Directions, PowerLaw
    from curvdiag.scaling.result import ScalingResult

SQUARE = r"E[h$^2$]"
# By (squares, biased): held-out series are full, in-sample ones hollow, in every figure.
LOOKS: dict[tuple[bool, bool], dict[str, Any]] = {
    (False, False): {"color": BLUE, "marker": "o", "linestyle": "-", "markerfacecolor": BLUE},
    (True, False): {"color": LINES[3][0], "marker": "^", "linestyle": "--", "markerfacecolor": LINES[3][0]},
    (False, True): {"color": ORANGE, "marker": "s", "linestyle": "-.", "markerfacecolor": "white"},
    (True, True): {"color": LINES[4][0], "marker": "v", "linestyle": ":", "markerfacecolor": "white"},
}


@dataclass(frozen=True)
class Line:
    """``log10 y = intercept + exponent log10 x``, fitted to the first ``count`` directions; ``low`` and ``high``
    end the interval of the exponent, NaN where there is none."""

    exponent: float
    intercept: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        return exponent_text(self.exponent, self.low, self.high)


def sides(result: ScalingResult | Directions) -> list[Directions]:
    """The measurements in a result, the held-out one first; or the one that was given, or the only one there is."""
    given: Any = result  # known by its fields only
    if not hasattr(given, "held_out"):
        return [given]
    return [given.held_out] if given.held_out.biased else [given.held_out, given.in_sample]


def side_name(directions: Directions) -> str:
    return "in-sample (biased)" if directions.biased else "held out"


def fits_of(directions: Directions, method: str | None, square: bool = False) -> PowerLaw | None:
    """The fits by one method, the first of them if not given; ``None`` where there are none.

    Raises:
        ArgumentError: There is no fit by this method.
    """
    fits = directions.square_fits if square else directions.noise_fits
    if not fits:
        return None
    if method is not None and method not in fits:
        raise ArgumentError(f"there is no fit by {method!r}; there are {', '.join(fits)}")
    return fits[method or next(iter(fits))]


def chosen_line(directions: Directions, method: str | None = None, count: int | None = None) -> Line | None:
    """The fit of C to most directions of those that have an interval, where the verdict is made; or to ``count``.

    Where no fit has an interval it is the one to most directions.

    Raises:
        ArgumentError: There is no fit by this method, or to this number of directions.
    """
    fits = fits_of(directions, method)
    if fits is None:
        return None
    counts = np.asarray(fits.counts)
    if count is not None and count not in counts:
        raise ArgumentError(f"there is no fit to {count} directions, but to {', '.join(map(str, counts.tolist()))}")
    usable = np.isfinite(fits.exponent) if count is None else counts == count
    sure = usable & np.isfinite(fits.low) & np.isfinite(fits.high)
    usable = sure if sure.any() else usable
    if not usable.any():
        return None
    at = np.flatnonzero(usable)[np.argmax(counts[usable])]
    exponent, intercept, low, high = (float(part[at]) for part in (fits.exponent, fits.intercept, fits.low, fits.high))
    return Line(exponent, intercept, low, high, int(counts[at]))


def exponent_text(exponent: float, low: float, high: float) -> str:
    """``1.213 [1.152, 1.274]``, as many figures as the printed result has: 0.995 is not 1."""
    ends = f" [{low:.3f}, {high:.3f}]" if math.isfinite(low) and math.isfinite(high) else ""
    return f"{exponent:.3f}{ends}".replace("-", "\N{MINUS SIGN}")
