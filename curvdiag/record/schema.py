"""The tables of a run file, and how to tell a run file from others."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from curvdiag.errors import StoreError

APPLICATION_ID = 0x43525644  # "CRVD": what `file` and PRAGMA application_id show
SCHEMA_VERSION = 1

SCHEMA = """
CREATE TABLE runs (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    name TEXT NOT NULL,
    created REAL NOT NULL,     -- Unix time, seconds
    config TEXT NOT NULL,      -- JSON
    versions TEXT NOT NULL     -- JSON
);
CREATE TABLE measurements (
    id INTEGER PRIMARY KEY,
    run INTEGER NOT NULL REFERENCES runs (id) ON DELETE CASCADE,
    step INTEGER NOT NULL,
    epoch REAL,
    wall_time REAL NOT NULL,   -- Unix time, seconds
    seconds REAL,              -- what the measurement took
    UNIQUE (run, step)
);
CREATE TABLE scalars (         -- NULL stands for NaN in value and standard_error
    measurement INTEGER NOT NULL REFERENCES measurements (id) ON DELETE CASCADE,
    name TEXT NOT NULL,
    value REAL,
    standard_error REAL,
    samples INTEGER,
    PRIMARY KEY (measurement, name)
) WITHOUT ROWID;
CREATE TABLE densities (       -- blobs: float64, little-endian, row by row
    measurement INTEGER NOT NULL REFERENCES measurements (id) ON DELETE CASCADE,
    operator TEXT NOT NULL,
    block TEXT NOT NULL,       -- '' is the whole model
    probes INTEGER NOT NULL,   -- shape of nodes and weights: probes x points
    points INTEGER NOT NULL,
    nodes BLOB NOT NULL,
    weights BLOB NOT NULL,
    deflated BLOB NOT NULL,
    size INTEGER NOT NULL,
    steps INTEGER NOT NULL,
    matvecs INTEGER NOT NULL,
    note TEXT NOT NULL,
    PRIMARY KEY (measurement, operator, block)
);
CREATE TABLE events (
    id INTEGER PRIMARY KEY,
    run INTEGER NOT NULL REFERENCES runs (id) ON DELETE CASCADE,
    step INTEGER NOT NULL,
    kind TEXT NOT NULL,
    message TEXT NOT NULL,
    time REAL NOT NULL         -- Unix time, seconds
);
"""


def check(connection: sqlite3.Connection, path: Path, *, new_allowed: bool) -> bool:
    """Whether the file already is a run file that this version can use; a new one is still empty."""
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    if application == 0 and version == 0 and tables == 0:
        if new_allowed:
            return False
        raise StoreError(f"{path} is empty, not a run file of curvdiag")
    if application != APPLICATION_ID:
        raise StoreError(f"{path} is a database of another program, not a run file of curvdiag")
    if version > SCHEMA_VERSION:
        raise StoreError(
            f"{path} was written by a newer curvdiag (schema {version}; this one reads up to schema "
            f"{SCHEMA_VERSION}); upgrade curvdiag: pip install --upgrade curvdiag"
        )
    return True


def create(connection: sqlite3.Connection) -> None:
    """Make the tables, inside the caller's transaction."""
    for statement in SCHEMA.split(";\n"):
        connection.execute(statement)


def mark(connection: sqlite3.Connection) -> None:
    """Write who made the file and by which schema; over the same values a write that changes nothing."""
    connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
