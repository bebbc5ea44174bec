"""A whole step of stochastic Lanczos quadrature: ours, plain and deflated, and that of each other library."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import measure
from measure import Pauses, Timing
from peers import Peer
from report import Row
from settings import Settings, Subject

from curvdiag import spectral_density

STEPS, PROBES = 80, 4
SECTION = f"A whole step of stochastic Lanczos quadrature, {STEPS} steps and {PROBES} probes"
EXTRA = {"MLP": 0.3, "GPT": 0.15, "ResNet": 0.15}
"""Most gradients that a step may take beyond the product."""
STEP = {"ResNet": 2.4}
"""Most gradients for a whole step."""
TIMES = {"hessian-eigenthings": 1.6, "curvlinops": 4.0}
"""How many times as long as ours the others' step is to take, at least; 1 where nothing is said."""
DEFLATE, DEFLATED_EXTRA, DEFLATED = 10, 0.3, ("MLP",)
"""Eigenpairs to deflate, what it may add to a step, and where."""


def slq_rows(subject: Subject, settings: Settings) -> list[Row]:
    """Our plain step, what it adds to the product, the deflated step, and each peer's."""
    ours, product = own_steps(subject, 16 if settings.quick else STEPS)
    extra = ours - product
    limit, most = EXTRA[subject.name], STEP.get(subject.name)
    note = "the whole density over all its steps" + ("; 16 steps only (--quick)" if settings.quick else "")
    rows = [
        Row(
            SECTION,
            subject.name,
            "curvdiag",
            ours.mean,
            *ours.quartiles,
            "" if most is None else f"at most {most}",
            None if most is None else ours.mean <= most,
            note,
        ),
        Row(
            SECTION,
            subject.name,
            "curvdiag, beyond the bare product",
            extra.mean,
            *extra.quartiles,
            f"at most {limit}",
            extra.mean <= limit,
            f"against {product.mean:.2f} for H @ v in the same minute",
        ),
    ]
    if subject.name in DEFLATED:
        rows += deflated_rows(subject, settings)
    return rows + peer_rows(subject, settings, ours.mean)


def own_steps(subject: Subject, steps: int) -> tuple[Timing, Timing]:
    """Our step and the bare product, stretch by stretch of the same density."""
    spectral_density(subject.kept, steps=2, probes=PROBES)
    pauses = Pauses((subject.unit, lambda: subject.kept @ subject.vector), every=max(1, steps // 8))
    pauses.run(lambda tick: spectral_density(subject.kept, steps=steps, probes=PROBES, progress=tick))
    return pauses.ratios(steps * PROBES)


def deflated_rows(subject: Subject, settings: Settings) -> list[Row]:
    """A whole deflated density for each product that it made, beside a plain one in the same turn."""
    steps = 10 if settings.quick else 40
    options = {"steps": steps, "probes": PROBES}
    deflated = spectral_density(subject.kept, deflate=DEFLATE, **options)
    plain = spectral_density(subject.kept, **options)
    taken: dict[str, list[float]] = {"plain": [], "deflated": []}
    for _ in range(settings.slq_rounds):
        run: Callable[[], object] = lambda: spectral_density(subject.kept, **options)  # noqa: E731
        taken["plain"].append(measure.once(subject.unit, run, plain.matvecs))
        run = lambda: spectral_density(subject.kept, deflate=DEFLATE, **options)  # noqa: E731
        taken["deflated"].append(measure.once(subject.unit, run, deflated.matvecs))
    step, extra = Timing(tuple(taken["deflated"])), Timing(tuple(taken["deflated"])) - Timing(tuple(taken["plain"]))
    what = f"curvdiag, deflate={DEFLATE}"
    note = f"{steps} steps, {len(deflated.deflated)} eigenvalues deflated, {deflated.matvecs} products in all"
    note += f"; {deflated.note}" if deflated.note else ""
    return [
        Row(SECTION, subject.name, what, step.median, *step.quartiles, note=note),
        Row(
            SECTION,
            subject.name,
            f"{what}, beyond the plain step",
            extra.median,
            *extra.quartiles,
            f"at most {DEFLATED_EXTRA}",
            extra.median <= DEFLATED_EXTRA,
            "each density's whole time over all its products",
        ),
    ]


def peer_rows(subject: Subject, settings: Settings, ours: float) -> list[Row]:
    """The step of each peer; it is to take so many times as long as ours."""
    taken: dict[str, list[float]] = {peer.name: [] for peer in subject.peers}
    for _ in range(settings.slq_rounds):
        for peer in subject.peers:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                taken[peer.name].append(measure.once(subject.unit, _density(peer), peer.steps))
    rows = []
    for peer in subject.peers:
        timing, times = Timing(tuple(taken[peer.name])), TIMES.get(peer.name, 1.0)
        note = f"{timing.median / ours:.1f} times ours; {peer.steps} steps, 1 probe"
        note += f"; {peer.note}" if peer.note else ""
        note += "" if subject.agrees(peer.name) else f"; {subject.difference(peer.name)}"
        target = f"at least {times:g} times ours" if times != 1 else "more than ours"
        holds = subject.verdict(peer.name, timing.median > times * ours)
        rows.append(Row(SECTION, subject.name, peer.name, timing.median, *timing.quartiles, target, holds, note))
    return rows


def _density(peer: Peer) -> Callable[[], object]:
    return lambda: peer.density(peer.steps)
