"""Between a monitor and its run file: what cannot be written now is kept, and written when it can."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

from curvdiag.errors import ArgumentError, StoreError, UnwritableStoreError
from curvdiag.monitor.measurement import Measurement
from curvdiag.record import Run, RunStore


class Recorder:
    """One run of a store.

    Args:
        store: Path of the run file, an open store, or None to record nothing.
        name: Of the run.
        describe: Gives the run's configuration when it begins, with the first record.
        strict: Raise what goes wrong with the file.
        warn: Called with a kind and a message otherwise.

    Raises:
        StoreError: The path cannot be a run file: no such folder, another kind of file, a newer schema.
    """

    def __init__(
        self,
        store: str | os.PathLike[str] | RunStore | None,
        name: str | None,
        describe: Callable[[], Mapping[str, Any]],
        *,
        strict: bool,
        warn: Callable[[str, str], None],
    ) -> None:
        self.strict, self._warn = strict, warn
        self._name, self._describe = name, describe
        self._owns_store = not isinstance(store, RunStore)
        self._run: Run | None = None
        self._elsewhere: tuple[int, str] | None = None  # the run as another rank has it, which writes
        self._unwritten: list[dict[str, Any]] = []
        self._beside: tuple[int, dict[str, float]] = (-1, {})  # the latest step with numbers of the user's own
        self.store = store if isinstance(store, RunStore) or store is None else self._open(store)

    def _open(self, path: str | os.PathLike[str]) -> RunStore | None:
        try:
            return RunStore(path)
        except UnwritableStoreError as error:
            if self.strict:
                raise
            self._warn("store", f"{error}; measurements stay in memory")
            return None

    @property
    def name(self) -> str:
        """Of the run: as the store has it once it has begun, as given before; else ``"curvdiag"``."""
        return self._run.name if self._run is not None else self._name or "curvdiag"

    @property
    def named(self) -> tuple[int, str] | None:
        """Number and name of the run, where it has begun; of the rank that writes, where another one does."""
        return self._elsewhere if self._run is None else (self._run.id, self._run.name)

    @named.setter
    def named(self, told: tuple[int, str] | None) -> None:
        self._elsewhere = told

    @property
    def run(self) -> Run | None:
        """The run, begun when it is first asked for."""
        if self._run is None and self.store is not None:
            configuration = self._describe()
            try:
                self._run = self.store.new_run(self._name, configuration)
            except ArgumentError as error:  # not JSON: keep what it looks like rather than nothing
                self._warn("config", f"{error}; it is recorded as text")
                self._run = self.store.new_run(self._name, {key: repr(value) for key, value in configuration.items()})
        return self._run

    def measurement(self, measurement: Measurement) -> None:
        """Record a measurement, after those that could not be recorded before.

        It replaces an earlier one at its step, but for the numbers that stand beside it.
        """
        self._write(
            step=measurement.step,
            scalars={**self._numbers_at(measurement.step), **measurement.scalars},
            densities=measurement.densities,
            events=[("note", note) for note in measurement.notes],
            epoch=measurement.epoch,
            seconds=measurement.seconds,
        )

    def numbers(self, step: int, numbers: Mapping[str, float], epoch: float | None) -> None:
        """Record numbers beside what the run holds at their step."""
        self._beside = step, {**self._numbers_at(step), **numbers}
        self._write(step=step, scalars=dict(numbers), epoch=epoch, keep=True)

    def _numbers_at(self, step: int) -> dict[str, float]:
        return self._beside[1] if self._beside[0] == step else {}

    def event(self, step: int, kind: str, message: str, epoch: float | None) -> None:
        """Record that something happened."""
        self._write(step=step, events=[(kind, message)], epoch=epoch)

    def _write(self, **record: Any) -> None:
        if self.store is None:
            return
        self._unwritten.append({**record, "wall_time": time.time()})
        try:
            self._write_all()
        except StoreError as error:
            if self.strict:
                raise
            self._warn("store", f"{error}; training goes on, and measurements stay in memory until they can be written")

    def _write_all(self) -> None:
        run = self.run
        assert run is not None
        while self._unwritten:
            try:
                run.record(**self._unwritten[0])
            except ArgumentError as error:  # this one can never be written, and must not hold up the others
                if self.strict:
                    raise
                self._warn("record", f"a measurement cannot be recorded: {error}")
            self._unwritten.pop(0)

    def close(self) -> None:
        """Close the store if the path was given; it is kept, so that a later checkpoint still names the run."""
        if self.store is not None and self._unwritten:
            with contextlib.suppress(StoreError):  # it was warned about; this is the last attempt
                self._write_all()
        if self.store is not None and self._owns_store:
            self.store.close()

    def state_dict(self) -> dict[str, Any]:
        run, name = self.named or (None, None)
        step, numbers = self._beside
        return {"run": run, "run_name": name, "recorded": {"step": step, "scalars": dict(numbers)}}

    def load_state_dict(self, state: Mapping[str, Any], step: int) -> Run | None:
        """Continue the same run from ``step``, and return it.

        Where the store does not hold it, a new one is begun, with a warning.
        """
        if state["run"] is None or self.store is None:
            self._elsewhere = None if state["run"] is None else (state["run"], state["run_name"])
            return None
        try:
            known = {info.id: info.name for info in self.store.runs()}
            if known.get(state["run"]) == state["run_name"]:
                self._run = self.store.resume(state["run"], step=step)
                recorded = state.get("recorded", {"step": -1, "scalars": {}})
                self._beside = recorded["step"], dict(recorded["scalars"])
                return self._run
        except StoreError as error:
            if self.strict:
                raise
            self._warn("store", f"{error}; the run cannot be continued, and a new one is begun")
            return None
        self._warn("resume", f"the store holds no run {state['run_name']!r} to continue; a new one is begun")
        return None
