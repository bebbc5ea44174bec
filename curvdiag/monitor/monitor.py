"""CurvatureMonitor: measures a model while it trains, and leaves no trace in the training."""

from __future__ import annotations

import logging
import os
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from curvdiag.errors import ArgumentError, CurvdiagWarning
from curvdiag.monitor.cadence import Cadence, Every, LogSpaced, OverheadBudget
from curvdiag.monitor.clock import Clock
from curvdiag.monitor.measurement import Measurement, measure
from curvdiag.monitor.recorder import Recorder
from curvdiag.monitor.settings import Preset, Settings
from curvdiag.monitor.training import as_number, optimizer_scalars, synchronize, was_skipped
from curvdiag.objective import Objective
from curvdiag.record import Run, RunStore

log = logging.getLogger(__name__)


class CurvatureMonitor:
    """Watches the Hessian of an objective, and the noise of its gradients, over a training run.

    ::

        monitor = CurvatureMonitor(Objective(model, criterion, probe_batch), store="run.db")
        monitor.attach(optimizer)  # measures after optimizer.step(); the loop stays as it was

    Training ends with the same bits as without the monitor. A measurement that fails, or a quantity of it, is recorded
    and warned about once, and training goes on. Forward hooks of the model run during measurements too, since layers
    may need them.

    ============================================  =================================================================
    key                                           what
    ============================================  =================================================================
    ``curv/hessian/lambda_max``                   largest eigenvalue; some eigenvalue lies within ``..._residual``
    ``curv/hessian/lambda_min``                   smallest Ritz value of the density's probes
    ``curv/hessian/trace``                        trace, with standard error
    ``curv/hessian/frobenius_norm``               Frobenius norm, with standard error
    ``curv/anisotropy/<measure>``                 every measure of :func:`curvdiag.spectrum.anisotropy` that has a value
    ``curv/layer/<name>/lambda_max``, ``trace``   the same for the diagonal block of one layer
    ``noise/scale``                               ``B_simple = tr C / |g|^2`` of the population, in samples; NaN where
                                                  the probe set is too small to tell ``|g|^2`` from its noise
    ``noise/scale_curvature``                     ``B_noise = tr(HC) / (g^T H g)`` of the probe set; NaN where the
                                                  curvature along the gradient is not positive
    ``noise/trace``                               ``tr C`` of the population, of single samples
    ``noise/cwgd``                                ``2 tr((|H| + delta)^-1 C)`` of the probe set, ``delta`` 1e-3 of the
                                                  largest Ritz value
    ``align/cosine``, ``commutator``,             of C with H, see :func:`curvdiag.scaling.alignment.alignment`; and
    ``cosine_baseline``, ``commutator_baseline``  with random eigenvectors of the same spectra
    ``curv/cost/seconds``, ``gradients``,         what the measurement took: time, the same in gradients of the
    ``matvecs``                                   objective, and products with H and C
    ``curv/overhead``                             share of the run's time that went into measuring so far
    ``train/loss``                                as given to :meth:`step` or :meth:`observe_loss`
    ``train/lr/<group>``, ``momentum``, ``p``     of each of the optimizer's parameter groups
    ============================================  =================================================================

    Args:
        objective: What is measured; its batches are fixed, so that curves show the model's change.
        store: Path of the run file, an open RunStore, or None to keep measurements in memory only.
        name: Of the run in the file.
        config: Recorded with the run, beside the monitor's own settings.
        every: Measure every so many steps; short for ``cadence=Every(every)``.
        cadence: When to measure: a function of the step, ``Every``, ``LogSpaced`` or ``OverheadBudget``. By default
            ``OverheadBudget(0.1)``: a tenth of the run's time.
        preset: ``"light"`` (top eigenvalue, trace), ``"standard"`` (density and anisotropy as well) or ``"full"``
            (each layer, and gradient noise where single samples have losses of their own, as well).
        measure: Single quantities instead of a preset, any of ``"lambda_max"``, ``"trace"``, ``"density"``,
            ``"anisotropy"``, ``"layers"``, ``"noise_scale"``, ``"noise_trace"``, ``"cwgd"``, ``"alignment"``.
        steps, probes, tol, seed: Of the measurement; see :class:`~curvdiag.monitor.settings.Settings`.
        steps_per_epoch: To record epochs without calls of :meth:`epoch`.
        strict: Raise what goes wrong instead of recording it.
        hessian: Further arguments of :class:`~curvdiag.operators.Hessian`.

    Raises:
        ArgumentError: Arguments that mean nothing, or ``preset`` and ``measure`` together.
        LossError: ``measure`` names gradient noise, and the loss gives only a mean, or BatchNorm couples the samples.

    Attributes:
        steps_done: Optimizer steps counted so far.
        history: All measurements of this process, oldest first.
    """

    def __init__(
        self,
        objective: Objective,
        store: str | os.PathLike[str] | RunStore | None = None,
        *,
        name: str | None = None,
        config: Mapping[str, Any] | None = None,
        every: int | None = None,
        cadence: Cadence | None = None,
        preset: Preset | None = None,
        measure: Sequence[str] | None = None,
        steps: int = 40,
        probes: int = 3,
        tol: float = 1e-2,
        seed: int = 0,
        steps_per_epoch: float | None = None,
        strict: bool = False,
        hessian: Mapping[str, Any] | None = None,
    ) -> None:
        if every is not None and cadence is not None:
            raise ArgumentError("give every= or cadence=, not both")
        if cadence is not None and not callable(cadence):
            raise ArgumentError(f"cadence= is a function of the step, not {cadence!r}; every={cadence!r} for a number")
        self.objective = objective
        self.settings = Settings(preset, steps, probes, tol, seed, dict(hessian or {}), measure)
        obstacle = self.settings.obstacle(objective)
        if obstacle is not None and measure is not None:
            raise obstacle
        default = OverheadBudget(0.1) if every is None else Every(every)
        self.cadence: Cadence = default if cadence is None else cadence
        self.steps_per_epoch = steps_per_epoch
        self.strict = strict
        self.steps_done = 0
        self.history: list[Measurement] = []
        self.clock = Clock()
        self._config = dict(config or {})
        self._warned: set[str] = set()
        self._recorder = Recorder(store, name, self._description, strict=strict, warn=self._warn)
        self._optimizer: Optimizer | None = None
        self._hook: Any = None
        self._epoch: float | None = None
        self._loss: float | Tensor | None = None
        self._loss_step = 0
        self._gradient_seconds = 0.0
        self._trained, self._measured_at = 0.0, 0

    # Following the training

    def attach(self, optimizer: Optimizer) -> CurvatureMonitor:
        """Count the steps of ``optimizer``, and measure after those that the cadence chooses."""
        if self._optimizer is not None:
            raise ArgumentError("this monitor is attached already; detach() it first, or make another")
        self._optimizer = optimizer
        follow = self._after_step
        if "torch._dynamo" in sys.modules:  # a compiled optimizer step must not compile the measurement into itself
            follow = torch.compiler.disable(follow)
        self._hook = optimizer.register_step_post_hook(follow)
        self.clock.start()
        return self

    def detach(self) -> None:
        """Stop following the optimizer; what was measured stays."""
        if self._hook is not None:
            self._hook.remove()
        self._optimizer = self._hook = None

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        if not was_skipped(optimizer):
            self.step()

    def step(self, loss: float | Tensor | None = None) -> Measurement | None:
        """Count one optimizer step, and measure if the cadence says so; for loops without :meth:`attach`."""
        self.clock.start()
        self.steps_done += 1
        if loss is not None:
            self.observe_loss(loss)
        observe = getattr(self.cadence, "observe", None)
        if observe is not None:
            observe(elapsed=self.clock.elapsed, measuring=self.clock.measuring, last=self.clock.last)
        return self.measure() if self.cadence(self.steps_done) else None

    def epoch(self, number: float) -> None:
        """Say which epoch the training is in; recorded with the measurements that follow."""
        self._epoch = float(number)

    def observe_loss(self, loss: float | Tensor) -> None:
        """Say what the training loss is. A tensor is read only when a measurement is recorded."""
        # A copy, because loops reuse and rescale the tensor that they log.
        self._loss = loss.detach().clone() if isinstance(loss, Tensor) else float(loss)
        self._loss_step = self.steps_done

    # Measuring

    def measure(self) -> Measurement | None:
        """Measure now, whatever the cadence says; None where the measurement failed.

        Raises:
            CurvdiagError: With ``strict=True``, whatever went wrong.
        """
        measurement: Measurement | None = None
        synchronize(self.objective.device)  # what training has queued is not the measurement's time
        with self.clock.measuring_time():
            try:
                measurement = self._measure()
            except Exception as error:
                if self.strict:
                    raise
                self._failed("measurement", error)
        if measurement is not None:
            self.history.append(measurement)
            self._warn_of_share()
        return measurement

    def _measure(self) -> Measurement:
        started = time.perf_counter()
        if not self._gradient_seconds:
            self._gradient_seconds = self._time_gradient()
        with torch.inference_mode(False):
            found = measure(self.objective, self.settings, strict=self.strict)
        synchronize(self.objective.device)
        seconds = time.perf_counter() - started
        scalars, notes = found.scalars, found.notes
        scalars["curv/cost/seconds"] = seconds
        scalars["curv/cost/gradients"] = seconds / self._gradient_seconds
        scalars["curv/cost/matvecs"] = float(found.matvecs)
        scalars["curv/overhead"] = (self.clock.measuring + seconds) / max(self.clock.elapsed, seconds)
        if self._optimizer is not None:
            scalars.update(optimizer_scalars(self._optimizer))
        loss = as_number(self._loss)
        if loss is not None and self.steps_done - self._loss_step <= 1:  # an older one is not this step's
            scalars["train/loss"] = loss
        if not self.history:
            notes += self.objective.notes
            if (obstacle := self.settings.obstacle(self.objective)) is not None:
                notes.append(f"left out: {obstacle}")
            notes.append(
                f"a measurement takes {seconds:.3g} s, as much as {seconds / self._gradient_seconds:.0f} gradients"
            )
            log.info("the first %s", notes[-1].removeprefix("a "))
        epoch = self._current_epoch()
        measurement = Measurement(self.steps_done, epoch, scalars, found.densities, seconds, tuple(notes))
        self._recorder.measurement(measurement)
        for name, error in found.failures.items():
            self._failed(f"measurement of {name}", error)
        return measurement

    def _time_gradient(self) -> float:
        times = []
        for _ in range(2):  # the first one warms up
            started = time.perf_counter()
            self.objective.gradient()
            synchronize(self.objective.device)
            times.append(time.perf_counter() - started)
        return min(times)

    def _current_epoch(self) -> float | None:
        return self.steps_done / self.steps_per_epoch if self.steps_per_epoch else self._epoch

    def _warn_of_share(self) -> None:
        trained = self.clock.elapsed - self.clock.measuring
        between, self._trained = trained - self._trained, trained
        steps, self._measured_at = self.steps_done - self._measured_at, self.steps_done
        share = self.clock.last / (self.clock.last + between)
        spaced = isinstance(self.cadence, OverheadBudget | LogSpaced)  # their share falls as the run goes on
        if share > 0.5 and steps and not spaced and (steps >= 5 or len(self.history) > 1):
            self._warn(
                "share",
                f"measuring every {steps} steps takes {share:.0%} of the run: {self.clock.last:.3g} s for each "
                f"measurement, {between:.3g} s for the training between two. Measure less often, take "
                "preset='light' or fewer probes, or cadence=OverheadBudget(0.1)",
            )

    # Recording

    @property
    def latest(self) -> Measurement | None:
        """The last measurement that succeeded."""
        return self.history[-1] if self.history else None

    @property
    def store(self) -> RunStore | None:
        """The open run file, if there is one."""
        return self._recorder.store

    @property
    def run(self) -> Run | None:
        """The run in the store, begun with the first measurement."""
        return self._recorder.run

    def _description(self) -> dict[str, Any]:
        settings = self.settings
        return {
            **self._config,
            "curvdiag": {
                "objective": repr(self.objective),
                "cadence": repr(self.cadence),
                "preset": settings.preset,
                "measure": list(settings.quantities),
                "steps": settings.steps,
                "probes": settings.probes,
                "tol": settings.tol,
                "seed": settings.seed,
                "hessian": {key: str(value) for key, value in settings.hessian.items()},
            },
        }

    def _failed(self, what: str, error: Exception) -> None:
        message = f"{type(error).__name__}: {error}"
        self._warn(what, f"the {what} at step {self.steps_done} failed and training goes on. {message}")
        self._recorder.event(self.steps_done, "error", message, self._current_epoch())

    def _warn(self, kind: str, message: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(message, CurvdiagWarning, stacklevel=5)

    def close(self) -> None:
        """Detach, and close the run file if the monitor opened it."""
        self.detach()
        self._recorder.close()

    def __enter__(self) -> CurvatureMonitor:
        self.clock.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # Restarting

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs, in plain numbers and strings: steps, times, the cadence, and which run it is."""
        return {
            **self._recorder.state_dict(),
            "steps_done": self.steps_done,
            "epoch": self._epoch,
            "clock": self.clock.state_dict(),
            "cadence": getattr(self.cadence, "state_dict", lambda: None)(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue: count on from the checkpoint's step, in the same run of the store."""
        self.steps_done, self._epoch = int(state["steps_done"]), state["epoch"]
        self.clock.load_state_dict(state["clock"])
        if state["cadence"] is not None and hasattr(self.cadence, "load_state_dict"):
            self.cadence.load_state_dict(state["cadence"])
        self._recorder.load_state_dict(state, self.steps_done)

    def __repr__(self) -> str:
        what = self.settings.preset or list(self.settings.quantities)
        return (
            f"CurvatureMonitor({self.objective!r}, {what!r}, {self.cadence!r}, "
            f"{len(self.history)} measurements in {self.steps_done} steps)"
        )
