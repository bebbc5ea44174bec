"""What the monitor takes of a training run, by its own clock and against the same run without it."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from measure import Timing
from report import Row
from settings import Settings
from torch import nn

from curvdiag import CurvatureMonitor, Objective, OverheadBudget
from curvdiag.experiments.digits import digits

BATCH, PROBE = 64, 128
MARGIN, MEASUREMENTS = 0.02, 10
"""How far above the share that was asked for, and how many measurements at least in a run."""


def monitor_rows(settings: Settings) -> list[Row]:
    """Its share of training runs on the digits, by its own clock and by the wall's, and how often it measured."""
    return [
        row
        for fraction in ((0.1, 0.05) if settings.long else (0.1,))
        for row in _rows(fraction, settings.seconds * (0.1 / fraction), settings)
    ]


@dataclass(frozen=True)
class Overhead:
    """Of one fraction asked for.

    Attributes:
        own: Share of each run by the monitor's clock.
        wall: ``1 - plain / monitored`` for each run, against the mean of the runs without it before and after.
        measurements: In each run.
        plain: Seconds of the runs without the monitor.
    """

    fraction: float
    own: tuple[float, ...]
    wall: tuple[float, ...]
    measurements: tuple[int, ...]
    plain: tuple[float, ...]

    @property
    def unrest(self) -> float:
        """How far runs without the monitor differ among themselves, in fractions of one."""
        return (max(self.plain) - min(self.plain)) / statistics.fmean(self.plain)


def measure(fraction: float, *, seconds: float, pairs: int, progress: Callable[[], None] = lambda: None) -> Overhead:
    """Train ``pairs`` times with the monitor and once more often without it, in turns, about ``seconds`` each."""
    train(200, fraction)  # warm up
    steps = max(1000, round(1000 * seconds / train(1000, None).seconds))

    plain = [train(steps, None).seconds]
    progress()
    own, wall, measurements = [], [], []
    for _ in range(pairs):
        with_it = train(steps, fraction)
        progress()
        plain.append(train(steps, None).seconds)
        progress()
        own.append(with_it.share)
        wall.append(1 - (plain[-2] + plain[-1]) / 2 / with_it.seconds)
        measurements.append(with_it.measurements)
    return Overhead(fraction, tuple(own), tuple(wall), tuple(measurements), tuple(plain))


def _rows(fraction: float, seconds: float, settings: Settings) -> list[Row]:
    pairs = settings.pairs
    settings.tell(f"monitor: {2 * pairs + 1} training runs of about {seconds:g} s, a share of {fraction:.0%} asked for")
    found = measure(fraction, seconds=seconds, pairs=pairs)
    section, net = "The monitor's share of a training run", "digits MLP"
    asked, target = f"OverheadBudget({fraction:g})", fraction + MARGIN
    note = f"{pairs} runs of {statistics.median(found.plain):.0f} s, preset standard with 20 steps and 3 probes"
    unrest = f"runs without the monitor differ by {found.unrest:.1%}"
    rows = []
    for what, shares, remark in (("own clock", found.own, note), ("wall clock", found.wall, unrest)):
        timing = Timing(shares)
        holds = timing.median <= target
        text = f"at most {target:.0%}"
        rows.append(
            Row(section, net, f"{asked}, {what}", timing.median, *timing.quartiles, text, holds, remark, "share")
        )
    fewest = min(found.measurements)
    quartiles = Timing(tuple(map(float, found.measurements))).quartiles
    least, enough = f"at least {MEASUREMENTS}", fewest >= MEASUREMENTS
    what, remark = f"{asked}, measurements", "in the run with the fewest"
    return [*rows, Row(section, net, what, fewest, *quartiles, least, enough, remark, "count")]


@dataclass(frozen=True)
class Run:
    """One training run: what it took, and what the monitor says of itself."""

    seconds: float
    share: float = 0.0
    measurements: int = 0


def train(steps: int, fraction: float | None) -> Run:
    """One run on the digits, all that the monitor needs included."""
    torch.manual_seed(0)
    images, classes = digits()
    inputs = images.flatten(1)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    order = torch.randint(len(inputs), (256, BATCH))
    monitor = None
    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        if fraction is not None:
            objective = Objective(model, criterion, (inputs[:PROBE], classes[:PROBE]))
            cadence, store = OverheadBudget(fraction), Path(folder) / "run.db"
            monitor = CurvatureMonitor(objective, store, cadence=cadence, steps=20, strict=True)
            monitor.attach(optimizer)
        for step in range(steps):
            batch = order[step % len(order)]
            optimizer.zero_grad()
            criterion(model(inputs[batch]), classes[batch]).backward()
            optimizer.step()
        taken = time.perf_counter() - begun
        if monitor is None:
            return Run(taken)
        run = Run(taken, monitor.clock.measuring / monitor.clock.elapsed, len(monitor.history))
        monitor.close()
    return run
