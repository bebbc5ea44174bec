"""Products with the Hessian: kept and rebuilt graphs, compiled, several vectors at once, and the other libraries'."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import replace

import measure
import torch
from digits import trained
from measure import Timing, relative
from nets import gradient
from peers import Peer
from report import Row, row_of
from settings import AGREEMENT, Settings, Subject, differs

from curvdiag import CurvdiagWarning, Hessian, Objective

SECTION = "Hessian product H @ v"
KEPT = {"MLP": 2.0, "GPT": 2.1, "ResNet": 2.5}
"""Most gradients for a product through kept graphs."""
REBUILT, SHARED = 4.0, 0.4
"""Most gradients where the graph is built for one vector, and most above the kept graph where 8 vectors share one."""
VECTORS, CHOSEN = 8, 1.25
"""Vectors at once, and the most that the way chosen between two may take of the faster one."""


def product_rows(subject: Subject, settings: Settings) -> list[Row]:
    """All products with one vector in turns, then eight vectors through one rebuilt graph."""
    name, vector = subject.name, subject.vector
    candidates: dict[str, Callable[[], object]] = {
        "kept": lambda: subject.kept @ vector,
        "rebuilt": lambda: subject.rebuilt @ vector,
        "form": lambda: subject.kept.quadratic_form(vector),
    }
    for peer in subject.peers:
        candidates[peer.name] = _product(peer, peer.prepare(vector))
    timings = measure.alternate(subject.unit, candidates, rounds=settings.rounds)
    plan = subject.kept.plan
    note = "" if plan is None or not plan.rebuilt else "not all graphs fitted into memory"
    same = differs(subject.rebuilt @ vector, subject.product)
    rows = [
        row_of(SECTION, name, "curvdiag, graphs kept", timings["kept"], KEPT[name], note),
        row_of(SECTION, name, "curvdiag, graphs rebuilt", timings["rebuilt"], REBUILT, same),
        form_row(subject, timings["form"], timings["kept"].median),
        *shared_rows(subject, settings),
    ]
    for peer in subject.peers:
        rows.append(row_of(SECTION, name, peer.name, timings[peer.name], None, subject.difference(peer.name)))
    return rows


def form_row(subject: Subject, timing: Timing, product: float) -> Row:
    """``v^T H v`` without the product, which is to be cheaper than it."""
    vector = subject.vector
    truth = float(vector.double() @ subject.product.double())
    apart = abs(float(subject.kept.quadratic_form(vector)) / truth - 1)
    note = f"{timing.median / product:.2f} of the product; differs from v . (H @ v) by {apart:.0e}"
    return row_of(SECTION, subject.name, "curvdiag, v^T H v alone", timing, product, note)


def shared_rows(subject: Subject, settings: Settings) -> list[Row]:
    """Eight vectors through one rebuilt graph, against eight products through the kept one in the same turn."""
    vectors = torch.randn(len(subject.vector), VECTORS, generator=torch.Generator().manual_seed(1))
    apart = relative(subject.rebuilt @ vectors, subject.kept @ vectors)
    candidates: dict[str, Callable[[], object]] = {
        "kept": lambda: [subject.kept @ vectors[:, i] for i in range(VECTORS)],
        "rebuilt": lambda: subject.rebuilt @ vectors,
    }
    turns = max(1, (settings.rounds + 1) // 2)
    timings = measure.alternate(subject.unit, candidates, rounds=turns, repeats=1)
    one, kept = timings["rebuilt"] / VECTORS, timings["kept"] / VECTORS
    what = f"curvdiag, graphs rebuilt, {VECTORS} vectors at once"
    note = f"each vector; products differ from those of kept graphs by {apart:.0e}"
    return [
        row_of(SECTION, subject.name, what, one, None, note),
        row_of(
            SECTION, subject.name, f"{what}, beyond kept graphs", one - kept, SHARED, f"against {kept.median:.2f} kept"
        ),
    ]


def compiled_rows(subject: Subject, settings: Settings) -> list[Row]:
    """Products after compiling; how long that took and when it has paid are in the note."""
    begun = time.perf_counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", CurvdiagWarning)
        compiled = Hessian(subject.objective, compile=True)
        products = [compiled @ subject.vector for _ in range(2)]
    took = time.perf_counter() - begun
    apart = max(relative(product, subject.product) for product in products)
    candidates: dict[str, Callable[[], object]] = {
        "compiled": lambda: compiled @ subject.vector,
        "kept": lambda: subject.kept @ subject.vector,
    }
    timings = measure.alternate(subject.unit, candidates, rounds=settings.rounds)
    gain = (timings["kept"].median - timings["compiled"].median) * measure.seconds(subject.unit)
    note = f"ready after {took:.0f} s, {pays_after(took, gain)}; product differs from the eager one by {apart:.0e}"
    # Where it runs without compiled code after all, it says so in a warning.
    note += "".join(f"; {w.message}" for w in caught if issubclass(w.category, CurvdiagWarning))
    row = row_of(SECTION, subject.name, "curvdiag, graphs kept, compiled", timings["compiled"], None, note)
    return [row if apart <= AGREEMENT else replace(row, target="the same product", holds=False)]


def pays_after(took: float, gain: float) -> str:
    """``took`` seconds spent once, ``gain`` seconds saved by each product."""
    return f"has paid after {took / gain:,.0f} products" if gain > 0 else "never pays here"


def batched_rows(settings: Settings) -> list[Row]:
    """Several vectors in one pass of a small net against one after the other."""
    net = "digits MLP"
    model, (images, classes) = trained(20, steps=50)
    batches = [(images[:128], classes[:128])]
    objective = Objective(model, torch.nn.CrossEntropyLoss(), batches=batches)
    ways = {"one by one": False, "batched": True, "the way chosen by size": "auto", "by timing": "timed"}
    operators = {name: Hessian(objective, batched=way) for name, way in ways.items()}
    size = objective.parameters.size
    vectors = torch.randn(size, VECTORS, generator=torch.Generator().manual_seed(0))
    products = {name: operator @ vectors for name, operator in operators.items()}
    candidates: dict[str, Callable[[], object]] = {
        name: lambda operator=operator: operator @ vectors for name, operator in operators.items()
    }
    unit = lambda: gradient(model, batches)  # noqa: E731
    timings = measure.alternate(unit, candidates, rounds=4 * settings.rounds, repeats=5)
    each = {name: timing / VECTORS for name, timing in timings.items()}
    rows = []
    for name, timing in each.items():
        others = [other for way, other in each.items() if way in ("one by one", "batched")]
        most = CHOSEN * min(other.median for other in others) if ways[name] in ("auto", "timed") else None
        apart = relative(products[name], products["one by one"])
        note = "each vector" + ("" if name == "one by one" else f"; differs from one by one by {apart:.0e}")
        rows.append(row_of(SECTION, net, f"curvdiag, {VECTORS} vectors, {name}", timing, most, note))
    return rows


def _product(peer: Peer, argument: object) -> Callable[[], object]:
    return lambda: peer.multiply(argument)
