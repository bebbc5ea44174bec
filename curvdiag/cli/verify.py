"""``curvdiag verify``: a second opinion."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Group

    from curvdiag.verify import Verification


def verify(
    out: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Save all rows as JSON.", show_default=False),
    ] = None,
) -> None:
    """Compare curvdiag with dense LAPACK and with PyHessian on small problems; exit code 1 if a row fails."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    from curvdiag.record.export import replace_whole
    from curvdiag.verify import verify as compare

    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("problems", total=None)
        result = compare(progress=lambda done, total: bar.update(task, completed=done, total=total))
    # A pipe has no width of its own, and 80 columns would break every row.
    Console(width=None if console.is_terminal else 140).print(table(result))
    if out is not None:
        text = json.dumps(report(result), indent=1, allow_nan=False)
        typer.echo(f"wrote {replace_whole(out, lambda file: print(text, file=file), 'w')}")
    typer.echo(str(result))
    if not result.passed:
        raise typer.Exit(1)


def table(result: Verification) -> Group:
    """One row a comparison; what a reader should know of some rows stands below, by number."""
    from rich.console import Group
    from rich.markup import escape
    from rich.table import Table
    from rich.text import Text

    rows = Table("problem", "quantity", "note", "against", box=None, header_style="bold", pad_edge=False)
    rows.columns[1].no_wrap = True
    for name in ("curvdiag", "reference", "difference", "tolerance"):
        rows.add_column(name, justify="right", no_wrap=True)
    rows.add_column("")
    notes: list[str] = []
    before = ""
    for check in result.checks:
        if check.note and check.note not in notes:
            notes.append(check.note)
        if before and check.problem != before:
            rows.add_row()
        rows.add_row(
            escape(check.problem) if check.problem != before else "",
            escape(check.quantity),
            str(notes.index(check.note) + 1) if check.note else "",
            escape(check.against),
            f"{check.value:.6g}",
            f"{check.reference:.6g}",
            f"{check.difference:.1e}",
            f"{check.tolerance:.1e}",
            "[green]PASS[/green]" if check.passed else "[bold red]FAIL[/bold red]",
        )
        before = check.problem
    return Group(rows, "", *(Text(f"{number}  {note}") for number, note in enumerate(notes, 1)), "")


def report(result: Verification) -> dict[str, object]:
    """All rows, with the versions that gave them."""
    from importlib.metadata import version

    packages = ("curvdiag", "torch", "numpy", "scipy", "pyhessian")
    return {
        "passed": result.passed,
        "versions": {name: version(name) for name in packages},
        "checks": [check.to_dict() for check in result.checks],
    }
