"""What comes out of a run file: one quantity over a run, and what happened meanwhile."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from curvdiag.results import Result

if TYPE_CHECKING:
    from curvdiag.spectrum.density import SpectralDensity


@dataclass(frozen=True)
class Series(Result):
    """One scalar over a run, in the order of its steps.

    Attributes:
        name: Its key, e.g. ``"curv/hessian/lambda_max"``.
        steps: Optimizer steps ``[T]``, strictly increasing integers.
        epochs: Epochs ``[T]``; NaN where none was recorded.
        times: Unix times of the measurements ``[T]``, in seconds.
        values: The values ``[T]``.
        standard_errors: Their standard errors ``[T]``; NaN where unknown, 0 where the value is exact.
        samples: How many independent samples each value averages ``[T]``; 0 for exact values and for
            plain numbers recorded without an error.
    """

    name: str
    steps: np.ndarray
    epochs: np.ndarray
    times: np.ndarray
    values: np.ndarray
    standard_errors: np.ndarray
    samples: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))

    figure = "scalars"

    def __len__(self) -> int:
        return len(self.steps)

    def __str__(self) -> str:
        if not len(self):
            return f"{self.name}: no measurements"
        return (
            f"{self.name}: {len(self)} measurements, steps {self.steps[0]} to {self.steps[-1]}, "
            f"last {self.values[-1]:.6g}"
        )


@dataclass(frozen=True)
class DensitySeries(Result):
    """The spectral densities of one operator, or of one block of it, over a run.

    Attributes:
        operator: E.g. ``"hessian"``.
        block: Name of the block; ``""`` is the whole model.
        steps, epochs, times: As in :class:`Series`, each ``[T]``.
        densities: The ``T`` densities, exactly as they were measured.
    """

    operator: str
    block: str
    steps: np.ndarray
    epochs: np.ndarray
    times: np.ndarray
    densities: tuple[SpectralDensity, ...]

    figure = "heatmap"

    def __len__(self) -> int:
        return len(self.densities)

    def __str__(self) -> str:
        of = f"{self.operator}, block {self.block}" if self.block else self.operator
        span = f", steps {self.steps[0]} to {self.steps[-1]}" if len(self) else ""
        return f"{len(self)} spectral densities of {of}{span}"


@dataclass(frozen=True)
class Event:
    """Something that happened in a run: a failed measurement, a resumption.

    Attributes:
        kind: One word, e.g. ``"error"``.
        message: What happened.
        step: The optimizer step.
        time: Unix time in seconds.
    """

    kind: str
    message: str
    step: int
    time: float


@dataclass(frozen=True)
class RunInfo:
    """One run of a file, in short.

    Attributes:
        id: Number of the run in its file, from 1.
        name: Its name; not necessarily unique.
        created: Unix time in seconds.
        config: The configuration given when the run was made.
        versions: Versions of python, torch, numpy and curvdiag that made it.
        measurements: How many measurements it holds.
        last_step: Step of the last one, ``None`` before the first.
    """

    id: int
    name: str
    created: float
    config: dict[str, Any]
    versions: dict[str, str]
    measurements: int
    last_step: int | None
