"""``curvdiag measure``: one measurement, printed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from curvdiag.cli.measuring import (
    LanczosSteps,
    Part,
    PresetChoice,
    Probes,
    Quantities,
    Seed,
    Task,
    Tolerance,
    Traceback,
)

if TYPE_CHECKING:
    from rich.table import Table

    from curvdiag.monitor import Measurement


def measure(
    task: Task,
    checkpoint: Annotated[
        Path | None,
        typer.Option("--checkpoint", "-c", metavar="FILE", help="Weights to measure at; the task's own if not given."),
    ] = None,
    part: Part = None,
    preset: PresetChoice = None,
    quantities: Quantities = None,
    lanczos_steps: LanczosSteps = 40,
    probes: Probes = 3,
    tol: Tolerance = 1e-2,
    seed: Seed = 0,
    machine: Annotated[bool, typer.Option("--json", help="Print JSON, with densities, versions and settings.")] = False,
    traceback: Traceback = False,
) -> None:
    """Measure a task once and print what was found; exit code 1 where some of it failed."""
    from rich.console import Console

    from curvdiag.checkpoints.measuring import Measurer
    from curvdiag.checkpoints.weights import load_checkpoint
    from curvdiag.cli.task import load_task
    from curvdiag.monitor.description import describe_settings
    from curvdiag.monitor.settings import Settings

    settings = Settings(
        None if preset is None else preset.value, lanczos_steps, probes, tol, seed, measure=quantities or None
    )
    with load_task(task, show_traceback=traceback) as objective:
        measurer = Measurer(objective, settings)
        contents = None if checkpoint is None else load_checkpoint(objective.model, checkpoint, part)
        place = (0, None) if contents is None else (contents.step or 0, contents.epoch)
        measurement, failures = measurer(*place, None if contents is None else contents.scalars)
        settled = describe_settings(objective, settings)
    notes = [*measurer.notes, *measurement.notes]
    wrong = {name: f"{type(error).__name__}: {error}" for name, error in failures.items()}
    if machine:
        about = {"task": task, "checkpoint": None if checkpoint is None else str(checkpoint), "settings": settled}
        typer.echo(as_json(measurement, None if contents is None else contents.step, about, notes, wrong))
    else:
        console = Console()
        console.print(settled["objective"], soft_wrap=True, markup=False, highlight=False)
        console.print(table(measurement))
        for line in [*notes, *(f"{name} failed: {why}" for name, why in wrong.items())]:
            console.print(line, soft_wrap=True, markup=False, highlight=False)
    if wrong:
        if machine:
            print("\n".join(f"{name} failed: {' '.join(why.split())}" for name, why in wrong.items()), file=sys.stderr)
        raise typer.Exit(1)


def table(measurement: Measurement) -> Table:
    """One row a number, with its standard error where it has one."""
    from rich.markup import escape
    from rich.table import Table

    rows = Table("quantity", box=None, header_style="bold", pad_edge=False)
    for title in ("value", "± standard error"):
        rows.add_column(title, justify="right", no_wrap=True)
    for name, value in sorted(measurement.scalars.items()):
        error = getattr(value, "standard_error", None)
        rows.add_row(escape(name), f"{float(value):.6g}", "" if not error else f"{error:.2g}")
    return rows


def as_json(
    measurement: Measurement, step: int | None, about: dict[str, Any], notes: list[str], failures: dict[str, str]
) -> str:
    """Everything, in JSON; what is not finite is ``null``."""
    from importlib.metadata import version

    from curvdiag.cli.scaling import finite

    scalars = {
        name: value.to_dict() if hasattr(value, "to_dict") else float(value)
        for name, value in sorted(measurement.scalars.items())
    }
    densities = [
        {"operator": operator, "block": block, **density.to_dict()}
        for (operator, block), density in measurement.densities.items()
    ]
    versions = {name: version(name) for name in ("curvdiag", "torch", "numpy", "scipy")}
    whole = {
        **about, "versions": versions, "step": step, "epoch": measurement.epoch, "seconds": measurement.seconds,
        "scalars": scalars, "densities": densities, "notes": notes, "failures": failures,
    }  # fmt: skip
    return json.dumps(finite(whole), indent=1, allow_nan=False)
