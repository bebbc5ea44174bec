"""The results of curvature-weighted gradient diversity, in its two forms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from curvdiag.estimate import Estimate
from curvdiag.results import Result

Negative = Literal["abs", "floor"]

# Default of delta and of the diagonal's floor, as a fraction of the largest eigenvalue or entry.
FRACTION = 1e-3


@dataclass(frozen=True)
class CWGD(Result):
    """Curvature-weighted gradient diversity, in either form.

    Attributes:
        value: Of the probe set, with a standard error across the random vectors. ``C`` is divided by ``N``; the
            population's, and distinct pairs, take ``N / (N - 1)`` times that.
        form: ``"full"`` or ``"diagonal"``.
        lambda_max: The largest eigenvalue (a Ritz value) or diagonal entry that was found.
        matvecs: Products with the Hessian.
        notes: What stands in the way of the number.
    """

    value: Estimate
    form: str
    lambda_max: float
    matvecs: int
    notes: tuple[str, ...]

    figure = "estimate"

    def plot(self, ax: Any = None, **options: Any) -> Any:
        """Draw the value with its interval."""
        return self.value.plot(ax, **{"label": "CWGD", **options})

    def _lines(self) -> list[str]:
        return []

    def __str__(self) -> str:
        lines = [f"CWGD, {self.form} form: {self.value}", *self._lines(), *(f"note: {note}" for note in self.notes)]
        return "\n  ".join(lines)


@dataclass(frozen=True)
class FullCWGD(CWGD):
    """``2 tr((|H| + delta)^-1 C)``.

    Attributes:
        delta: What is added to ``|H|``.
        with_tenth, with_tenfold: The value with ``delta / 10`` and with ``10 delta``, from the same quadratures.
        log_slope: ``d log value / d log delta``, between -1 and 0: which share of the value ``delta`` decides.
        steps: Lanczos steps of each start.
        change: How far ``value``, ``with_tenth`` and ``with_tenfold`` moved while the steps doubled for the last time.
        converged: Whether it changed ``value`` by less than its standard error.
    """

    delta: float
    with_tenth: Estimate
    with_tenfold: Estimate
    log_slope: Estimate
    steps: int
    change: tuple[float, float, float]
    converged: bool

    def _lines(self) -> list[str]:
        return [
            f"delta {self.delta:.3g} (lambda_max {self.lambda_max:.4g}), {self.steps} steps, {self.matvecs} products",
            f"delta / 10: {self.with_tenth}   10 delta: {self.with_tenfold}",
            f"d log value / d log delta: {self.log_slope}",
        ]


@dataclass(frozen=True)
class DiagonalCWGD(CWGD):
    """``2 sum_k sigma_k^2 / lambda_k`` over the parameters, as published.

    ``1 / lambda`` of a noisy estimate is too large in the mean, by about its relative variance: the value is biased
    upwards, and the less the more probes. Entries that the noise hides altogether are another matter: they carry
    about the noise's own size, or lie on the floor, and what they add to the value says nothing of the curvature.

    Attributes:
        floor: Smallest ``lambda_k`` that is divided by; smaller ones are raised to it.
        floor_share: Share of the value that comes from entries on the floor. Minus ``d log value / d log floor``.
        on_floor: How many entries are on it.
        lost_share: Share of the value from entries within two standard errors of zero: what the probes' noise made up,
            which more probes would change. NaN for a single probe.
        negative: How many of the estimated entries are negative.
        negative_as: What was done with them: ``"abs"`` took their size, ``"floor"`` put them on the floor.
        bias: The jackknife's estimate, over probes, of the bias of ``value``, not removed from it. To be trusted where
            ``lost_share`` is small. NaN for a single probe.
        probes: Random vectors behind the diagonal.
    """

    floor: float
    floor_share: float
    on_floor: int
    lost_share: float
    negative: int
    negative_as: Negative
    bias: float
    probes: int

    def _lines(self) -> list[str]:
        negative = "their size taken" if self.negative_as == "abs" else "put on the floor"
        return [
            f"floor {self.floor:.3g}: {self.on_floor:,} entries on it carry {self.floor_share:.1%} of the value",
            f"{self.negative:,} negative entries, {negative}; {self.probes} probes",
            f"{self.lost_share:.1%} of the value from entries within two standard errors of zero",
            f"bias from the probes' noise, not removed: about {self.bias:.3g}",
        ]
