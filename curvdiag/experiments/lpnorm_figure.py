"""The picture of the ``lpnorm`` experiment: accuracies, curves, and the measured anisotropy beside p."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from curvdiag.estimate import Estimate
from curvdiag.experiments.lpnorm_methods import BASELINES, P_MAX, PUBLISHED
from curvdiag.experiments.lpnorm_summary import Outcome, Summary, finals
from curvdiag.plotting.style import LINES, open_frame

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FOLLOWED = (*BASELINES, PUBLISHED, "LPSGDM, AnisotropyP", "LPSGDM, PredictedDecreaseP")
"""The methods whose curves are shown; the JSON holds all."""
LOOKS = dict(zip(FOLLOWED, LINES, strict=False))
GREY = "#8a8a8a"


def draw(outcomes: Mapping[str, Outcome]) -> Figure:
    """A column for each task: test accuracy by method, accuracy and training loss by epoch, p, and effective rank."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.4 * len(outcomes) + 1.6, 13.6), layout="constrained")
    rows = (3.3, 2.0, 2.0, 1.4, 1.4)
    grid = figure.subplots(5, len(outcomes), squeeze=False, gridspec_kw={"height_ratios": rows})
    for column, outcome in zip(grid.T, outcomes.values(), strict=True):
        accuracies(outcome.summaries, column[0])
        column[0].set_title(outcome.task.title)
        curves(outcome, column[1:])
        column[-1].set_xlabel("epoch")
    for ax in grid[:, 1:].flat:
        ax.set_ylabel("")
    for ax in grid[0, 1:]:
        ax.tick_params(labelleft=False)
    handles, labels = grid[1, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    return figure


def accuracies(summaries: Sequence[Summary], ax: Axes) -> None:
    """Mean test accuracy of each method with its 95 % interval, in %; those whose curves are shown are coloured."""
    for row, one in enumerate(summaries):
        colour, _, marker = LOOKS.get(one.method, (GREY, "-", "o"))
        value, (low, high) = 100 * one.accuracy.value, one.accuracy.interval()
        error = [[value - 100 * low], [100 * high - value]]
        ax.errorbar(value, row, xerr=error, color=colour, marker=marker, markersize=6, capsize=3, linewidth=1.6)
    for name in BASELINES[:2]:
        for one in summaries:
            if one.method == name:
                colour, dash, _ = LOOKS[name]
                ax.axvline(100 * one.accuracy.value, color=colour, linestyle=dash, linewidth=0.8, alpha=0.6, zorder=0)
    ax.set_yticks(range(len(summaries)), [one.method for one in summaries])
    ax.set_ylim(len(summaries) - 0.4, -0.6)
    ax.set_xlabel("test accuracy at the end, %, with 95 % intervals over seeds")
    ax.grid(axis="x", color="#e4e4e4", linewidth=0.7)
    ax.set_axisbelow(True)
    open_frame(ax)


def curves(outcome: Outcome, axes: Sequence[Axes]) -> None:
    """Four panels over epochs: test accuracy, training loss, p, effective rank; means over seeds with intervals."""
    accuracy, loss, p, rank = axes
    epochs = range(1, outcome.task.epochs + 1)
    for method in FOLLOWED:
        runs = [run.curves for run in finals(outcome.runs, method) if run.curves is not None]
        band(accuracy, method, runs[0].tested_at, [[100 * x for x in one.accuracy] for one in runs])
        band(loss, method, epochs, [one.train_loss for one in runs], log=True)
        band(p, method, epochs, [one.p for one in runs])
        band(rank, method, runs[0].measured_at, [one.anisotropy for one in runs], log=True)
    accuracy.set_ylim(bottom=_floor(accuracy))
    p.set_ylim(1.8, P_MAX + 0.3)
    labels = ("test accuracy, %", "training loss", "p", "effective rank of H")
    for ax, label in zip(axes, labels, strict=True):
        ax.set_ylabel(label)
        ax.set_xlim(0, outcome.task.epochs * 1.01)
        ax.tick_params(labelbottom=ax is rank)
        open_frame(ax)


def band(ax: Axes, method: str, at: Sequence[float], values: Sequence[Sequence[float]], *, log: bool = False) -> None:
    """Mean over runs and its 95 % interval, of logarithms where the axis is logarithmic; runs that broke off left out.

    Nothing is drawn where nothing was seen.
    """
    whole = np.array([one for one in values if len(one) == len(at)], dtype=np.float64)
    if not whole.size:
        return
    if log:
        ax.set_yscale("log")
        whole = np.log(whole)
    estimate = Estimate.from_samples(whole)
    back = np.exp if log else np.asarray
    colour, dash, marker = LOOKS[method]
    look: dict[str, Any] = {"color": colour, "linestyle": dash, "marker": marker, "markersize": 4, "linewidth": 1.4}
    ax.plot(at, back(estimate.value), markevery=max(1, len(at) // 6), label=method, **look)
    low, high = estimate.interval()
    if np.isfinite(low).all():
        ax.fill_between(at, back(low), back(high), color=colour, alpha=0.15, linewidth=0)


def _floor(ax: Axes) -> float:
    """Where the lowest curve is after a third of the run: what is before it would flatten the rest."""
    return min(float(y[len(y) // 3]) for y in (np.asarray(line.get_ydata()) for line in ax.lines))
