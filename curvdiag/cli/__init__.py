"""The command ``curvdiag``. One file a command; a new one is one more line in :data:`COMMANDS`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.metadata import version as installed_version
from typing import Annotated

import torch.distributed as dist
import typer

from curvdiag.cli.demo import demo
from curvdiag.cli.export import export
from curvdiag.cli.measure import measure
from curvdiag.cli.merge import merge
from curvdiag.cli.plot import plot
from curvdiag.cli.report import report
from curvdiag.cli.reproduce import Listing, reproduce
from curvdiag.cli.runs import runs
from curvdiag.cli.scaling import scaling
from curvdiag.cli.scan import scan
from curvdiag.cli.verify import verify
from curvdiag.cli.watch import watch
from curvdiag.errors import CurvdiagError

COMMANDS = (demo, measure, scan, merge, plot, runs, export, report, watch, verify, scaling)

app = typer.Typer(
    name="curvdiag",
    help="Watch the curvature of a network while it trains.",
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)
for command in COMMANDS:
    app.command()(command)
app.command(cls=Listing)(reproduce)


def show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"curvdiag {installed_version('curvdiag')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=show_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    pass


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; what curvdiag refuses becomes one line on stderr and exit code 2."""
    try:
        app(args=None if arguments is None else list(arguments))
    except CurvdiagError as error:
        print("curvdiag: error:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)


def run() -> None:
    """The process of the command: :func:`main`, and an end that gloo cannot spoil where a task made a process group."""
    try:
        main()
    except SystemExit as ended:
        if dist.is_available() and dist.is_initialized():
            # a thread of gloo's may abort the process, all done and written, while the interpreter is taken apart
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(ended.code if isinstance(ended.code, int) else 0)
        raise
