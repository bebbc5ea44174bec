"""A scan under way: which checkpoints are to be measured, and what happens to each of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from curvdiag.checkpoints.ledger import Ledger, stamped
from curvdiag.checkpoints.load import load
from curvdiag.checkpoints.match import differ, weights_in
from curvdiag.checkpoints.measuring import Measurer
from curvdiag.checkpoints.outcome import Failure
from curvdiag.checkpoints.read import read
from curvdiag.checkpoints.steps import Place
from curvdiag.errors import CheckpointError, out_of_step
from curvdiag.objective import Objective

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """What a scan, or a shard of it, has before it.

    Attributes:
        folder: That holds all checkpoints of the run.
        paths: Those to look at.
        where: At which step each stands, of all checkpoints of the run, as far as it is known.
        failed: Those to look at that cannot be read.
        first: Step of the first checkpoint of the run.
        kind: In words what the steps are, if not optimizer steps.
        idle: In words why there is nothing to look at.
    """

    folder: Path
    paths: list[Path]
    where: dict[Path, Place]
    failed: dict[Path, Failure]
    first: int
    kind: str
    idle: str


class Work:
    """A scan under way: it sorts out what is to be measured, and measures it.

    Where several ranks measure together, each of them does it; only the first has a ``ledger``, and decides.
    """

    def __init__(
        self,
        objective: Objective,
        measurer: Measurer,
        ledger: Ledger | None,
        part: str | None,
        plan: Plan,
        tell: Tell,
    ) -> None:
        self.objective, self.ranks = objective, objective.ranks
        self.measurer, self.ledger, self.part, self.plan, self.tell = measurer, ledger, part, plan, tell
        self.failed = dict(plan.failed)

    def begin(self, again: bool) -> tuple[list[int], list[tuple[Path, Place]]]:
        """Steps that the run holds, and what is to be measured, by step."""
        plan, found = self.plan, None
        with self.ranks.together("sorting of checkpoints"):
            if self.ledger is not None:
                if plan.kind:
                    self.ledger.event(0, "note", plan.kind)
                for words in filter(None, (plan.kind, plan.idle)):
                    self.tell(words)
                for path, failure in plan.failed.items():
                    self.note_failure(path, failure.reason)
                found = self.sort(self.ledger, again)
        found = self.ranks.of_first(found)
        assert found is not None
        return found

    def sort(self, ledger: Ledger, again: bool) -> tuple[list[int], list[tuple[Path, Place]]]:
        """What the run holds, and what is to be measured; one checkpoint for each step."""
        where = self.plan.where
        by_step: dict[int, list[Path]] = {}
        for path in self.plan.paths:
            if path in where and path not in self.failed:
                by_step.setdefault(where[path].step, []).append(path)
        held: list[int] = []
        queue: list[tuple[Path, Place]] = []
        for step, several in sorted(by_step.items()):
            if not again and any(ledger.holds(step, path) for path in several):
                held.append(step)
                continue
            chosen = several[0] if len(several) == 1 else self.one_of(several)
            if chosen is None:
                continue
            if step in ledger.steps and not again:
                self.tell(f"{chosen.name} is not what step {step} was measured from; it is measured again")
            queue.append((chosen, where[chosen]))
        return held, queue

    def one_of(self, several: Sequence[Path]) -> Path | None:
        """Of the checkpoints of one step that fit the model the first, if all hold the same weights; else none."""
        model, fitting = self.objective.model, {}
        for path in several:
            try:
                weights = weights_in(read(path), model, self.part)
                load(model, weights)
                fitting[path] = weights
            except CheckpointError as error:
                self.note_failure(path, reason(path, error))
        if len(fitting) < 2:
            return next(iter(fitting), None)
        names, step = " and ".join(path.name for path in fitting), self.plan.where[several[0]].step
        first, *others = fitting.values()
        if not any(differ(first, other, model.state_dict()) for other in others):
            self.tell(f"{names} are the same weights of step {step}; they are measured once")
            return next(iter(fitting))
        why = f"{names} are both of step {step} and differ: narrow the pattern, or scan them apart with --name"
        for path in fitting:
            self.failed[path] = Failure(str(path), why)
        self.note_failure(path, why)  # of all of them, once
        return None

    def measure(self, path: Path, place: Place) -> bool:
        """Load one checkpoint and measure; whether it succeeded, on all ranks.

        Raises:
            StoreError: The run file cannot be written.
            DistributedError: Another rank failed in what only it does, or is gone.
        """
        model, ledger = self.objective.model, self.ledger
        try:
            with self.ranks.together(f"loading of {path.name}"):
                stamp = stamped(path)  # before it is read: what is written meanwhile is another one
                contents = read(path)
                load(model, weights_in(contents, model, self.part))
                if stamped(path) != stamp:
                    raise CheckpointError("was written anew while it was read")
            measurement, failures = self.measurer(place.step, place.epoch, contents.scalars)
        except Exception as error:  # of the user's own model, too; the other checkpoints may do
            if out_of_step(error):
                raise
            with self.ranks.together("recording"):
                self.note_failure(path, reason(path, error))
            return False
        errors = [("error", f"{name}: {type(error).__name__}: {error}") for name, error in failures.items()]
        with self.ranks.together("recording"):
            if ledger is not None:
                for note in [] if ledger.steps else self.measurer.notes:
                    ledger.event(self.plan.first, "note", note)  # also where another shard has that step
                ledger.measurement(stamp, measurement, errors)
                ledger.steps.add(place.step)
        for _, message in errors:
            self.tell(one_line(f"{path.name}, step {place.step}: {message}"))
        return True

    def note_failure(self, path: Path, why: str) -> None:
        self.failed[path] = Failure(str(path), why)
        self.tell(why)
        if self.ledger is not None:
            place = self.plan.where.get(path)
            self.ledger.event(0 if place is None else place.step, "error", why)

    def failures(self) -> tuple[Failure, ...]:
        """What was not measured, in natural order, as the first rank has it."""
        return self.ranks.of_first(tuple(self.failed[path] for path in self.plan.paths if path in self.failed))


def reason(path: Path, error: Exception) -> str:
    """Why a checkpoint was not measured, in one line that begins with its name."""
    if isinstance(error, CheckpointError):
        return one_line(f"{path.name} {error}")
    return one_line(f"{path.name}: {type(error).__name__}: {error}")


def one_line(text: str) -> str:
    return " ".join(text.split())
