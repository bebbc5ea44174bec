"""The run of a scan in its run file: which checkpoints it holds already."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from curvdiag.checkpoints.find import weights_file
from curvdiag.errors import ArgumentError
from curvdiag.monitor.measurement import Measurement
from curvdiag.record import Run, RunInfo, RunStore
from curvdiag.record.same import differing

MEASURED = "curv/cost/seconds"
"""A number that every measurement of a scan holds."""

STAMP = re.compile(r"\[\d+ bytes, modified \d+\]$")


class Ledger:
    """One run of a store, begun or continued.

    A scan is continued where a run has the same name and description: folder, objective (with its data and loss) and
    settings. With any other one a new run is begun, so that one run never mixes two kinds of measurements. Several
    processes may hold the same run at once, each with checkpoints of its own.

    Attributes:
        run: The run.
        beginning: In words whether it was there before; and where another run of its name is not continued, why not.
    """

    def __init__(
        self, store: RunStore, name: str, config: Mapping[str, Any], description: Mapping[str, Mapping[str, Any]]
    ) -> None:
        named: list[tuple[RunInfo, list[str]]] = []

        def same(info: RunInfo) -> bool:
            if info.name == name:
                named.append((info, differing(info.config, description)))
            return info.name == name and not named[-1][1]

        self.run: Run = store.new_run(name, {**config, **description}, unless=same)
        known = any(not keys for _, keys in named)
        self.beginning = f"{'continues' if known else 'begins'} run {self.run.name!r}"
        if named and not known:
            last, keys = named[-1]
            self.beginning += f" anew, since run {last.id} of this name differs in {', '.join(keys)},"
        events = self.run.events()
        self._events = {(event.kind, event.message, event.step) for event in events}
        self._stamps = {event.step: stamp_in(event.message) for event in events if event.kind == "checkpoint"}
        self._measured = {int(step) for step in self._held()}

    def _held(self) -> Sequence[int]:
        try:
            return self.run.scalars(MEASURED).steps.tolist()
        except ArgumentError:  # none so far
            return []

    @property
    def steps(self) -> set[int]:
        """Steps that were measured before."""
        return self._measured

    def holds(self, step: int, path: Path) -> bool:
        """Whether this step was measured, from a file of the size and time that this one has."""
        try:
            return step in self._measured and self._stamps.get(step) == stamp_in(stamped(path))
        except OSError:  # it is gone; reading it will tell
            return False

    def measurement(self, stamp: str, measurement: Measurement, events: Sequence[tuple[str, str]] = ()) -> None:
        """Record a measurement, with the file that it was made of, in one transaction."""
        self.run.record(
            measurement.step,
            measurement.scalars,
            measurement.densities,
            [("checkpoint", stamp), *events, *(("note", note) for note in measurement.notes)],
            epoch=measurement.epoch,
            seconds=measurement.seconds,
        )

    def event(self, step: int, kind: str, message: str) -> None:
        """Record that something happened, once; also where several scans write into the file."""
        if (kind, message, step) not in self._events:
            self._events.add((kind, message, step))
            self.run.event(step, kind, message)


def stamped(path: Path) -> str:
    """A checkpoint's name, with what changes when it is written anew."""
    file = ((weights_file(path) or path) if path.is_dir() else path).stat()
    return f"{path.name} [{file.st_size} bytes, modified {file.st_mtime_ns}]"


def stamp_in(message: str) -> str | None:
    found = STAMP.search(message)
    return None if found is None else found[0]


def common_folder(paths: Sequence[Path]) -> Path:
    """The innermost folder that holds all checkpoints."""
    return Path(os.path.commonpath([path.absolute().parent for path in paths])).resolve()
