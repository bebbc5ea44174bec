"""``curvdiag runs``: what a run file holds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Annotated

import typer

from curvdiag.cli.options import RunFile

if TYPE_CHECKING:
    from rich.table import Table

    from curvdiag.record import Event, RunInfo

Found = Sequence[tuple["RunInfo", list[str], "list[Event]"]]

PIPE_WIDTH = 160
"""A pipe has no width of its own, and 80 columns would break every row."""


def runs(
    file: RunFile,
    run: Annotated[
        str | None,
        typer.Option("--run", metavar="NAME_OR_ID", help="Only this run; all if not given."),
    ] = None,
    events: Annotated[
        bool, typer.Option("--events", help="What happened in the runs: failures, notes, measured checkpoints.")
    ] = False,
    machine: Annotated[
        bool, typer.Option("--json", help="Print JSON, with configurations, versions and events.")
    ] = False,
) -> None:
    """List the runs of a file, or what happened in them."""
    from rich.console import Console

    from curvdiag.record import RunStore

    with RunStore(file, readonly=True) as store:
        chosen = store.runs() if run is None else [store.run(run)]
        found = [(one, store.operators(one.id), store.events(one.id)) for one in chosen]
    if machine:
        typer.echo(as_json(found))
        return
    console = Console()
    console = console if console.is_terminal else Console(width=PIPE_WIDTH)
    console.print(event_table(file.name, found) if events else run_table(file.name, found))
    if not found:
        console.print("no runs yet")


def run_table(title: str, found: Found) -> Table:
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(title), title_justify="left", box=None, header_style="bold", pad_edge=False)
    table.add_column("id", justify="right")
    table.add_column("name")
    table.add_column("begun", no_wrap=True)
    table.add_column("measured", justify="right")
    table.add_column("last step", justify="right", no_wrap=True)
    table.add_column("errors", justify="right")
    table.add_column("densities")
    table.add_column("torch")
    for run, operators, events in found:
        table.add_row(
            str(run.id),
            escape(run.name),
            moment(run.created),
            str(run.measurements),
            "-" if run.last_step is None else str(run.last_step),
            str(sum(event.kind == "error" for event in events)),
            ", ".join(operators) or "-",
            run.versions.get("torch", "-"),
        )
    return table


def event_table(title: str, found: Found) -> Table:
    from rich.markup import escape
    from rich.table import Table

    table = Table("run", title=escape(title), title_justify="left", box=None, header_style="bold", pad_edge=False)
    table.add_column("step", justify="right")
    table.add_column("when", no_wrap=True)
    table.add_column("kind")
    table.add_column("what")
    for run, _, events in found:
        for event in events:
            table.add_row(
                escape(run.name), str(event.step), moment(event.time), escape(event.kind), escape(event.message)
            )
    return table


def as_json(found: Found) -> str:
    from dataclasses import asdict

    from curvdiag.cli.scaling import finite

    rows = [
        {**asdict(run), "densities": operators, "events": [asdict(event) for event in events]}
        for run, operators, events in found
    ]
    return json.dumps(finite(rows), indent=1, allow_nan=False)


def moment(time: float) -> str:
    return datetime.fromtimestamp(time).strftime("%Y-%m-%d %H:%M")
