"""``curvdiag export``: a run for other programs."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from curvdiag.cli.options import RunChoice, RunFile

if TYPE_CHECKING:
    from curvdiag.record import RunStore


def export(
    file: RunFile,
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE.csv|FILE.npz|FILE.json",
            help="Where to; the ending says what.",
            show_default=False,
        ),
    ],
    run: RunChoice = None,
) -> None:
    """Write a run as CSV (scalars, one line a value), npz (scalars and densities) or JSON (everything)."""
    from curvdiag.errors import ArgumentError
    from curvdiag.record import RunStore

    ending = output.suffix.lower()
    if ending not in (".csv", ".npz", ".json"):
        raise ArgumentError(f"cannot tell from {output.name!r} what to write: the name ends in .csv or .npz or .json")
    with RunStore(file, readonly=True) as store:
        identity = store.run(run).id  # once: the latest run may be another one a moment later
        if ending == ".json":
            written = export_json(store, output, identity)
        else:
            written = (store.export_csv if ending == ".csv" else store.export_npz)(output, identity)
    typer.echo(f"wrote {written}")


def export_json(store: RunStore, path: Path, run: int) -> Path:
    """Everything that a run holds, in one JSON file; what is not finite is ``null``.

    Keys: ``run`` (id, name, configuration, versions), ``scalars`` by name, each with lists ``steps``, ``epochs``,
    ``times``, ``values``, ``standard_errors`` and ``samples``; ``densities``, a list with operator, block, ``steps``,
    ``epochs``, ``times`` and the densities themselves; ``events``.
    """
    from curvdiag.cli.scaling import finite
    from curvdiag.record.export import replace_whole

    def without_name(series: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in series.items() if key != "name"}

    whole = {
        "run": asdict(store.run(run)),
        "scalars": {name: without_name(store.scalars(name, run).to_dict()) for name in store.scalar_names(run)},
        "densities": [
            store.densities(operator, block, run).to_dict()
            for operator in store.operators(run)
            for block in store.blocks(operator, run)
        ],
        "events": [asdict(event) for event in store.events(run)],
    }
    text = json.dumps(finite(whole), allow_nan=False)
    return replace_whole(path, lambda file: print(text, file=file), "w")
