"""TensorBoard."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from curvdiag.errors import ArgumentError
from curvdiag.extras import require
from curvdiag.loggers.evolution import Evolution
from curvdiag.loggers.histogram import histogram
from curvdiag.loggers.keys import HEATMAP, density_key, measured_numbers

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from curvdiag.monitor.measurement import Measurement
    from curvdiag.record import Run


class TensorBoardLogger:
    """Writes scalars, densities as histograms, the heatmap as an image, and the configuration as text.

    Histograms count eigenvalues in bins that are equally wide on the axis of the plots. The heatmap is drawn anew when
    there are twice as many measurements as in the last one, and at the end. What the monitor notes of the training,
    ``train/...``, is filed under ``curv/train/...``.

    After a resume into the same folder TensorBoard shows nothing that was filed there beyond the checkpoint.

    Args:
        to: A folder, best one of its own, since TensorBoard follows one file of a folder at a time; or a
            ``SummaryWriter`` that is open, and is left open.

    Raises:
        MissingExtraError: TensorBoard is not installed.
        ArgumentError: ``to`` is neither.
    """

    def __init__(self, to: str | os.PathLike[str] | SummaryWriter) -> None:
        require("tensorboard", extra="tensorboard")
        is_folder = isinstance(to, str | os.PathLike)
        if not is_folder and not hasattr(to, "add_histogram_raw"):
            raise ArgumentError(f"TensorBoardLogger takes a folder or a SummaryWriter, not {to!r}")
        self._folder = os.fspath(to) if isinstance(to, str | os.PathLike) else None
        self._writer: Any = None if is_folder else to
        self._purge_step: int | None = None
        self._evolution = Evolution()

    @property
    def writer(self) -> SummaryWriter:
        """The one given, or one for the folder, opened when it is first asked for."""
        if self._writer is None:
            tensorboard = require("torch.utils.tensorboard", extra="tensorboard")
            self._writer = tensorboard.SummaryWriter(self._folder, purge_step=self._purge_step)
            self._purge_step = None
        return self._writer

    def begin(self, name: str, config: Mapping[str, Any]) -> None:
        text = json.dumps({"name": name, **config}, indent=2)
        self.writer.add_text("curvdiag/config", "\n".join(f"    {line}" for line in text.splitlines()))

    def log(self, measurement: Measurement) -> None:
        step = measurement.step
        self.numbers(step, measured_numbers(measurement))
        for key, density in measurement.densities.items():
            found = histogram(density)
            self.writer.add_histogram_raw(
                density_key(*key),
                min=found.low,
                max=found.high,
                num=density.size,
                sum=found.sum,
                sum_squares=found.sum_squares,
                bucket_limits=found.edges[1:].tolist(),
                bucket_counts=found.counts.tolist(),
                global_step=step,
            )
        self._evolution.add(measurement)
        if self._evolution.due:
            self._draw()
        self.writer.flush()

    def numbers(self, step: int, scalars: Mapping[str, float]) -> None:
        for key, value in scalars.items():
            self.writer.add_scalar(key, value, step)

    def resume(self, step: int, run: Run | None) -> None:
        self._evolution.resume(step, run)
        if self._folder is not None:
            self._close_writer()
            self._purge_step = step + 1

    def close(self) -> None:
        try:
            if self._evolution.stale:
                self._draw()
        finally:
            self._close_writer() if self._folder is not None else self.writer.flush()

    def _draw(self) -> None:
        self.writer.add_image(HEATMAP, self._evolution.draw(), self._evolution.last, dataformats="HWC")

    def _close_writer(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def __repr__(self) -> str:
        return f"TensorBoardLogger({self._writer if self._folder is None else self._folder!r})"
