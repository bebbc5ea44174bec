"""``curvdiag scan``: a finished run, measured after the fact from its checkpoints."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from curvdiag.cli.measuring import (
    TASK_HELP,
    LanczosSteps,
    Part,
    PresetChoice,
    Probes,
    Quantities,
    Seed,
    Tolerance,
    Traceback,
)

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

TASK = re.compile(r".+:[A-Za-z_]\w*")
INTERRUPTED = 130
PLACE = "{shard}"


def scan(
    arguments: Annotated[
        list[str],
        typer.Argument(metavar="TASK [CHECKPOINT]", help=f"{TASK_HELP}. Checkpoints may follow.", show_default=False),
    ],
    checkpoints: Annotated[
        list[str] | None,
        typer.Option(
            "--checkpoints",
            "-c",
            metavar="PATTERN",
            help="Files, folders, or a pattern such as 'ckpts/*.pt', quoted or not; may be repeated. Read are files of "
            "torch, safetensors, Lightning, and folders of Transformers.",
        ),
    ] = None,
    store: Annotated[
        Path,
        typer.Option(
            metavar="RUN.db",
            help="The run file that the measurements go to. With --shard, '{shard}' in its name stands for I.",
        ),
    ] = Path("run.db"),
    name: Annotated[
        str | None,
        typer.Option(help="Of the run in the file; 'scan of FOLDER' if not given."),
    ] = None,
    steps: Annotated[
        str | None,
        typer.Option(
            metavar="N,N,...",
            help="Training steps of the checkpoints, in the natural order of their names, where neither they nor their "
            "names tell them.",
        ),
    ] = None,
    shard: Annotated[
        str | None,
        typer.Option(
            metavar="I/N|auto",
            help="Only each N-th checkpoint from the I-th on: I counts from 0, so that sbatch --array=0-15 goes with "
            "--shard $SLURM_ARRAY_TASK_ID/16. auto takes both from torchrun or from the Slurm array.",
            show_default=False,
        ),
    ] = None,
    part: Part = None,
    preset: PresetChoice = None,
    quantities: Quantities = None,
    lanczos_steps: LanczosSteps = 40,
    probes: Probes = 3,
    tol: Tolerance = 1e-2,
    seed: Seed = 0,
    again: Annotated[bool, typer.Option("--again", help="Measure what the run holds already, too.")] = False,
    traceback: Traceback = False,
) -> None:
    """Measure the checkpoints of a finished run into a run file, as the monitor would have done in the training.

    It goes on where it stopped. What fails is told in one line each and tried again next time.

    With --shard several processes share the work, into one file, or each into its own; then curvdiag merge.

    Exit code: 0 all are measured, 1 some failed, 2 nothing could be done, 130 interrupted.
    """
    from rich.console import Console

    from curvdiag.checkpoints import scan as scan_checkpoints
    from curvdiag.checkpoints.find import find
    from curvdiag.checkpoints.shards import shard_named, wait_for_torchrun
    from curvdiag.cli.task import load_task

    task, patterns = sorted_out(arguments, checkpoints or [])
    at = None if steps is None else whole_numbers(steps)
    chosen = None if shard is None else shard_named(shard, os.environ)
    store = store_of(chosen, store)
    find(patterns)  # before the task is loaded, which may take long
    check_store(store)
    console = Console(stderr=True)
    with ExitStack() as stack:
        objective = stack.enter_context(load_task(task, show_traceback=traceback))
        first = objective.ranks.first
        check_ranks(shard, alone=objective.ranks.alone)
        lines = Lines(stack.enter_context(progress_bar(console, shown=first)))
        try:
            result = scan_checkpoints(
                objective, patterns, store, at=at, part=part, name=name, config={"task": task}, again=again,
                shard=chosen, preset=None if preset is None else preset.value, measure=quantities or None,
                steps=lanczos_steps, probes=probes, tol=tol, seed=seed,
                progress=lines.progress, tell=lines.tell,
            )  # fmt: skip
        except KeyboardInterrupt:
            console.print("interrupted; what was measured is kept, and the same command goes on", soft_wrap=True)
            raise typer.Exit(INTERRUPTED) from None
    if first:
        typer.echo(str(result))
    if shard == "auto":
        wait_for_torchrun(failed=bool(result.failed))
    if result.failed:
        raise typer.Exit(1)


def sorted_out(arguments: Sequence[str], patterns: Sequence[str]) -> tuple[str, list[str]]:
    """The task and the checkpoints, where a shell has expanded a pattern in front of the task or behind it."""
    from curvdiag.errors import ArgumentError

    given = list(arguments)
    ends = [index for index in (0, len(given) - 1) if TASK.fullmatch(given[index]) and not Path(given[index]).exists()]
    task = given.pop(ends[0] if ends else 0)
    if not [*patterns, *given]:
        raise ArgumentError("which checkpoints? Name them, or give a pattern: --checkpoints 'ckpts/*.pt'")
    return task, [*patterns, *given]


def store_of(shard: tuple[int, int] | None, store: Path) -> Path:
    """The run file of a shard: its number in the place of ``{shard}``."""
    from curvdiag.errors import ArgumentError

    if shard is None and PLACE in str(store):
        raise ArgumentError(
            f"{PLACE} in the name of the run file, {store}, stands for the number of a shard: give --shard"
        )
    return store if shard is None else Path(str(store).replace(PLACE, str(shard[0])))


def check_ranks(shard: str | None, *, alone: bool) -> None:
    """Refuse processes of torchrun that would all do the same, or would be shards and wait for each other."""
    from curvdiag.errors import ArgumentError

    world = os.environ.get("WORLD_SIZE", "1")
    if alone and shard is None and world != "1" and "TORCHELASTIC_RUN_ID" in os.environ:
        raise ArgumentError(
            f"each of the {world} processes of torchrun would measure everything: share the checkpoints with --shard "
            "auto, or the data with group='world' in the Objective of the task"
        )
    if not alone and shard == "auto":
        raise ArgumentError(
            "the ranks of this task measure each checkpoint together, and cannot be shards of their own: leave --shard "
            "auto away, or give all of them the same i/n"
        )


def whole_numbers(text: str) -> list[int]:
    from curvdiag.errors import ArgumentError

    try:
        return [int(number) for number in text.split(",")]
    except ValueError as error:
        raise ArgumentError(
            f"--steps takes whole numbers with commas between, such as 0,500,1000, not {text!r}"
        ) from error


def check_store(path: Path) -> None:
    """Refuse what cannot become a run file, before the work and not after it."""
    from curvdiag.errors import StoreError
    from curvdiag.record import RunStore

    if path.exists():
        RunStore(path).close()
    elif not path.absolute().parent.is_dir():
        raise StoreError(f"cannot open {path}: the folder {path.absolute().parent} does not exist; create it first")


class Lines:
    """What is told while it works: everything of importance, and how far it is, where no bar can be drawn in lines."""

    def __init__(self, bar: Progress) -> None:
        self.bar, self.console, self.began = bar, bar.console, time.monotonic()
        self.row = bar.add_task("checkpoints", total=None)

    def tell(self, line: str) -> None:
        self.console.print(line, soft_wrap=True, markup=False, highlight=False)

    def progress(self, done: int, total: int) -> None:
        self.bar.update(self.row, completed=done, total=total)
        if done == 0:
            self.began = time.monotonic()
        if done == 0 or self.console.is_terminal:
            return
        left = (time.monotonic() - self.began) / done * (total - done)
        self.tell(f"{done} of {total} checkpoints" + (f", about {duration(left)} left" if done < total else ""))


def duration(seconds: float) -> str:
    """``75 -> "1:15"``, ``4000 -> "1:06:40"``."""
    return str(timedelta(seconds=round(seconds))).removeprefix("0:")


def progress_bar(console: Console, *, shown: bool = True) -> Progress:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # One measurement may take minutes: the rate is that of all of them, not of the last half minute.
    return Progress(
        *columns,
        console=console,
        transient=True,
        disable=not (shown and console.is_terminal),
        speed_estimate_period=1e9,
    )
