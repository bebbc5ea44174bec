"""What a run is said to be: the configuration that is recorded with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from curvdiag.monitor.cadence import Cadence
from curvdiag.monitor.settings import Settings
from curvdiag.objective import Objective


def describe(config: Mapping[str, Any], objective: Objective, settings: Settings, cadence: Cadence) -> dict[str, Any]:
    """The user's configuration, and the monitor's own under ``"curvdiag"``."""
    return {
        **config,
        "curvdiag": {
            "objective": repr(objective),
            "cadence": repr(cadence),
            "preset": settings.preset,
            "measure": list(settings.quantities),
            "steps": settings.steps,
            "probes": settings.probes,
            "tol": settings.tol,
            "seed": settings.seed,
            "hessian": {key: str(value) for key, value in settings.hessian.items()},
        },
    }
