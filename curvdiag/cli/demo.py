"""``curvdiag demo``: the user's picture in a minute."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from curvdiag.scaling import ScalingResult


def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the run file and the pictures.")] = Path(
        "runs/demo"
    ),
    epochs: Annotated[int, typer.Option(min=1, help="Epochs of training; one measurement each.")] = 20,
) -> None:
    """Train a small net on digits with the monitor attached, hold its noise against its curvature, and draw both."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from curvdiag.experiments.demo import run_demo
    from curvdiag.record import RunStore

    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("epochs", total=epochs)
        result = run_demo(
            out, epochs=epochs, progress=lambda done, total: bar.update(task, completed=done, total=total)
        )
    with RunStore(result.run_file, readonly=True) as store:
        console.print(summary(store))
    console.print(
        f"{result.accuracy:.1%} of the digits held out are recognised. Training and measuring took "
        f"{result.seconds:.0f} s, {result.overhead:.0%} of it measuring."
    )
    console.print(noise_in_words(result.scaling), soft_wrap=True)
    console.print(f"Run file: {result.run_file}", soft_wrap=True)
    for path, what in result.pictures.items():
        console.print(f"{path}: {what}", soft_wrap=True)


def noise_in_words(result: ScalingResult) -> str:
    """What the test of C against H found, and the figure that decided it."""
    verdict = result.verdict
    return (
        f"Is gradient noise C shaped like the curvature H? In the last layer after training, on samples held out: "
        f"{verdict.word}. In C_ii ~ H_ii^gamma: {verdict.reasons[0]}."
    )


def summary(store):  # type: ignore[no-untyped-def]
    """A short table of a run: a few measurements from first to last."""
    from rich.table import Table

    columns = {
        "train/loss": "training loss",
        "curv/hessian/lambda_max": "lambda_max",
        "curv/hessian/trace": "trace",
        "curv/anisotropy/stable_rank": "stable rank",
    }
    known = set(store.scalar_names())
    series = {title: store.scalars(name) for name, title in columns.items() if name in known}
    steps = store.scalars("curv/hessian/lambda_max").steps
    table = Table("step", *series, title="The Hessian over training")
    for index in sorted({round(i * (len(steps) - 1) / 6) for i in range(7)}):
        step = steps[index]
        cells = []
        for one in series.values():
            value = dict(zip(one.steps.tolist(), one.values.tolist(), strict=True)).get(int(step))
            cells.append("-" if value is None else f"{value:.3g}")
        table.add_row(str(step), *cells)
    return table
