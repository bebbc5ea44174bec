"""``curvdiag report``: a run as one page that can be opened anywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from curvdiag.cli.options import RunFile


def report(
    file: RunFile,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE.html", help="The page; beside the run file if not given."),
    ] = None,
    run: Annotated[
        str | None,
        typer.Option("--run", metavar="NAME_OR_ID", help="Only this run; without it the page holds all, to choose."),
    ] = None,
) -> None:
    """Write a run as one self-contained page with interactive figures."""
    from curvdiag.report import write_report

    written = write_report(file, file.with_suffix(".html") if output is None else output, run)
    typer.echo(f"wrote {written} ({written.stat().st_size / 1e6:.1f} MB)")
