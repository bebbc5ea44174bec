"""One run of the ``lpnorm`` experiment: a method with a setting and a seed, on a task."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from curvdiag.errors import CurvdiagError
from curvdiag.experiments.lpnorm_methods import MEASURE, METHODS, Scene
from curvdiag.experiments.lpnorm_tasks import Task
from curvdiag.objective import Objective
from curvdiag.operators import Hessian
from curvdiag.results import Result
from curvdiag.spectrum import Anisotropy, anisotropy, spectral_density

Key: TypeAlias = tuple[str, str, float, float, int, bool]

WARM_UP = 1
"""Epochs of linear warm-up; the paper's number is not known."""
PROBES = 2
"""Lanczos runs of a measurement."""


@dataclass(frozen=True)
class Job:
    """What to run.

    Attributes:
        task: What is learnt.
        method: Name of an entry of :data:`~curvdiag.experiments.lpnorm_methods.METHODS`.
        lr, weight_decay: The setting.
        seed: Of the weights, the split and the order of the images.
        final: Test now and then, and at the end; otherwise validate at the end.
        watch: Measure the anisotropy, though the method may not need it.
    """

    task: Task
    method: str
    lr: float
    weight_decay: float
    seed: int
    final: bool
    watch: bool = False

    @property
    def key(self) -> Key:
        """What tells runs apart."""
        return (self.task.name, self.method, self.lr, self.weight_decay, self.seed, self.final)


@dataclass(frozen=True)
class Run(Result):
    """What came of it.

    Attributes:
        task, method, lr, weight_decay, seed, final: As in :class:`Job`, the task by its name.
        accuracy, loss: At the end: of the test where ``final``, of the validation otherwise.
        seconds: Of a processor for the training with all that its schedules measure.
        total_seconds: The same with tests and with what was only watched.
        curves: Of a final run only.
    """

    task: str
    method: str
    lr: float
    weight_decay: float
    seed: int
    final: bool
    accuracy: float
    loss: float
    seconds: float
    total_seconds: float
    curves: Curves | None = None

    @property
    def key(self) -> Key:
        return (self.task, self.method, self.lr, self.weight_decay, self.seed, self.final)

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> Run:
        """What :meth:`to_dict` gave."""
        return cls(**{**saved, "curves": None if saved["curves"] is None else Curves(**saved["curves"])})


@dataclass(frozen=True)
class Curves(Result):
    """How a run went.

    Attributes:
        train_loss: Mean over each epoch's batches, as they were met.
        tested_at, accuracy, loss: Epochs of the tests, and what they gave.
        p: In the last step of each epoch; empty for methods without.
        rate: Learning rate over that of warm-up and cosine, in the last step of each epoch.
        measured_at, anisotropy: Epochs of the measurements, and what they gave; empty where nobody measured.
    """

    train_loss: list[float] = field(default_factory=list)
    tested_at: list[int] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    p: list[float] = field(default_factory=list)
    rate: list[float] = field(default_factory=list)
    measured_at: list[float] = field(default_factory=list)
    anisotropy: list[float] = field(default_factory=list)


def train(job: Job) -> Run:
    """Train on one thread; the global random state is neither read nor changed."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the same sums everywhere, and nets this small gain nothing from more
    try:
        with torch.random.fork_rng(devices=[]), _without_warnings():
            torch.manual_seed(job.seed)
            return _train(job)
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Schedules that hold their last measurement say so each time; at rates far too high that is no news."""
    logger = logging.getLogger("curvdiag.schedules")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def warm_up_cosine(steps: int, warm_up: int) -> Callable[[int], float]:
    """The factor of the learning rate in each step, from 0: up in a line to 1, then down half a cosine towards 0."""

    def factor(step: int) -> float:
        if step < warm_up:
            return (step + 1) / warm_up
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warm_up) / max(1, steps - warm_up))))

    return factor


def evaluate(model: nn.Module, images: Tensor, classes: Tensor) -> tuple[float, float]:
    """Accuracy and mean cross-entropy in evaluation mode; the model is left in train mode."""
    model.eval()
    with torch.no_grad():
        outputs = torch.cat([model(part) for part in images.split(1000)])
    model.train()
    accuracy = float((outputs.argmax(1) == classes).double().mean())
    return accuracy, float(nn.functional.cross_entropy(outputs, classes))


def _train(job: Job) -> Run:
    task, samples = job.task, job.task.samples()
    started = time.process_time()
    rows, validation = samples.split(task.train_size, job.seed)
    trainer = _Trainer(job, samples.images[rows], samples.classes[rows])
    curves, failed = trainer.curves, False
    while trainer.epochs_done < task.epochs and not failed:
        trainer.epoch()
        failed = not math.isfinite(curves.train_loss[-1])
        if job.final and (trainer.epochs_done % task.test_every == 0 or failed):
            accuracy, loss = evaluate(trainer.model, samples.test_images, samples.test_classes)
            curves.tested_at.append(trainer.epochs_done)
            curves.accuracy.append(accuracy)
            curves.loss.append(loss)
    if not job.final:
        accuracy, loss = evaluate(trainer.model, samples.images[validation], samples.classes[validation])
    return Run(
        task.name, job.method, job.lr, job.weight_decay, job.seed, job.final,
        accuracy, loss, trainer.seconds, time.process_time() - started, curves if job.final else None,
    )  # fmt: skip


class _Trainer:
    """A net on its way through the epochs, with its optimizer and schedules.

    Attributes:
        curves: What has been seen so far.
        epochs_done, seconds: How far it has come, and how long that took.
    """

    def __init__(self, job: Job, images: Tensor, classes: Tensor) -> None:
        started = time.process_time()
        self.job, self.task, self.method = job, job.task, METHODS[job.method]
        self.images, self.classes = images, classes
        self.model, self.criterion = job.task.net(), nn.CrossEntropyLoss()
        self.order = torch.Generator().manual_seed(job.seed)
        self.curves, self.epochs_done = Curves(), 0

        per_epoch = self.task.steps_per_epoch
        steps = self.task.epochs * per_epoch
        self.plain = warm_up_cosine(steps, WARM_UP * per_epoch)
        self.optimizer = self.method.build(self.model.parameters(), job.lr, job.weight_decay, steps)
        # Curvature with the statistics of the batch, which is what the optimizer meets.
        probe = (images[: self.task.probe], classes[: self.task.probe])
        objective = Objective(self.model, self.criterion, probe, mode="train")
        self.gauge = Gauge(objective, self.task.lanczos)
        scene = Scene(self.task.epochs, per_epoch, self.task.measure_every * per_epoch, objective, self.gauge)
        self.rates: Any = LambdaLR(self.optimizer, self.plain)
        if self.method.rate is not None:
            self.rates = self.method.rate(self.rates, scene)
        self.p = None if self.method.p is None else self.method.p(self.optimizer, scene)
        self.seconds = time.process_time() - started
        self._watch()

    def epoch(self) -> None:
        """Every image once, in a new order."""
        started, total = time.process_time(), 0.0
        group = self.optimizer.param_groups[0]
        batches = torch.randperm(len(self.classes), generator=self.order).split(self.task.batch_size)
        for step, rows in enumerate(batches, self.epochs_done * len(batches)):
            self.optimizer.zero_grad()
            loss = self.criterion(self.model(self.images[rows]), self.classes[rows])
            loss.backward()
            self.optimizer.step()
            total += float(loss.detach()) * len(rows)
            used = float(group.get("p", math.nan)), float(group["lr"]) / (self.job.lr * self.plain(step))
            self.rates.step()
            if self.p is not None and self.method.p_per_step:
                self.p.step()
        if self.p is not None and not self.method.p_per_step:
            self.p.step()
        self.epochs_done += 1
        self.seconds += time.process_time() - started
        self.curves.train_loss.append(total / len(self.classes))
        if not math.isnan(used[0]):
            self.curves.p.append(used[0])
        self.curves.rate.append(used[1])
        self._watch()

    def _watch(self) -> None:
        """Measure where the schedules do not, outside of the time of training; and note what was seen."""
        if self.job.watch and not self.method.measured and self.epochs_done % self.task.measure_every == 0:
            with suppress(CurvdiagError):  # of a run that has blown up
                self.gauge()
        for index in range(len(self.curves.anisotropy), len(self.gauge.seen)):
            self.curves.measured_at.append(float(index * self.task.measure_every))
            self.curves.anisotropy.append(self.gauge.seen[index])


class Gauge:
    """Measures the anisotropy of the objective's Hessian at the present weights.

    Attributes:
        seen: What :data:`MEASURE` was each time, NaN where it failed.
    """

    def __init__(self, objective: Objective, steps: int) -> None:
        self.objective, self.steps = objective, steps
        self.seen: list[float] = []

    def __call__(self) -> Anisotropy:
        self.seen.append(math.nan)
        density = spectral_density(Hessian(self.objective), steps=self.steps, probes=PROBES, seed=0)
        found = anisotropy(density)
        self.seen[-1] = float(getattr(found, MEASURE))
        return found
