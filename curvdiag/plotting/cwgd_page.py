"""CWGD-Cosine beside its controls, on one page: cells, horizons, one run, best rates, and the adaptive cases."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from curvdiag.plotting.style import BLUE, INK, LINES, ORANGE, open_frame, own_axes, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, HEIGHT = 10.0, 13.0
LIMIT = 2 ** (-1 / 3)
BEYOND = 3.0
"""Ratios above this stand at the edge of the comparison, with their number."""
SMALL = "small"


def cwgd_page(study: Any, figure: Figure | None = None) -> Figure:
    """Everything that the experiment ``cwgd`` found.

    Args:
        study: Of :mod:`curvdiag.experiments.cwgd`.
        figure: Where to draw, an empty one; a new figure if not given.
    """
    if figure is None:
        import matplotlib.pyplot as plt

        figure = plt.figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    # Two parts: the long names of the lower one move no axes of the upper one.
    upper, lower = np.asarray(figure.subfigures(2, 1, height_ratios=(2, 1.1)))
    above, below = upper.subplots(2, 2), lower.subplots(1, 2)
    published = study.published
    steps = max(cell.steps for cell in published.cells)
    cells = [cell for cell in published.cells if cell.steps == steps]
    cwgd_cells(cells, above[0, 0], title=f"every cell, {steps:,} steps, the same $\\eta_{{max}}$")
    cwgd_horizons(published.horizons, above[0, 1], title="the same against the number of steps")
    cwgd_paths(published.paths, above[1, 0], title="one cell, along the way")
    cwgd_rates(published.rate_curves, above[1, 1], title="each at any peak rate")
    cwgd_factors(study.adaptive, below[0], title="where curvature or noise change: factor")
    cwgd_comparisons(study.adaptive, below[1], title="where they change: final error")
    found = published.agreement
    figure.suptitle(
        "CWGD-Cosine on 50-dimensional quadratics, exact; and where it has something to adapt to\n"
        f"{found.scores} simulated means against the exact ones: largest |z| {short(found.largest)}, "
        f"where 99 % of such maxima lie below {short(found.allowed)}",
        fontsize="medium",
    )
    return figure


def cwgd_cells(cells: Sequence[Any], ax: Axes | None = None, *, title: str = "") -> Axes:
    """Final error of CWGD-Cosine over that of cosine at the same peak rate, cell by cell."""
    ax = own_axes(ax)
    noises = list(dict.fromkeys(cell.noise for cell in cells))
    sizes = sorted({cell.batch_size for cell in cells})
    floors = sorted({cell.floor for cell in cells})
    for i, noise in enumerate(noises):
        colour, _, marker = LINES[i + 1]
        for floor in floors:
            chosen = [cell for cell in cells if (cell.noise, cell.floor) == (noise, floor)]
            shift = [1.16 ** (3 * (i - 1) + sizes.index(c.batch_size) - (len(sizes) - 1) / 2) for c in chosen]
            ax.plot(
                [c.condition * s for c, s in zip(chosen, shift, strict=True)],
                [c.exact["cwgd"] / c.exact["cosine"] for c in chosen],
                linestyle="none", marker=marker, color=colour, markersize=5,
                markerfacecolor=colour if floor == floors[0] else "none", label=f"{noise}, cosine to {short(floor)}",
            )  # fmt: skip
    ax.set_xscale("log")
    ratio_axis(ax)
    ax.set_xticks(sorted({cell.condition for cell in cells}))
    ax.set_xticklabels([short(c) for c in sorted({cell.condition for cell in cells})])
    ax.minorticks_off()
    names = " ".join(short(size) for size in sizes)
    ax.set_xlabel(f"condition number (side by side: batch sizes {names})")
    ax.legend(fontsize=SMALL, loc="upper left", framealpha=0.9)
    return finished(ax, title)


def cwgd_horizons(horizons: Any, ax: Axes | None = None, *, title: str = "") -> Axes:
    """The same ratio against the number of steps: it tends to ``2^(-1/3)`` for a cosine to zero."""
    ax = own_axes(ax)
    for i, condition in enumerate(horizons.conditions):
        colour, _, marker = LINES[i]
        for floor, gains in horizons.gains.items():
            name = f"condition {short(condition)}" if floor == "0" else None
            ax.plot(
                horizons.steps, 1 - np.asarray(gains[i]), color=colour, linestyle="-" if floor == "0" else ":",
                marker=marker, markersize=3.5, label=name,
            )  # fmt: skip
    ax.set_xscale("log")
    ratio_axis(ax)
    ax.plot([], [], color=INK, linestyle=":", label="cosine to 0.1")
    ax.set_xlabel("steps T (isotropic noise, batch 16)")
    ax.legend(fontsize=SMALL, loc="upper right", framealpha=0.9)
    return finished(ax, title)


def ratio_axis(ax: Axes) -> None:
    """A logarithmic axis of ratios, with lines at 1 and at the limit."""
    ax.set_yscale("log")
    ax.axhline(1, color=INK, linewidth=0.9, zorder=1)
    ax.axhline(LIMIT, color=ORANGE, linewidth=1.4, linestyle=(0, (6, 3)), zorder=1)
    ax.annotate(
        "$2^{-1/3}$: 20.6 % less", (0, LIMIT), xycoords=("axes fraction", "data"), xytext=(4, 5), ha="left",
        textcoords="offset points", va="bottom", color=ORANGE, fontsize=SMALL,
    )  # fmt: skip
    low, high = ax.get_ylim()
    ticks = [t for t in (0.4, 0.5, 0.6, 0.8, 1, 1.5, 2, 3, 5, 10, 20, 50) if low <= t <= high]
    ax.set_yticks(ticks)
    ax.set_yticklabels([short(t) for t in ticks])
    ax.minorticks_off()
    ax.set_ylabel("final error, CWGD-Cosine / cosine")


def cwgd_paths(paths: Any, ax: Axes | None = None, *, title: str = "") -> Axes:
    """Exact expected error along the way, of every method of one cell."""
    ax = own_axes(ax)
    looks: tuple[tuple[str, Any, float], ...] = (
        (INK, "-", 1.4),
        (BLUE, "-", 4.0),
        (ORANGE, (0, (4, 3)), 1.6),
        ("#56B4E9", (0, (1, 2)), 3.0),
    )
    looks += (("#009E73", "-", 3.5), ("#CC79A7", (0, (4, 3)), 1.6))
    for (name, errors), (colour, dash, width) in zip(paths.errors.items(), looks, strict=True):
        light = 0.45 if width > 3 else 1.0
        ax.plot(paths.at, errors, color=colour, linestyle=dash, linewidth=width, alpha=light, label=name)
    ax.set_yscale("log")
    last = np.array([errors[-1] for errors in paths.errors.values()])
    ax.set_ylim(last.min() / 1.6, last.max() * 300)
    ax.set_xlabel(f"step (condition {short(paths.condition)}, {paths.noise} noise, batch {paths.batch_size})")
    ax.set_ylabel("expected error")
    ax.legend(fontsize=SMALL, loc="upper right", framealpha=0.9)
    return finished(ax, title)


def cwgd_rates(curves: Any, ax: Axes | None = None, *, title: str = "") -> Axes:
    """Final error against the peak rate: the two methods' curves are one, shifted by a factor of two."""
    ax = own_axes(ax)
    for i, (condition, (plain, divided)) in enumerate(curves.errors.items()):
        colour = LINES[i][0]
        least = min(plain)
        for errors, dash in ((plain, "-"), (divided, (0, (4, 3)))):
            y = np.asarray(errors) / least
            ax.plot(curves.rates, y, color=colour, linestyle=dash, label=f"condition {condition}" * (dash == "-"))
            best = int(np.argmin(y))
            ax.plot(curves.rates[best], y[best], marker="o" if dash == "-" else "s", color=colour, markersize=6)
    ax.plot([], [], color=INK, marker="o", label="cosine, and its best")
    ax.plot([], [], color=INK, linestyle=(0, (4, 3)), marker="s", label="CWGD-Cosine, and its best")
    ax.set_xscale("log")
    ax.set_ylim(0.9, 5.5)
    ax.set_xlabel(r"peak rate $\eta_{max} \lambda_{max}$" + f" ({curves.steps:,} steps)")
    ax.set_ylabel("final error / the least of cosine")
    ax.legend(fontsize=SMALL, loc="upper center", ncols=2, framealpha=1.0)
    return finished(ax, title)


def cwgd_factors(outcomes: Sequence[Any], ax: Axes | None = None, *, title: str = "") -> Axes:
    """What the normalised variant multiplies the cosine by along the way: each case's first form."""
    ax = own_axes(ax)
    ax.axhline(1, color=INK, linewidth=0.9, zorder=1)
    for outcome, (colour, dash, _) in zip(outcomes, LINES, strict=False):
        form = next(iter(outcome.factors))
        times = np.asarray(outcome.times) / outcome.steps
        ax.plot(times, outcome.factors[form], color=colour, linestyle=dash, label=outcome.name)
    ax.set_ylim(0, 3.0)
    ax.set_yticks([0, 0.5, 1, 1.5, 2])
    ax.set_xlabel("t / T")
    ax.set_ylabel(r"$2 \,/\, (1 + CWGD_t/CWGD_0)$")
    ax.legend(fontsize="x-small", loc="upper center", ncols=2, handlelength=1.6, columnspacing=1.0, framealpha=0.9)
    return finished(ax, title)


def cwgd_comparisons(outcomes: Sequence[Any], ax: Axes | None = None, *, title: str = "") -> Axes:
    """Final error over that of tuned cosine, with 95 % intervals: tuned, at cosine's best rate, and the control."""
    ax = own_axes(ax)
    labels, y = [], 0.0
    for outcome in outcomes:
        for form in outcome.factors:
            tuned, same = outcome.find("normalised", form), outcome.find("published", form)
            draw_interval(ax, same, y + 0.18, "s", ORANGE)
            draw_interval(ax, tuned, y - 0.12, "o", BLUE)
            labels.append((y, f"{outcome.name}: {form}"))
            y += 1
        draw_interval(ax, outcome.find("halved"), y, "^", INK)
        labels.append((y, "control"))
        y += 1.35
    for marker, colour, name in (
        ("o", BLUE, "normalised, each tuned"), ("s", ORANGE, "CWGD-Cosine at cosine's best rate"),
        ("^", INK, "control: cosine at half that rate"),
    ):  # fmt: skip
        ax.plot([], [], marker=marker, color=colour, markerfacecolor="none" if marker == "s" else colour, label=name)
    ax.axvline(1, color=INK, linewidth=0.9, zorder=1)
    ax.set_xscale("log")
    shown = [o.find(m, form) for o in outcomes for form in o.factors for m in ("normalised", "published")]
    lowest = min(one.low for one in (*shown, *(o.find("halved") for o in outcomes)))
    ax.set_xlim(min(0.75, lowest / 1.05), BEYOND * 1.35)
    ax.set_xticks([0.8, 1, 1.5, 2, 3])
    ax.set_xticklabels(["0.8", "1", "1.5", "2", "3"])
    ax.minorticks_off()
    ax.set_yticks([at for at, _ in labels])
    ax.set_yticklabels([name for _, name in labels], fontsize=SMALL)
    ax.set_ylim(y, -4.4)
    ax.set_xlabel("final error / that of tuned cosine")
    ax.legend(fontsize=SMALL, loc="upper right", framealpha=0.9)
    return finished(ax, title)


def draw_interval(ax: Axes, one: Any, y: float, marker: str, colour: str) -> None:
    """A ratio with its interval, or an arrow with its number where it lies beyond the axis."""
    face = "none" if marker == "s" else colour
    if not one.ratio < BEYOND:
        text = f"{short(one.ratio)} \N{RIGHTWARDS ARROW}" if math.isfinite(one.ratio) else "diverges"
        ax.annotate(
            text,
            (BEYOND * (1.3 if marker == "s" else 1.0), y),
            ha="right",
            va="center",
            fontsize="x-small",
            color=colour,
        )
        return
    ax.plot([one.low, one.high], [y, y], color=colour, linewidth=1.6, solid_capstyle="butt")
    ax.plot(one.ratio, y, marker=marker, color=colour, markersize=4.5, markerfacecolor=face)


def finished(ax: Axes, title: str) -> Axes:
    if title:
        ax.set_title(title)
    open_frame(ax)
    return ax
