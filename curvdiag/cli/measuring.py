"""Arguments that say how a measurement is made; shared by ``curvdiag scan`` and ``curvdiag measure``."""

from __future__ import annotations

import enum
from typing import Annotated, TypeAlias

import typer


class Preset(enum.StrEnum):
    light = "light"
    standard = "standard"
    full = "full"


TASK_HELP = (
    "A function without arguments that returns a curvdiag.Objective: module:function, or path/to/file.py:function. "
    "Ready to try: curvdiag.experiments.digits:objective"
)

Task: TypeAlias = Annotated[str, typer.Argument(metavar="TASK", help=TASK_HELP, show_default=False)]
PresetChoice: TypeAlias = Annotated[
    Preset | None,
    typer.Option(
        help="light: top eigenvalue and trace; standard (if not given): density and anisotropy as well; full: each "
        "layer and gradient noise as well.",
        show_default=False,
    ),
]
Quantities: TypeAlias = Annotated[
    list[str] | None,
    typer.Option("--measure", metavar="NAME", help="Single quantities instead of a preset; may be repeated."),
]
LanczosSteps: TypeAlias = Annotated[int, typer.Option("--lanczos-steps", min=1, help="Lanczos steps of the density.")]
Probes: TypeAlias = Annotated[int, typer.Option(min=1, help="Random vectors of the density and the trace.")]
Tolerance: TypeAlias = Annotated[float, typer.Option(help="Relative residual at which an eigenvalue is taken.")]
Seed: TypeAlias = Annotated[int, typer.Option(min=0, help="Of the probes.")]
Part: TypeAlias = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", help="Which weights of a checkpoint, where several fit the model: an entry or prefix."
    ),
]
Traceback: TypeAlias = Annotated[
    bool, typer.Option("--traceback", help="If the task itself fails, show its traceback.")
]
