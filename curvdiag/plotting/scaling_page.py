"""The whole test of C against H on one page."""

from __future__ import annotations

import math
import textwrap
from typing import TYPE_CHECKING

from curvdiag.plotting.coupling import coupling_pair
from curvdiag.plotting.exponent import exponent
from curvdiag.plotting.scaling import scaling
from curvdiag.plotting.spectra import spectra
from curvdiag.plotting.style import INK, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from curvdiag.estimate import Estimate
    from curvdiag.scaling.alignment import Window
    from curvdiag.scaling.result import ScalingResult

WIDTH, HEIGHT = 15.0, 9.4
WINDOW = ("commutator", "diagonal_recovery", "coupling_mean", "coupling_variance", "rank_correlation")
COLUMNS = 68  # letters in a line of the text
LINES = 21, 48  # most lines of text, beside the spectra and without them


def scaling_page(result: ScalingResult, figure: Figure | None = None, *, title: str | None = None) -> Figure:
    """C against H, the exponent, the coupling beside its baseline, the spectra where they are known, and the verdict.

    Args:
        result: Of the scaling test.
        figure: Where to draw, an empty one; a new figure if not given.
        title: ``None`` for block, basis and size, ``""`` for none.
    """
    if figure is None:
        import matplotlib.pyplot as plt

        figure = plt.figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    grid = figure.add_gridspec(2, 3, width_ratios=(1, 1, 1))
    has_spectra = result.curvature_spectrum is not None or result.noise_spectrum is not None
    scaling(result, figure.add_subplot(grid[0, 0]), title="noise against curvature")
    exponent(result, figure.add_subplot(grid[0, 1]), title="exponent against number of directions")
    if has_spectra:
        spectra(result, figure.add_subplot(grid[1, 2]), title="spectra")
    if result.coupling is not None and result.coupling_baseline is not None:
        pair = figure.add_subplot(grid[1, 0]), figure.add_subplot(grid[1, 1])
        coupling_pair(result, pair)
        pair[0].set_title("coupling by the noise: measured")
        pair[1].set_title("coupling: random eigenvectors")
    text = figure.add_subplot(grid[0, 2] if has_spectra else grid[:, 2])
    write(text, story(result, brief=has_spectra), LINES[not has_spectra])
    if title is None:
        where = result.block or "whole model"
        basis = "eigenbasis of H" if result.basis == "hessian" else "single parameters"
        title = f"C against H: {where}, {basis}, {result.size:,} parameters, {result.samples:,} samples"
    if title:
        figure.suptitle(title)
    return figure


def story(result: ScalingResult, brief: bool = False) -> list[str]:
    """The verdict and the figures beside it, as paragraphs; the first is the headline."""
    names = ("commutator", "diagonal_recovery") if brief else WINDOW
    parts = [str(result.verdict.word), *result.verdict.reasons, ""]
    parts += [
        "Alignment on all samples: measured (random eigenvectors)",
        f"commutator: {estimated(result.commutator)} ({short_or_dash(result.commutator_baseline)})",
        f"cosine of C and H: {estimated(result.cosine)} ({short_or_dash(result.cosine_baseline)})",
    ]
    parts += [window_line(window, name) for window in result.windows for name in names]
    parts += [""] * bool(result.notes) + [str(note) for note in result.notes]
    return parts


def window_line(window: Window, name: str) -> str:
    value, random = short_or_dash(getattr(window, name)), short_or_dash(window.baseline.get(name, math.nan))
    return f"{name.replace('_', ' ')}, {window.name} {window.first + 1}\N{EN DASH}{window.last}: {value} ({random})"


def estimated(estimate: Estimate) -> str:
    if estimate.samples == 0 or not math.isfinite(float(estimate.standard_error)):
        return short_or_dash(float(estimate.value))
    return f"{short_or_dash(float(estimate.value))} ± {float(estimate.standard_error):.1g}"


def short_or_dash(value: float) -> str:
    return short(value) if math.isfinite(value) else "-"


def write(ax: Axes, parts: list[str], most: int) -> None:
    """Paragraphs from the top; what does not fit is said to be left out."""
    ax.set_axis_off()
    ax.text(0.0, 1.0, parts[0], transform=ax.transAxes, va="top", fontsize="large", fontweight="bold", color=INK)
    lines: list[str] = []
    for part in parts[1:]:
        lines += textwrap.wrap(part, COLUMNS, subsequent_indent="   ") or [""]
    if len(lines) > most:
        lines = [*lines[: most - 1], "... (the whole of it is in the printed result)"]
    ax.annotate(
        "\n".join(lines).replace("$", r"\$"), (0.0, 1.0), xytext=(0, -22), xycoords="axes fraction",
        textcoords="offset points", va="top", fontsize=7.6, color=INK, linespacing=1.35,
    )  # fmt: skip
