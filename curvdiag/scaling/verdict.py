"""In words: is the gradient noise proportional to the curvature, superlinear in it, or no power of it at all."""

from __future__ import annotations

import math
from dataclasses import dataclass

from curvdiag.errors import ArgumentError
from curvdiag.results import Result
from curvdiag.scaling.departure import Departure
from curvdiag.scaling.power_law import Directions, PowerLaw

# A change of the local exponent, over the range that was measured, that no single exponent may hide: half of the way
# from C proportional to H to C proportional to H^2.
BEND = 0.5
# Scatter of the directions about the line, in decades, that does the same: a factor of 1.6 either way.
SCATTER = 0.2
# An interval around 1 that also holds 1.5, or 0.5, decides nothing.
WIDTH = 0.5
# Less than this range of H, or fewer points than this, are no ground for a power law.
DECADES, POINTS = 0.5, 5
# Departures rarer than this under sampling alone are taken for real. With the 5 % of the interval it makes 6 %.
RARE = 0.01


@dataclass(frozen=True)
class Verdict(Result):
    """One of six words, and the figures that decided it.

    - ``"proportional"``: the interval of the exponent holds 1, and no direction departs from slope 1 by more than
      sampling error explains.
    - ``"proportional on average"``: the interval holds 1, but single directions depart from slope 1, beyond sampling
      error and within a factor of 1.6.
    - ``"superlinear"``, ``"sublinear"``: the whole interval lies above 1, or below.
    - ``"not a power law"``: beyond sampling error, the local exponent changes by more than 0.5 over the range, or the
      directions scatter about the line by more than a factor of 1.6.
    - ``"undecided"``: too few directions, too small a range, or too wide an interval.
    """

    word: str
    reasons: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.word}: " + "; ".join(self.reasons)


def judge(held_out: Directions, *, method: str = "ols") -> Verdict:
    """The verdict on a held-out measurement, at the largest number of directions that has an interval.

    Where C is proportional to H it says otherwise in about 6 of 100 repetitions: 5 for the interval of 95 %, 1 for the
    test of single directions (measured: 5 to 7 with 2,000 samples or more, 7 to 8 with 400, 7 to 12 with 100).

    The verdict is on the basis it was given: "proportional" in a basis from few samples does not show that C is
    proportional to H in the population's eigenbasis (:func:`~curvdiag.scaling.measure.scaling_test` says how far the
    exponent is pulled towards 1). Such a basis also mixes some of the strongest directions into the weakest, and there
    adds more to C than to H where the noise is superlinear: the line bends, and "not a power law" then means that there
    were too few samples for the basis, or few for so wide a range.

    Args:
        held_out: Along directions that other samples gave.
        method: The fit that decides; least squares has the interval that covers best.

    Raises:
        ArgumentError: The measurement is biased, or has no fit by this method.
    """
    if held_out.biased:
        raise ArgumentError("a verdict needs directions found on other samples than those measured: this fit is biased")
    if method not in held_out.noise_fits:
        raise ArgumentError(f"there is no fit by {method!r}; there are {', '.join(held_out.noise_fits)}")
    departure, fit = held_out.departure, held_out.noise_fits[method]
    if departure is None:
        return Verdict("undecided", (_no_interval(held_out),))
    at = fit.counts.tolist().index(departure.count)
    low, high = float(fit.low[at]), float(fit.high[at])
    reasons = [_exponent(fit, at, departure, held_out.level), *_range(held_out, departure)]
    if math.isnan(low) or not _enough(departure):
        return Verdict("undecided", tuple(reasons))
    reasons[1:1] = [_bend(departure), _scatter(departure)]
    return Verdict(_word(low, high, departure), tuple(reasons))


def _enough(departure: Departure) -> bool:
    return departure.points >= POINTS and departure.decades >= DECADES


def _word(low: float, high: float, departure: Departure) -> str:
    bent = not departure.bend_low <= 0 <= departure.bend_high and abs(departure.bend) > BEND
    scattered = departure.scatter_p < RARE and departure.scatter > SCATTER
    if bent or scattered:
        return "not a power law"
    if low > 1:
        return "superlinear"
    if high < 1:
        return "sublinear"
    if low <= 1 - WIDTH or high >= 1 + WIDTH:
        return "undecided"
    return "proportional on average" if departure.imbalance_p < RARE else "proportional"


def _exponent(fit: PowerLaw, at: int, departure: Departure, level: float) -> str:
    low, high = fit.low[at], fit.high[at]
    place = "contains 1" if low <= 1 <= high else "lies above 1" if low > 1 else "lies below 1"
    where = f"{departure.points} directions over {departure.decades:.1f} decades of curvature"
    if math.isnan(low):
        return f"exponent {fit.exponent[at]:.3f} on {where}, without an interval: too many replicates had no fit"
    if not _enough(departure):
        where += f", where {POINTS} over {DECADES} are the least for a verdict"
    text = f"exponent {fit.exponent[at]:.3f} on {where}; its {100 * level:g} % interval [{low:.3f}, {high:.3f}] {place}"
    if low <= 1 - WIDTH or high >= 1 + WIDTH:
        return text + (" and is too wide to decide" if low <= 1 <= high else "")
    return text


def _bend(departure: Departure) -> str:
    low, high = departure.bend_low, departure.bend_high
    if low <= 0 <= high:
        size = "within sampling error"
    else:
        size = "beyond sampling error" + (f" but below {BEND}" if abs(departure.bend) <= BEND else f" and above {BEND}")
    return (
        f"the local exponent goes from {departure.bottom:.2f} at the smallest curvature to {departure.top:.2f} at the "
        f"largest, a change of {departure.bend:.2f} (99 % interval [{low:.2f}, {high:.2f}]), {size}"
    )


def _scatter(departure: Departure) -> str:
    return (
        f"on top of sampling error, directions scatter by a factor of {10**departure.scatter:.2f} about the line "
        f"(p = {departure.scatter_p:.2g} for none), and C/H by {10**departure.imbalance:.2f} "
        f"(p = {departure.imbalance_p:.2g} for none)"
    )


def _range(held_out: Directions, departure: Departure) -> tuple[str, ...]:
    total = len(held_out.curvature)
    if departure.count == total and not held_out.left_out:
        return ()
    return (
        f"{held_out.left_out} of {total} directions have no positive curvature or noise; more than 5 % are missing "
        f"beyond {held_out.reach}, or not known to half of their size beyond {held_out.resolved}",
    )


def _no_interval(held_out: Directions) -> str:
    if held_out.resolved < POINTS:
        return (
            f"only the first {held_out.resolved} of {len(held_out.curvature)} directions have a curvature and a noise "
            "that are positive and known to half of their size: take more samples"
        )
    return (
        "the fits have no intervals: measure with a bootstrap, and with counts among the directions that are resolved"
    )
