"""Under which names loggers file what a monitor gives them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from curvdiag.monitor.measurement import Measurement

HEATMAP = "curv/hessian/heatmap"
"""The evolution of the whole model's eigenvalue density, as an image."""


def measured_numbers(measurement: Measurement) -> dict[str, float]:
    """The numbers of a measurement, with ``train/...`` as ``curv/train/...``; standard errors are in the run file.

    What a monitor notes of the training must not mix with what the training logs by itself, often under the same key.
    """
    return {
        f"curv/{key}" if key.startswith("train/") else key: float(value) for key, value in measurement.scalars.items()
    }


def density_key(operator: str, block: str) -> str:
    """``("hessian", "") -> "curv/hessian/density"``; of a layer, ``"curv/layer/<name>/density"``."""
    if not block:
        return f"curv/{operator}/density"
    return f"curv/layer/{block}/density" if operator == "hessian" else f"curv/layer/{block}/{operator}/density"
