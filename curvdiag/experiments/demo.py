"""The demo: a small convolutional net learns digits with the monitor attached, and its noise is held against H."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from curvdiag.errors import CurvdiagWarning
from curvdiag.experiments.digits import digits, small_conv_net
from curvdiag.monitor import CurvatureMonitor
from curvdiag.objective import Objective
from curvdiag.record import RunStore
from curvdiag.scaling import ScalingResult, scaling_test

EPOCHS, BATCH, PROBE = 20, 64, 128
BLOCK = "8.weight"  # the last layer, whose factors give H and C whole in a second
CURVES = {
    "curv/hessian/lambda_max": "largest eigenvalue",
    "curv/hessian/trace": "trace",
    "curv/anisotropy/stable_rank": "stable rank",
}


@dataclass(frozen=True)
class Demo:
    """What the demo left behind.

    Attributes:
        run_file: The run's file.
        pictures: What each picture shows, by path.
        accuracy: On the digits held out.
        seconds: Training and measuring; the test of C against H and the pictures come after.
        overhead: Share of it that went into measuring.
        scaling: Gradient noise against curvature in the last layer at the end, on all digits trained on.
    """

    run_file: Path
    pictures: dict[Path, str]
    accuracy: float
    seconds: float
    overhead: float
    scaling: ScalingResult


def run_demo(folder: Path, *, epochs: int = EPOCHS, seed: int = 0, progress: Callable[[int, int], None]) -> Demo:
    """Train, measure before the first step and after every epoch, hold C against H at the end, and draw.

    ``progress`` gets (epoch, epochs).
    """
    folder.mkdir(parents=True, exist_ok=True)
    run_file = folder / "run.db"
    run_file.unlink(missing_ok=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so small a net gains nothing from more, and loses much on a busy machine
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            started = time.perf_counter()
            trained, accuracy, overhead = _train(run_file, epochs, progress)
            seconds = time.perf_counter() - started
            scaling = scaling_test(trained, BLOCK, squares=False, duality=False, seed=seed)
    finally:
        torch.set_num_threads(threads)
    pictures = draw(run_file, folder) | draw_scaling(scaling, folder)
    return Demo(run_file, pictures, accuracy, seconds, overhead, scaling)


def _train(run_file: Path, epochs: int, progress: Callable[[int, int], None]) -> tuple[Objective, float, float]:
    """The trained net over all digits that it learned from, its accuracy on the others, and the monitor's share."""
    images, classes = digits()
    order = torch.randperm(len(images))
    train, test = order[300:], order[:300]
    loader = DataLoader(TensorDataset(images[train], classes[train]), BATCH, shuffle=True, drop_last=True)
    model, criterion = small_conv_net(), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(loader))

    objective = Objective(model, criterion, (images[train[:PROBE]], classes[train[:PROBE]]))
    monitor = CurvatureMonitor(
        objective,
        store=str(run_file),
        name="digits",
        every=len(loader),
        steps_per_epoch=len(loader),
        probes=4,
        config={"model": "small_conv_net", "epochs": epochs, "batch": BATCH, "optimizer": "SGD, cosine"},
    )
    with monitor, warnings.catch_warnings():
        # Measuring after each epoch takes most of the time of a net that learns in seconds; here that is the point.
        warnings.filterwarnings("ignore", "measuring every", CurvdiagWarning)
        monitor.attach(optimizer)
        monitor.measure()
        for epoch in range(epochs):
            progress(epoch, epochs)
            for inputs, targets in loader:
                optimizer.zero_grad()
                loss = criterion(model(inputs), targets)
                loss.backward()
                monitor.observe_loss(loss)
                optimizer.step()
                scheduler.step()
        progress(epochs, epochs)
        overhead = monitor.clock.measuring / monitor.clock.elapsed
    model.eval()
    with torch.no_grad():
        accuracy = float((model(images[test]).argmax(1) == classes[test]).float().mean())
    return Objective(model, criterion, (images[train], classes[train])), accuracy, overhead


def draw(run_file: Path, folder: Path) -> dict[Path, str]:
    """The demo's pictures, from the run file alone."""
    from matplotlib.figure import Figure

    from curvdiag import plotting

    pictures: dict[Path, str] = {}

    def save(figure: Figure, name: str, what: str) -> None:
        path = folder / name
        figure.savefig(path, dpi=150)
        pictures[path] = what

    with RunStore(run_file, readonly=True) as store:
        series = store.densities("hessian")
        figure = Figure(figsize=(7.0, 4.4), layout="constrained")
        plotting.heatmap(series, ax=figure.subplots())
        save(figure, "heatmap.png", "eigenvalue density of the Hessian over training")

        figure = Figure(figsize=(7.0, 6.4), layout="constrained")
        for ax, index, when in zip(figure.subplots(2), (0, -1), ("before training", "after training"), strict=True):
            plotting.density(series.densities[index], ax=ax)
            ax.set_title(when)
        save(figure, "density.png", "the density at the start and at the end")

        figure = Figure(figsize=(7.0, 7.2), layout="constrained")
        for ax, (name, label) in zip(figure.subplots(3, sharex=True), CURVES.items(), strict=True):
            plotting.scalars(store.scalars(name), ax=ax)
            ax.set_ylabel(label)
            ax.label_outer()
        save(figure, "scalars.png", "lambda_max, trace and anisotropy over steps")
    return pictures


def draw_scaling(result: ScalingResult, folder: Path) -> dict[Path, str]:
    """The picture of C against H."""
    from matplotlib.figure import Figure

    from curvdiag import plotting

    figure = Figure(figsize=(7.0, 5.2), layout="constrained")
    plotting.scaling(result, ax=figure.subplots(), title=f"the last layer after training: {result.verdict.word}")
    path = folder / "scaling.png"
    figure.savefig(path, dpi=150)
    return {path: "gradient noise C against curvature H in the last layer, direction by direction"}
