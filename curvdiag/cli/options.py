"""Arguments that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeAlias

import typer

RunFile: TypeAlias = Annotated[
    Path,
    typer.Argument(metavar="RUN.db", help="The run file; it may still be written to.", show_default=False),
]
RunChoice: TypeAlias = Annotated[
    str | None,
    typer.Option("--run", metavar="NAME_OR_ID", help="Which run of the file; the latest if not given."),
]
