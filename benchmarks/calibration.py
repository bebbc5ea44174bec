"""Table of the held-out interval's coverage and the verdict's errors: ``python benchmarks/calibration.py``.

Problems with known H and C (20 directions over two decades), 500 repetitions a cell; ``--quick`` takes 50.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from curvdiag.experiments.calibration import Calibration, Problem, calibrate
from curvdiag.scaling.power_law import METHODS

HERE = Path(__file__).parent
SAMPLES = (100, 400, 2000, 4000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="50 repetitions instead of 500")
    parser.add_argument("--tails", action="store_true", help="also dependent gradients with heavy tails (t, 8 degrees)")
    parser.add_argument("--json", type=Path, default=HERE / "results" / "calibration.json", help="where to save")
    parser.add_argument("--samples", type=int, nargs="+", default=SAMPLES, help="how many samples, half for the basis")
    options = parser.parse_args()
    problems = [Problem("one"), Problem("full")]
    if options.tails:
        problems += [Problem(rank, tails=8.0, dependent=True) for rank in ("one", "full")]
    # Wide enough for the table even where the output is no terminal.
    console, rows = Console(width=max(Console().width, 175)), []
    for problem in problems:
        for samples in options.samples:
            console.print(f"rank {problem.rank}, {samples} samples ...", style="dim")
            rows += calibrate(problem, samples, repetitions=50 if options.quick else 500, methods=METHODS)
    console.print(table(rows))
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps([_finite(row.to_dict()) for row in rows], indent=1) + "\n")


def table(rows: list[Calibration]) -> Table:
    """A line for each cell; the coverage of 95 % intervals is that of least squares, Theil-Sen and Deming."""
    grid = Table(title=f"95 % held-out intervals and verdicts, {rows[0].repetitions} repetitions")
    names = ("samples", "rank of h", "tails", "gamma", "in its basis", "coverage, % (OLS / T-S / Deming)")
    for name in (*names, "held-out bias", "in-sample bias", "not proportional, %", "words"):
        grid.add_column(name, justify="left" if name == "words" else "right")
    for row in rows:
        words = ", ".join(f"{word} {count}" for word, count in sorted(row.words.items(), key=lambda w: -w[1]))
        grid.add_row(
            f"{row.samples:,}",
            row.rank,
            "Gaussian" if np.isinf(row.tails) else f"t{row.tails:g}, dependent",
            f"{row.gamma:g}",
            f"{row.exponent:.3f}",
            " / ".join(f"{100 * row.coverage[m]:.1f}" for m in row.coverage),
            f"{row.bias['ols']:+.4f}",
            f"{row.in_sample_bias:+.4f}",
            f"{100 * row.refused:.1f}",
            words,
        )
    return grid


def _finite(row: dict[str, object]) -> dict[str, object]:
    """JSON has no infinity: Gaussian tails become null."""
    return row | {"tails": None if row["tails"] == np.inf else row["tails"]}


if __name__ == "__main__":
    main()
