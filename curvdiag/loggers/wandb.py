"""Weights & Biases."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from curvdiag.extras import require
from curvdiag.loggers.evolution import Evolution
from curvdiag.loggers.histogram import histogram
from curvdiag.loggers.keys import HEATMAP, density_key, measured_numbers

if TYPE_CHECKING:
    import wandb

    from curvdiag.monitor.measurement import Measurement
    from curvdiag.record import Run

STEP = "curv/step"
"""The metric that gives everything of curvdiag's its horizontal axis."""


class WandbLogger:
    """Writes numbers, densities as histograms, and at the end the heatmap as an image, into a run of W&B.

    Keys are those of the monitor, so that slashes make panels; what it notes of the training, ``train/...``, is filed
    under ``curv/train/...``. Each key is drawn over curvdiag's own ``curv/step``. W&B's step is left to the training:
    rows join the one that the training's next ``wandb.log`` completes, so no step that it gives comes too late. (Where
    curvdiag has two for one row it has to complete the first; so log at least as often as the monitor measures where
    you give W&B steps of your own.)

    Args:
        run: A run of W&B; by default the one that is open when the monitor begins, and where none is, one of its own,
            which ends with the monitor. A run that was given or open is left open.
        init: For a run of its own, as ``wandb.init`` takes them: ``project``, ``dir``, ``mode``; ``id`` and
            ``resume="allow"`` to continue one.

    Raises:
        MissingExtraError: wandb is not installed.

    Attributes:
        run: The run; None before it has begun.
    """

    def __init__(self, run: wandb.Run | None = None, **init: Any) -> None:
        self._wandb = require("wandb", extra="wandb")
        self._given = run
        self.run: Any = run
        self._init, self._owns_run = init, False
        self._defined: set[str] = set()
        self._row: tuple[int, int] | None = None  # our step and W&B's of the row that holds something of ours
        self._has_steps = True
        self._evolution = Evolution()

    def begin(self, name: str, config: Mapping[str, Any]) -> None:
        # Each time anew: the run of an earlier monitor may have ended.
        self.run, self._owns_run = self._wandb.run if self._given is None else self._given, False
        if self.run is None:
            self.run, self._owns_run = self._wandb.init(**{"name": name, **self._init}), True
        self._defined, self._row, self._has_steps = set(), None, True
        own = {"curvdiag": config["curvdiag"]} if "curvdiag" in config else {}
        self.run.config.setdefaults(dict(config))  # what the user's own run says of itself stays
        self.run.config.update(own, allow_val_change=True)
        self.run.define_metric(STEP, hidden=True)

    def log(self, measurement: Measurement) -> None:
        densities = {density_key(*key): histogram(density) for key, density in measurement.densities.items()}
        row: dict[str, Any] = dict(measured_numbers(measurement))
        for key, found in densities.items():
            row[key] = self._wandb.Histogram(np_histogram=(found.counts, found.edges))
        self._define(row)
        self._write(measurement.step, row)
        self._evolution.add(measurement)

    def numbers(self, step: int, scalars: Mapping[str, float]) -> None:
        self._define(scalars)
        self._write(step, scalars)

    def resume(self, step: int, run: Run | None) -> None:
        self._evolution.resume(step, run)

    def close(self) -> None:
        try:
            if self._evolution.last is not None:
                self._define([HEATMAP])
                self._write(self._evolution.last, {HEATMAP: self._wandb.Image(self._evolution.draw())})
        finally:
            if self._owns_run:
                self.run.finish()

    def _define(self, keys: Iterable[str]) -> None:
        """Each key by its full name: a pattern would reach keys of the user's own."""
        for key in keys:
            if key not in self._defined and "*" not in key:
                self.run.define_metric(key, step_metric=STEP)
                self._defined.add(key)

    def _write(self, step: int, values: Mapping[str, Any]) -> None:
        row, theirs = {STEP: step, **values}, self._their_step()
        if theirs is None:
            self.run.log(row)
            return
        if self._row is not None and self._row[0] != step and self._row[1] == theirs:
            self.run.log({}, commit=True)  # the row holds another step of ours, which this one would replace
            theirs = self._their_step() or 0
        self.run.log(row, commit=False)
        self._row = step, theirs

    def _their_step(self) -> int | None:
        """W&B's step of the row that is being filled; None where the mode of the run knows none."""
        if not self._has_steps:
            return None
        self.run.log({}, commit=False)  # raises at once where the run has ended; its step would take half a minute
        try:
            return int(self.run.step)
        except Exception:  # a shared or a disabled run
            self._has_steps = False
            return None

    def __repr__(self) -> str:
        return "WandbLogger()" if self.run is None else f"WandbLogger({self.run.id!r})"
