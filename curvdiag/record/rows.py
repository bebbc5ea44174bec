"""How a measurement becomes rows of the file."""

from __future__ import annotations

import sqlite3
from typing import TYPE_CHECKING, Any

import numpy as np

from curvdiag.errors import ArgumentError

if TYPE_CHECKING:
    from curvdiag.spectrum.density import SpectralDensity

Row = tuple[Any, ...]


def scalar_row(name: str, value: Any) -> Row:
    """``(name, value, standard error, samples)`` of a number or an Estimate.

    SQLite keeps NaN as NULL, so NULL is read back as NaN. A plain number has neither error nor samples.
    """
    if not isinstance(name, str) or not name:
        raise ArgumentError(f"the name of a scalar is a non-empty string, not {name!r}")
    try:
        if hasattr(value, "standard_error"):
            return name, float(value.value), float(value.standard_error), int(value.samples)
        return name, float(value), None, None
    except (TypeError, ValueError, RuntimeError) as error:
        raise ArgumentError(f"scalar {name!r} must be one number or a scalar Estimate, not {value!r}") from error


def density_row(key: tuple[str, str], density: SpectralDensity) -> Row:
    """``(operator, block, probes, points, nodes, weights, deflated, size, steps, matvecs, note)``."""
    if not (isinstance(key, tuple) and len(key) == 2 and all(isinstance(part, str) for part in key)):
        raise ArgumentError(f'a density is filed under (operator, block), e.g. ("hessian", ""), not under {key!r}')
    nodes, weights = np.asarray(density.nodes), np.asarray(density.weights)
    if nodes.ndim != 2 or nodes.shape != weights.shape:
        raise ArgumentError(
            f"the density of {key} needs nodes and weights of one shape [probes, m], "
            f"not {nodes.shape} and {weights.shape}"
        )
    blobs = (blob(nodes), blob(weights), blob(density.deflated))
    numbers = (int(density.size), int(density.steps), int(density.matvecs))
    return *key, *nodes.shape, *blobs, *numbers, str(density.note)


def blob(array: Any) -> bytes:
    return np.ascontiguousarray(array, dtype="<f8").tobytes()


def insert_measurement(
    connection: sqlite3.Connection, head: Row, scalars: list[Row], densities: list[Row], *, keep: bool = False
) -> None:
    """``head`` is ``(run, step, epoch, wall_time, seconds)``; what was there before goes, unless ``keep``."""
    if not keep:
        connection.execute("DELETE FROM measurements WHERE run = ? AND step = ?", head[:2])
    connection.execute(
        "INSERT OR IGNORE INTO measurements (run, step, epoch, wall_time, seconds) VALUES (?, ?, ?, ?, ?)", head
    )
    (row,) = connection.execute("SELECT id FROM measurements WHERE run = ? AND step = ?", head[:2]).fetchone()
    connection.executemany(
        "INSERT OR REPLACE INTO scalars (measurement, name, value, standard_error, samples) VALUES (?, ?, ?, ?, ?)",
        [(row, *scalar) for scalar in scalars],
    )
    connection.executemany(
        "INSERT OR REPLACE INTO densities (measurement, operator, block, probes, points, nodes, weights, deflated, "
        "size, steps, matvecs, note) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        [(row, *density) for density in densities],
    )


def insert_events(connection: sqlite3.Connection, rows: list[Row]) -> None:
    """Rows ``(run, step, kind, message, time)``."""
    connection.executemany("INSERT INTO events (run, step, kind, message, time) VALUES (?, ?, ?, ?, ?)", rows)


def has_event(connection: sqlite3.Connection, event: Row) -> bool:
    """Whether the file holds an event ``(run, step, kind, message)``."""
    found = connection.execute("SELECT 1 FROM events WHERE run = ? AND step = ? AND kind = ? AND message = ?", event)
    return found.fetchone() is not None


def delete_beyond(connection: sqlite3.Connection, run: int, step: int) -> int:
    """Remove the measurements of a run after ``step``; how many there were."""
    return connection.execute("DELETE FROM measurements WHERE run = ? AND step > ?", (run, step)).rowcount
