"""``curvdiag merge``: several run files made one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def merge(
    files: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN.db", help="Run files, or patterns such as 'run-*.db'; only read.", show_default=False
        ),
    ],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="RUN.db", help="The run file to write.", show_default=False),
    ],
    apart: Annotated[
        bool, typer.Option("--apart", help="Keep runs of one name that differ as runs of their own.")
    ] = False,
    join: Annotated[
        bool,
        typer.Option(
            "--join", help="Make one run of the runs of one name: of a training that was continued into another file."
        ),
    ] = False,
    newest: Annotated[
        bool,
        typer.Option(
            "--newest", help="Where files hold different measurements of one step, take the later one, and say so."
        ),
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the output if it exists.")] = False,
) -> None:
    """Make one run file of several: of the shards of a scan, or of any runs.

    For shards: curvdiag merge 'part-*.db' -o run.db

    Parts of one run become one run; runs of different names stay runs of their own. All is written, or nothing.

    Refused, with what differs: runs of one name that are not one, unless --apart or --join says what they are; and
    measurements that contradict each other, unless --newest says which to take.
    """
    from curvdiag.record import merge_runs

    result = merge_runs(files, output, apart=apart, join=join, newest=newest, overwrite=force)
    for note in result.notes:
        typer.echo(note, err=True)
    typer.echo(str(result))
