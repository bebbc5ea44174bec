"""A training run measured after the fact: each of its checkpoints, into a run file."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from curvdiag.checkpoints.find import Patterns, find
from curvdiag.checkpoints.fingerprint import fingerprint
from curvdiag.checkpoints.ledger import Ledger, common_folder, stamped
from curvdiag.checkpoints.load import load, weights_kept
from curvdiag.checkpoints.match import differ, weights_in
from curvdiag.checkpoints.measuring import Measurer
from curvdiag.checkpoints.read import MOST, Contents, read
from curvdiag.checkpoints.steps import REMEDY, Place, places
from curvdiag.errors import ArgumentError, CheckpointError
from curvdiag.monitor.description import describe_settings
from curvdiag.monitor.settings import Preset, Settings
from curvdiag.objective import Objective
from curvdiag.record import RunStore
from curvdiag.results import Result

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Failure(Result):
    """A checkpoint that was not measured.

    Attributes:
        path: Which one.
        reason: Why not, in one line that begins with its name.
    """

    path: str
    reason: str


@dataclass(frozen=True)
class Scan(Result):
    """What came of a scan.

    Attributes:
        store: The run file.
        run: Number of the run in it.
        name: Its name.
        measured: Steps measured now, in order.
        held: Steps that the run held already.
        failed: Checkpoints that were not measured, in natural order.
    """

    store: str
    run: int
    name: str
    measured: tuple[int, ...]
    held: tuple[int, ...]
    failed: tuple[Failure, ...]

    def __str__(self) -> str:
        parts = [f"{len(self.measured)} checkpoints measured"]
        parts += [f"{len(self.held)} there already"] if self.held else []
        parts += [f"{len(self.failed)} failed"] if self.failed else []
        return f"{self.store}, run {self.name!r}: {', '.join(parts)}"


def scan(
    objective: Objective,
    paths: Patterns,
    store: str | os.PathLike[str] | RunStore,
    *,
    at: Sequence[int] | None = None,
    part: str | None = None,
    name: str | None = None,
    config: Mapping[str, Any] | None = None,
    again: bool = False,
    preset: Preset | None = None,
    measure: Sequence[str] | None = None,
    steps: int = 40,
    probes: int = 3,
    tol: float = 1e-2,
    seed: int = 0,
    hessian: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
    tell: Tell | None = None,
) -> Scan:
    """Measure a model at each checkpoint of a run, into a run file, as a monitor would have done in the training.

    Read are files of torch (``weights_only=True``: no code of a checkpoint is ever run) with a state dict, whole or as
    an entry; safetensors; Lightning's ``.ckpt``; folders of Transformers, in one piece or several. What stands before
    the names (``module.``, ``model.``, ``_orig_mod.``) is found from the model's own. Weights and buffers are cast to
    the model's type; afterwards the model is as it was.

    Steps are what the checkpoints say of themselves (``global_step``, ``step``, ``trainer_state.json``), else what
    their names say; the learning rate, where a checkpoint has it, is recorded as ``train/lr/<group>``. A scan goes on
    where it stopped: steps that the run holds are left out, unless their file has changed. A run is the same where
    name, folder, settings and objective are, down to its loss and its data (so give what draws them a seed). What
    cannot be read, or does not fit, is told, recorded as an event of the run, and tried again next time; the others are
    measured.

    Args:
        objective: What is measured; its model takes the weights of one checkpoint after the other.
        paths: Files, folders and patterns (``"ckpts/*.pt"``); several in a list.
        store: Path of the run file, or an open one.
        at: Steps of the checkpoints, in the natural order of their names, where nothing else tells them.
        part: Which weights of each file, where several fit the model, e.g. ``"ema"``.
        name: Of the run; ``"scan of <folder>"`` if not given.
        config: Recorded with the run.
        again: Measure what the run holds already, too.
        preset, measure, steps, probes, tol, seed, hessian: As of :class:`~curvdiag.CurvatureMonitor`.
        progress: Called with how many checkpoints are done, and how many there are to measure.
        tell: Called with one line for each thing that a user should know.

    Raises:
        ArgumentError: Nothing matches, nothing tells the order, or settings make no sense.
        LossError: ``measure`` names gradient noise, and the loss gives only a mean.
        MissingExtraError: A checkpoint is of safetensors, and that package is not installed.
        StoreError: The run file cannot be opened or written.
    """
    settings = Settings(preset, steps, probes, tol, seed, dict(hessian or {}), measure)
    measurer = Measurer(objective, settings)
    found = find(paths)
    folder = common_folder(found)
    described = {
        "curvdiag": {**describe_settings(objective, settings), "cadence": "checkpoints"},
        "checkpoints": {"folder": str(folder), "part": part, "fingerprint": fingerprint(objective)},
    }
    failed: dict[Path, Failure] = {}
    line = tell or (lambda text: None)
    where, kind = placed(found, at, failed)
    with ExitStack() as stack:
        file = store if isinstance(store, RunStore) else stack.enter_context(RunStore(store))
        ledger = Ledger(file, name or f"scan of {folder.name or folder}", config or {}, described)
        line(f"{ledger.beginning} of {file.path}")
        if kind:
            ledger.event(0, "note", kind)
            line(kind)
        stack.enter_context(weights_kept(objective.model))
        work = Work(objective, measurer, ledger, part, failed, line)
        for path, failure in list(failed.items()):
            work.note_failure(path, failure.reason, where.get(path))
        held, queue = work.sort(found, where, again)
        measured = []
        if progress is not None:
            progress(0, len(queue))
        for done, (path, place) in enumerate(queue, 1):
            if work.measure(path, place):
                measured.append(place.step)
            if progress is not None:
                progress(done, len(queue))
        order = [failed[path] for path in found if path in failed]
        return Scan(str(file.path), ledger.run.id, ledger.run.name, tuple(measured), tuple(held), tuple(order))


def placed(
    found: Sequence[Path], at: Sequence[int] | None, failed: dict[Path, Failure]
) -> tuple[dict[Path, Place], str]:
    """The place of each checkpoint that can be read; what cannot is filed as failed."""
    heads: list[Contents | None] = []
    for path in found:
        try:
            heads.append(read(path, weights=False))
        except CheckpointError as error:
            failed[path] = Failure(str(path), reason(path, error))
            heads.append(None)
    if at is not None:
        if len(at) != len(found):
            shown = ", ".join(path.name for path in found[:6]) + (", ..." if len(found) > 6 else "")
            raise ArgumentError(f"{len(at)} steps are given for {len(found)} checkpoints; give one for each of {shown}")
        if wrong := [step for step in at if isinstance(step, bool) or step != int(step) or not 0 <= step < MOST]:
            raise ArgumentError(f"a step is a whole number, not negative and below 2**63, not {wrong[0]!r}")
        triples = zip(found, at, heads, strict=True)
        return {path: Place(int(step), head.epoch if head else None) for path, step, head in triples}, ""
    guessed, kind = places(found, heads)
    where = {path: place for path, place in zip(found, guessed, strict=True) if place is not None}
    for path in found:
        if path not in where and path not in failed:
            failed[path] = Failure(str(path), f"{path.name} does not tell its step: {REMEDY}")
    return where, kind


class Work:
    """A scan under way: it sorts out what is to be measured, and measures it."""

    def __init__(
        self,
        objective: Objective,
        measurer: Measurer,
        ledger: Ledger,
        part: str | None,
        failed: dict[Path, Failure],
        tell: Tell,
    ) -> None:
        self.objective, self.measurer, self.ledger = objective, measurer, ledger
        self.part, self.failed, self.tell = part, failed, tell

    def sort(
        self, found: Sequence[Path], where: Mapping[Path, Place], again: bool
    ) -> tuple[list[int], list[tuple[Path, Place]]]:
        """Steps that the run holds, and what is to be measured, by step; one checkpoint for each."""
        by_step: dict[int, list[Path]] = {}
        for path in found:
            if path in where and path not in self.failed:
                by_step.setdefault(where[path].step, []).append(path)
        held: list[int] = []
        queue: list[tuple[Path, Place]] = []
        for step, several in sorted(by_step.items()):
            if not again and any(self.ledger.holds(step, path) for path in several):
                held.append(step)
                continue
            chosen = several[0] if len(several) == 1 else self.one_of(several, where)
            if chosen is None:
                continue
            if step in self.ledger.steps and not again:
                self.tell(f"{chosen.name} is not what step {step} was measured from; it is measured again")
            queue.append((chosen, where[chosen]))
        return held, queue

    def one_of(self, several: Sequence[Path], where: Mapping[Path, Place]) -> Path | None:
        """Of the checkpoints of one step that fit the model the first, if all hold the same weights; else none."""
        model, fitting = self.objective.model, {}
        for path in several:
            try:
                weights = weights_in(read(path), model, self.part)
                load(model, weights)
                fitting[path] = weights
            except CheckpointError as error:
                self.note_failure(path, reason(path, error), where[path])
        if len(fitting) < 2:
            return next(iter(fitting), None)
        names, step = " and ".join(path.name for path in fitting), where[several[0]].step
        first, *others = fitting.values()
        if not any(differ(first, other, model.state_dict()) for other in others):
            self.tell(f"{names} are the same weights of step {step}; they are measured once")
            return next(iter(fitting))
        why = f"{names} are both of step {step} and differ: narrow the pattern, or scan them apart with --name"
        for path in fitting:
            self.failed[path] = Failure(str(path), why)
        self.note_failure(path, why, where[path])  # of all of them, once
        return None

    def measure(self, path: Path, place: Place) -> bool:
        """Load one checkpoint and measure; whether it succeeded.

        Raises:
            StoreError: The run file cannot be written.
        """
        model, first = self.objective.model, not self.ledger.steps
        try:
            stamp = stamped(path)  # before it is read: what is written meanwhile is another one
            contents = read(path)
            load(model, weights_in(contents, model, self.part))
            if stamped(path) != stamp:
                raise CheckpointError("was written anew while it was read")
            measurement, failures = self.measurer(place.step, place.epoch, contents.scalars)
        except Exception as error:  # of the user's own model, too; the other checkpoints may do
            self.note_failure(path, reason(path, error), place)
            return False
        errors = [("error", f"{name}: {type(error).__name__}: {error}") for name, error in failures.items()]
        notes = [("note", note) for note in self.measurer.notes] if first else []
        self.ledger.measurement(stamp, measurement, [*notes, *errors])
        for _, message in errors:
            self.tell(one_line(f"{path.name}, step {place.step}: {message}"))
        self.ledger.steps.add(place.step)
        return True

    def note_failure(self, path: Path, why: str, place: Place | None) -> None:
        self.failed[path] = Failure(str(path), why)
        self.tell(why)
        self.ledger.event(0 if place is None else place.step, "error", why)


def reason(path: Path, error: Exception) -> str:
    """Why a checkpoint was not measured, in one line that begins with its name."""
    if isinstance(error, CheckpointError):
        return one_line(f"{path.name} {error}")
    return one_line(f"{path.name}: {type(error).__name__}: {error}")


def one_line(text: str) -> str:
    return " ".join(text.split())
