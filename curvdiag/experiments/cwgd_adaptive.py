"""Where curvature or noise change along the way: what is adaptive in CWGD-Cosine against plain cosine.

Every method's peak rate is tuned by itself, over the same rates, on seeds of its own; then the methods are compared on
other seeds with the same noise for all. The normalised variant at the peak rate ``eta`` is CWGD-Cosine at
``(1 + alpha) eta``: tuned, the two are one method, and only one of them is run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
from scipy import stats

from curvdiag.experiments.cwgd_cells import ALPHA
from curvdiag.experiments.quadratics import Array, cosine, cwgd_factor
from curvdiag.results import Result

RATES = 2.0 ** (np.arange(-24, 9) / 4)
"""Peak rates that every method is tuned over, in units of ``1 / lambda_max``: 33 from 1/64 to 4."""

FINER = 2.0 ** (np.arange(-4, 5) / 16)
"""The second tuning, about the best of these."""
TUNED = ("normalised", "replayed")
EXPLODED = 1e30
"""A final error beyond this, or none at all, is infinite."""


class Case(Protocol):
    """SGD on one problem, in float64, over seeds and methods at once: states are ``[S, M, d]``."""

    name: str
    steps: int
    forms: tuple[str, ...]
    """Ways to know CWGD, for :meth:`cwgd`."""

    def start(self, seeds: int, methods: int) -> Array: ...

    def draw(self, seeds: int, t: int, generator: np.random.Generator) -> object:
        """What is random in step ``t``, the same for all methods."""

    def gradient(self, x: Array, draw: object, t: int) -> Array: ...

    def cwgd(self, form: str, x: Array, draw: object, t: int) -> Array:
        """``[S, M]``."""

    def error(self, x: Array) -> Array:
        """The loss above the minimum after the last step ``[S, M]``."""


class Method(NamedTuple):
    """Cosine to zero from ``eta_max``, times a factor.

    The factor is 1 for no ``form``; the one of ``replay`` ``[T]`` where given; else that of CWGD in this form.
    """

    eta_max: float
    form: str = ""
    normalized: bool = True
    replay: Array | None = None


@dataclass(frozen=True)
class Comparison(Result):
    """A method against plain cosine at cosine's own best peak rate.

    Attributes:
        method: ``"normalised"``, each tuned; ``"replayed"``: the normalised one's mean factor over the tuning seeds
            as a fixed schedule, at the same rate; ``"published"``: CWGD-Cosine, and ``"normalised, untuned"``, both at
            the peak rate that is best for cosine; ``"halved"``: cosine at ``1 / (1 + alpha)`` of that rate.
        form: How CWGD was known; empty for ``"halved"``, which needs none.
        eta_max: Peak rate.
        ratio, low, high: Mean final error over that of cosine, with a 95 % interval over seeds, paired.
        coarse: For tuned methods: by how much of itself the error of either, whichever is more, might fall between the
            rates of the grid. The grid decides smaller differences.
    """

    method: str
    form: str
    eta_max: float
    ratio: float
    low: float
    high: float
    coarse: float

    @property
    def verdict(self) -> str:
        """In words: the interval, widened by what the grid of rates leaves open, on one side of 1 or not."""
        if not math.isnan(self.coarse) and self.high * (1 + self.coarse) < 1:
            return "better"
        return "worse" if not math.isnan(self.coarse) and self.low > 1 + self.coarse else "no difference shown"

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "verdict": self.verdict}


@dataclass(frozen=True)
class Outcome(Result):
    """One case.

    Attributes:
        name, steps, seeds: Of the case, and the seeds compared on.
        eta_max: Best peak rate of cosine.
        error: Its final error there, mean over seeds.
        at_edge: Methods whose best rate lies at the edge of those tried.
        comparisons: The others against it.
        times, factors: The normalised variant's mean factor along the way, by form, at its best rate.
        also: The same comparisons by other measures of the end, by name.
    """

    name: str
    steps: int
    seeds: int
    eta_max: float
    error: float
    at_edge: tuple[str, ...]
    comparisons: tuple[Comparison, ...]
    times: tuple[int, ...]
    factors: dict[str, list[float]]
    also: dict[str, tuple[Comparison, ...]] = field(default_factory=dict)

    def find(self, method: str, form: str = "") -> Comparison:
        return next(one for one in self.comparisons if (one.method, one.form) == (method, form))


def run_methods(
    case: Case, methods: Sequence[Method], seeds: int, generator: np.random.Generator
) -> tuple[Array, Array]:
    """Final errors ``[S, M]`` and mean factors over the seeds ``[T, M]``; a run that explodes has an infinite error."""
    x = case.start(seeds, len(methods))
    curve = cosine(case.steps)
    peaks = np.array([method.eta_max for method in methods])
    rows = {
        form: [i for i, method in enumerate(methods) if method.form == form and method.replay is None]
        for form in case.forms
    }
    scale = {
        form: np.array([1 + ALPHA if methods[i].normalized else 1.0 for i in found]) for form, found in rows.items()
    }
    factor = np.ones((seeds, len(methods)))
    first: dict[str, Array] = {}
    mean = np.empty((case.steps, len(methods)))
    with np.errstate(over="ignore", invalid="ignore"):
        for t in range(case.steps):
            draw = case.draw(seeds, t, generator)
            for form, found in rows.items():
                if found:
                    now = case.cwgd(form, x[:, found], draw, t)
                    ratio = now / first.setdefault(form, now)
                    factor[:, found] = scale[form] * cwgd_factor(ratio, ALPHA)
            for i, method in enumerate(methods):
                if method.replay is not None:
                    factor[:, i] = method.replay[t]
            mean[t] = factor.mean(0)
            x = x - (curve[t] * peaks * factor)[:, :, None] * case.gradient(x, draw, t)
        errors = case.error(x)
    return np.where(errors < EXPLODED, errors, np.inf), mean


def compare_methods(
    case: Case,
    *,
    rates: Array = RATES,
    tuning_seeds: int = 64,
    seeds: int = 256,
    seed: int = 0,
    progress: Callable[[str], object] = lambda text: None,
) -> Outcome:
    """Tune each method, then compare them on fresh seeds.

    Each is tuned twice with the same noise: over ``rates``, and over finer ones about the best of these.
    """
    progress(f"{case.name}: {1 + len(case.forms)} methods at {len(rates)} rates, and at {len(FINER)} about the best")
    tried: dict[str, Array] = dict.fromkeys(("", *case.forms), rates)
    best, _, at_edge = chosen(_tuned(case, tried, tuning_seeds, seed)[0], tried)
    tried = {form: rate * FINER for form, rate in best.items()}
    table, factors = _tuned(case, tried, tuning_seeds, seed)
    best, coarse, _ = chosen(table, tried)
    traces = {form: factors[form][:, int(np.argmin(table[form]))] for form in case.forms}
    entries = entries_at(best, traces)
    errors, _ = run_methods(case, list(entries.values()), seeds, np.random.default_rng([seed, 1]))
    times = np.unique(np.linspace(0, case.steps - 1, 101).round().astype(int))
    return Outcome(
        name=case.name,
        steps=case.steps,
        seeds=seeds,
        eta_max=best[""],
        error=float(errors[:, 0].mean()),
        at_edge=at_edge,
        comparisons=compared(entries, errors, coarse),
        times=tuple(times.tolist()),
        factors={form: trace[times].tolist() for form, trace in traces.items()},
    )


def _tuned(case: Case, tried: dict[str, Array], seeds: int, seed: int) -> tuple[dict[str, Array], dict[str, Array]]:
    """Mean errors ``[rates]`` and mean factors ``[T, rates]`` by form."""
    methods = [Method(float(rate), form) for form, rates in tried.items() for rate in rates]
    errors, factors = run_methods(case, methods, seeds, np.random.default_rng([seed, 0]))
    ends = np.cumsum([len(rates) for rates in tried.values()])[:-1]
    parts = np.split(errors.mean(0), ends), np.split(factors, ends, axis=1)
    return dict(zip(tried, parts[0], strict=True)), dict(zip(tried, parts[1], strict=True))


def chosen(
    table: dict[str, Array], tried: dict[str, Array]
) -> tuple[dict[str, float], dict[str, float], tuple[str, ...]]:
    """By form: the best of the rates, what the grid leaves there, and which best ones lie at an edge of the grid.

    What it leaves is the relative height of the best rate's error above the vertex of the parabola through it and its
    neighbours, in logarithms. At the edge of stability, where the next rate has more than twice the error, no parabola
    says anything: there it is the step from the rate before.

    Args:
        table, tried: Mean errors and rates ``[rates]`` by form; cosine's is ``""``.
    """
    best, left, edge = {}, {}, []
    for form, errors in table.items():
        i = int(np.argmin(errors))
        best[form], left[form] = float(tried[form][i]), math.nan
        if i in (0, len(errors) - 1):
            edge.append(form or "cosine")
        elif not errors[i + 1] < 2 * errors[i]:
            left[form] = float(errors[i - 1] / errors[i] - 1)
        elif np.isfinite(errors[i - 1]):
            below, middle, above = np.log(errors[i - 1 : i + 2])
            bend = above - 2 * middle + below
            left[form] = float(np.expm1((above - below) ** 2 / (8 * bend))) if bend > 0 else 0.0
    return best, left, tuple(edge)


def entries_at(best: dict[str, float], traces: dict[str, Array]) -> dict[tuple[str, str], Method]:
    """What is compared, by method and form: cosine first, then at the rate that CWGD-Cosine has where nothing changes.

    Args:
        best: Peak rates by form; cosine's is ``""``.
        traces: Mean factors ``[T]`` to replay, by form.
    """
    plain = best[""]
    entries = {("cosine", ""): Method(plain), ("halved", ""): Method(plain / (1 + ALPHA))}
    for form, trace in traces.items():
        entries["normalised", form] = Method(best[form], form)
        entries["replayed", form] = Method(best[form], form, replay=trace)
        entries["normalised, untuned", form] = Method(plain, form)
        entries["published", form] = Method(plain, form, normalized=False)
    return entries


def compared(entries: dict[tuple[str, str], Method], errors: Array, coarse: dict[str, float]) -> tuple[Comparison, ...]:
    """Every entry but the first against the first, from errors ``[S, M]``; ``coarse`` is what :func:`chosen` found."""
    found = []
    for i, ((name, form), method) in enumerate(entries.items()):
        if i:
            ratio, low, high = ratio_of_means(errors[:, i], errors[:, 0])
            left = max(coarse.get("", 0.0), coarse.get(form, 0.0)) if name in TUNED else 0.0
            found.append(Comparison(name, form, method.eta_max, ratio, low, high, left))
    return tuple(found)


def ratio_of_means(errors: Array, plain: Array, level: float = 0.95) -> tuple[float, float, float]:
    """``mean(errors) / mean(plain)`` of paired seeds, with an interval.

    Student's t on the logarithm, whose error is that of the paired relative deviations, to first order.
    """
    above, below = errors.mean(), plain.mean()
    if not np.isfinite(above):
        return (float("inf"),) * 3
    deviations = errors / above - plain / below
    error = deviations.std(ddof=1) / np.sqrt(len(errors))
    half = stats.t.ppf((1 + level) / 2, len(errors) - 1) * error
    middle = np.log(above / below)
    return float(np.exp(middle)), float(np.exp(middle - half)), float(np.exp(middle + half))
