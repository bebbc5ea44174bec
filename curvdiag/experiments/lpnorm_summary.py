"""What the runs of the ``lpnorm`` experiment say: means over seeds with intervals, and paired differences."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from curvdiag.estimate import Estimate
from curvdiag.experiments.lpnorm_methods import BASELINES, CONTROLS, METHODS, PUBLISHED
from curvdiag.experiments.lpnorm_tasks import Task
from curvdiag.experiments.lpnorm_training import Run
from curvdiag.experiments.lpnorm_tuning import Setting, Trial, ranked
from curvdiag.results import Result


@dataclass(frozen=True)
class Summary(Result):
    """One method on one task. Accuracies are shares, intervals Student t's over seeds, for the chosen setting.

    Attributes:
        method, lr, weight_decay: Name, and the setting that tuning chose.
        at_edge: The rate lies in the outer tenth of the range that was searched, at either end.
        validation: Accuracy that it was chosen for.
        settings, tuning_runs, failed: How many settings were tried, in how many runs, of which so many ended without
            a finite loss.
        accuracy, loss: On the test images at the end, mean over seeds.
        ahead: Accuracy less that of each baseline, paired by seed.
        second: Accuracy of the second best setting of the tuning less that of the best, paired by seed: what hangs on
            the choice, which the other intervals do not cover. None where it was not run.
        seconds: Of one tuning run, all measurements that the method needs included.
    """

    method: str
    lr: float
    weight_decay: float
    at_edge: bool
    validation: float
    settings: int
    tuning_runs: int
    failed: int
    accuracy: Estimate
    loss: Estimate
    ahead: dict[str, Estimate]
    second: Estimate | None
    seconds: float


@dataclass(frozen=True)
class Outcome(Result):
    """All runs of a task, and what they say.

    Attributes:
        task: What was learnt.
        summaries: A row for each method.
        comparisons: The paper's method against its baselines, and methods against their controls, in words.
        runs: Tuning runs and final ones.
    """

    task: Task
    summaries: list[Summary]
    comparisons: list[str]
    runs: list[Run]


def choose(runs: Iterable[Run], method: str) -> list[Setting]:
    """The best settings of a method by its tuning runs: one, and a second where more were tried."""
    return ranked([trial(run) for run in runs if run.method == method and not run.final])[:2]


def trial(run: Run) -> Trial:
    return Trial(Setting(run.lr, run.weight_decay), run.accuracy, run.loss)


def finals(runs: Sequence[Run], method: str, place: int = 0) -> list[Run]:
    """The final runs of a method's best setting (``place`` 1: of its second best) by seed; perhaps none."""
    own = [run for run in runs if run.method == method and run.final]
    if not own or place >= len(settings := choose(runs, method)):
        return []
    return sorted((run for run in own if trial(run).setting == settings[place]), key=lambda run: run.seed)


def summarise(runs: Sequence[Run]) -> list[Summary]:
    """One row for each method of one task, in the order of :data:`METHODS`."""
    return [_summary(runs, method) for method in METHODS if finals(runs, method)]


def paired(ours: Sequence[Run], theirs: Sequence[Run]) -> Estimate:
    """Mean difference in accuracy over the seeds that both have."""
    other = {run.seed: run.accuracy for run in theirs}
    return Estimate.from_samples([run.accuracy - other[run.seed] for run in ours if run.seed in other])


def _summary(runs: Sequence[Run], method: str) -> Summary:
    tuning = [run for run in runs if run.method == method and not run.final]
    tested, second = finals(runs, method), finals(runs, method, 1)
    setting = choose(runs, method)[0]
    chosen = [run.accuracy for run in tuning if trial(run).setting == setting]
    others = [name for name in BASELINES if name != method and finals(runs, name)]
    return Summary(
        method=method,
        lr=setting.lr,
        weight_decay=setting.weight_decay,
        at_edge=METHODS[method].search.at_edge(setting),
        validation=float(np.mean(chosen)),
        settings=len({trial(run).setting for run in tuning}),
        tuning_runs=len(tuning),
        failed=sum(not math.isfinite(run.loss) for run in tuning),
        accuracy=Estimate.from_samples([run.accuracy for run in tested]),
        loss=Estimate.from_samples([run.loss for run in tested]),
        ahead={name: paired(tested, finals(runs, name)) for name in others},
        second=paired(second, tested) if second else None,
        seconds=float(np.mean([run.seconds for run in tuning])),
    )


def verdict(difference: Estimate) -> str:
    """``"ahead"`` or ``"behind"`` where the whole 95 % interval lies on that side of zero, else ``"undecided"``."""
    low, high = difference.interval()
    return "ahead" if low > 0 else "behind" if high < 0 else "undecided"


def points(difference: Estimate) -> str:
    """A difference in accuracy with its interval, in percentage points: ``+0.42 (-0.10 to +0.94)``."""
    return "{:+.2f} ({:+.2f} to {:+.2f})".format(*(100 * x for x in (difference.value, *difference.interval())))


def table(summaries: Sequence[Summary]) -> list[str]:
    """A table in Markdown.

    Its columns: the setting, test accuracy in %, what it is ahead of SGD-M and of AdamW, what the tuning's second best
    setting is ahead of the best, and the processor's seconds of a run.
    """
    first, second = BASELINES[:2]
    head = ("method", "rate, decay", "accuracy, %", f"less {first}", f"less {second}", "second setting", "s")
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for one in summaries:
        low, high = (100 * x for x in one.accuracy.interval())
        ahead = [points(one.ahead[name]) if name in one.ahead else "" for name in (first, second)]
        setting = f"{one.lr:.2g}{' (edge)' if one.at_edge else ''}, {one.weight_decay:.1g}"
        accuracy = f"{100 * one.accuracy.value:.2f} ({low:.2f} to {high:.2f})"
        other = "" if one.second is None else f"{100 * one.second.value:+.2f}"
        cells = (one.method, setting, accuracy, *ahead, other, f"{one.seconds:.1f}")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def comparisons(runs: Sequence[Run]) -> list[str]:
    """In words: LPSGDM with CosineP against the paper's baselines, then those of :data:`CONTROLS` against them."""
    pairs = [(PUBLISHED, name) for name in BASELINES] + list(CONTROLS.items())
    lines = []
    for name, other in pairs:
        ours, theirs = finals(runs, name), finals(runs, other)
        if ours and theirs:
            difference = paired(ours, theirs)
            lines.append(f"{name} less {other}: {points(difference)} percentage points, {verdict(difference)}")
    return lines
