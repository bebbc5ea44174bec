"""What few samples do to the exponent of C in H, held out and in sample, where the population's is known.

Two made-up problems with 400 directions over four decades, rank-one Hessians ``h = s w w^T`` of rows ``w`` with
covariance ``H``:

- ``"superlinear"``: ``s = 1``, and gradients drawn for themselves with covariance ``C = H^1.5``. Eigenvectors from few
  samples mix the population's directions, so that the exponent in their basis is nearer to 1.
- ``"proportional"``: gradients ``+-s w``, with ``log s`` normal of standard deviation 2. C is proportional to H in the
  population, in every basis. Eigenvectors that fit the few samples of large ``s`` make it look superlinear in sample.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from curvdiag.scaling.power_law import DirectionSamples, measure_power_law

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MINUTES = 0.5

DIRECTIONS, DECADES, SPREAD = 400, 4.0, 2.0
EXPONENTS = {"superlinear": 1.5, "proportional": 1.0}
COUNTS = (100, 200, 400)
SAMPLES = (960, 20_000)


def exponents(kind: str, samples: int, *, counts: Sequence[int] = COUNTS, seed: int = 0) -> dict[str, list[float]]:
    """Least-squares exponents on the first ``counts`` directions, ``"held out"`` and ``"in sample"``.

    Args:
        kind: ``"superlinear"`` or ``"proportional"``.
        samples: All of them; half gives the held-out basis.
    """
    generator = np.random.default_rng(seed)
    spectrum = np.logspace(0, -DECADES, DIRECTIONS)
    white = generator.standard_normal((samples, DIRECTIONS))
    rows = white * np.sqrt(spectrum)
    if kind == "superlinear":
        gradients = generator.standard_normal(rows.shape) * spectrum ** (EXPONENTS[kind] / 2)
    else:
        scale = np.exp(SPREAD * generator.standard_normal((samples, 1)))
        gradients = rows * scale * generator.choice([-1.0, 1.0], (samples, 1))
        rows *= np.sqrt(scale)
    half, found = samples // 2, {}
    for side, basis, measured in (("held out", rows[:half], slice(half, None)), ("in sample", rows, slice(None))):
        vectors = np.linalg.eigh(basis.T @ basis)[1][:, ::-1]
        slopes, along = (torch.from_numpy(part[measured] @ vectors) for part in (gradients, rows))
        fits = measure_power_law(DirectionSamples(slopes, along.square()), counts=counts, bootstrap=0, methods=("ols",))
        found[side] = fits.noise_fits["ols"].exponent.tolist()
    return found


Found = Mapping[str, Mapping[int, Mapping[str, Sequence[float]]]]
"""Exponents by kind, number of samples and side."""


def reproduce(
    out: Path, *, seed: int = 0, quick: bool = False, progress: Callable[[str], object] = print
) -> list[Path]:
    """Write ``mixing.png`` and ``mixing.json`` into ``out``."""
    from curvdiag.experiments.saved import make_folder, save

    make_folder(out)
    started, sizes = time.perf_counter(), (200, 400) if quick else SAMPLES
    found: dict[str, dict[int, dict[str, list[float]]]] = {kind: {} for kind in EXPONENTS}
    for kind, exponent in EXPONENTS.items():
        for samples in sizes:
            found[kind][samples] = exponents(kind, samples, seed=seed)
            for side, values in found[kind][samples].items():
                text = ", ".join(f"{value:.2f} on {count}" for value, count in zip(values, COUNTS, strict=True))
                progress(f"{kind} ({exponent:g}), {samples:,} samples, {side}: {text}")
    options = {"samples": sizes, "directions": COUNTS, "exponents": EXPONENTS, "quick": quick}
    seconds = time.perf_counter() - started
    return save("mixing", out, draw(found), found, options=options, seed=seed, seconds=seconds)


def draw(found: Found) -> Figure:
    """A panel for each population: the exponent against the number of directions fitted."""
    from matplotlib.figure import Figure

    from curvdiag.plotting.style import INK, LINES, open_frame

    figure = Figure(figsize=(9.6, 4.2), layout="constrained")
    for ax, (kind, by_samples) in zip(figure.subplots(1, len(found), sharey=True), found.items(), strict=True):
        ax.axhline(EXPONENTS[kind], color=INK, linewidth=1, linestyle=(0, (6, 3)), label="of the population")
        for (samples, sides), filled in zip(by_samples.items(), (False, True), strict=True):
            for (side, values), (color, dashes, marker) in zip(sides.items(), LINES[1:], strict=False):
                face = color if filled else "white"
                ax.plot(
                    COUNTS, values, color=color, linestyle=dashes, marker=marker, mfc=face, label=f"{side}, {samples:,}"
                )
        ax.set(title=kind, xlabel="directions fitted, those of largest curvature first", xticks=COUNTS)
        open_frame(ax)
    figure.axes[0].set_ylabel(r"exponent $\gamma$")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize="small", frameon=False)
    return figure
