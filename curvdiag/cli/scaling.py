"""``curvdiag scaling``: is the gradient noise of a task shaped like its curvature?"""

from __future__ import annotations

import enum
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from curvdiag.scaling.result import ScalingResult


class Basis(enum.StrEnum):
    hessian = "hessian"
    parameter = "parameter"


class Method(enum.StrEnum):
    auto = "auto"
    dense = "dense"
    kronecker = "kronecker"
    matrix_free = "matrix-free"


def scaling(
    task: Annotated[
        str,
        typer.Argument(
            metavar="MODULE:FUNCTION",
            help="A function without arguments that returns a curvdiag.Objective; also path/to/file.py:FUNCTION. "
            "Ready to try: curvdiag.experiments.digits:objective --block 3.weight",
            show_default=False,
        ),
    ],
    block: Annotated[
        str | None,
        typer.Option(metavar="GLOB", help="Parameters to look at, e.g. '2.weight'; all of the objective if not given."),
    ] = None,
    basis: Annotated[
        Basis, typer.Option(help="Directions to compare in: eigenvectors of the Hessian, or single parameters.")
    ] = Basis.hessian,
    directions: Annotated[
        int | None, typer.Option(min=3, help="How many, those of largest curvature; chosen from the size if not given.")
    ] = None,
    method: Annotated[Method, typer.Option(help="How H and C are worked out; auto chooses by size.")] = Method.auto,
    seed: Annotated[int, typer.Option(min=0, help="Of the halves, the probes and the bootstrap.")] = 0,
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="FOLDER", help="Where scaling.png and scaling.json go.")
    ] = Path("runs/scaling"),
    traceback: Annotated[
        bool, typer.Option("--traceback", help="If the task itself fails, show its traceback.")
    ] = False,
) -> None:
    """Test whether gradient noise C is shaped like the curvature H: C_ii ~ H_ii^gamma, held out, with a verdict."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from curvdiag.cli.task import load_task
    from curvdiag.record.database import translated
    from curvdiag.scaling.measure import scaling_test

    with translated(out, "make the folder"):  # before the work, not after it
        out.mkdir(parents=True, exist_ok=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with load_task(task, show_traceback=traceback) as objective:
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
            row = bar.add_task("C against H", total=None)
            result = scaling_test(
                objective, block, basis.value, directions, method=method.value, seed=seed,
                progress=lambda done, total: bar.update(row, completed=done, total=total),
            )  # fmt: skip
        typer.echo(str(result))
        options = {"task": task, "block": block, "directions": directions, "method": method.value, "seed": seed}
        for path in (draw(result, out / "scaling.png"), write(result, out / "scaling.json", options)):
            typer.echo(f"wrote {path}")


def draw(result: ScalingResult, path: Path) -> Path:
    from curvdiag.cli.plot import new_figure, save
    from curvdiag.plotting import scaling_page
    from curvdiag.plotting.scaling_page import HEIGHT, WIDTH

    return save(scaling_page(result, new_figure(WIDTH, HEIGHT)), path)


def write(result: ScalingResult, path: Path, options: dict[str, Any]) -> Path:
    """The whole result with what was asked for and the versions that gave it; what is not finite becomes ``null``."""
    from importlib.metadata import version

    from curvdiag.record.export import replace_whole

    versions = {name: version(name) for name in ("curvdiag", "torch", "numpy", "scipy")}
    whole = {"options": options, "versions": versions, "result": finite(result.to_dict())}
    text = json.dumps(whole, indent=1, allow_nan=False)
    return replace_whole(path, lambda file: print(text, file=file), "w")


def finite(value: Any) -> Any:
    """The same with ``None`` for every number that JSON does not know."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(one) for key, one in value.items()}
    if isinstance(value, list):
        return [finite(one) for one in value]
    return value
