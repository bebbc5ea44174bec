"""A small training run that is watched by a monitor and leaves a checkpoint at each measured step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from curvdiag import CurvatureMonitor, Objective, RunStore
from curvdiag.checkpoints import Scan, load_checkpoint, scan
from curvdiag.checkpoints.read import Contents

STEPS = (2, 4, 6)
QUICK: dict[str, Any] = {"steps": 8, "probes": 2}
OF_THE_TRAINING = ("curv/overhead", "curv/cost/seconds", "curv/cost/gradients")
"""What a scan leaves out, and what only a clock knows."""

Save = Callable[[nn.Module, torch.optim.Optimizer, int], None]


def net(seed: int = 0) -> nn.Sequential:
    """With BatchNorm, whose statistics a checkpoint holds as buffers."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3))


def data() -> tuple[Tensor, Tensor]:
    inputs = torch.randn(40, 4, generator=torch.Generator().manual_seed(1))
    return inputs, inputs[:, :3].argmax(1)


def objective(seed: int = 9) -> Objective:
    """Of a net that was never trained: every weight that matters has to come from a checkpoint."""
    return Objective(net(seed), F.cross_entropy, data())


def train(run_file: Path, save: Save, **options: Any) -> None:
    """Train, measure after each second step, and save right there."""
    model, (inputs, targets) = net(), data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.5)
    watched = Objective(model, F.cross_entropy, (inputs, targets))
    chosen = {**QUICK, "warm": False, "cadence": lambda step: step in STEPS, **options}
    with CurvatureMonitor(watched, run_file, name="training", **chosen) as monitor:
        monitor.attach(optimizer)
        for step in range(1, STEPS[-1] + 1):
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
            if step in STEPS:
                save(model, optimizer, step)


def state_dicts(folder: Path, name: str = "step={}.pt") -> Save:
    folder.mkdir(exist_ok=True)
    return lambda model, optimizer, step: torch.save(model.state_dict(), folder / name.format(step))


def untrained(folder: Path) -> Path:
    """Checkpoints of a run that was not watched; what they hold does not matter."""
    save = state_dicts(folder)
    for step in STEPS:
        save(net(step), torch.optim.SGD([torch.zeros(1)]), step)
    return folder


def quick(where: Path, **options: Any) -> Scan:
    """A cheap scan of a folder into the run file beside it."""
    made = options.pop("objective", None) or objective()
    return scan(
        made, options.pop("paths", where), where.parent / "run.db", **{"measure": ["trace"], **QUICK, **options}
    )


def numbers(run_file: Path, run: Any = None) -> dict[str, dict[int, float]]:
    """All scalars of a run by name and step, but for those that a clock makes."""
    with RunStore(run_file, readonly=True) as store:
        names = [name for name in store.scalar_names(run) if name not in OF_THE_TRAINING]
        series = [store.scalars(name, run) for name in names]
        return {one.name: dict(zip(one.steps.tolist(), one.values.tolist(), strict=True)) for one in series}


def curvature(run_file: Path, run: Any = None) -> dict[str, dict[int, float]]:
    """The same without what the optimizer says."""
    return {name: values for name, values in numbers(run_file, run).items() if not name.startswith("train/")}


def assert_same_densities(one: Path, other: Path) -> None:
    """Bit for bit."""
    with RunStore(one, readonly=True) as a, RunStore(other, readonly=True) as b:
        first, second = a.densities(), b.densities()
    assert first.steps.tolist() == second.steps.tolist() == list(STEPS)
    for x, y in zip(first.densities, second.densities, strict=True):
        np.testing.assert_array_equal(x.nodes, y.nodes)
        np.testing.assert_array_equal(x.weights, y.weights)
        np.testing.assert_array_equal(x.deflated, y.deflated)


STATE = net(5).state_dict()


def taken(path: Path, part: str | None = None) -> Contents:
    """Load what is there into another net, and make sure that it is the saved one then."""
    model = net(6)
    contents = load_checkpoint(model, path, part)
    assert all(torch.equal(tensor, STATE[name]) for name, tensor in model.state_dict().items())
    return contents


def prefixed(before: str) -> dict[str, Any]:
    return {before + name: tensor for name, tensor in STATE.items()}
