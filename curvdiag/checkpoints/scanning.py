"""A training run measured after the fact: each of its checkpoints, into a run file."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from curvdiag.checkpoints.find import Patterns, find
from curvdiag.checkpoints.fingerprint import fingerprint
from curvdiag.checkpoints.ledger import Ledger, common_folder
from curvdiag.checkpoints.load import weights_kept
from curvdiag.checkpoints.measuring import Measurer
from curvdiag.checkpoints.outcome import Failure, Scan
from curvdiag.checkpoints.read import MOST, Contents, read
from curvdiag.checkpoints.shards import Shard, checked, share
from curvdiag.checkpoints.steps import REMEDY, Place, places
from curvdiag.checkpoints.work import Plan, Tell, Work, reason
from curvdiag.errors import ArgumentError, CheckpointError
from curvdiag.monitor.description import describe_settings
from curvdiag.monitor.settings import Preset, Settings
from curvdiag.objective import Objective
from curvdiag.record import RunStore


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
    shard: Shard | None = None,
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

    An objective on several ranks (``group="world"``) is measured on all of them together; the first one reads which
    checkpoints there are, and writes. All ranks make the call, and all return the same.

    Args:
        objective: What is measured; its model takes the weights of one checkpoint after the other.
        paths: Files, folders and patterns (``"ckpts/*.pt"``); several in a list.
        store: Path of the run file, or an open one.
        at: Steps of the checkpoints, in the natural order of their names, where nothing else tells them.
        part: Which weights of each file, where several fit the model, e.g. ``"ema"``.
        name: Of the run; ``"scan of <folder>"`` if not given.
        config: Recorded with the run.
        again: Measure what the run holds already, too.
        shard: ``(i, n)``: only each n-th step from the i-th on, counted from 0. The shards of 0 to n-1 are everything,
            each step once, and give the run that one scan gives: in one file, to which all of them may write at once,
            or in one for each and then :func:`curvdiag.record.merge_runs`.
        preset, measure, steps, probes, tol, seed, hessian: As of :class:`~curvdiag.CurvatureMonitor`.
        progress: Called with how many checkpoints are done, and how many there are to measure.
        tell: Called with one line for each thing that a user should know.

    Raises:
        ArgumentError: Nothing matches, nothing tells the order, settings make no sense, or the weights are sharded.
        DistributedError: Another rank failed, or a rank is gone.
        LossError: ``measure`` names gradient noise, and the loss gives only a mean.
        MissingExtraError: A checkpoint is of safetensors, and that package is not installed.
        StoreError: The run file cannot be opened or written.
    """
    ranks = objective.ranks
    shard = None if shard is None else checked(shard)
    if objective.sharded:
        raise ArgumentError(
            "a scan puts whole checkpoints into the model, and the weights of this one are sharded: make it unsharded "
            "in the task, with the data shared among the ranks"
        )
    ranks.agree(
        "shards", shard, "all ranks measure each checkpoint together: give the same shard on every rank, or none"
    )
    settings = Settings(preset, steps, probes, tol, seed, dict(hessian or {}), measure)
    measurer = Measurer(objective, settings)
    with ranks.together("search for checkpoints"):
        own = planned(paths, at, shard) if ranks.first else None
    plan = ranks.of_first(own)
    assert plan is not None
    described = {
        "curvdiag": {**describe_settings(objective, settings), "cadence": "checkpoints"},
        "checkpoints": {"folder": str(plan.folder), "part": part, "fingerprint": fingerprint(objective)},
    }
    line = tell if tell is not None and ranks.first else lambda text: None
    advance = progress if progress is not None and ranks.first else lambda done, total: None
    with ExitStack() as stack:
        with ranks.together("opening of the run file"):
            ledger: Ledger | None = None
            if ranks.first:
                file = store if isinstance(store, RunStore) else stack.enter_context(RunStore(store))
                ledger = Ledger(file, name or f"scan of {plan.folder.name or plan.folder}", config or {}, described)
                line(f"{ledger.beginning} of {file.path}")
        where = ranks.of_first(None if ledger is None else (str(ledger.run.store.path), ledger.run.id, ledger.run.name))
        stack.enter_context(weights_kept(objective.model))
        work = Work(objective, measurer, ledger, part, plan, line)
        held, queue = work.begin(again)
        measured = []
        advance(0, len(queue))
        for done, (path, place) in enumerate(queue, 1):
            if work.measure(path, place):
                measured.append(place.step)
            advance(done, len(queue))
        assert where is not None
        return Scan(*where, tuple(measured), tuple(held), work.failures(), shard)


def planned(paths: Patterns, at: Sequence[int] | None, shard: Shard | None) -> Plan:
    """What there is to measure, and at which steps.

    Raises:
        ArgumentError: Nothing matches, or nothing tells the order.
    """
    found = find(paths)
    failed: dict[Path, Failure] = {}
    where, kind = placed(found, at, failed)
    mine = found if shard is None else share(found, where, shard)
    return Plan(
        folder=common_folder(found),
        paths=mine,
        where=where,
        failed={path: failed[path] for path in mine if path in failed},
        first=min((place.step for place in where.values()), default=0),
        kind=kind,
        idle=""
        if shard is None or mine
        else f"shard {shard[0]}/{shard[1]} has none of the {len(found)} checkpoints: nothing to measure",
    )


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
