"""How a step of quadrature grows with parameters, samples, steps and probes; with the steps, beside two others."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import measure
import torch
from measure import Timing
from nets import Batches
from peers import Peer, eigenthings, pyhessian
from report import Row
from settings import Settings, Subject
from torch import nn

from curvdiag import spectral_density

SECTIONS = {
    "parameters": "Growth with parameters: an MLP of two hidden layers, 512 samples",
    "samples": "Growth with samples: the MLP at width 256",
    "steps": "Growth with Lanczos steps: the MLP at width 256, one probe",
    "probes": "Growth with probes: the MLP at width 256, one step, for each probe",
}
WIDTHS, SAMPLES = (128, 256, 512, 1024, 2048), (128, 256, 512, 1024, 2048, 4096)
STEPS, PROBES = (10, 20, 40, 80, 160), (1, 2, 4, 8, 16)
COUNT = 6
"""Products, and steps, that are timed together."""
PEERS_UP_TO = 80
"""The others reorthogonalise, so that 160 steps would take as long as all the rest."""


def growth_rows(settings: Settings) -> list[Row]:
    """One row for each point, with its place and its seconds for the figure."""
    if settings.quick:
        return [*sizes("parameters", (16, 32), 1), *sizes("samples", (8, 16), 1), *steps((4, 8), 1), *probes((1, 2), 1)]
    return [*sizes("parameters", WIDTHS, 2), *sizes("samples", SAMPLES, 2), *steps(STEPS, 2), *probes(PROBES, 5)]


def mlp(width: int = 256, samples: int = 512) -> Callable[[], tuple[nn.Module, Batches]]:
    """The benchmark's MLP at another width, on so many samples in four batches."""

    def make() -> tuple[nn.Module, Batches]:
        layers = (nn.Linear(784, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))
        few = samples // 4
        return nn.Sequential(*layers), [(torch.randn(few, 784), torch.randint(10, (few,))) for _ in range(4)]

    return make


def sizes(kind: str, values: Sequence[int], rounds: int) -> list[Row]:
    """The product and a step of quadrature, with what the user's own gradient takes."""
    rows = []
    for value in values:
        make = mlp(width=value) if kind == "parameters" else mlp(samples=value)
        subject = Subject(f"MLP {value}", make, quick=True)
        at = subject.objective.parameters.size if kind == "parameters" else subject.objective.size
        candidates: dict[str, Callable[[], object]] = {
            "a product": lambda subject=subject: [subject.kept @ subject.vector for _ in range(COUNT)],
            "a step": lambda subject=subject: spectral_density(subject.kept, steps=COUNT, probes=1),
        }
        timings = measure.alternate(subject.unit, candidates, rounds=rounds, repeats=1)
        second = measure.seconds(subject.unit, 4)
        for what, timing in timings.items():
            rows.append(_row(kind, f"curvdiag, {what}", at, timing / COUNT, second))
        rows.append(_row(kind, "a gradient", at, Timing((1.0,)), second))
    return rows


def steps(values: Sequence[int], rounds: int) -> list[Row]:
    """The mean price of a step in densities of more and more steps."""
    subject = Subject("MLP", mlp(), quick=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        others = [
            eigenthings(subject.model, subject.batches, steps=1),
            pyhessian(subject.model, subject.batches, whole=True, steps=1),
        ]
    rows = []
    for value in values:
        calls: dict[str, Callable[[], object]] = {
            "curvdiag": lambda value=value: spectral_density(subject.kept, steps=value, probes=1)
        }
        if value <= PEERS_UP_TO:
            calls |= {peer.name: _density(peer, value) for peer in others}
        for name, call in calls.items():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                timing = Timing(tuple(measure.once(subject.unit, call, value) for _ in range(rounds)))
            rows.append(_row("steps", f"{name}, a step", value, timing, measure.seconds(subject.unit)))
    return rows


def probes(values: Sequence[int], rounds: int) -> list[Row]:
    """Products with several vectors: a rebuilt graph is shared by them, a kept one costs the same for each."""
    subject = Subject("MLP", mlp(), quick=True)
    rows = []
    for value in values:
        vectors = torch.randn(subject.kept.size, value, generator=torch.Generator().manual_seed(0))
        candidates: dict[str, Callable[[], object]] = {
            "graphs kept": lambda vectors=vectors: subject.kept @ vectors,
            "graphs rebuilt": lambda vectors=vectors: subject.rebuilt @ vectors,
        }
        timings = measure.alternate(subject.unit, candidates, rounds=rounds, repeats=1)
        second = measure.seconds(subject.unit)
        rows += [_row("probes", f"curvdiag, {what}", value, t / value, second) for what, t in timings.items()]
    return rows


def _row(kind: str, what: str, at: int, timing: Timing, second: float) -> Row:
    """``second`` is what a gradient takes."""
    taken = timing.median * second
    note = f"{1e3 * taken:.3g} ms"
    net = f"{at:,} {kind}"
    return Row(SECTIONS[kind], net, what, timing.median, *timing.quartiles, note=note, at=float(at), seconds=taken)


def _density(peer: Peer, steps: int) -> Callable[[], object]:
    return lambda: peer.density(steps)
