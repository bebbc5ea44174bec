"""The command ``curvdiag``. One file a command; a new one is one more line in :data:`COMMANDS`."""

from __future__ import annotations

import contextlib
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
    """The process of the command: :func:`main`, with an end that gloo cannot spoil if a task made a process group."""
    try:
        main()
    except SystemExit as ended:
        if not dist.is_available() or not dist.is_initialized():
            raise
        _end(ended.code)


def _end(code: object) -> None:
    """End the process without taking the interpreter apart, during which a thread of gloo's now and then aborts it.

    What is registered with atexit is left out.
    """
    if code is not None and not isinstance(code, int):  # as sys.exit does
        print(code, file=sys.stderr)
        code = 1
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # nobody reads it any more
            stream.flush()
    os._exit(code or 0)
