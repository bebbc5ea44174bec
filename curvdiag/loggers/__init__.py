"""Where a run is seen while it lasts: TensorBoard, Weights & Biases, MLflow, or a function of your own.

::

    from curvdiag.loggers import TensorBoardLogger

    monitor = CurvatureMonitor(objective, "run.db", loggers=[TensorBoardLogger("runs/first"), print])

The run file stays the truth, and standard errors are only there. A logger that fails is warned about once and left
out, and training goes on; none of them changes a bit of it. Loggers of your own have the four methods of
:class:`Logger`.
"""

from curvdiag.loggers.mlflow import MLflowLogger
from curvdiag.loggers.tensorboard import TensorBoardLogger
from curvdiag.loggers.wandb import WandbLogger
from curvdiag.monitor.loggers import CallableLogger, Logger

__all__ = ["CallableLogger", "Logger", "MLflowLogger", "TensorBoardLogger", "WandbLogger"]
