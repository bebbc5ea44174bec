"""RunStore: the measurements of training runs in one file that survives what happens to the process."""

from __future__ import annotations

import json
import operator as operators
import os
import platform
import time
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from curvdiag.errors import ArgumentError
from curvdiag.record import export, queries, rows
from curvdiag.record.database import Database
from curvdiag.record.queries import RunKey
from curvdiag.record.series import DensitySeries, Event, RunInfo, Series

if TYPE_CHECKING:
    from curvdiag.estimate import Estimate
    from curvdiag.spectrum.density import SpectralDensity


class RunStore:
    """One SQLite file with the measurements of one or several runs.

    A measurement is one transaction: after :meth:`Run.record` returns it survives a killed process and a
    power cut, and before that it leaves no trace. The file can be read by other processes while it is
    written, and a closed one has no side files. Any thread may use a store; after a fork only the process
    that opened it.

    Where a method takes ``run``: the number or the name of a run (of several with one name the latest), or
    ``None`` for the latest in the file.

    Args:
        path: The file; created, unless ``readonly``, in a folder that exists.
        readonly: Only read, for instance while another process writes. Nothing is written then, except that
            a half-done transaction of a killed process is undone where that is needed to read.

    Raises:
        StoreError: The file cannot be opened, is not a run file, or was written by a newer curvdiag.
    """

    def __init__(self, path: str | os.PathLike[str], *, readonly: bool = False):
        self._database = Database(path, readonly=readonly)

    @property
    def path(self) -> Path:
        """The file, as an absolute path."""
        return self._database.path

    @property
    def readonly(self) -> bool:
        return self._database.readonly

    # Runs

    def new_run(
        self,
        name: str | None = None,
        config: Mapping[str, Any] | None = None,
        *,
        unless: Callable[[RunInfo], bool] | None = None,
    ) -> Run:
        """Begin a run.

        Args:
            name: How to call it; ``"run 3"`` for the third of the file if not given. Need not be unique.
            config: Whatever describes it. Kept as JSON; what JSON does not know is kept as its ``str``.
            unless: Is asked of each run of the file. The latest for which it is true is continued, and none begun; of
                several processes that do so at once only one begins it.

        Raises:
            StoreError: The file cannot be written.
        """
        try:
            configuration = json.dumps({str(k): v for k, v in (config or {}).items()}, default=str)
        except (TypeError, ValueError) as error:
            raise ArgumentError(f"the configuration of a run must become JSON, but {error}") from error
        with self._database.writing("begin a run in") as connection:
            known = [info for info in queries.list_runs(connection) if unless(info)] if unless is not None else []
            if known:
                return Run(self, known[-1].id, known[-1].name)
            identity = connection.execute(
                "INSERT INTO runs (name, created, config, versions) VALUES (?, ?, ?, ?)",
                (name or "", time.time(), configuration, json.dumps(versions())),
            ).lastrowid
            assert identity is not None
            if not name:
                connection.execute("UPDATE runs SET name = ? WHERE id = ?", (f"run {identity}", identity))
        return Run(self, identity, name or f"run {identity}")

    def resume(self, run: RunKey = None, *, step: int | None = None) -> Run:
        """Continue a run that the file already holds.

        Args:
            run: Which one.
            step: The step from which training continues. What the run holds beyond it was measured on a path
                that training has left; it is removed together with the first new measurement, never before,
                and an event says so. Without ``step`` nothing is removed, and a new measurement replaces
                only an old one at its own step.

        Raises:
            ArgumentError: There is no such run.
            StoreError: The file cannot be read or was opened with ``readonly=True``.
        """
        with self._database.writing("resume a run in") as connection:
            info = queries.find_run(connection, run)
        return Run(self, info.id, info.name, None if step is None else whole_step(step))

    def runs(self) -> list[RunInfo]:
        """All runs of the file, the oldest first."""
        with self._database.reading() as connection:
            return queries.list_runs(connection)

    def run(self, run: RunKey = None) -> RunInfo:
        """One run of the file: name, configuration, versions.

        Raises:
            ArgumentError: There is no such run.
        """
        with self._database.reading() as connection:
            return queries.find_run(connection, run)

    # What a run measured

    def scalar_names(self, run: RunKey = None) -> list[str]:
        """Names of the scalars that a run holds, sorted."""
        with self._database.reading() as connection:
            return queries.scalar_names(connection, queries.find_run(connection, run).id)

    def scalars(self, name: str, run: RunKey = None) -> Series:
        """One scalar over a run.

        Raises:
            ArgumentError: The run does not hold it; the message lists what it holds.
        """
        with self._database.reading() as connection:
            return queries.series(connection, queries.find_run(connection, run), name)

    def operators(self, run: RunKey = None) -> list[str]:
        """Operators whose densities a run holds, sorted."""
        with self._database.reading() as connection:
            filed = queries.filed_densities(connection, queries.find_run(connection, run).id)
        return sorted({operator for operator, _ in filed})

    def blocks(self, operator: str = "hessian", run: RunKey = None) -> list[str]:
        """Blocks of an operator whose densities a run holds, sorted; ``""`` is the whole model."""
        with self._database.reading() as connection:
            filed = queries.filed_densities(connection, queries.find_run(connection, run).id)
        return [block for found, block in filed if found == operator]

    def densities(self, operator: str = "hessian", block: str = "", run: RunKey = None) -> DensitySeries:
        """The spectral densities of an operator, or of one block of it, over a run.

        Raises:
            ArgumentError: The run does not hold them; the message lists what it holds.
        """
        with self._database.reading() as connection:
            return queries.density_series(connection, queries.find_run(connection, run), operator, block)

    def events(self, run: RunKey = None) -> list[Event]:
        """What happened in a run, in the order in which it was recorded."""
        with self._database.reading() as connection:
            return queries.events(connection, queries.find_run(connection, run).id)

    # Export

    def export_csv(self, path: str | os.PathLike[str], run: RunKey = None) -> Path:
        """Write the scalars of a run as CSV, one line a value: :func:`curvdiag.record.export.write_csv`."""
        with self._database.reading() as connection:
            info = queries.find_run(connection, run)
            found = queries.scalar_rows(connection, info.id)
        return export.write_csv(Path(path), info, found)

    def export_npz(self, path: str | os.PathLike[str], run: RunKey = None) -> Path:
        """Write scalars and densities of a run for NumPy; see :func:`curvdiag.record.export.write_npz`."""
        with self._database.reading() as connection:
            info = queries.find_run(connection, run)
            series = [queries.series(connection, info, n) for n in queries.scalar_names(connection, info.id)]
            filed = queries.filed_densities(connection, info.id)
            densities = [queries.density_series(connection, info, *key) for key in filed]
        return export.write_npz(Path(path), info, series, densities)

    def close(self) -> None:
        """Close the file, leaving nothing beside it; harmless when repeated."""
        self._database.close()

    def __enter__(self) -> RunStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"RunStore({str(self.path)!r}{', readonly=True' if self.readonly else ''})"


class Run:
    """One run of a store, open for recording. Made by :meth:`RunStore.new_run` and :meth:`RunStore.resume`.

    Attributes:
        store: The store.
        id: Number of the run in its file.
        name: Its name.
    """

    def __init__(self, store: RunStore, id: int, name: str, continued_from: int | None = None):
        self.store = store
        self.id = id
        self.name = name
        self._continued_from = continued_from

    def record(
        self,
        step: int,
        scalars: Mapping[str, Estimate | float] | None = None,
        densities: Mapping[tuple[str, str], SpectralDensity] | None = None,
        events: Iterable[tuple[str, str]] = (),
        *,
        epoch: float | None = None,
        wall_time: float | None = None,
        seconds: float | None = None,
        keep: bool = False,
    ) -> None:
        """Record one measurement, all of it or nothing.

        A measurement at a step that the run already holds replaces the one there. With events alone nothing
        is replaced, so a failed measurement leaves the good one of its step.

        Args:
            step: Optimizer step, an integer.
            scalars: Numbers, or an :class:`~curvdiag.Estimate` of one, by name. NaN and infinity are kept.
            densities: Spectral densities by (operator, block), block ``""`` for the whole model.
            events: Pairs (kind, message).
            epoch: Epoch, whole or fractional.
            wall_time: Unix time of the measurement in seconds; now, if not given.
            seconds: What the measurement took.
            keep: Add to what the run holds at the step, instead of replacing it; where a name is there already, its
                value is replaced.

        Raises:
            ArgumentError: A step, name or value cannot be recorded; nothing was.
            StoreError: The file cannot be written (full disk, ...). Nothing was recorded, what was recorded
                before is safe, and a later call may succeed again.
        """
        step, now = whole_step(step), time.time()
        scalar_rows = [rows.scalar_row(name, value) for name, value in (scalars or {}).items()]
        density_rows = [rows.density_row(key, density) for key, density in (densities or {}).items()]
        event_rows = [(self.id, step, text(kind), text(message), now) for kind, message in events]
        at = now if wall_time is None else float(wall_time)
        head = (self.id, step, optional(epoch), at, optional(seconds))
        resumed_at = self._continued_from
        with self.store._database.writing("record in") as connection:
            if resumed_at is not None:
                left = rows.delete_beyond(connection, self.id, resumed_at)
                message = f"continued from step {resumed_at}; removed {left} measurements beyond it"
                rows.insert_events(connection, [(self.id, resumed_at, "resumed", message, now)])
            if scalar_rows or density_rows:
                rows.insert_measurement(connection, head, scalar_rows, density_rows, keep=keep)
            rows.insert_events(connection, event_rows)
        self._continued_from = None

    def event(self, step: int, kind: str, message: str) -> None:
        """Record that something happened, unless the run holds the same event of this step.

        Raises:
            StoreError: The file cannot be written.
        """
        row = (self.id, whole_step(step), text(kind), text(message))
        with self.store._database.writing("record in") as connection:
            if not rows.has_event(connection, row):
                rows.insert_events(connection, [(*row, time.time())])

    @property
    def info(self) -> RunInfo:
        """Configuration, versions and length of the run, as the file has them now."""
        return self.store.run(self.id)

    def scalar_names(self) -> list[str]:
        """Names of the scalars recorded so far."""
        return self.store.scalar_names(self.id)

    def scalars(self, name: str) -> Series:
        """One scalar over this run; see :meth:`RunStore.scalars`."""
        return self.store.scalars(name, self.id)

    def blocks(self, operator: str = "hessian") -> list[str]:
        """Blocks of an operator with densities; ``""`` is the whole model."""
        return self.store.blocks(operator, self.id)

    def densities(self, operator: str = "hessian", block: str = "") -> DensitySeries:
        """Spectral densities over this run; see :meth:`RunStore.densities`."""
        return self.store.densities(operator, block, self.id)

    def events(self) -> list[Event]:
        """What happened in this run."""
        return self.store.events(self.id)

    def __repr__(self) -> str:
        return f"Run({self.id}, {self.name!r}, {str(self.store.path)!r})"


def whole_step(step: Any) -> int:
    try:
        return operators.index(step)
    except TypeError as error:
        raise ArgumentError(f"a step is an integer, not {step!r}") from error


def optional(number: Any) -> float | None:
    return None if number is None else float(number)


def text(value: Any) -> str:
    """A string that UTF-8 can carry, whatever an exception's message holds."""
    return str(value).encode("utf-8", "replace").decode("utf-8")


def versions() -> dict[str, str]:
    """Versions of what the numbers of a run depend on."""
    found = {"python": platform.python_version()}
    for package in ("torch", "numpy", "curvdiag"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
