"""``curvdiag runs``: what a run file holds."""

from __future__ import annotations

from datetime import datetime

from curvdiag.cli.options import RunFile


def runs(file: RunFile) -> None:
    """List the runs of a file."""
    from rich.console import Console
    from rich.table import Table

    from curvdiag.record import RunStore

    with RunStore(file, readonly=True) as store:
        found = [(run, store.operators(run.id), store.events(run.id)) for run in store.runs()]
    table = Table(title=file.name, title_justify="left", box=None, header_style="bold", pad_edge=False)
    table.add_column("id", justify="right")
    table.add_column("name")
    table.add_column("begun", no_wrap=True)
    table.add_column("measured", justify="right")
    table.add_column("last step", justify="right", no_wrap=True)
    table.add_column("events", justify="right")
    table.add_column("densities")
    table.add_column("torch")
    for run, operators, events in found:
        table.add_row(
            str(run.id),
            run.name,
            datetime.fromtimestamp(run.created).strftime("%Y-%m-%d %H:%M"),
            str(run.measurements),
            "-" if run.last_step is None else str(run.last_step),
            str(len(events)),
            ", ".join(operators) or "-",
            run.versions.get("torch", "-"),
        )
    console = Console()
    console.print(table)
    if not found:
        console.print("no runs yet")
