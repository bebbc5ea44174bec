"""Spectra of all layers from one pass over the data per step, against one run for each layer."""

from __future__ import annotations

from collections.abc import Mapping

import measure
from measure import Timing
from report import Row, row_of
from settings import Settings, Subject

from curvdiag import Hessian, spectral_density
from curvdiag.spectrum.layers import layer_spectra

SECTION = "Spectra of all layers, by step and probe of every layer together"
LAYERS: dict[str, Mapping[str, str]] = {
    "MLP": {name: f"{name}.*" for name in ("0", "2", "4")},
    "GPT": {
        "embeddings": "tokens.*",
        **{f"block {i}": f"blocks.{i}.*" for i in range(4)},
        "head": "head.*",
    },
    "ResNet": {
        "stem": "0.*",
        **{f"block {i}": f"{i + 3}.*" for i in range(8)},
        "head": "13.*",
    },
}
"""The parts of each net, as globs of parameter names."""


def layer_rows(subject: Subject, settings: Settings) -> list[Row]:
    """Both ways through kept and through rebuilt graphs, in gradients."""
    layers, steps = LAYERS[subject.name], 2 if settings.quick else 3
    rounds = 1 if settings.quick else 2
    rows = []
    for graphs, op in (("kept", subject.kept), ("rebuilt", subject.rebuilt)):
        together, apart = compare(subject, op, layers, steps, rounds)
        note = f"{len(layers)} layers, {steps} steps, 1 probe"
        what = f"curvdiag, graphs {graphs}"
        rows.append(row_of(SECTION, subject.name, f"{what}, layer_spectra", together, None, note))
        words = f"{apart.median / together.median:.1f} times layer_spectra"
        holds = apart.median > together.median
        rows.append(
            Row(
                SECTION,
                subject.name,
                f"{what}, one run for each layer",
                apart.median,
                *apart.quartiles,
                "more than layer_spectra" if graphs == "rebuilt" else "",
                holds if graphs == "rebuilt" else None,
                words,
            )
        )
    return rows


def compare(subject: Subject, op: Hessian, layers: Mapping[str, str], steps: int, rounds: int) -> tuple[Timing, Timing]:
    """Gradients for each step and probe of all layers: in lockstep, and one layer after the other."""

    def together() -> object:
        return layer_spectra(op, layers, steps=steps, probes=1)

    def apart() -> object:
        return [spectral_density(op.block(glob), steps=steps, probes=1) for glob in layers.values()]

    taken: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for values, call in zip(taken, (together, apart), strict=True):
            values.append(measure.once(subject.unit, call, steps))
    return Timing(tuple(taken[0])), Timing(tuple(taken[1]))
