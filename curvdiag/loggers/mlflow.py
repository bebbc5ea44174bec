"""MLflow."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from curvdiag.extras import require
from curvdiag.loggers.evolution import Evolution
from curvdiag.loggers.keys import HEATMAP, measured_numbers
from curvdiag.loggers.mlflow_names import Names, parameters

if TYPE_CHECKING:
    from curvdiag.monitor.measurement import Measurement
    from curvdiag.record import Run

METRICS, PARAMETERS = 1000, 100  # most that MLflow takes at once


class MLflowLogger:
    """Writes numbers as metrics, the configuration as parameters, and at the end the heatmap as an image artifact.

    Keys are those of the monitor, with an underscore for each character that MLflow refuses; what the monitor notes of
    the training, ``train/...``, is filed under ``curv/train/...``. Infinite values become the largest finite ones where
    they are stored; NaN stays. Parameters that the run has already keep their value.

    Args:
        run_id: A run to continue; by default the one that is active when the monitor begins, and where none is, one
            of its own, which ends with the monitor. A run that was given or active is left as it is.
        experiment: Name of the experiment for a run of its own, made where there is none; by default MLflow's present
            one.
        tracking_uri: Where MLflow keeps its runs, e.g. ``"sqlite:///mlflow.db"``; by default MLflow's present one. With
            it a run that is active elsewhere is not looked for.

    Raises:
        MissingExtraError: MLflow is not installed.

    Attributes:
        run_id: Of the run; None before it has begun.
    """

    def __init__(
        self, run_id: str | None = None, *, experiment: str | None = None, tracking_uri: str | None = None
    ) -> None:
        self._mlflow = require("mlflow", extra="mlflow")
        self._given, self._experiment, self._uri = run_id, experiment, tracking_uri
        self.run_id = run_id
        self._owns_run = False
        self._client: Any = None
        self._names = Names()
        self._evolution = Evolution()

    def begin(self, name: str, config: Mapping[str, Any]) -> None:
        self._client = self._mlflow.MlflowClient(self._uri)
        active = self._mlflow.active_run() if self._uri is None else None
        # Each time anew: the run of an earlier monitor may have ended.
        self.run_id, self._owns_run = self._given if active is None else self._given or active.info.run_id, False
        if self.run_id is None:  # made by the client, so that it does not become the active one of the training
            self.run_id = self._client.create_run(self._experiment_id(), run_name=name).info.run_id
            self._owns_run = True
        held = self._client.get_run(self.run_id).data.params
        new = [(key, value) for key, value in parameters(config).items() if key not in held]
        entity = self._mlflow.entities.Param
        for k in range(0, len(new), PARAMETERS):
            self._client.log_batch(self.run_id, params=[entity(*pair) for pair in new[k : k + PARAMETERS]])

    def log(self, measurement: Measurement) -> None:
        self.numbers(measurement.step, measured_numbers(measurement))
        self._evolution.add(measurement)

    def numbers(self, step: int, scalars: Mapping[str, float]) -> None:
        now, entity = int(1000 * time.time()), self._mlflow.entities.Metric
        metrics = [entity(self._names[key], value, now, step) for key, value in scalars.items()]
        for k in range(0, len(metrics), METRICS):
            self._client.log_batch(self.run_id, metrics=metrics[k : k + METRICS])

    def resume(self, step: int, run: Run | None) -> None:
        self._evolution.resume(step, run)

    def close(self) -> None:
        try:
            if self._evolution.last is not None:
                self._client.log_image(self.run_id, self._evolution.draw(), f"{HEATMAP}.png")
        finally:
            if self._owns_run:
                self._client.set_terminated(self.run_id)

    def _experiment_id(self) -> str:
        """Of the experiment by name, else what ``mlflow.set_experiment`` and its environment variables say."""
        name = self._experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME")
        if not name:
            return os.environ.get("MLFLOW_EXPERIMENT_ID") or "0"
        found = self._client.get_experiment_by_name(name)
        return self._client.create_experiment(name) if found is None else found.experiment_id

    def __repr__(self) -> str:
        return "MLflowLogger()" if self.run_id is None else f"MLflowLogger({self.run_id!r})"
