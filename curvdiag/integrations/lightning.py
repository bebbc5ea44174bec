"""CurvatureCallback for Lightning: the curvature of a model, measured while a Trainer fits it."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import Any, ClassVar, TypeAlias

from torch import Tensor, nn
from torch.optim import Optimizer

from curvdiag.errors import ArgumentError, CurvdiagError, CurvdiagWarning
from curvdiag.integrations.common import (
    Groups,
    Schedules,
    Session,
    Store,
    groups_of,
    made_by,
    made_on_all,
    refuse_shards,
    require_trained,
)
from curvdiag.integrations.lightning_bases import remade, with_bases
from curvdiag.integrations.lightning_trainer import batches_that_stepped, optimizer_to_follow, synchronizes
from curvdiag.integrations.training_step import training_step_objective
from curvdiag.monitor import CurvatureMonitor
from curvdiag.objective import Objective
from curvdiag.sandbox import random_states
from curvdiag.schedules import PScheduler

MakeObjective: TypeAlias = Callable[[Any, Any], Objective]
"""``objective(pl_module, trainer)``, called when the training begins, with the module on its device."""

SHARDED = ("FSDPStrategy", "DeepSpeedStrategy", "XLAFSDPStrategy")
SHARDED_BY_MODULE = "ModelParallelStrategy"
"""Whose modules call ``fully_shard`` themselves, in ``configure_model``."""


class CurvatureCallback:
    """Measures curvature while a Lightning Trainer fits, of ``lightning`` and of ``pytorch_lightning`` alike.

    ::

        trainer = Trainer(callbacks=[CurvatureCallback(store="run.db")])

    Training ends with the same bits as without it. It measures after the optimizer steps that the cadence chooses: real
    steps, whatever the accumulation, and not those that mixed precision skips. Numbers go into the run file, with the
    keys of :class:`~curvdiag.monitor.CurvatureMonitor`, to the trainer's loggers, and on one process into its
    ``callback_metrics``, where ``ModelCheckpoint(monitor="curv/hessian/lambda_max")`` finds them from the first
    measurement on, which has to come before the first validation. ``train/loss`` is that of the step that was measured.
    Checkpoints hold its state: a resumed training continues the same run, and without a checkpoint each training begins
    a new one.

    Without ``objective`` the loss is what ``training_step`` returns on the first few batches of the training's loader,
    in eval mode, its calls of ``self.log`` left out. Each batch gives one number, so quantities of the gradient noise
    need an objective with a loss for each sample::

        CurvatureCallback(lambda module, trainer: Objective(module.net, nn.CrossEntropyLoss(), probe_batch))

    Any strategy on one device, and DDP: the first process measures and writes, the others wait for it at their next
    exchange of gradients, up to the timeout of the process group. With an objective of all of them they measure
    together, each its share of the samples, and every process has the numbers and the metrics::

        CurvatureCallback(lambda module, trainer: Objective(module.net, criterion, own_probes, group="world"))

    So they do under ``ModelParallelStrategy`` with ``fully_shard``; other strategies that shard weights are refused.
    ``fast_dev_run`` writes no file, as Lightning then writes no logs.

    Args:
        objective: What is measured; or ``objective(pl_module, trainer)``, which makes it, called when the training
            begins on every process, with the module on its device; or None for the loss of ``training_step``.
        store: Path of the run file, an open RunStore, or None to keep measurements in memory only.
        schedules: ``schedules(optimizer, monitor)`` gives a schedule of curvdiag, of ``p`` or of the learning rate, or
            a list of them, with ``step()`` without arguments. They are stepped after each optimizer step, after the
            measurement, by this callback: do not return them from ``configure_optimizers``. What they choose is
            recorded into the run. With DDP, and an objective of each process alone, give it the same batches on all,
            since a schedule may measure by itself.
        log: Send numbers to the trainer's loggers and metrics.
        batches: Batches of the training's loader that the loss of ``training_step`` is measured on.
        optimizer: Number of the optimizer whose steps count, where there are several; by default the one with most
            of the objective's parameters.
        monitor_arguments: Of :class:`~curvdiag.monitor.CurvatureMonitor`: ``every=100``, ``preset="light"``, ... Two
            callbacks in one trainer need two names, ``name=``.

    Raises:
        MissingExtraError: Neither package is installed.

    Attributes:
        monitor: The monitor of the present or last training; None before the first, and where another process measures.
        schedules: What ``schedules=`` made, in that training.
    """

    given_as: ClassVar[type]  # without the base of a package

    def __new__(cls, *arguments: Any, **options: Any) -> CurvatureCallback:
        return object.__new__(with_bases(cls))

    def __init__(
        self,
        objective: Objective | MakeObjective | None = None,
        store: Store = None,
        *,
        schedules: Schedules | None = None,
        log: bool = True,
        batches: int = 4,
        optimizer: int | None = None,
        **monitor_arguments: Any,
    ) -> None:
        given = objective is None or isinstance(objective, Objective) or callable(objective)
        if not given or isinstance(objective, nn.Module):
            wanted = "an Objective or a function (pl_module, trainer) -> Objective"
            hint = "; the run file is store=" if isinstance(objective, str | os.PathLike) else ""
            raise ArgumentError(f"objective= is {wanted}, not a {type(objective).__name__}{hint}")
        if batches < 1:
            raise ArgumentError(f"batches is a number of batches, at least 1, not {batches}")
        self._objective, self._store, self._schedules, self._log = objective, store, schedules, log
        self._batches, self._optimizer, self._arguments = batches, optimizer, monitor_arguments
        self._session: Session | None = None
        self._begun_with: list[Groups] = []
        self._state: dict[str, Any] | None = None
        self._losses: list[Tensor] = []
        self._mute: set[int] = set()
        self._metrics: dict[str, float] = {}  # the newest, as the trainer has them
        self._resumed: dict[str, float] = {}

    @property
    def monitor(self) -> CurvatureMonitor | None:
        return None if self._session is None else self._session.monitor

    @property
    def _together(self) -> bool:
        return self.monitor is not None and not self.monitor.ranks.alone

    @property
    def schedules(self) -> list[Any]:
        return [] if self._session is None else list(self._session.schedules)

    # The training begins

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage != "fit":
            return
        for kind in type(trainer.strategy).__mro__:
            own = isinstance(self._objective, Objective) or self._objective is None
            if kind.__name__ in SHARDED or (kind.__name__ == SHARDED_BY_MODULE and own):
                refuse_shards(type(trainer.strategy).__name__, with_function=kind.__name__ == SHARDED_BY_MODULE)
        self._state, self._resumed = None, {}
        if self._session is not None and trainer.global_step > 0:  # fit goes on, with new optimizers, as Lightning does
            self._state, self._resumed = {"monitor": self._session.monitor.state_dict()}, self._metrics

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        # A checkpoint, if there is one, has not reached the optimizers yet.
        self._begun_with = [groups_of(optimizer) for optimizer in trainer.optimizers]

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.close()
        self._session, self._losses, self._mute, self._metrics = None, [], set(), {}
        several, failure = trainer.world_size > 1, None
        try:
            with random_states():  # a function of the user's may draw
                self._session = self._begun(trainer, pl_module)
            self._warn_of_two_rates(trainer)
        except Exception as error:
            failure = error
        well = failure is None
        if several:  # the others would wait for a process that has ended
            well = trainer.strategy.reduce_boolean_decision(well, all=True)
        if failure is not None:
            raise failure
        if not well:
            raise CurvdiagError("another process could not begin to measure, and its own error says why")

    def _made_here(self, module: Any, trainer: Any) -> tuple[Objective | None, Callable[[Any], Any] | None]:
        """What this process measures, if anything, and how schedules on several processes get what one measured."""
        scheduled, first = self._schedules is not None, bool(trainer.is_global_zero)
        if trainer.world_size == 1:
            return self._made(module, trainer, shared=False), None

        def share(value: Any) -> Any:
            return trainer.strategy.broadcast(value, src=0)

        if self._objective is None:
            made = self._made(module, trainer, shared=scheduled) if first or scheduled else None
            return made, share if scheduled else None

        def make() -> Objective:
            return self._made(module, trainer, shared=scheduled)

        made, together = made_on_all(make, first=first, needed=scheduled)
        return made if first or scheduled or together else None, share if scheduled else None

    def _begun(self, trainer: Any, module: Any) -> Session | None:
        objective, share = self._made_here(module, trainer)
        if objective is None:
            return None
        number = optimizer_to_follow(trainer.optimizers, objective, self._optimizer)
        if number is None:
            message = "there is no optimizer whose steps could be followed, and nothing is measured"
            warnings.warn(message, CurvdiagWarning, stacklevel=3)
            return None
        arguments = dict(self._arguments)
        if trainer.fast_dev_run:
            arguments.pop("loggers", None)
        if "config" not in arguments and getattr(module, "hparams", None):
            arguments["config"] = {"hparams": dict(module.hparams)}
        return Session(
            objective,
            trainer.optimizers[number],
            None if trainer.fast_dev_run else self._store,
            schedules=self._schedules,
            arguments=arguments,
            begun_with=self._begun_with[number] if number < len(self._begun_with) else None,
            state=self._state,
            steps_done=batches_that_stepped(trainer),
            share=share,
            measures=trainer.is_global_zero,
        )

    def _warn_of_two_rates(self, trainer: Any) -> None:
        ours = [type(one).__name__ for one in self.schedules if not isinstance(one, PScheduler)]
        theirs = [type(config.scheduler).__name__ for config in trainer.lr_scheduler_configs]
        if ours and theirs:
            message = (
                f"{', '.join(theirs)} of configure_optimizers and {', '.join(ours)} of schedules= both move the "
                "learning rate, and the first may undo what the second chooses: give one of them only"
            )
            warnings.warn(message, CurvdiagWarning, stacklevel=3)

    def _made(self, module: Any, trainer: Any, *, shared: bool) -> Objective:
        if isinstance(self._objective, Objective):
            made = self._objective
            require_trained(made, module)
        elif self._objective is not None:
            made = made_by(self._objective, module, trainer)
        else:
            seed = int(self._arguments.get("seed", 0))
            made = training_step_objective(module, trainer, batches=self._batches, seed=seed, shared=shared)
        if trainer.world_size > 1 and made.mode == "train" and synchronizes(made.model):
            raise ArgumentError(
                "SyncBatchNorm in mode='train' waits for all processes, and only one of them measures: use mode='eval'"
            )
        return made

    # While it goes on

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self.monitor is not None:  # what is measured in this batch belongs to its end
            share = (batch_idx + 1) / trainer.num_training_batches  # zero of infinitely many
            self.monitor.epoch(trainer.current_epoch + share)

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
        if self._session is None:
            return
        found = loss.detach().clone()
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None:
            found /= scaler.scale(found.new_ones(()))
        if not pl_module.automatic_optimization:
            self._losses.clear()  # of several losses the one of the last backward pass belongs to the step
        self._losses.append(found)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Optimizer) -> None:
        if self._session is None or optimizer is not self._session.optimizer or not self._losses:
            return
        loss = self._losses[0] if len(self._losses) == 1 else sum(self._losses[1:], self._losses[0]) / len(self._losses)
        if pl_module.automatic_optimization:  # which has divided each by the number of batches
            loss = loss * trainer.accumulate_grad_batches
        self._losses.clear()
        self._session.monitor.observe_loss(loss)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        numbers = {**self._resumed, **self._tell(trainer)}
        self._resumed = {}
        self._metrics.update(numbers)
        # Where one process measures alone the others have no such metric, and would wait for it.
        if numbers and (trainer.world_size == 1 or self._together):
            pl_module.log_dict(numbers, logger=False, on_step=True, on_epoch=False)

    def _tell(self, trainer: Any) -> dict[str, float]:
        """Give the loggers what is new."""
        if self._session is None:
            return {}
        told: dict[str, float] = {}
        for _, numbers in self._session.news():
            told.update((key, value) for key, value in numbers.items() if key != "train/loss")  # the user logs that
        if not told or not self._log:
            return {}
        step = batches_that_stepped(trainer) + 1  # the trainer counts this batch later
        for logger in trainer.loggers if trainer.is_global_zero else ():
            if id(logger) in self._mute:
                continue
            try:
                logger.log_metrics(told, step=step)
            except Exception as error:
                self._mute.add(id(logger))
                message = f"{type(logger).__name__} failed and gets no more curvature: {type(error).__name__}: {error}"
                warnings.warn(message, CurvdiagWarning, stacklevel=3)
        return told

    # The training ends

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._tell(trainer)
        self.close()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage == "fit":
            self.close()

    def close(self) -> None:
        """Measure no more, and close the run file if it was given as a path; the end of a fit does it too."""
        if self._session is not None:
            self._session.close()

    # Checkpoints

    @property
    def state_key(self) -> str:
        """The same in both packages."""
        name = self._arguments.get("name")
        return "curvdiag.CurvatureCallback" + (f"[{name}]" if name else "")

    def state_dict(self) -> dict[str, Any]:
        if self._session is None:
            return self._state or {}
        return {**self._session.state_dict(), "metrics": dict(self._metrics)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._state = dict(state_dict)  # taken up when the training begins
        # A checkpoint that is monitored may be due before the next measurement.
        self._resumed = dict(state_dict.get("metrics", {})) if self._log else {}

    def __reduce__(self) -> tuple[Any, ...]:
        """To other processes goes what was given, and no training."""
        state = {name: value for name, value in vars(self).items() if name not in ("log", "log_dict")}  # the trainer's
        return (
            remade,
            (getattr(self, "given_as", type(self)),),
            {**state, "_session": None, "_losses": [], "_mute": set(), "_metrics": {}, "_resumed": {}},
        )
