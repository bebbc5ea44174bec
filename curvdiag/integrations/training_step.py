"""The training loss of a LightningModule as an objective: its ``training_step`` on fixed batches."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from curvdiag.data import Batch
from curvdiag.errors import ArgumentError, LossError
from curvdiag.integrations.lightning_bases import PACKAGES
from curvdiag.loaders import first_batches
from curvdiag.objective import Objective
from curvdiag.sandbox import random_states

REMEDY = "give the callback an objective of its own: objective=lambda module, trainer: Objective(module.net, ...)"


def training_step_objective(module: Any, trainer: Any, *, batches: int, seed: int, shared: bool) -> Objective:
    """What ``module.training_step`` returns on the first batches of the training's loader, in eval mode.

    The batches go through the module's transfer hooks, as in training. While the step runs here, ``log`` and
    ``log_dict`` do nothing and the trainer's loggers are mute. The step gives a mean, so this serves curvature, and not
    what needs the losses of single samples.

    Args:
        module, trainer: As the hooks of a callback get them, once the training has begun.
        batches: How many.
        seed: With which a loader that shuffles is read.
        shared: Take the batches of the first process; then all must call this.

    Raises:
        ArgumentError: The module optimizes by hand, so that its step is no function of the batch; or the training has
            several loaders, or something that is no DataLoader.
        CurvdiagError: As :class:`~curvdiag.objective.Objective`; the step is not deterministic, say.
    """
    if not module.automatic_optimization:
        raise ArgumentError(
            f"the training_step of {type(module).__name__} optimizes by hand (automatic_optimization = False), and "
            f"cannot be run for its loss alone; {REMEDY}"
        )
    loader = trainer.train_dataloader
    if not isinstance(loader, DataLoader):
        raise ArgumentError(f"the batches of a {type(loader).__name__} cannot be read beside the training; {REMEDY}")
    with random_states():  # transfer hooks may augment
        torch.default_generator.manual_seed(seed)
        found = [_transferred(batch, module, trainer) for batch in first_batches(loader, batches, seed=seed)]
    if shared:
        found = trainer.strategy.broadcast(found, src=0)  # a schedule may measure by itself, and all must choose alike
    return Objective.from_loss(module, _loss(trainer), batches=found)


def _loss(trainer: Any) -> Callable[[Any, Batch], Tensor]:
    def training_loss(module: Any, batch: Batch) -> Tensor:
        with _mute(module, trainer):
            output = module.training_step(batch, 0) if _takes_index(module) else module.training_step(batch)
        loss = output.get("loss") if isinstance(output, dict) else output
        if not isinstance(loss, Tensor):
            raise LossError(f"training_step returned {type(loss).__name__} and no loss; {REMEDY}")
        return loss

    return training_loss


def _takes_index(module: Any) -> bool:
    parameters = inspect.signature(module.training_step).parameters.values()
    names = [one.name for one in parameters if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)]
    return len(names) > 1 or any(one.kind is one.VAR_POSITIONAL for one in parameters)


def _transferred(batch: Batch, module: Any, trainer: Any) -> Batch:
    batch = trainer.precision_plugin.convert_input(batch)
    batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


@contextmanager
def _mute(module: Any, trainer: Any) -> Iterator[None]:
    """The step leaves nothing in the trainer's results or loggers, and waits for no other process."""
    bases = [base.__module__ for base in type(trainer).__mro__]
    package = next(name for name in PACKAGES if any(base.startswith(name) for base in bases))
    silent = importlib.import_module(f"{package}.loggers.logger").DummyLogger
    loggers, own = trainer.loggers, {name: vars(module)[name] for name in REPLACED if name in vars(module)}
    try:
        vars(module).update(log=_nothing, log_dict=_nothing)
        if trainer.world_size > 1:
            vars(module)["all_gather"] = _refuse
            for metric in module.modules():
                if hasattr(metric, "_to_sync"):  # of torchmetrics; what the step sets, the measurement restores
                    metric._to_sync = False
        trainer.loggers = [silent() for _ in loggers]
        yield
    finally:
        trainer.loggers = loggers
        for name in REPLACED:
            vars(module).pop(name, None)
        vars(module).update(own)


REPLACED = ("log", "log_dict", "all_gather")


def _nothing(*_: Any, **__: Any) -> None:
    pass


def _refuse(*_: Any, **__: Any) -> None:
    raise LossError(f"training_step gathers from all processes, and only one of them measures; {REMEDY}")
