"""Run files for tests of the report: one with everything that a run can hold, with names that are no markup."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from curvdiag.estimate import Estimate
from curvdiag.record import Run, RunStore
from curvdiag.spectrum.density import SpectralDensity

HOSTILE = "<script>alert(1)</script>"
ENDING = "</script><img src=x onerror=alert(2)> & <b>bold</b>"
HELD = f"the measurement failed: <i>{ENDING}</i>; the last measurement, of 20 steps ago, is held"
LAYERS = ("0.conv", "1.norm", "2.conv", "10.head", ENDING)


def density(step: int, *, size: int = 20_000, probes: int = 4, points: int = 40, seed: int = 0) -> SpectralDensity:
    """A bulk about zero, a few outliers that rise with the step."""
    rng = np.random.default_rng([seed, step])
    bulk = rng.laplace(0, 0.4, (probes, points - 6))
    outliers = np.array([1.0, 2.0, 4.0, 8.0, 16.0, -1.5]) * (1 + 2 * (1 - math.exp(-step / 150)))
    nodes = np.concatenate([bulk, outliers + 0.02 * rng.standard_normal((probes, 6))], axis=1)
    weights = np.concatenate([np.full((probes, points - 6), 1.0), np.full((probes, 6), 6 / size)], axis=1)
    return SpectralDensity(nodes, weights / weights.sum(1, keepdims=True), size, steps=points, matvecs=probes * points)


def scalars(step: int, layers: tuple[str, ...] = LAYERS) -> dict[str, Estimate | float]:
    """Every key that a monitor and its schedules record, and one of a user's own."""
    t = step / 400
    rising, falling = 1 - math.exp(-3 * t), math.exp(-2 * t)
    found: dict[str, Estimate | float] = {
        "train/loss": 2.3 * falling + 0.02,
        "train/lr/0": 0.05 * (1 + math.cos(math.pi * min(t, 1))) / 2 + 1e-4,
        "train/momentum/0": 0.9,
        "train/p/0": 2 + 4 * falling,
        "curv/hessian/lambda_max": 16 + 32 * rising,
        "curv/hessian/lambda_max_residual": 0.01,
        "curv/hessian/lambda_min": -1.5 - rising,
        "curv/hessian/trace": Estimate(300 * falling + 40, 12 * falling + 1, 4),
        "curv/hessian/frobenius_norm": Estimate(30 + 20 * rising, 1.5, 4),
        "curv/preconditioned/lambda_max": 3000 * falling + 500,
        "curv/anisotropy/effective_rank": Estimate(120 * falling + 8, 5 * falling + 0.3, 4),
        "curv/anisotropy/stable_rank": Estimate(3 + falling, 0.2, 4),
        "curv/anisotropy/negative_mass": Estimate(0.2 * falling, 0.01, 4),
        "noise/scale": Estimate(40 * math.exp(2 * t), 5 * math.exp(2 * t), 8) if step else math.nan,
        "noise/trace": Estimate(12 * falling, 0.5, 200),
        "noise/cwgd": Estimate(900 + 300 * t, 40, 4),
        "align/gamma": Estimate(1.3 - 0.3 * rising, 0.05, 200),
        "align/cosine": Estimate(0.5 + 0.4 * rising, 0.03, 6),
        "align/cosine_baseline": Estimate(0.05, 0.01, 6),
        "schedule/anisotropy_p/a": 120 * falling + 8,
        "schedule/anisotropy_p/p/0": 2 + 4 * falling,
        "schedule/sharpness_capped/lambda_max": 16 + 32 * rising,
        "schedule/sharpness_capped/cap/0": 1.9 / (16 + 32 * rising),
        "schedule/sharpness_capped/lr/0": 0.02,
        "curv/cost/seconds": 1.2 + 0.1 * math.sin(step),
        "curv/cost/gradients": 400.0,
        "curv/overhead": 0.05,
        f"val/{HOSTILE}": 0.9 * rising,
    }
    for index, layer in enumerate(layers):
        found[f"curv/layer/{layer}/lambda_max"] = (16 + 32 * rising) / (1 + index)
        found[f"curv/layer/{layer}/trace"] = Estimate(60 * falling / (1 + index) + 4, 2.0, 4)
    return found


def record(run: Run, step: int, *, layers: tuple[str, ...] = LAYERS, only: tuple[str, ...] = ("",)) -> None:
    """One measurement, of the scalars whose names begin with one of ``only``."""
    blocks = {("hessian", layer): density(step, size=2000, seed=1 + i) for i, layer in enumerate(layers)}
    numbers = {name: value for name, value in scalars(step, layers).items() if name.startswith(only)}
    run.record(step, numbers, {("hessian", ""): density(step), **blocks}, epoch=step / 40)


def full(path: Path, *, name: str = HOSTILE, times: int = 21, only: tuple[str, ...] = ("",)) -> Path:
    """A run with every section, or with those of the numbers that begin with one of ``only``."""
    with RunStore(path) as store:
        config = {"optimizer": "SGD", "lr": 0.05, "nan": math.nan, "nested": {"a": [1, 2], ENDING: HOSTILE}}
        run = store.new_run(name, config)
        for step in range(0, 20 * times, 20):
            record(run, step, only=only)
        run.record(40, events=[("note", f"about {ENDING}"), ("error", "NonFiniteError: the loss is NaN")])
        run.record(60, events=[("schedule", f"AnisotropyP: {HELD}"), ("schedule", "SharpnessCappedLR: another")])
    return path


def small(path: Path, *names: str) -> Path:
    """Runs with the loss and lambda_max alone."""
    with RunStore(path) as store:
        for index, name in enumerate(names):
            run = store.new_run(name)
            for step in (0, 10, 20):
                run.record(step, {"train/loss": 1.0 + index, "curv/hessian/lambda_max": step + 1.0})
    return path


def trained_by(path: Path, *optimizers: str) -> Path:
    """Runs with the numbers of the edge of stability, of which a monitor has recorded the optimizer."""
    with RunStore(path) as store:
        for optimizer in optimizers:
            run = store.new_run(optimizer, {"curvdiag": {"optimizer": optimizer}} if optimizer else {"curvdiag": "no"})
            eigenvalues = {"curv/hessian/lambda_max": 30.0, "curv/preconditioned/lambda_max": 300.0}
            run.record(0, {"train/lr/0": 0.05, "train/momentum/0": 0.75, **eigenvalues})
    return path


def large(path: Path, *, times: int = 500, layers: int = 20) -> Path:
    """As long and as wide as the page must carry: 500 measurements of 20 layers."""
    names = tuple(f"blocks.{i // 2}.{('attention', 'mlp')[i % 2]}.weight" for i in range(layers))
    measures = ("effective_rank", "stable_rank", "participation_ratio", "negative_mass", "bulk_ratio")
    with RunStore(path) as store:
        run = store.new_run("large")
        blocks = {layer: [density(t, size=5000, points=20, seed=2 + i) for t in (0, 100, 400)] for i, layer in
                  enumerate(names)}  # fmt: skip
        whole = [density(t, points=80) for t in range(0, 1000, 50)]
        for index in range(times):
            found = scalars(index, names)
            found |= {
                f"curv/layer/{layer}/anisotropy/{measure}": Estimate(1 + 0.01 * index, 0.1, 4)
                for layer in names
                for measure in measures
            }
            densities = {("hessian", layer): blocks[layer][index % 3] for layer in names}
            run.record(index * 50, found, {("hessian", ""): whole[index % 20], **densities})
    return path
