"""What a run is said to be: the configuration that is recorded with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.optim import SGD, Optimizer

from curvdiag.monitor.cadence import Cadence
from curvdiag.monitor.scaling import steps_as
from curvdiag.monitor.settings import Settings
from curvdiag.objective import Objective


def describe(
    config: Mapping[str, Any],
    objective: Objective,
    settings: Settings,
    cadence: Cadence,
    optimizer: Optimizer | None = None,
) -> dict[str, Any]:
    """The user's configuration, and the monitor's own under ``"curvdiag"``, with the optimizer."""
    own = {**describe_settings(objective, settings), "cadence": repr(cadence)}
    return {**config, "curvdiag": own if optimizer is None else {**own, "optimizer": rule(optimizer)}}


def describe_settings(objective: Objective, settings: Settings) -> dict[str, Any]:
    """What is measured, and how."""
    return {
        "objective": repr(objective),
        "preset": settings.preset,
        "measure": list(settings.quantities),
        "steps": settings.steps,
        "probes": settings.probes,
        "tol": settings.tol,
        "seed": settings.seed,
        "hessian": {key: str(value) for key, value in settings.hessian.items()},
    }


def rule(optimizer: Optimizer) -> str:
    """The optimizer's class; of SGD also the kind of its momentum, on which the edge of stability depends."""
    name = type(optimizer).__name__
    if not steps_as(optimizer, SGD):
        return name
    kinds = {
        "Nesterov" if group.get("nesterov") else "dampened momentum" if group.get("dampening") else "heavy ball"
        for group in optimizer.param_groups
        if group.get("momentum")
    }
    return f"{name}, {' and '.join(sorted(kinds))}" if kinds else name
