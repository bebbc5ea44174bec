"""One measurement as a run file holds it: read, compared with another of its step, and made one with it."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass, replace

from curvdiag.record.rows import Row, insert_measurement

CLOCKS = ("curv/cost/seconds", "curv/cost/gradients", "curv/overhead")
"""Scalars that a clock makes: no two measurements of the same weights have them alike."""


@dataclass(frozen=True)
class Measured:
    """A measurement, its numbers and bytes untouched.

    Attributes:
        step, epoch, wall_time, seconds: As in the table of measurements.
        scalars: ``(value, standard error, samples)`` by name.
        densities: Columns of a density from ``probes`` on, by (operator, block).
    """

    step: int
    epoch: float | None
    wall_time: float
    seconds: float | None
    scalars: dict[str, Row]
    densities: dict[tuple[str, str], Row]


def measured(connection: sqlite3.Connection, run: int, step: int | None = None) -> Iterator[Measured]:
    """The measurements of a run, by step; or only that of one step, if there is one."""
    chosen, given = ("", (run,)) if step is None else (" AND step = ?", (run, step))
    heads = connection.execute(
        f"SELECT id, step, epoch, wall_time, seconds FROM measurements WHERE run = ?{chosen} ORDER BY step", given
    ).fetchall()
    for identity, at, epoch, wall_time, seconds in heads:
        scalars = connection.execute(
            "SELECT name, value, standard_error, samples FROM scalars WHERE measurement = ? ORDER BY name", (identity,)
        )
        numbers = {name: tuple(row) for name, *row in scalars}
        densities = connection.execute(
            "SELECT operator, block, probes, points, nodes, weights, deflated, size, steps, matvecs, note "
            "FROM densities WHERE measurement = ? ORDER BY operator, block",
            (identity,),
        )
        filed = {(operator, block): tuple(row) for operator, block, *row in densities}
        yield Measured(at, epoch, wall_time, seconds, numbers, filed)


def write(connection: sqlite3.Connection, run: int, one: Measured) -> None:
    """Put a measurement into a run, in the place of what it has at this step."""
    head = (run, one.step, one.epoch, one.wall_time, one.seconds)
    scalars = [(name, *row) for name, row in one.scalars.items()]
    insert_measurement(connection, head, scalars, [(*key, *row) for key, row in one.densities.items()])


def disagreement(one: Measured, other: Measured) -> str | None:
    """In what two measurements of a step contradict each other, in words; what only one of them has does not count."""
    for name in one.scalars.keys() & other.scalars.keys() - set(CLOCKS):
        mine, theirs = one.scalars[name], other.scalars[name]
        if mine != theirs:
            values = [f"{'nan' if row[0] is None else repr(row[0])}" for row in (mine, theirs)]
            return f"{name}: {' and '.join(values)}" if mine[0] != theirs[0] else f"the error of {name}"
    for operator, block in one.densities.keys() & other.densities.keys():
        if one.densities[operator, block] != other.densities[operator, block]:
            return f"the density of {operator}" + (f", block {block}" if block else "")
    if one.epoch is not None and other.epoch is not None and one.epoch != other.epoch:
        return f"epoch {one.epoch} and {other.epoch}"
    return None


def united(one: Measured, other: Measured) -> Measured:
    """What either of two agreeing measurements holds; what a clock made is that of the later."""
    early, late = sorted((one, other), key=lambda measurement: measurement.wall_time)
    return replace(
        late,
        epoch=early.epoch if late.epoch is None else late.epoch,
        scalars={**early.scalars, **late.scalars},
        densities={**early.densities, **late.densities},
    )
