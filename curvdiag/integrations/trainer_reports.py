"""Loggers to where the Transformers Trainer reports: a callback cannot reach the ones that the Trainer made."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from curvdiag import loggers


def reporters(args: Any) -> list[Any]:
    """Loggers to where ``report_to`` sends the Trainer's own numbers."""
    wanted = args.report_to if isinstance(args.report_to, list | tuple) else [args.report_to]
    found: list[Any] = []
    if "tensorboard" in wanted:
        found.append(loggers.TensorBoardLogger(_tensorboard_folder(args)))
    if "wandb" in wanted:
        found.append(loggers.WandbLogger())
    if "mlflow" in wanted:
        found.append(loggers.MLflowLogger())
    return found


def _tensorboard_folder(args: Any) -> Path:
    """Beside the Trainer's own events, which TensorBoard would not read on in a folder that has two files of them."""
    named = os.environ.get("TENSORBOARD_LOGGING_DIR")
    if named:
        return Path(named).expanduser() / "curvature"
    runs = [one for one in Path(args.output_dir, "runs").glob("*") if one.is_dir()]
    newest = max(runs, key=lambda one: one.stat().st_mtime_ns, default=Path(args.output_dir, "runs"))
    return newest / "curvature"
