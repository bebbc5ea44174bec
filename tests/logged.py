"""A short training run with loggers, and readers of what they wrote."""

from __future__ import annotations

import atexit
import functools
import json
import os
import shutil
import struct
import tempfile
import time
import warnings
from dataclasses import dataclass, field

import torch
from nets import make
from torch.nn import functional as F

from curvdiag import CurvatureMonitor, CurvdiagWarning, Objective


class Training:
    """Steps of SGD on a tiny net, watched at each of them."""

    def __init__(self, store=None, *, loggers=(), **options):
        self.model, self.batch = make("mlp-tanh")
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05)
        options = {"measure": ["density", "layers"], "steps": 4, "probes": 2, "cadence": lambda step: True, **options}
        objective = Objective(self.model, F.cross_entropy, self.batch)
        self.monitor = CurvatureMonitor(objective, store, loggers=loggers, **options).attach(self.optimizer)

    def step(self, times=1):
        for _ in range(times):
            self.optimizer.zero_grad()
            loss = F.cross_entropy(self.model(self.batch[0]), self.batch[1])
            self.monitor.observe_loss(loss)
            loss.backward()
            self.optimizer.step()
        return self

    def close(self):
        self.monitor.close()
        return self

    @property
    def history(self):
        return self.monitor.history


@dataclass
class Spy:
    """A logger that notes its calls, and raises at those named in ``fails``."""

    fails: tuple = ()
    error: Exception = field(default_factory=lambda: RuntimeError("no space left"))
    calls: list = field(default_factory=list)

    def _call(self, name, *arguments):
        self.calls.append((name, *arguments))
        if name in self.fails:
            raise self.error

    def begin(self, name, config):
        self._call("begin", name, config)

    def log(self, measurement):
        self._call("log", measurement)

    def numbers(self, step, scalars):
        self._call("numbers", step, dict(scalars))

    def close(self):
        self._call("close")

    def names(self):
        return [name for name, *_ in self.calls]


def collected(function):
    """The messages of our warnings, but for that of the share of time."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        function()
    ours = [str(w.message) for w in seen if issubclass(w.category, CurvdiagWarning)]
    return [message for message in ours if not message.startswith("measuring every")]


@functools.cache
def mlflow_uri():
    """An SQLite store of MLflow's, for all tests of a process: making one takes seconds."""
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return f"sqlite:///{folder}/mlflow.db"


def offline(folder, **options):
    """Arguments of ``wandb.init``; its environment variables are read once in a process."""
    import wandb

    settings = wandb.Settings(silent=True, console="off", x_disable_stats=True, x_disable_meta=True)
    return {"mode": "offline", "dir": folder, "settings": settings, **options}


def renamed(scalars):
    """Numbers of a measurement under the names that TensorBoard, W&B and MLflow have."""
    return {f"curv/{key}" if key.startswith("train/") else key: float(value) for key, value in scalars.items()}


@dataclass
class WandbFile:
    """What an offline run of W&B holds: rows in order, step axes by metric, configuration, exit code."""

    rows: list
    axes: dict
    config: dict
    finished: bool


def read_wandb(folder):
    """What the one ``.wandb`` file below ``folder`` holds, once its writer, another process, is through."""
    (path,) = folder.rglob("*.wandb")
    until = time.monotonic() + 20
    while not (found := _parsed(path.read_bytes())).finished and time.monotonic() < until:
        time.sleep(0.02)
    return found


def _parsed(data):
    """Records of protobuf in blocks of LevelDB's log format."""
    from wandb.proto import wandb_internal_pb2

    position, found, parts = 7, WandbFile([], {}, {}, False), b""
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part of one
            record, parts = wandb_internal_pb2.Record.FromString(parts), b""
            _file(record, found)
    return found


def _file(record, found):
    kind = record.WhichOneof("record_type")
    if kind == "history":
        found.rows.append(_values(record.history.item))
    elif kind == "metric":
        found.axes[record.metric.name or record.metric.glob_name] = record.metric.step_metric
    elif kind in ("config", "run"):
        found.config.update(_values(record.config.update if kind == "config" else record.run.config.update))
    elif kind == "exit":
        found.finished = True


def _values(items):
    """Values by key; those with several keys as dictionaries."""
    found = {}
    for item in items:
        *outer, last = list(item.nested_key) or [item.key]
        place = found
        for key in outer:
            place = place.setdefault(key, {})
        place[last] = json.loads(item.value_json)
    return found
