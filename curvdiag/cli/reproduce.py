"""``curvdiag reproduce``: a published result again, with its controls."""

from __future__ import annotations

import ast
import importlib
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

EXPERIMENTS = ("geometry", "cwgd", "lpnorm", "superlinear", "mixing", "calibration")
"""Modules of :mod:`curvdiag.experiments` with a function ``reproduce`` and a constant ``MINUTES``."""


@dataclass(frozen=True)
class About:
    """What an experiment says of itself.

    Attributes:
        summary: The first sentence of its module's docstring.
        text: The rest of it.
        minutes: How long it takes on 2 CPU cores.
    """

    summary: str
    text: str
    minutes: float

    @property
    def time(self) -> str:
        if self.minutes < 1:
            return f"{max(round(60 * self.minutes, -1), 10):.0f} s"
        return f"{self.minutes:.0f} min" if self.minutes < 100 else f"{self.minutes / 60:.1f} h"


class Listing(TyperCommand):
    """The command, whose help ends with what each experiment says of itself; read only when it is asked for."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        from rich.markup import escape

        parts = []
        for name in EXPERIMENTS:
            one = about(name)
            parts.append(escape(f"{name} ({one.time}): {one.summary} {one.text}".replace("``", "`").strip()))
        self.epilog = "\n\n".join(["Experiments, with their time on 2 CPU cores:", *parts])
        super().format_help(ctx, formatter)


def reproduce(
    name: Annotated[
        str | None,
        typer.Argument(metavar="NAME", help="Which experiment; without one they are listed.", show_default=False),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", metavar="FOLDER", show_default=False,
            help="Where NAME.png and NAME.json go: figures/ if not given, and with --quick runs/quick/.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of everything random in it.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="A run of seconds, to see that it works.")] = False,
) -> None:  # fmt: skip
    """Run an experiment of the papers again, beside its controls: a picture and a JSON with all numbers."""
    if name is None:
        width = max(map(len, EXPERIMENTS))
        for known in EXPERIMENTS:
            one = about(known)
            typer.echo(f"{known:{width}}  {one.time:>6}  {one.summary}")
        typer.echo("\nTimes are on 2 CPU cores. curvdiag reproduce NAME runs one, curvdiag reproduce --help says more.")
        return
    require_known(name)
    from curvdiag.experiments.saved import make_folder

    folder = out if out is not None else Path("runs/quick" if quick else "figures")
    make_folder(folder)  # before the work, not after it
    typer.echo(f"{name}: {'a few seconds' if quick else f'about {about(name).time} on 2 CPU cores'}")
    module: Any = importlib.import_module(f"curvdiag.experiments.{name}")
    for path in module.reproduce(folder, seed=seed, quick=quick, progress=typer.echo):
        typer.echo(f"wrote {path}")


def require_known(name: str) -> None:
    """Raise an error that says what there is, and what was probably meant."""
    from curvdiag.errors import ArgumentError

    if name in EXPERIMENTS:
        return
    close = get_close_matches(name.lower(), EXPERIMENTS, 1)
    hint = f"; did you mean {close[0]!r}?" if close else "."
    raise ArgumentError(f"there is no experiment {name!r}{hint} There are {', '.join(EXPERIMENTS)}")


def about(name: str) -> About:
    """What a module says of itself, read from its source: importing six of them for a list would take seconds."""
    import curvdiag.experiments

    path = Path(curvdiag.experiments.__path__[0]) / f"{name}.py"
    tree = ast.parse(path.read_text(encoding="utf-8"))
    summary, _, text = (" ".join(part.split()) for part in (ast.get_docstring(tree) or "").partition("\n\n"))
    minutes = next(
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "MINUTES"
    )
    return About(summary, text, float(minutes))
