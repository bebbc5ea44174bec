"""Products with C and with the Gauss-Newton matrix, and the moments of per-sample gradients."""

from __future__ import annotations

from collections.abc import Callable

import measure
import moments
from measure import Timing, relative
from nets import Batches
from peers import gauss_newton
from report import Row, row_of
from torch import nn, randn

from curvdiag import GaussNewton, Hessian, NoiseCovariance, Objective

PRODUCTS = {"MLP": 1.7, "ResNet": 2.5, "GPT": 1.7}
"""Most gradients for a product that needs no second derivative of the model."""
LEEWAY = {"MLP": 1.0, "ResNet": 1.0, "GPT": 1.05}
"""Most that the moments may take, as a multiple of what ``vmap`` takes."""


def covariance_products(
    name: str, model: nn.Module, objective: Objective, hessian: Hessian, unit: Callable[[], object], rounds: int
) -> list[Row]:
    covariance, ours = NoiseCovariance(objective, graphs=hessian), GaussNewton(objective)
    theirs, v = gauss_newton(model, objective.batches), randn(objective.parameters.size)
    peer = "curvlinops, GGN @ v"
    candidates: dict[str, Callable[[], object]] = {
        "curvdiag, C @ v kept": lambda: covariance @ v,
        "curvdiag, GGN @ v kept": lambda: ours @ v,
        peer: lambda: theirs(v),
    }
    agreement = f"product differs from curvdiag's by {relative(theirs(v), ours @ v):.0e}"
    return [
        row_of("Products C @ v and GGN @ v", name, what, timing, *_target(what == peer, name, agreement))
        for what, timing in measure.alternate(unit, candidates, rounds=rounds).items()
    ]


def _target(is_peer: bool, name: str, agreement: str) -> tuple[float | None, str]:
    return (None, agreement) if is_peer else (PRODUCTS[name], "")


def moments_rows(name: str, model: nn.Module, batches: Batches, unit: Callable[[], object], rounds: int) -> list[Row]:
    """Ours against its limit, against ``vmap``, and against BackPACK where that supports the net."""
    section = "Mean, diagonal of C, and norms of per-sample gradients"
    candidates = moments.candidates(model, batches)
    truth = candidates["curvdiag"]()
    timings = measure.alternate(unit, candidates, rounds=rounds)
    ours = timings.pop("curvdiag")
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
