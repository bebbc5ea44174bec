"""Several run files made one: the parts of a run together, other runs beside each other, nothing half done."""

from __future__ import annotations

import heapq
import json
import os
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from curvdiag.errors import ArgumentError, StoreError
from curvdiag.record.belonging import Member, grouped
from curvdiag.record.measured import Measured, disagreement, measured, united, write
from curvdiag.record.output import Paths, run_files, written_whole
from curvdiag.record.rows import Row, insert_events
from curvdiag.record.same import is_scan, unlike
from curvdiag.record.store import RunStore
from curvdiag.results import Result


@dataclass(frozen=True)
class MergedRun(Result):
    """One run of a merged file.

    Attributes:
        id: Its number there.
        name: Its name.
        measurements: How many it holds.
        files: The run files that hold parts of it.
    """

    id: int
    name: str
    measurements: int
    files: tuple[str, ...]

    def __str__(self) -> str:
        many = "1 file" if len(self.files) == 1 else f"{len(self.files)} files"
        held = "1 measurement" if self.measurements == 1 else f"{self.measurements} measurements"
        return f"run {self.name!r}, {held} from {many}"


@dataclass(frozen=True)
class Merge(Result):
    """What came of merging run files.

    Attributes:
        path: The file that was written.
        runs: Its runs, the oldest first.
        notes: What else a user should know, one line each.
    """

    path: str
    runs: tuple[MergedRun, ...]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.path}: {'; '.join(map(str, self.runs))}"


def merge_runs(
    paths: Paths,
    output: str | os.PathLike[str],
    *,
    apart: bool = False,
    join: bool = False,
    newest: bool = False,
    overwrite: bool = False,
) -> Merge:
    """Write the runs of several run files into one file: all of it, or nothing.

    Parts of one run become one run, with the measurements of all of them. Scans are parts of one where their name,
    folder, objective and settings are the same, as for a scan that goes on; of other runs, which began in a training,
    only copies of one and the same are. Runs of different names stay runs of their own. Runs of one name that are not
    the same are refused, with what differs, unless one of the files holds them side by side already.

    A measurement that several files hold is taken once, whatever its clocks say; where they contradict each other, the
    merge is refused. What only one of them holds of a step (a quantity that failed in the other) is kept.

    Args:
        paths: Run files, and patterns (``"run-*.db"``); they may be in use, and are only read.
        output: The file to write. It may be one of ``paths``, if it may be overwritten.
        apart: Keep runs of one name that differ as runs of their own.
        join: Make one run of runs of one name although they began at different moments: of a training that was
            continued into another file. They must measure the same objective in the same way.
        newest: Where measurements of a step contradict each other, take the later one; an event says so.
        overwrite: Replace a run file that is there.

    Raises:
        ArgumentError: Nothing matches, or ``apart`` and ``join`` together.
        StoreError: A file cannot be read or written, the output exists, or the runs do not belong together. The output
            is then as it was before.
    """
    if apart and join:
        raise ArgumentError("apart and join contradict each other: give one of them")
    files = run_files(paths)
    target = Path(output).expanduser().absolute()
    with written_whole(target, overwrite=overwrite) as store:
        members: list[Member] = []
        for file in files:
            with RunStore(file, readonly=True) as source:
                members += [Member(file, info) for info in source.runs()]
        if not members:
            raise StoreError(f"there is nothing to merge: no run in {', '.join(str(file) for file in files)}")
        groups = [Merging(group) for group in grouped(members, apart=apart, join=join)]
        with store._database.writing("merge into") as connection:
            for group in groups:
                group.begin(connection)
            for file in files:
                with RunStore(file, readonly=True) as source, source._database.reading() as reading:
                    for group in groups:
                        group.take(file, reading, connection, newest)
            refuse_contradictions(groups)
            runs = tuple(group.finish(connection) for group in groups)
    return Merge(str(target), runs, tuple(note for group in groups for note in group.notes))


class Merging:
    """One run of the output under way.

    Attributes:
        notes: What to tell of it.
        contradictions: ``(step, file, other file, in what)`` of measurements that do not agree.
    """

    def __init__(self, members: Sequence[Member]) -> None:
        self.members = sorted(members, key=lambda member: member.info.created)
        self.first = self.members[0].info
        self.notes: list[str] = []
        self.contradictions: list[tuple[int, Path, Path, str]] = []
        self._run = 0
        self._from: dict[int, Path] = {}
        self._events: list[list[Row]] = []

    def begin(self, connection: sqlite3.Connection) -> None:
        """Make the run: with the configuration and versions of the part that began first."""
        row = (self.first.name, self.first.created, json.dumps(self.first.config), json.dumps(self.first.versions))
        made = connection.execute("INSERT INTO runs (name, created, config, versions) VALUES (?, ?, ?, ?)", row)
        assert made.lastrowid is not None
        self._run = made.lastrowid
        for member in self.members[1:]:
            if found := unlike(self.first.versions, member.info.versions):
                versions = ", ".join(f"{key} {a} and {b}" for key, (a, b) in found.items())
                self._note(0, f"its parts were made with different versions: {versions}", member.info.created)
            if found := unlike(self.first.config, member.info.config):
                kept = f"that of {self.members[0].file.name} is kept"
                self.notes.append(f"the configurations of run {self.first.name!r} differ in {', '.join(found)}: {kept}")

    def _note(self, step: int, message: str, time: float) -> None:
        """Tell it, and record it as an event."""
        line = f"run {self.first.name!r}, step {step}: {message}"
        if line not in self.notes:
            self.notes.append(line)
            self._events.append([(step, "note", message, time)])

    def take(self, file: Path, source: sqlite3.Connection, target: sqlite3.Connection, newest: bool) -> None:
        """Copy what a file holds of this run."""
        for member in self.members:
            if member.file != file:
                continue
            for one in measured(source, member.info.id):
                self._take_measurement(file, one, target, newest)
            found = source.execute(
                "SELECT step, kind, message, time FROM events WHERE run = ? ORDER BY id", (member.info.id,)
            )
            self._events.append(found.fetchall())

    def _take_measurement(self, file: Path, one: Measured, target: sqlite3.Connection, newest: bool) -> None:
        held = next(measured(target, self._run, one.step), None)
        if held is None:
            self._from[one.step] = file
            write(target, self._run, one)
            return
        why = disagreement(held, one)
        if why is None:
            write(target, self._run, united(held, one))
        elif not newest:
            self.contradictions.append((one.step, self._from[one.step], file, why))
        else:
            later = one.wall_time > held.wall_time
            kept, other = (file, self._from[one.step]) if later else (self._from[one.step], file)
            message = f"measured otherwise in {other.name} ({why}); the later measurement, of {kept.name}, is kept"
            self._note(one.step, message, max(one.wall_time, held.wall_time))
            self._from[one.step] = kept
            if later:
                write(target, self._run, one)

    def finish(self, connection: sqlite3.Connection) -> MergedRun:
        """Write the events, in the order in which they happened; each once."""
        rows = list(heapq.merge(*self._events, key=lambda event: event[3]))
        # A scan records an event of a step once, and so does the sum of its parts; of a training only copies are one.
        keys = [row[:3] if is_scan(self.first.config) else row for row in rows]
        last = {key: place for place, key in enumerate(keys)}
        kept = [row for place, row in enumerate(rows) if last[keys[place]] == place]
        insert_events(connection, [(self._run, *row) for row in kept])
        (count,) = connection.execute("SELECT count(*) FROM measurements WHERE run = ?", (self._run,)).fetchone()
        files = tuple(dict.fromkeys(str(member.file) for member in self.members))
        return MergedRun(self._run, self.first.name, count, files)


def refuse_contradictions(groups: Sequence[Merging]) -> None:
    for group in groups:
        if group.contradictions:
            step, one, other, why = group.contradictions[0]
            steps = sorted({found[0] for found in group.contradictions})
            shown = ", ".join(str(step) for step in steps[:6]) + (f" and {len(steps) - 6} more" * (len(steps) > 6))
            raise StoreError(
                f"{one} and {other} hold different measurements of run {group.first.name!r} at step {step} ({why}); "
                f"contradictions are at step{'s' * (len(steps) > 1)} {shown}: leave a file out, or take the later "
                "measurement of each step with newest=True (--newest)"
            )
