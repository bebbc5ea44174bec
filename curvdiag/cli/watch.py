"""``curvdiag watch``: the page of a run that goes on."""

from __future__ import annotations

from typing import Annotated

import typer

from curvdiag.cli.options import RunFile


def watch(
    file: RunFile,
    port: Annotated[int, typer.Option(help="Port of 127.0.0.1; 0 for any free one.")] = 8642,
) -> None:
    """Serve the page of a run file on this machine, and follow the run while it goes on."""
    from curvdiag.report import serve

    serve(file, port, ready=lambda address: typer.echo(f"{file.name} at {address} (Ctrl-C ends it)"))
    typer.echo("stopped")
