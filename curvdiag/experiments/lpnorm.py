"""l_p-norm optimizers and schedules of p beside the usual ones, equally tuned, on digits and on a part of CIFAR-10.

Xu and Yang (arXiv:2606.02078) report that LPSGDM with a cosine schedule of p is ahead of SGD with momentum, AdamW and
Lion on CIFAR. Here each method tries as many settings of learning rate and weight decay, at the same places of a range
of the same width, on validation images; the best one is then run with fresh seeds and tested on other images. Shown are
accuracies with 95 % intervals over seeds, differences paired by seed, accuracy and loss curves, and the measured
anisotropy of the Hessian beside p. CIFAR-10 needs CURVDIAG_DATA; without it only the digits are run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from curvdiag.experiments.lpnorm_journal import Journal
from curvdiag.experiments.lpnorm_methods import BASELINES, MEASURE, METHODS, P_MAX
from curvdiag.experiments.lpnorm_summary import Outcome, choose, comparisons, summarise, table
from curvdiag.experiments.lpnorm_tasks import CIFAR10, DIGITS, Task, has_cifar10
from curvdiag.experiments.lpnorm_training import Job, Run, train
from curvdiag.experiments.lpnorm_tuning import DECAY_DECADES, LR_DECADES
from curvdiag.experiments.saved import VERSIONS
from curvdiag.results import Result

MINUTES = 38.0
WORKERS = 2
JOURNAL = ".lpnorm.journal"
"""Finished runs, in the folder that the figure goes to, until all are there."""
QUICK: dict[str, Any] = {
    "train_size": 64,
    "epochs": 2,
    "points": 2,
    "tuning_seeds": 1,
    "seeds": 3,
    "second_seeds": 1,
    "measure_every": 2,
    "test_every": 1,
    "probe": 16,
    "lanczos": 5,
}
"""What ``quick`` changes of a task."""

Progress = Callable[[str], object]


@dataclass(frozen=True)
class Comparison(Result):
    """The experiment.

    Attributes:
        outcomes: By task.
        seconds: Of one processor, for all runs together.
    """

    outcomes: dict[str, Outcome]
    seconds: float


def run(
    *,
    seed: int = 0,
    quick: bool = False,
    tasks: Sequence[Task] | None = None,
    workers: int = WORKERS,
    journal: Path | None = None,
    progress: Progress = lambda text: None,
) -> Comparison:
    """Tune every method, and run each at its best.

    Args:
        seed: Of everything. Seeds of final runs and of tuning runs differ from one another.
        quick: A few steps on a few digits.
        tasks: What to learn; digits, and CIFAR-10 where it is there, if not given.
        workers: Processes, each on one thread. The result does not depend on them.
        journal: A file that keeps finished runs; what it holds already, from the same options, is not run again.
        progress: Called with lines of text.
    """
    if tasks is None:
        tasks = [DIGITS, CIFAR10] if has_cifar10() and not quick else [DIGITS]
    if quick:
        tasks, workers = [replace(task, **QUICK) for task in tasks], 1
    kept = Journal(journal, {**options(tasks), "seed": seed, "versions": {name: version(name) for name in VERSIONS}})
    if kept.runs:
        progress(f"{len(kept.runs)} runs are there already")
    outcomes = {task.name: _compare(task, seed, workers, kept, progress) for task in tasks}
    return Comparison(outcomes, sum(one.total_seconds for outcome in outcomes.values() for one in outcome.runs))


def reproduce(out: Path, *, seed: int = 0, quick: bool = False, progress: Progress = print) -> list[Path]:
    """Write ``lpnorm.png`` and ``lpnorm.json`` into ``out``; an interrupted run is taken up again where it was.

    The seconds in the file are what all runs took of a processor, over :data:`WORKERS`.
    """
    from curvdiag.experiments.lpnorm_figure import draw
    from curvdiag.experiments.saved import make_folder, save

    make_folder(out)
    found = run(seed=seed, quick=quick, journal=None if quick else out / JOURNAL, progress=progress)
    outcomes = found.outcomes
    for outcome in outcomes.values():
        for line in (f"{outcome.task.title}:", *table(outcome.summaries), *outcome.comparisons):
            progress(line)
    asked = options([outcome.task for outcome in outcomes.values()])
    results = {name: {**one.to_dict(), "task": one.task.title} for name, one in outcomes.items()}
    written = save(
        "lpnorm", out, draw(outcomes), results, options=asked, seed=seed, seconds=found.seconds / WORKERS, digits=5
    )
    if not quick:
        (out / JOURNAL).unlink(missing_ok=True)
    return written


def options(tasks: Sequence[Task]) -> dict[str, Any]:
    """What is done, in plain numbers and words."""
    sizes = {task.name: task.sizes for task in tasks}
    searches = {name: vars(method.search) for name, method in METHODS.items()}
    widths = {"lr_decades": LR_DECADES, "decay_decades": DECAY_DECADES}
    return {"p_max": P_MAX, "measure": MEASURE, "tasks": sizes, "search_about": searches, **widths}


def _compare(task: Task, seed: int, workers: int, kept: Journal, progress: Progress) -> Outcome:
    """Tune all, choose, run all at their best."""
    tuning = [
        Job(task, name, setting.lr, setting.weight_decay, tuning_seed, final=False)
        for name, method in METHODS.items()
        for setting in method.search.settings(task.points, seed)
        for tuning_seed in range(1000 * seed + 500, 1000 * seed + 500 + task.tuning_seeds)
    ]
    runs = _run_all(tuning, workers, kept, f"{task.name}, tuning", progress)
    final = [
        # Curvature is watched in the runs of the methods that have a p, and of one that has not, for comparison.
        Job(task, name, setting.lr, setting.weight_decay, final_seed, final=True, watch=watched)
        for name, method in METHODS.items()
        for setting, seeds, watched in zip(
            choose(runs, name),
            (task.seeds, task.second_seeds),
            (method.p is not None or name == BASELINES[0], False),
            strict=False,
        )
        for final_seed in range(1000 * seed, 1000 * seed + seeds)
    ]
    runs += _run_all(final, workers, kept, f"{task.name}, final", progress)
    return Outcome(task, summarise(runs), comparisons(runs), runs)


def _run_all(jobs: Sequence[Job], workers: int, kept: Journal, what: str, progress: Progress) -> list[Run]:
    """All runs in the order of the jobs; those in the journal are taken from there."""
    left = [job for job in jobs if job.key not in kept.runs]
    started = time.perf_counter()
    for done, run in enumerate(_finished(left, workers), 1):
        kept.add(run)
        if done % max(1, len(left) // 10) == 0 or done == len(left):
            progress(f"{what}: {done} of {len(left)} runs, {time.perf_counter() - started:.0f} s")
    return [kept.runs[job.key] for job in jobs]


def _finished(jobs: Sequence[Job], workers: int) -> Iterator[Run]:
    if workers == 1:
        yield from map(train, jobs)
        return
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        waiting = [pool.submit(train, job) for job in jobs]
        try:
            for one in as_completed(waiting):
                yield one.result()
        except BaseException:  # an interruption, too, does not wait for hundreds of runs
            pool.shutdown(wait=False, cancel_futures=True)
            raise
