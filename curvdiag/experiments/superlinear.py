"""The published set-up in which gradient noise was compared with curvature: a small MLP on some classes of MNIST.

Zhang, Yang and Tu, "On the Superlinear Relationship between SGD Noise Covariance and Loss Landscape Curvature"
(arXiv:2602.05600). Vanilla SGD, learning rate 0.1, cosine over 500 epochs to a hundredth of it, gradient norms clipped
at 5; no momentum, weight decay or augmentation. Needs CURVDIAG_DATA.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curvdiag.errors import ArgumentError, DataError
from curvdiag.experiments.datasets import mnist
from curvdiag.objective import Objective
from curvdiag.scaling.measure import scaling_test
from curvdiag.scaling.result import ScalingResult

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MINUTES = 5.0
BLOCK = "2.weight"
"""The weight matrix that the paper looks at: the one from 50 hidden units to 50."""
COUNTS = (10, 20, 50, 100, 200, 300, 500, 1000)
"""Numbers of directions; the paper fits 300 for three classes."""
ORIENTATION = {
    "cross-entropy": {50: 1.05, 300: 1.18, 1000: 1.34},
    "softmax-mse": {50: 1.07, 300: 1.22, 1000: 1.34},
}
"""In-sample exponents of one earlier run each, by number of directions; the paper's own table is not known."""
SEEDS = 4
SIZES = (1500, 3000, 6000)
LR, LR_FLOOR, COSINE_EPOCHS, CLIP = 0.1, 0.001, 500, 5.0


def softmax_mse(logits: Tensor, targets: Tensor) -> Tensor:
    """Per-sample mean over the classes of ``(softmax - one-hot)^2``, ``[B]``: what the paper calls MSE."""
    return (logits.softmax(1) - F.one_hot(targets, logits.shape[1])).square().mean(1)


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross-entropy": F.cross_entropy,
    "softmax-mse": softmax_mse,
}


@dataclass(frozen=True)
class Trained:
    """A net at the end of its training, with what it learnt from."""

    model: nn.Module
    loss: str
    inputs: Tensor
    targets: Tensor
    accuracy: float

    def objective(self) -> Objective:
        """The training loss over all samples."""
        return Objective(self.model, LOSSES[self.loss], (self.inputs, self.targets))


def published_mlp(classes: int = 10, hidden: int = 50) -> nn.Sequential:
    """784-50-50-10, ReLU, no bias; with one output for each class that there is.

    The paper writes 10 outputs. For three classes, three outputs give the accuracy and the exponents of the earlier
    runs under both losses; ten do so under cross-entropy only, since the mean over ten classes makes the other loss
    smaller.
    """
    return nn.Sequential(
        *(nn.Linear(784, hidden, bias=False), nn.ReLU()),
        *(nn.Linear(hidden, hidden, bias=False), nn.ReLU()),
        nn.Linear(hidden, classes, bias=False),
    )


def some_digits(classes: int = 3, per_class: int = 2000) -> tuple[Tensor, Tensor]:
    """The first ``per_class`` training images of each of the first ``classes`` digits, ``[N, 784]`` in [0, 1].

    Raises:
        ArgumentError: There are not so many classes.
        DataError: MNIST is not there, or has too few images of a class.
    """
    if not 2 <= classes <= 10:
        raise ArgumentError(f"MNIST has 10 classes and a comparison needs 2, not {classes}")
    images, labels = mnist()
    rows = [(labels == c).nonzero().squeeze(1)[:per_class] for c in range(classes)]
    if any(len(r) < per_class for r in rows):
        raise DataError(f"MNIST has fewer than {per_class} images of some of the first {classes} digits")
    chosen = torch.cat(rows)
    return images[chosen].reshape(len(chosen), -1).float() / 255, labels[chosen]


def train(
    loss: str = "cross-entropy",
    *,
    classes: int = 3,
    per_class: int = 2000,
    epochs: int = 100,
    batch_size: int = 50,
    hidden: int = 50,
    seed: int = 0,
    progress: Callable[[int, int], object] | None = None,
) -> Trained:
    """Train the MLP as published.

    Args:
        loss: ``"cross-entropy"`` or ``"softmax-mse"``.
        progress: Called with (epochs done, epochs planned).
    """
    if loss not in LOSSES:
        raise ArgumentError(f"the loss is one of {', '.join(LOSSES)}, not {loss!r}")
    inputs, targets = some_digits(classes, per_class)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = published_mlp(classes, hidden)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, COSINE_EPOCHS, eta_min=LR_FLOOR)
    order = torch.Generator().manual_seed(seed)
    for epoch in range(epochs):
        for rows in torch.randperm(len(targets), generator=order).split(batch_size):
            optimizer.zero_grad()
            LOSSES[loss](model(inputs[rows]), targets[rows]).mean().backward()
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
        schedule.step()
        if progress is not None:
            progress(epoch + 1, epochs)
    with torch.no_grad():
        accuracy = float((model(inputs).argmax(1) == targets).float().mean())
    return Trained(model, loss, inputs, targets, accuracy)


def compare(
    loss: str,
    seeds: Sequence[int],
    *,
    counts: Sequence[int] = COUNTS,
    progress: Callable[[str], object] = lambda text: None,
    **training: Any,
) -> list[ScalingResult]:
    """Train once for each seed and test C against H in the 50 x 50 layer, without bootstrap intervals.

    The spread over seeds takes the place of intervals, which the few samples that still carry gradient at the end of a
    training do not give.

    Args:
        loss: As in :func:`train`, which also gets ``training``.
        counts: Numbers of directions to fit.
        progress: Called with a line of text for each seed.
    """
    results = []
    for seed in seeds:
        trained = train(loss, seed=seed, **training)
        progress(f"{loss}, seed {seed}: {trained.accuracy:.2%} of the training samples")
        results.append(
            scaling_test(
                trained.objective(), BLOCK, directions=max(counts), counts=counts, bootstrap=0, duality=False, seed=seed
            )
        )
    return results


def by_samples(
    loss: str, sizes: Sequence[int], *, counts: Sequence[int] = COUNTS, seed: int = 0, **training: Any
) -> dict[int, ScalingResult]:
    """One training, tested on random parts of its training samples: where the in-sample fit is biased, it moves."""
    trained = train(loss, seed=seed, **training)
    order = torch.randperm(len(trained.targets), generator=torch.Generator().manual_seed(seed))
    found = {}
    for size in sizes:
        rows = order[:size]
        part = Objective(trained.model, LOSSES[loss], (trained.inputs[rows], trained.targets[rows]))
        options = {"directions": max(counts), "counts": counts, "bootstrap": 0, "duality": False, "squares": False}
        found[size] = scaling_test(part, BLOCK, seed=seed, **options)  # type: ignore[arg-type]
    return found


def draw(by_loss: Mapping[str, Sequence[ScalingResult]]) -> Figure:
    """The exponent against the number of directions, one panel for each loss, beside earlier single runs."""
    from matplotlib.figure import Figure

    from curvdiag.plotting import exponents_of_runs

    figure = Figure(figsize=(5.2 * len(by_loss), 4.0), layout="constrained")
    axes = figure.subplots(1, len(by_loss), sharey=True, squeeze=False)
    for (loss, results), ax in zip(by_loss.items(), axes[0], strict=True):
        exponents_of_runs(results, ax, reference=ORIENTATION.get(loss), title=loss)
    figure.suptitle("Gradient noise against curvature: MNIST MLP, 50 x 50 layer, 3 classes, 100 epochs")
    return figure


def reproduce(
    out: Path, *, seed: int = 0, quick: bool = False, progress: Callable[[str], object] = print
) -> list[Path]:
    """Write ``superlinear.png`` and ``superlinear.json`` into ``out``: both losses, four seeds.

    Raises:
        DataError: ``CURVDIAG_DATA`` names no folder with MNIST.
    """
    from curvdiag.experiments.saved import make_folder, save

    make_folder(out)
    started = time.perf_counter()
    seeds, training = range(seed, seed + SEEDS), dict[str, Any]()
    sizes: Sequence[int] = SIZES
    counts: Sequence[int] = COUNTS
    if quick:
        seeds, sizes, counts = range(seed, seed + 1), (90, 180), (5, 10, 20)
        training = {"per_class": 60, "epochs": 2, "hidden": 10}
    found = {loss: compare(loss, seeds, counts=counts, progress=progress, **training) for loss in LOSSES}
    parts = by_samples("cross-entropy", sizes, counts=counts, seed=seed, **training)
    for loss, runs in found.items():
        for run, one in zip(seeds, runs, strict=True):
            progress(f"{loss}, seed {run}: {_words(one)}")
    for size, one in parts.items():
        progress(f"cross-entropy, {size} samples: {_words(one)}")
    results: dict[str, Any] = {loss: [summary(one) for one in runs] for loss, runs in found.items()}
    results["cross-entropy by number of samples"] = {size: summary(one) for size, one in parts.items()}
    options = {"seeds": list(seeds), "samples": sizes, "directions": counts, "training": training, "quick": quick}
    seconds = time.perf_counter() - started
    return save("superlinear", out, draw(found), results, options=options, seed=seed, seconds=seconds)


def summary(result: ScalingResult) -> dict[str, dict[str, float]]:
    """Exponents by number of directions, held out and in-sample."""
    sides = {"held out": result.held_out, "in-sample": result.in_sample}
    fits = {name: side.noise_fits["ols"] for name, side in sides.items()}
    return {
        name: {
            str(count): round(float(value), 3) for count, value in zip(fit.counts.tolist(), fit.exponent, strict=True)
        }
        for name, fit in fits.items()
    }


def _words(result: ScalingResult) -> str:
    return "; ".join(f"{side} {values}" for side, values in summary(result).items())
