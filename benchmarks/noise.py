"""Products with C and with the Gauss-Newton matrix by two routes, and the moments of per-sample gradients."""

from __future__ import annotations

from collections.abc import Callable

import measure
import moments
from measure import Timing, relative
from peers import gauss_newton
from report import Row, row_of
from routes import forward_mode
from settings import AGREEMENT, Settings, Subject, differs

from curvdiag import GaussNewton, NoiseCovariance

PRODUCTS = {"MLP": 1.5, "ResNet": 2.2, "GPT": 1.5}
"""Most gradients for a product that needs no second derivative of the model."""
SHARED = "curvdiag, GGN @ v on the Hessian's graph"
LEEWAY = {"MLP": 1.0, "ResNet": 1.0, "GPT": 1.05}
"""Most that the moments may take, as a multiple of what ``vmap`` takes."""


def noise_rows(subject: Subject, settings: Settings) -> list[Row]:
    return [*covariance_products(subject, settings), *moments_rows(subject, settings)]


def covariance_products(subject: Subject, settings: Settings) -> list[Row]:
    """Ours, which is a second backward pass, the forward mode written here, and curvlinops' own."""
    section, v = "Products C @ v and GGN @ v", subject.vector
    own = {
        "C @ v": NoiseCovariance(subject.objective, graphs=subject.kept),
        "GGN @ v": GaussNewton(subject.objective),
    }
    forward, theirs = forward_mode(subject.model, subject.batches), gauss_newton(subject.model, subject.batches)
    candidates: dict[str, Callable[[], object]] = {"curvlinops, GGN @ v": lambda: theirs(v)}
    shared = GaussNewton(subject.objective, graphs=subject.kept)
    candidates[SHARED] = lambda: shared @ v
    for name in own:
        candidates[f"curvdiag, {name} kept"] = lambda name=name: own[name] @ v
        candidates[f"forward mode, {name}"] = lambda name=name: forward[name](v)
    timings = measure.alternate(subject.unit, candidates, rounds=settings.rounds)
    rows = []
    for name, operator in own.items():
        ours, other = timings[f"curvdiag, {name} kept"], timings[f"forward mode, {name}"]
        truth = operator @ v
        apart = relative(forward[name](v), truth)
        note = f"second backward pass through the kept graph; {_winner(ours, other)}"
        rows.append(row_of(section, subject.name, f"curvdiag, {name} kept", ours, PRODUCTS[subject.name], note))
        same = f"dual numbers, then a kept graph; {differs(forward[name](v), truth)}"
        rows.append(
            Row(
                section,
                subject.name,
                f"forward mode, {name}",
                other.median,
                *other.quartiles,
                "" if apart <= AGREEMENT else "the same product",
                None if apart <= AGREEMENT else False,
                same,
            )
        )
    truth = own["GGN @ v"] @ v
    same, agreement = differs(shared @ v, truth), differs(theirs(v), truth)
    return [
        *rows,
        row_of(section, subject.name, SHARED, timings[SHARED], None, f"no graph of its own; {same}"),
        row_of(section, subject.name, "curvlinops, GGN @ v", timings["curvlinops, GGN @ v"], None, agreement),
    ]


def _winner(ours: Timing, other: Timing) -> str:
    """Which of the two routes is faster, and by how much."""
    ratio = other.median / ours.median
    if abs(ratio - 1) < 0.05:
        return "forward mode takes as long"
    return (
        f"wins: forward mode takes {ratio:.1f} times as long" if ratio > 1 else f"forward mode wins: {ratio:.2f} of it"
    )


def moments_rows(subject: Subject, settings: Settings) -> list[Row]:
    """Ours against its limit, against ``vmap``, and against BackPACK where that supports the net."""
    section, name = "Mean, diagonal of C, and norms of per-sample gradients", subject.name
    candidates = moments.candidates(subject.model, subject.batches)
    truth = candidates["curvdiag"]()
    own = {"curvdiag": candidates.pop("curvdiag")}
    ours = measure.alternate(subject.unit, own, rounds=2 * settings.rounds)["curvdiag"]
    timings = measure.alternate(subject.unit, candidates, rounds=settings.rounds, repeats=1)  # they take long
    rows = [row_of(section, name, "curvdiag", ours, moments.TARGETS[name])]
    for peer, timing in timings.items():
        error = max(relative(theirs, own) for theirs, own in zip(candidates[peer](), truth, strict=True))
        rows.append(_against(section, name, peer, timing, ours, error))
    return rows


def _against(section: str, name: str, peer: str, timing: Timing, ours: Timing, error: float) -> Row:
    least = ours.median / (LEEWAY[name] if peer == "vmap" else 1.0)
    note = f"figures differ from curvdiag's by {error:.0e}"
    return Row(
        section, name, peer, timing.median, *timing.quartiles, f"more than {least:.2f}", timing.median > least, note
    )
