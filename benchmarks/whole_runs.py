"""PyHessian's own runs, power iteration and trace, beside ours to the same accuracy; and its product, in pairs."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable

import measure
import torch
from measure import Timing
from nets import Batches
from report import Row
from settings import Settings, Subject
from torch import Tensor, nn

from curvdiag import Eigenpairs, Hessian, Objective, top_eigenpairs, trace

SECTION = "PyHessian's whole runs on one batch, as multiples of ours"
SLOWER = 1.05
"""Most that our product may take, in units of the product in PyHessian's kept graph."""
ITERATIONS, PROBES = 100, 20
"""Most products that its power iteration (its own default) and its trace may make."""
SEEDS = 4
"""Runs of each, from start vectors or probes of their own: how many products both take depends on them."""


def whole_run_rows(subject: Subject, settings: Settings) -> list[Row]:
    """The product in pairs, the power iteration and the trace."""
    return [product_row(subject, settings), *power_rows(subject, settings), *trace_rows(subject, settings)]


def product_row(subject: Subject, settings: Settings) -> Row:
    """Ours in units of theirs, in as many turns as it takes to tell 5 % apart."""
    from pyhessian.utils import hessian_vector_product

    asked = pyhessian(subject.model, subject.batches)
    shares = subject.vector.split([p.numel() for p in asked.params])
    parts = [share.view_as(p) for share, p in zip(shares, asked.params, strict=True)]
    timing = measure.paired(
        lambda: subject.kept @ subject.vector,
        lambda: hessian_vector_product(asked.gradsH, asked.params, parts),
        budget=1 if settings.quick else 12,
    )
    low, high = timing.quartiles
    note = f"the same backward pass, in {len(timing.ratios)} turns"
    note += f"; the quartiles straddle the limit of {SLOWER}" if low <= SLOWER < high else ""
    return Row(
        SECTION,
        subject.name,
        "curvdiag's product in units of PyHessian's",
        timing.median,
        low,
        high,
        f"at most {SLOWER}",
        timing.median <= SLOWER,
        note,
        "times",
    )


def power_rows(subject: Subject, settings: Settings) -> list[Row]:
    """Its power iteration as it ships, and our top eigenpair to the residual that it reaches."""
    asked = pyhessian(subject.model, subject.batches)
    truth = float(top_eigenpairs(subject.kept, 1, which="LM", tol=1e-5, max_matvecs=400).values[0])
    tols, worst, errors, products, same = [], [0.0, 0.0], [0.0, 0.0], [], True
    for seed in range(1 if settings.quick else SEEDS):
        value, vector = power_iteration(asked, seed)
        theirs = float((subject.kept @ vector - value * vector).norm()) / abs(value)
        # A residual as large as the eigenvalue says nothing; ours is then held to a tenth of it.
        tols.append(min(max(theirs, 1e-5), 0.1))
        found = top(subject.kept, tols[-1], seed)
        residual = float(found.residuals[0] / found.values[0].abs())
        same = same and residual <= max(tols[-1], theirs)
        worst = [max(a, b) for a, b in zip(worst, (theirs, residual), strict=True)]
        values = value, float(found.values[0])
        errors = [max(a, abs(one / truth - 1)) for a, one in zip(errors, values, strict=True)]
        products.append(found.matvecs)
    note = (
        f"from {len(tols)} start vectors, relative residuals up to {worst[0]:.0e} and errors of the value up to "
        f"{errors[0]:.0e}, ours {worst[1]:.0e} and {errors[1]:.0e} from {', '.join(map(str, products))} products"
    )
    whole = in_turns(
        lambda seed: power_iteration(pyhessian(subject.model, subject.batches), seed),
        lambda seed: top(fresh(subject), tols[seed], seed),
        settings,
    )
    ready = in_turns(
        lambda seed: power_iteration(asked, seed), lambda seed: top(subject.kept, tols[seed], seed), settings
    )
    return _faster(subject.name, "PyHessian, power iteration", whole, ready, note, same=same)


def trace_rows(subject: Subject, settings: Settings) -> list[Row]:
    """Its trace as it ships, and ours from as many probes."""
    asked = pyhessian(subject.model, subject.batches)
    probes = [len(trace_of(asked, seed)) for seed in range(1 if settings.quick else SEEDS)]
    whole = in_turns(
        lambda seed: trace_of(pyhessian(subject.model, subject.batches), seed),
        lambda seed: trace(fresh(subject), probes=probes[seed], seed=seed),
        settings,
    )
    ready = in_turns(
        lambda seed: trace_of(asked, seed), lambda seed: trace(subject.kept, probes=probes[seed], seed=seed), settings
    )
    note = f"both from {', '.join(map(str, probes))} probes, of {PROBES} that PyHessian may take"
    return _faster(subject.name, "PyHessian, trace", whole, ready, note, same=True)


def in_turns(theirs: Callable[[int], object], ours: Callable[[int], object], settings: Settings) -> Timing:
    """Theirs in units of ours, one turn for each seed; whoever goes second in one turn goes first in the next."""
    ratios = []
    with measure.NoCollection():
        for turn in range(1 if settings.quick else SEEDS):
            calls = (theirs, ours) if turn % 2 == 0 else (ours, theirs)
            taken = {call: measure.seconds(functools.partial(call, turn), 1, warm_up=False) for call in calls}
            ratios.append(taken[theirs] / taken[ours])
    return Timing(tuple(ratios))


def pyhessian(model: nn.Module, batches: Batches):  # type: ignore[no-untyped-def]
    """Its object for all data as one batch, whose graph it keeps."""
    from pyhessian import hessian

    one = tuple(torch.cat(parts) for parts in zip(*batches, strict=True))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return hessian(copy.deepcopy(model), nn.CrossEntropyLoss(), cuda=False, data=one)


def power_iteration(asked, seed: int) -> tuple[float, Tensor]:  # type: ignore[no-untyped-def]
    """Its top eigenvalue, to a change of a thousandth, and a unit vector."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        values, vectors = asked.eigenvalues(maxIter=ITERATIONS, tol=1e-3, top_n=1)
    vector = torch.cat([part.detach().reshape(-1) for part in vectors[0]])
    return values[0], vector / vector.norm()


def trace_of(asked, seed: int) -> list[float]:  # type: ignore[no-untyped-def]
    """One number for each of its probes, until their mean changes by less than a thousandth."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return asked.trace(maxIter=PROBES, tol=1e-3)


def fresh(subject: Subject) -> Hessian:
    """Everything that a user makes before a first product."""
    return Hessian(Objective(subject.model, nn.CrossEntropyLoss(), batches=subject.batches))


def top(operator: Hessian, tol: float, seed: int) -> Eigenpairs:
    return top_eigenpairs(operator, 1, which="LM", tol=tol, max_matvecs=400, seed=seed)


def _faster(net: str, what: str, whole: Timing, ready: Timing, note: str, *, same: bool) -> list[Row]:
    """Two rows: from the model to the figure, and once the operators of both are there."""
    note = note if same else f"void: ours did not reach the same residual; {note}"
    cases = ((what, whole, f"from the model to the figure; {note}"), (f"{what}, operators ready", ready, ""))
    return [
        Row(
            SECTION,
            net,
            name,
            timing.median,
            *timing.quartiles,
            "more than 1",
            timing.median > 1 if same else None,
            words,
            "times",
        )
        for name, timing, words in cases
    ]
