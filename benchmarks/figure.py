"""The figure of the benchmark from its saved rows: ``python benchmarks/figure.py [RESULTS.json]``.

Above, what each library takes on each net, in gradients, with the floor that counting matrix products gives. Below,
how a step grows.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from report import Row

from curvdiag.plotting.style import INK, LINES, open_frame

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HERE = Path(__file__).parent
NETS = ("MLP", "ResNet", "GPT")
LIBRARIES = {
    "curvdiag": 1,
    "PyHessian, one batch": 2,
    "PyHessian, data loader": 4,
    "hessian-eigenthings": 3,
    "curvlinops": 0,
    "forward mode": 6,
}
"""Place of each library's colour and marker in the house style."""
PRODUCT_FLOOR, COVARIANCE_FLOOR = 2.0, 4 / 3
"""Gradients of H @ v, and of C @ v and GGN @ v, by counting the products of linear layers."""
FLOOR, VOID = "floor by counting", "hollow: another matrix"
POINTS = (
    ("H @ v", "Hessian product H @ v", {"curvdiag, graphs kept": "curvdiag"}, PRODUCT_FLOOR),
    ("Lanczos quadrature, a step", "A whole step of stochastic Lanczos quadrature", {}, PRODUCT_FLOOR),
    (
        "GGN @ v",
        "Products C @ v and GGN @ v",
        {
            "curvdiag, GGN @ v kept": "curvdiag",
            "forward mode, GGN @ v": "forward mode",
            "curvlinops, GGN @ v": "curvlinops",
        },
        COVARIANCE_FLOOR,
    ),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("results", nargs="?", type=Path, help="a file of benchmarks/results; the newest if not given")
    parser.add_argument("--out", type=Path, default=HERE.parent / "figures" / "benchmarks.png")
    options = parser.parse_args()
    draw(options.results or newest(HERE / "results"), options.out)
    print(f"Wrote {options.out}")


def newest(folder: Path) -> Path:
    """The latest day's results."""
    found = sorted(folder.glob("[0-9]*-threads.json"))
    if not found:
        raise SystemExit(f"{folder.name} holds no results: run `make bench` first")
    return found[-1]


def draw(results: Path, out: Path) -> None:
    """Write the figure; a panel whose rows are missing says so."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    saved = json.loads(results.read_text(encoding="utf-8"))
    rows = [Row(**row) for row in saved["rows"]]
    style = {"font.size": 8, "axes.titlesize": 9, "axes.titleweight": "bold", "legend.fontsize": 7}
    with plt.rc_context(style):
        figure = plt.figure(figsize=(11, 6.6), layout="constrained")
        above, below = figure.subfigures(2, 1, height_ratios=(1, 1), hspace=0.04)
        panels = above.subplots(1, 3)
        for panel, (title, section, names, floor) in zip(panels, POINTS, strict=True):
            points(panel, rows, section, names, floor)
            panel.set_title(title, loc="left")
        named = [pair for panel in panels for pair in zip(*panel.get_legend_handles_labels(), strict=True)]
        handles = {label: handle for handle, label in named}
        order = [name for name in (*LIBRARIES, VOID, FLOOR) if name in handles]
        above.legend(
            [handles[name] for name in order], order, loc="outside lower center", ncols=len(order), frameon=False
        )
        four = below.subplots(1, 4)
        scaling(four[0], rows, "parameters")
        scaling(four[1], rows, "samples")
        by_steps(four[2], rows)
        by_probes(four[3], rows)
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, dpi=200)
        plt.close(figure)


def points(ax: Axes, rows: Sequence[Row], section: str, names: dict[str, str], floor: float) -> None:
    """A marker for each library on each net, with its quartiles, and the floor; what is void is hollow."""
    seen: dict[str, list[tuple[int, Row]]] = {}
    for row in rows:
        label = names.get(row.what, row.what)
        if row.section.startswith(section) and row.net in NETS and label in LIBRARIES:
            seen.setdefault(label, []).append((NETS.index(row.net), row))
    order = [name for name in LIBRARIES if name in seen]
    for index, label in enumerate(order):
        colour, _, marker = LINES[LIBRARIES[label]]
        shift = 0.11 * (index - (len(order) - 1) / 2)
        for number, (net, row) in enumerate(seen[label]):
            ax.errorbar(
                net + shift,
                row.value,
                [[max(0.0, row.value - row.low)], [max(0.0, row.high - row.value)]],
                color=colour,
                marker=marker,
                markersize=5.5,
                markerfacecolor="white" if "void" in row.note else colour,
                linewidth=1,
                label=label if not number else None,
            )
    ax.axhline(floor, color=INK, linewidth=0.8, linestyle=(0, (4, 3)), zorder=0, label=FLOOR)
    ax.plot([], [], color="none", marker="o", markeredgecolor=INK, markerfacecolor="white", label=VOID)
    ax.set_xticks(range(len(NETS)), NETS)
    ax.set_xlim(-0.5, len(NETS) - 0.5)
    ax.set_ylim(bottom=0)
    ax.set_ylabel("gradients")
    open_frame(ax)
    _say_if_empty(ax, bool(seen))


def scaling(ax: Axes, rows: Sequence[Row], kind: str) -> None:
    """Milliseconds over what grows, both logarithmic, with the slope of the upper half in the legend."""
    series = _series(rows, f"Growth with {kind}")
    for index, (name, found) in enumerate(sorted(series.items())):
        colour, line, marker = ((INK, ":", ""), LINES[5], LINES[1])[index % 3]
        x, y = np.array([r.at for r in found]), 1e3 * np.array([r.seconds for r in found])
        half = slice(len(x) // 2 if len(x) > 3 else 0, None)
        slope = np.polyfit(np.log(x[half]), np.log(y[half]), 1)[0]
        name = name.removeprefix("curvdiag, ")
        ax.loglog(x, y, color=colour, linestyle=line, marker=marker, markersize=4, label=f"{name}, slope {slope:.2f}")
    ax.set_title(f"Growth with {kind}", loc="left")
    ax.set_xlabel({"parameters": "parameters P", "samples": "samples N"}[kind])
    ax.set_ylabel("milliseconds")
    _finish(ax, bool(series))
    if kind == "samples" and series:
        places = _places(series)[::2]
        ax.set_xticks(places, [f"{at:g}" for at in places])
        ax.set_xticks([], minor=True)


def by_steps(ax: Axes, rows: Sequence[Row]) -> None:
    """The mean price of a step over the number of steps: those that reorthogonalise against all earlier ones rise."""
    series = _series(rows, "Growth with Lanczos steps")
    for name, found in series.items():
        label = name.removesuffix(", a step")
        colour, line, marker = LINES[LIBRARIES[label]]
        x, y = [r.at for r in found], [r.value for r in found]
        ax.plot(x, y, color=colour, linestyle=line, marker=marker, markersize=4, label=label)
    ax.set_title("Growth with Lanczos steps", loc="left")
    ax.set_xlabel("steps m")
    ax.set_ylabel("gradients for each step")
    _finish(ax, bool(series), _places(series))


def by_probes(ax: Axes, rows: Sequence[Row]) -> None:
    """The price of a vector over how many share a pass; counting gives 2 + 1.4 / k for a graph built anew."""
    series = _series(rows, "Growth with probes")
    for index, (name, found) in enumerate(series.items()):
        colour, line, marker = LINES[(1, 5)[index % 2]]
        x, y = np.array([r.at for r in found]), [r.value for r in found]
        ax.plot(x, y, color=colour, linestyle=line, marker=marker, markersize=4, label=name.removeprefix("curvdiag, "))
    if series:
        k = np.geomspace(x[0], x[-1], 100)
        ax.plot(k, 2 + 1.4 / k, color=INK, linewidth=0.8, linestyle=(0, (4, 3)), zorder=0, label="2 + 1.4 / k")
    ax.set_title("Growth with probes", loc="left")
    ax.set_xlabel("probes k")
    ax.set_ylabel("gradients for each probe")
    _finish(ax, bool(series), _places(series))


def _series(rows: Sequence[Row], section: str) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row.section.startswith(section) and row.at is not None:
            found.setdefault(row.what, []).append(row)
    return {name: sorted(of, key=lambda row: row.at or 0.0) for name, of in found.items()}


def _places(series: dict[str, list[Row]]) -> list[float]:
    return sorted({row.at for found in series.values() for row in found if row.at is not None})


def _finish(ax: Axes, filled: bool, ticks: Sequence[float] = ()) -> None:
    open_frame(ax)
    _say_if_empty(ax, filled)
    if not filled:
        return
    if ticks:
        ax.set_xscale("log")
        ax.set_xticks(ticks, [f"{at:g}" for at in ticks])
        ax.set_xticks([], minor=True)
        ax.set_ylim(0, 1.35 * ax.get_ylim()[1])
    else:
        low, high = ax.get_ylim()
        ax.set_ylim(low, high * (high / low) ** 0.35)
    ax.legend(loc="upper left", frameon=False, borderaxespad=0.2)


def _say_if_empty(ax: Axes, filled: bool) -> None:
    if not filled:
        ax.text(0.5, 0.5, "not measured", transform=ax.transAxes, ha="center", color=INK)


if __name__ == "__main__":
    main()
