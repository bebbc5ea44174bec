"""The heatmap of a run as it goes, drawn seldom enough to be cheap."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from curvdiag.record.series import DensitySeries

if TYPE_CHECKING:
    from curvdiag.monitor.measurement import Measurement
    from curvdiag.record import Run
    from curvdiag.spectrum.density import SpectralDensity

KEY = ("hessian", "")  # of the whole model


class Evolution:
    """The whole model's densities so far, and a picture of them.

    Attributes:
        stale: Whether there is something new that no picture shows.
    """

    def __init__(self) -> None:
        self._densities: dict[int, tuple[float, SpectralDensity]] = {}
        self._drawn = 1  # as many densities as the last picture shows
        self.stale = False

    def add(self, measurement: Measurement) -> None:
        """Keep the measurement's density, if it has one, in place of those of its step and of later ones."""
        density = measurement.densities.get(KEY)
        if density is not None:
            self.leave(measurement.step - 1)
            epoch = math.nan if measurement.epoch is None else measurement.epoch
            self._densities[measurement.step] = epoch, density
            self.stale = True

    def resume(self, step: int, run: Run | None) -> None:
        """Go on from ``step``, with what the run measured up to it."""
        if run is not None and KEY[1] in run.blocks(KEY[0]):
            past = run.densities(*KEY)
            found = zip(past.steps.tolist(), past.epochs.tolist(), past.densities, strict=True)
            self._densities = {at: (epoch, density) for at, epoch, density in found}
        self.leave(step)

    def leave(self, step: int) -> None:
        """Forget what lies beyond ``step``."""
        self._densities = {at: kept for at, kept in self._densities.items() if at <= step}
        self._drawn = max(1, min(self._drawn, len(self._densities)))

    @property
    def last(self) -> int | None:
        """Step of the last density; None before the first."""
        return max(self._densities, default=None)

    @property
    def due(self) -> bool:
        """Whether there are twice as many densities as in the last picture: all pictures cost little more than two."""
        return len(self._densities) >= 2 * self._drawn

    def draw(self) -> np.ndarray:
        """The heatmap in red, green and blue, uint8 ``[height, width, 3]``; pyplot never hears of it."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        from curvdiag.plotting import heatmap

        steps = np.array(list(self._densities), dtype=np.int64)
        epochs = np.array([epoch for epoch, _ in self._densities.values()])
        densities = tuple(density for _, density in self._densities.values())
        figure = Figure(figsize=(7.0, 4.2), dpi=120, layout="constrained")
        canvas = FigureCanvasAgg(figure)
        heatmap(DensitySeries(*KEY, steps, epochs, np.full(len(steps), np.nan), densities), ax=figure.subplots())
        canvas.draw()
        self._drawn, self.stale = len(steps), False
        return np.asarray(canvas.buffer_rgba())[..., :3].copy()
