"""``curvdiag plot``: pictures of a run, also while it goes on."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from curvdiag.cli.options import RunChoice, RunFile

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from curvdiag.record import RunStore

PANELS = 8
HEADLINES = (
    "train/loss",
    "curv/hessian/lambda_max",
    "curv/hessian/trace",
    "curv/hessian/frobenius_norm",
    "curv/anisotropy/stable_rank",
    "curv/overhead",
)


class Kind(enum.StrEnum):
    heatmap = "heatmap"
    density = "density"
    scalars = "scalars"


class Time(enum.StrEnum):
    auto = "auto"
    steps = "steps"
    epochs = "epochs"


class Scale(enum.StrEnum):
    auto = "auto"
    linear = "linear"
    symlog = "symlog"


def plot(
    file: RunFile,
    kind: Annotated[
        Kind,
        typer.Argument(
            help="heatmap: eigenvalue density over training; density: the same at one step; "
            "scalars: values over steps, with 95 % bands.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="Picture to write (png, pdf, svg); beside the run file if not given.",
        ),
    ] = None,
    run: RunChoice = None,
    operator: Annotated[str, typer.Option(help="Whose eigenvalues (heatmap, density).")] = "hessian",
    block: Annotated[str, typer.Option(help="One block of the operator; the whole model if not given.")] = "",
    step: Annotated[
        int | None,
        typer.Option(help="For density: the measurement nearest to this step; the last if not given."),
    ] = None,
    names: Annotated[
        list[str] | None,
        typer.Option(help="For scalars: a name or a pattern such as 'curv/layer/*/trace'; may be repeated."),
    ] = None,
    time: Annotated[
        Time, typer.Option(help="Time axis; auto takes epochs where each measurement has its own.")
    ] = Time.auto,
    scale: Annotated[Scale, typer.Option(help="Eigenvalue axis; auto chooses from the data.")] = Scale.auto,
) -> None:
    """Draw a run, also while it is being written."""
    from curvdiag.record import RunStore

    with RunStore(file, readonly=True) as store:
        info = store.run(run)  # once: the latest run may be another one a moment later
        name = info.name if info.name.startswith("run") else f"run {info.name}"
        if kind is Kind.heatmap:
            figure, tail = heatmap_figure(store, info.id, operator, block, time, scale)
        elif kind is Kind.density:
            figure, tail = density_figure(store, info.id, operator, block, step, scale)
        else:
            figure, tail = scalars_figure(store, info.id, names, time)
    target = output if output is not None else file.with_name(f"{file.stem}-{tail}.png")
    title = figure.axes[0].get_title()
    figure.axes[0].set_title(f"{title}, {name}" if title else name)
    typer.echo(f"wrote {save(figure, target)}")


def heatmap_figure(
    store: RunStore, run: int, operator: str, block: str, time: Time, scale: Scale
) -> tuple[Figure, str]:
    from curvdiag import plotting

    series = store.densities(operator, block, run)
    if len(series.steps) == 1:
        typer.echo("a single measurement is a single column: the monitor's every= says how often to measure", err=True)
    figure = new_figure(7.0, 4.2)
    plotting.heatmap(series, figure.subplots(), time=time.value, scale=scale.value)
    return figure, file_part("heatmap", operator, block)


def density_figure(
    store: RunStore, run: int, operator: str, block: str, step: int | None, scale: Scale
) -> tuple[Figure, str]:
    from curvdiag import plotting
    from curvdiag.plotting.style import operator_label

    series = store.densities(operator, block, run)
    steps = series.steps.tolist()
    nearest = steps[-1] if step is None else min(steps, key=lambda s: abs(s - step))
    if step not in (None, nearest):
        typer.echo(f"no measurement at step {step}; drawing the nearest, step {nearest}", err=True)
    figure = new_figure(6.4, 4.0)
    plotting.density(
        series.densities[steps.index(nearest)],
        figure.subplots(),
        scale=scale.value,
        operator=operator_label(operator),
        title=f"{operator_label(operator, block)}: eigenvalue density, step {nearest}",
    )
    return figure, file_part("density", operator, block, f"step{nearest}")


def scalars_figure(store: RunStore, run: int, names: Sequence[str] | None, time: Time) -> tuple[Figure, str]:
    from curvdiag import plotting

    chosen = choose_names(store.scalar_names(run), names or ())
    figure = new_figure(6.4, 1.4 + 1.9 * len(chosen))
    axes = figure.subplots(len(chosen), 1, sharex=True, squeeze=False)[:, 0]
    for ax, name in zip(axes, chosen, strict=True):
        plotting.scalars(store.scalars(name, run), ax, time="epochs" if time is Time.epochs else "steps")
        ax.label_outer()
    figure.align_ylabels(axes)
    return figure, "scalars"


def choose_names(known: Sequence[str], wanted: Sequence[str]) -> list[str]:
    """The scalars that the names and patterns mean; without any, those that a reader looks for first."""
    from curvdiag.errors import ArgumentError
    from curvdiag.record.queries import suggestion

    if not known:
        raise ArgumentError("the run holds no scalars yet")
    chosen = []
    for pattern in wanted:
        found = [name for name in known if name == pattern or fnmatchcase(name, pattern)]
        if not found:
            raise ArgumentError(f"the run holds no scalar {pattern!r}{suggestion(pattern, list(known))}")
        chosen += [name for name in found if name not in chosen]
    if not wanted:
        chosen = [name for name in HEADLINES if name in known] or list(known[:PANELS])
    if len(chosen) > PANELS:
        raise ArgumentError(f"{len(chosen)} scalars are too many for one figure of {PANELS} panels; name fewer")
    return chosen


def new_figure(width: float, height: float) -> Figure:
    """A figure that pyplot does not know: no window, no state, no display needed."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def file_part(*parts: str) -> str:
    """``("heatmap", "hessian", "conv.1/x") -> "heatmap-hessian-conv.1_x"``."""
    return "-".join("".join(c if c.isalnum() or c in "._" else "_" for c in part) for part in parts if part)


def save(figure: Figure, path: Path) -> Path:
    """Write a picture; the ending of its name says the format."""
    from curvdiag.errors import ArgumentError
    from curvdiag.record.export import replace_whole

    formats = figure.canvas.get_supported_filetypes()
    ending = path.suffix.lower().lstrip(".")
    if ending not in formats:
        known = ", ".join(sorted(formats))
        raise ArgumentError(f"cannot write a picture to {path.name!r}: the name ends in one of {known}")
    return replace_whole(path, lambda file: figure.savefig(file, format=ending, dpi=160), "wb")
