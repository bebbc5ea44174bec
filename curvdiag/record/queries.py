"""What can be read from a run file: runs, series of scalars, series of densities, events."""

from __future__ import annotations

import json
import math
import sqlite3
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from curvdiag.errors import ArgumentError
from curvdiag.record.series import DensitySeries, Event, RunInfo, Series

if TYPE_CHECKING:
    from curvdiag.record.store import Run

RunKey: TypeAlias = "int | str | Run | RunInfo | None"

RUNS = (
    "SELECT runs.id, name, created, config, versions, count(measurements.id), max(step) "
    "FROM runs LEFT JOIN measurements ON run = runs.id GROUP BY runs.id ORDER BY runs.id"
)


def list_runs(connection: sqlite3.Connection) -> list[RunInfo]:
    return [
        RunInfo(identity, name, created, json.loads(config), json.loads(versions), count, last)
        for identity, name, created, config, versions, count, last in connection.execute(RUNS)
    ]


def find_run(connection: sqlite3.Connection, key: RunKey) -> RunInfo:
    """The run that ``key`` means; a string is a name first, then a number."""
    runs = list_runs(connection)
    if not runs:
        raise ArgumentError("the file holds no run yet")
    if key is None:
        return runs[-1]
    wanted = key if isinstance(key, int | str) else key.id
    for matches in (
        [run for run in runs if run.name == wanted],
        [run for run in runs if str(run.id) == str(wanted)],
    ):
        if matches:
            return matches[-1]
    listing = ", ".join(f"{run.id} ({run.name})" for run in runs[-20:])
    raise ArgumentError(f"there is no run {wanted!r} in the file; it holds {listing}")


def scalar_names(connection: sqlite3.Connection, run: int) -> list[str]:
    found = connection.execute(
        "SELECT DISTINCT name FROM scalars JOIN measurements ON measurements.id = measurement WHERE run = ?",
        (run,),
    )
    return sorted(name for (name,) in found)


def filed_densities(connection: sqlite3.Connection, run: int) -> list[tuple[str, str]]:
    """Pairs (operator, block), sorted."""
    found = connection.execute(
        "SELECT DISTINCT operator, block FROM densities JOIN measurements ON measurements.id = measurement "
        "WHERE run = ?",
        (run,),
    )
    return sorted(found.fetchall())


def scalar_rows(connection: sqlite3.Connection, run: int, name: str | None = None) -> list[tuple[Any, ...]]:
    """``(name, step, epoch, wall_time, seconds, value, standard error, samples)`` by name, then step."""
    chosen = "" if name is None else " AND name = ?"
    return connection.execute(
        "SELECT name, step, epoch, wall_time, seconds, value, standard_error, samples FROM scalars "
        f"JOIN measurements ON measurements.id = measurement WHERE run = ?{chosen} ORDER BY name, step",
        (run,) if name is None else (run, name),
    ).fetchall()


def series(connection: sqlite3.Connection, run: RunInfo, name: str) -> Series:
    found = scalar_rows(connection, run.id, name)
    if not found:
        known = scalar_names(connection, run.id)
        raise ArgumentError(f"run {run.name!r} holds no scalar {name!r}{suggestion(name, known)}")
    _, steps, epochs, times, _, values, errors, samples = zip(*found, strict=True)
    return Series(
        name=name,
        steps=np.array(steps, dtype=np.int64),
        epochs=floats(epochs),
        times=floats(times),
        values=floats(values),
        standard_errors=floats(errors),
        samples=np.array([n or 0 for n in samples], dtype=np.int64),
    )


def density_series(connection: sqlite3.Connection, run: RunInfo, operator: str, block: str) -> DensitySeries:
    from curvdiag.spectrum.density import SpectralDensity

    moments, densities = [], []
    for (
        step,
        epoch,
        wall_time,
        probes,
        points,
        nodes,
        weights,
        deflated,
        size,
        steps,
        matvecs,
        note,
    ) in connection.execute(
        "SELECT step, epoch, wall_time, probes, points, nodes, weights, deflated, size, densities.steps, "
        "matvecs, note FROM densities JOIN measurements ON measurements.id = measurement "
        "WHERE run = ? AND operator = ? AND block = ? ORDER BY step",
        (run.id, operator, block),
    ):
        moments.append((step, epoch, wall_time))
        densities.append(
            SpectralDensity(
                nodes=array(nodes, probes, points),
                weights=array(weights, probes, points),
                size=size,
                deflated=array(deflated, -1),
                steps=steps,
                matvecs=matvecs,
                note=note,
            )
        )
    if not densities:
        of = f"{operator!r}, block {block!r}" if block else f"{operator!r} for the whole model"
        known = [f"{o}, block {b!r}" for o, b in filed_densities(connection, run.id)]
        raise ArgumentError(f"run {run.name!r} holds no densities of {of}{suggestion(operator, known)}")
    columns = zip(*moments, strict=True)
    return DensitySeries(
        operator=operator,
        block=block,
        steps=np.array(next(columns), dtype=np.int64),
        epochs=floats(next(columns)),
        times=floats(next(columns)),
        densities=tuple(densities),
    )


def events(connection: sqlite3.Connection, run: int) -> list[Event]:
    found = connection.execute("SELECT kind, message, step, time FROM events WHERE run = ? ORDER BY id", (run,))
    return [Event(*row) for row in found]


def suggestion(wanted: str, known: list[str]) -> str:
    """The end of a message: what there is instead."""
    if not known:
        return "; it has recorded none so far"
    close = get_close_matches(wanted, known, n=3, cutoff=0.5) if len(known) > 12 else []
    shown = close or known[:12]
    more = f" and {len(known) - len(shown)} more" if len(known) > len(shown) else ""
    return f"; it holds {', '.join(shown)}{more}"


def array(data: bytes, *shape: int) -> np.ndarray:
    return np.frombuffer(data, dtype="<f8").reshape(shape).astype(np.float64)


def floats(column: Any) -> np.ndarray:
    """A column of numbers, NULL as NaN."""
    return np.array([math.nan if x is None else x for x in column], dtype=np.float64)
