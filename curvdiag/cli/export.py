"""``curvdiag export``: a run for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from curvdiag.cli.options import RunChoice, RunFile


def export(
    file: RunFile,
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE.csv|FILE.npz",
            help="Where to; the ending says what.",
            show_default=False,
        ),
    ],
    run: RunChoice = None,
) -> None:
    """Write a run as CSV (scalars, one line a value) or npz (scalars and densities)."""
    from curvdiag.errors import ArgumentError
    from curvdiag.record import RunStore

    ending = output.suffix.lower()
    if ending not in (".csv", ".npz"):
        raise ArgumentError(f"cannot tell from {output.name!r} what to write: the name ends in .csv or .npz")
    with RunStore(file, readonly=True) as store:
        write = store.export_csv if ending == ".csv" else store.export_npz
        typer.echo(f"wrote {write(output, run)}")
