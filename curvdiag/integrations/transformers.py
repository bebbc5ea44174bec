"""CurvatureCallback for Transformers: the curvature of a model, measured while its Trainer trains it."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from curvdiag.errors import ArgumentError, CurvdiagWarning
from curvdiag.extras import require
from curvdiag.integrations.common import (
    Groups,
    Schedules,
    Store,
    groups_of,
    made_by,
    made_on_all,
    refuse_shards,
    require_trained,
)
from curvdiag.integrations.trainer_reports import reporters
from curvdiag.integrations.trainer_session import TrainerSession, inner_optimizer, packed, unpacked
from curvdiag.monitor import CurvatureMonitor
from curvdiag.objective import Objective

MakeObjective: TypeAlias = Callable[[Any, Any], Objective]
"""``objective(model, args)``, called when the training begins, with the model on its device."""

callbacks: Any = require("transformers.trainer_callback", extra="transformers")


class CurvatureCallback(callbacks.TrainerCallback, callbacks.ExportableState):
    """Measures curvature while a Transformers Trainer trains.

    ::

        trainer = Trainer(..., callbacks=[CurvatureCallback(probe_batches, "run.db")])

    Training ends with the same bits as without it. It measures after the optimizer steps that the cadence chooses,
    whatever the gradient accumulation; steps are the Trainer's ``global_step``. Numbers go into the run file, with the
    keys of :class:`~curvdiag.monitor.CurvatureMonitor`, into ``trainer.state.log_history`` as entries of their own, and
    to TensorBoard (as a run ``curvature`` beside the Trainer's own), Weights & Biases and MLflow where ``report_to``
    names them. In the run file ``train/loss`` is the mean that the Trainer logs, of the ``logging_steps`` in which
    the measurement lies. Checkpoints hold its state in ``trainer_state.json``: ``resume_from_checkpoint`` continues the
    same run.

    Probe batches are measured with the model's own loss and the Trainer's ``label_smoothing_factor``, in eval mode and
    in the precision of the weights (without the autocast of ``bf16=True``): the mean over all predicted tokens, see
    :meth:`curvdiag.Objective.from_huggingface`. A Trainer with a loss of its own (``compute_loss_func``, or another
    ``compute_loss``), which no callback can see, needs an objective, as does a choice of parameters::

        CurvatureCallback(lambda model, args: Objective.from_huggingface(model, batches, params="*.mlp.*"))

    One process measures and writes; with DDP the others wait for it. With an objective of all of them, which a function
    makes with ``group="world"``, they measure together, each its share of the samples. The Trainer tells nobody of an
    error in the training: the run file, in which everything measured is safe, is closed with the next training, with
    the callback, at the end of the program, or by :meth:`close`.

    Args:
        objective: What is measured: batches as a collator yields them, or a small dataset of samples, which the
            Trainer's own collator puts together; an :class:`~curvdiag.Objective`; or ``objective(model, args)``, which
            makes it, called when the training begins, on every process.
        store: Path of the run file, an open RunStore, or None to keep measurements in memory only.
        schedules: ``schedules(optimizer, monitor)`` gives a schedule of curvdiag, of ``p`` or of the learning rate, or
            a list of them. They are stepped after each optimizer step and after the Trainer's own schedule. One of the
            learning rate takes the place of the Trainer's: give ``lr_scheduler_type="constant"``.
        log: Put numbers into the log history and send them to ``report_to``.
        monitor_arguments: Of :class:`~curvdiag.monitor.CurvatureMonitor`: ``every=100``, ``preset="light"``, ...

    Raises:
        MissingExtraError: Transformers is not installed; on import of this module.
        ArgumentError: ``objective`` is a model, or nothing that could be measured.

    Attributes:
        monitor: The monitor of the present or last training; None before the first, and where another process measures.
        schedules: What ``schedules=`` made, in that training.
    """

    def __init__(
        self,
        objective: Objective | MakeObjective | Any,
        store: Store = None,
        *,
        schedules: Schedules | None = None,
        log: bool = True,
        **monitor_arguments: Any,
    ) -> None:
        if isinstance(objective, nn.Module) or objective is None:
            raise ArgumentError(
                "objective= is probe batches, an Objective or a function (model, args) -> Objective, not "
                f"{'None' if objective is None else 'the model'}"
            )
        self._objective, self._store, self._schedules, self._log = objective, store, schedules, log
        self._arguments = monitor_arguments
        self._session: TrainerSession | None = None
        self._begun_with: Groups = []
        self._place = 0
        self._closing: Any = None
        _remake_as(self)

    @property
    def monitor(self) -> CurvatureMonitor | None:
        return None if self._session is None else self._session.monitor

    @property
    def schedules(self) -> list[Any]:
        return [] if self._session is None else list(self._session.schedules)

    def _given(self) -> dict[str, Any]:
        """What a copy of the callback gets: everything but the training."""
        return {**vars(self), "_session": None, "_closing": None, "_begun_with": [], "_place": 0}

    def close(self) -> None:
        """Measure no more, and close the run file if it was given as a path; the end of a training does it too."""
        if self._closing is not None:
            self._closing()

    # The training begins

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **others: Any
    ) -> None:
        self.close()
        self._session = None
        for name in ("fsdp", "deepspeed"):
            if getattr(args, name, None):
                refuse_shards(name)
        # Several callbacks of this kind share one place in the checkpoint.
        self._place = vars(state).get("_curvdiag_callbacks", 0)
        vars(state)["_curvdiag_callbacks"] = self._place + 1
        objective, share = self._made_here(model, args, state, others.get("train_dataloader"))
        if objective is None:
            return
        kept = self._kept(state) if state.global_step > 0 else None
        inner = inner_optimizer(optimizer)
        self._begun_with = groups_of(inner) if kept is None else kept["begun_with"]
        self._session = TrainerSession(
            objective,
            inner,
            self._store if state.is_world_process_zero else None,
            schedules=self._schedules,
            arguments=self._completed(args, model, state),
            begun_with=None if kept is None else self._begun_with,
            state=None if kept is None else kept["session"],
            steps_done=state.global_step,
            share=share,
            measures=state.is_world_process_zero,
        )
        self._closing = weakref.finalize(self, self._session.close)
        # The Trainer's saving wants an entry, and a checkpoint of a training without this callback has none.
        state.stateful_callbacks.setdefault(type(self).__name__, [])

    def _made_here(
        self, model: Any, args: Any, state: Any, loader: Any
    ) -> tuple[Objective | None, Callable[[Any], Any] | None]:
        """What this process measures, if anything, and how schedules on several processes get what one measured."""
        scheduled, first = self._schedules is not None, bool(state.is_world_process_zero)
        if args.world_size == 1:
            return self._made(model, args, loader), None
        share = _from_first if scheduled else None
        if not (isinstance(self._objective, Objective) or _makes_objective(self._objective)):
            return self._made(model, args, loader) if first or scheduled else None, share

        def make() -> Objective:
            return self._made(model, args, loader)

        made, together = made_on_all(make, first=first, needed=scheduled)
        return made if first or scheduled or together else None, share

    def _made(self, model: Any, args: Any, loader: Any) -> Objective:
        given = self._objective
        if isinstance(given, Objective):
            require_trained(given, model)
            return given
        if _makes_objective(given):
            return made_by(given, model, args)
        batches: Any = given
        if _holds_samples(given):
            collate = getattr(loader, "collate_fn", None)
            batches = DataLoader(batches, batch_size=args.per_device_eval_batch_size, collate_fn=collate)
        several = getattr(getattr(model, "config", None), "problem_type", "") == "multi_label_classification"
        smoothing = 0.0 if several else args.label_smoothing_factor  # the Trainer does not smooth several labels
        return Objective.from_huggingface(model, batches, label_smoothing=smoothing)

    def _completed(self, args: Any, model: Any, state: Any) -> dict[str, Any]:
        """The monitor's arguments, with what the Trainer knows."""
        arguments = dict(self._arguments)
        if "config" not in arguments:
            told = {name: getattr(args, name, None) for name in TOLD}
            arguments["config"] = {"trainer": {"model": type(model).__name__, **told}}
        if self._log and state.is_world_process_zero:
            given = list(arguments.get("loggers", ()))
            arguments["loggers"] = given + [one for one in reporters(args) if type(one) not in map(type, given)]
        return arguments

    # While it goes on

    def on_step_begin(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **_: Any) -> None:
        if self.monitor is not None:  # what is measured in this step belongs to its end
            self.monitor.steps_done = state.global_step  # which counts the steps that mixed precision skips
            self.monitor.epoch(_epoch_after_step(args, state, train_dataloader))

    def on_step_end(self, args: Any, state: Any, control: Any, lr_scheduler: Any = None, **_: Any) -> None:
        if self._session is None:
            return
        self._session.step_schedules(lr_scheduler)
        for step, numbers in self._session.news():
            if self._log and state.is_world_process_zero:
                state.log_history.append({**numbers, "epoch": state.epoch, "step": step})

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if self._session is not None and "loss" in (logs or {}):
            self._session.write_loss(float(logs["loss"]))

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.close()

    # Checkpoints

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._drop_older(state)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._drop_older(state)

    def _drop_older(self, state: Any) -> None:
        """To a list of states, of several callbacks of a kind, the Trainer adds with each checkpoint."""
        kept = state.stateful_callbacks.get(type(self).__name__)
        if isinstance(kept, list):
            kept.clear()

    def state(self) -> dict[str, Any]:
        """What the Trainer puts into ``trainer_state.json``."""
        if self._session is None:
            return {"args": {}, "attributes": {}}
        kept = {"session": self._session.state_dict(), "begun_with": self._begun_with}
        return {"args": {}, "attributes": {"_saved": {"place": self._place, "state": packed(kept)}}}

    def _kept(self, state: Any) -> dict[str, Any] | None:
        """The state that the checkpoint holds of this callback: of several, in the order of the Trainer's list."""
        found = state.stateful_callbacks.get(type(self).__name__, [])
        for one in reversed([found] if isinstance(found, Mapping) else found):
            saved = one.get("attributes", {}).get("_saved")
            if saved and saved["place"] == self._place:
                return unpacked(saved["state"])
        warnings.warn(
            f"the checkpoint holds no state of this CurvatureCallback; a new run begins at step {state.global_step}",
            CurvdiagWarning,
            stacklevel=2,
        )
        return None


TOLD = (
    *("learning_rate", "lr_scheduler_type", "optim", "weight_decay", "max_grad_norm", "label_smoothing_factor"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "max_steps", "seed"),
)
"""Arguments of the training that the run's configuration holds."""


def _epoch_after_step(args: Any, state: Any, loader: Any) -> float:
    """Which epoch it will be after the present step, as the Trainer counts."""
    accumulated = args.gradient_accumulation_steps
    try:
        batches = len(loader)
    except TypeError:
        batches = args.max_steps * accumulated
    whole, done = divmod(state.global_step, max(1, -(-batches // accumulated)))
    return float(whole + min((done + 1) * accumulated, batches) / batches)


def _makes_objective(given: Any) -> bool:
    return callable(given) and not isinstance(given, Dataset | DataLoader)


def _holds_samples(data: Any) -> bool:
    """Whether these are samples still to be collated, and not batches."""
    if isinstance(data, Mapping | DataLoader):
        return False
    if isinstance(data, Dataset) or hasattr(data, "column_names"):
        return True
    first = data[0] if isinstance(data, list | tuple) and data else None
    if not isinstance(first, Mapping):
        return False
    told = first.get("input_ids", first.get("labels"))
    return not isinstance(told, torch.Tensor) or told.ndim < (2 if "input_ids" in first else 1)


def _from_first(value: Any) -> Any:
    """On every process what the first one gives."""
    box = [value]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def _remake_as(callback: CurvatureCallback) -> None:
    """Give a callback a class of its own, which makes this very callback.

    With ``restore_callback_states_from_checkpoint=True`` the Trainer replaces each callback by
    ``type(callback)(**args)``, with arguments out of a JSON file, where no objective has a place.
    """
    live = weakref.ref(callback)
    kind = type(callback)
    body = {
        "__reduce__": lambda self: (_copied, (kind, self._given())),
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__doc__": kind.__doc__,
        "__new__": lambda cls, *_, **__: live(),
        "__init__": lambda self, *_, **__: None,
    }
    callback.__class__ = type(kind.__name__, (kind,), body)


def _copied(kind: type[CurvatureCallback], given: dict[str, Any]) -> CurvatureCallback:
    """A copy of a callback, also in another process."""
    twin = object.__new__(kind)
    twin.__dict__.update(given)
    _remake_as(twin)
    return twin
