"""CurvatureMonitor: measures a model while it trains, and leaves no trace in the training."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

from torch.optim import Optimizer

from curvdiag.errors import ArgumentError, out_of_step
from curvdiag.monitor.agreement import in_common
from curvdiag.monitor.cadence import Cadence, Every, LogSpaced, OverheadBudget
from curvdiag.monitor.complaints import Complaints
from curvdiag.monitor.description import describe
from curvdiag.monitor.follower import Follower
from curvdiag.monitor.loggers import Logger, Loggers
from curvdiag.monitor.measurement import Measurement
from curvdiag.monitor.recorder import Recorder
from curvdiag.monitor.scaling import require_scaling
from curvdiag.monitor.settings import Preset, Settings, products_of
from curvdiag.monitor.survey import Survey
from curvdiag.monitor.training import numbers_in, optimizer_scalars, synchronize
from curvdiag.monitor.warm import WarmStarts
from curvdiag.objective import Objective
from curvdiag.record import Run, RunStore


class CurvatureMonitor(Follower):
    """Watches the Hessian of an objective, and the noise of its gradients, over a training run.

    ::

        monitor = CurvatureMonitor(Objective(model, criterion, probe_batch), store="run.db")
        monitor.attach(optimizer)  # measures after optimizer.step(); the loop stays as it was

    Training ends with the same bits as without the monitor. A measurement that fails, or a quantity of it, is recorded
    and warned about once, and training goes on. Forward hooks of the model run during measurements too, since layers
    may need them.

    Where the objective is that of several ranks (``group=``), make, attach and close the monitor on all of them, which
    take equally many steps: they measure together and hold the same numbers, those of the first rank, which alone
    writes, tells loggers and warns. Times, losses and rates are the first rank's. What fails on one rank is given up on
    all, and recorded with the rank's name; ranks that are gone, or that were given different things, raise a
    :class:`~curvdiag.errors.DistributedError`, since no training should go on with them. Of sharded weights
    products are finite differences, and what needs whole weights is left out.

    ============================================  =================================================================
    key                                           what
    ============================================  =================================================================
    ``curv/hessian/lambda_max``                   largest eigenvalue; some eigenvalue lies within ``..._residual``
    ``curv/hessian/lambda_min``                   smallest Ritz value of the density's probes
    ``curv/hessian/trace``                        trace, with standard error
    ``curv/hessian/frobenius_norm``               Frobenius norm, with standard error
    ``curv/anisotropy/<measure>``                 every measure of :func:`curvdiag.spectrum.anisotropy` that has a value
    ``curv/layer/<name>/lambda_max``, ``trace``   the same for the diagonal block of one layer
    ``curv/layer/<name>/anisotropy/<measure>``    the same measures for the block, but for ``top_ratio``
    ``curv/preconditioned/lambda_max``            largest eigenvalue of ``D^(-1/2) H D^(-1/2)``, with ``..._residual``;
                                                  ``D`` is what the attached optimizer divides its step by
    ``noise/scale``                               ``B_simple = tr C / |g|^2`` of the population, in samples; NaN where
                                                  the probe set is too small to tell ``|g|^2`` from its noise
    ``noise/scale_curvature``                     ``B_noise = tr(HC) / (g^T H g)`` of the probe set; NaN where the
                                                  curvature along the gradient is not positive
    ``noise/gradient_square``,                    ``|g|^2`` and ``g^T H g`` of the population, without bias; may be
    ``gradient_curvature``                        negative
    ``noise/gradient_square_probe``,              the same of the probe set, which hold about ``tr(C) / N`` and
    ``gradient_curvature_probe``                  ``tr(HC) / N`` of noise of the mean gradient
    ``noise/trace_hc``                            ``tr(HC)`` of the probe set, ``C`` divided by ``N``
    ``noise/trace``                               ``tr C`` of the population, of single samples
    ``noise/cwgd``                                ``2 tr((|H| + delta)^-1 C)`` of the probe set, ``delta`` 1e-3 of the
                                                  largest Ritz value
    ``noise/cwgd_diagonal``                       as published: ``2 sum_k C_kk / |H_kk|``, the diagonal by few probes
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
            ``"anisotropy"``, ``"layers"``, ``"noise_scale"``, ``"noise_trace"``, ``"cwgd"``, ``"alignment"``; and of
            those that no preset holds, ``"layer_anisotropy"``, ``"preconditioned_lambda_max"``, ``"cwgd_diagonal"``.
        steps, probes, tol, seed: Of the measurement; see :class:`~curvdiag.monitor.settings.Settings`.
        steps_per_epoch: To record epochs without calls of :meth:`epoch`.
        strict: Raise what goes wrong instead of recording it.
        hessian: Further arguments of :class:`~curvdiag.operators.Hessian`.
        warm: Where no density is measured, look for ``lambda_max``, and always for the preconditioned one, from the
            eigenvector of the last measurement, at three quarters of the products or so: one more vector. The first
            measurement after a resume is a cold one, so its value may differ within ``tol``; a monitor that a schedule
            follows measures cold, so that a resumed run takes the same steps. Where a function hands the measurements
            to a schedule, give ``warm=False``.
        loggers: Told of the run as it goes: those of :mod:`curvdiag.loggers`, or functions of ``(step, dict)``. One
            that fails is warned about once and left out from then on. Their time counts as measuring.

    Raises:
        ArgumentError: Arguments that mean nothing, or ``preset`` and ``measure`` together.
        LossError: ``measure`` names gradient noise, and the loss gives only a mean, or BatchNorm couples the samples.
        DistributedError: It could not be made on another rank.

    Attributes:
        steps_done: Optimizer steps counted so far.
        history: All measurements of this process, oldest first.
        recorded: What :meth:`record` was given in this process, as (step, numbers), oldest first.
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
        warm: bool = True,
        loggers: Sequence[Logger | Callable[[int, dict[str, float]], object]] = (),
    ) -> None:
        default = OverheadBudget(0.1) if every is None else Every(every)
        super().__init__(default if cadence is None else cadence, steps_per_epoch, objective.holders)
        with self.ranks.together("making of a monitor"):
            if every is not None and cadence is not None:
                raise ArgumentError("give every= or cadence=, not both")
            if not callable(self.cadence):
                raise ArgumentError(
                    f"cadence= is a function of the step, not {cadence!r}; every={cadence!r} for a number"
                )
            self.objective = objective
            chosen, notes = products_of(objective, hessian)
            self.settings = Settings(preset, steps, probes, tol, seed, chosen, measure)
            obstacle = self.settings.obstacle(objective)
            if obstacle is not None and measure is not None:
                raise obstacle
            self.strict = strict
            self.history: list[Measurement] = []
            self.recorded: list[tuple[int, dict[str, float]]] = []
            self._survey = Survey(objective, self.settings, self.clock, notes, strict=strict, warm=warm)
            self._config = dict(config or {})
            self._complaints = Complaints(self.ranks, self.event)
            if not self.ranks.first:  # which writes for all
                store, loggers = None, ()
            self._recorder = Recorder(store, name, self._description, strict=strict, warn=self._complaints.warn)
            self._loggers = Loggers(loggers, self.clock, self._introduction, self._logger_failed, strict=strict)
            self._closed = False

    def attach(self, optimizer: Optimizer) -> Self:
        """Count the steps of ``optimizer``, and measure after those that the cadence chooses.

        Raises:
            ArgumentError: The monitor is attached already; or ``measure`` holds ``"preconditioned_lambda_max"``, and it
                is not known by what this optimizer divides its steps.
        """
        if "preconditioned_lambda_max" in self.settings.quantities:
            require_scaling(optimizer)
        return super().attach(optimizer)

    # Measuring

    def measure(self) -> Measurement | None:
        """Measure now, whatever the cadence says; None where the measurement failed.

        Raises:
            CurvdiagError: With ``strict=True``, whatever went wrong.
            DistributedError: Ranks are gone, or were given different things.
        """
        self._agree()
        synchronize(self.objective.device)  # what training has queued is not the measurement's time
        with self.ranks.together(f"report at step {self.steps_done}"):
            measurement = self._attempt()
            if measurement is not None:
                self.history.append(measurement)
                self._loggers.log(measurement)
                self._warn_of_price()
        return measurement

    def _attempt(self) -> Measurement | None:
        with self.clock.measuring_time():
            try:
                with self.ranks.together(f"measurement at step {self.steps_done}"):
                    return self._measure()
            except BaseException as error:
                self._survey.warm.forget()
                if self.strict or not isinstance(error, Exception) or out_of_step(error):
                    raise
                self._complaints.failed("measurement", self.steps_done, error)
        return None

    def measure_cold(self) -> None:
        """From now on start each search from the same random vector, so that equal weights give equal numbers."""
        self._survey.warm = WarmStarts(enabled=False)

    def _measure(self) -> Measurement:
        found, seconds = self._survey.take(self.objective, self._optimizer, first=not self.history)
        if self._optimizer is not None:
            found.scalars.update(optimizer_scalars(self._optimizer))
        if (loss := self._present_loss()) is not None:
            found.scalars["train/loss"] = loss
        step, notes = self.steps_done, tuple(found.notes)
        measurement = Measurement(step, self._present_epoch(), found.scalars, found.densities, seconds, notes)
        self._recorder.measurement(measurement)
        for name, error in found.failures.items():
            self._complaints.failed(f"measurement of {name}", step, error)
        return measurement if self.ranks.alone else self._as_first(measurement)

    def _as_first(self, measurement: Measurement) -> Measurement:
        """The first rank's numbers and words on all ranks; densities, which are large, are each rank's own."""
        numbers = dataclasses.replace(measurement, densities={}) if self.ranks.first else None
        told, run = self.ranks.of_first((numbers, self._recorder.named), "what was measured")
        self._recorder.named = run
        assert told is not None
        return dataclasses.replace(told, densities=measurement.densities)

    def _warn_of_price(self) -> None:
        complaint = self._survey.price.complaint(self.steps_done, first=len(self.history) == 1)
        spaced = isinstance(self.cadence, OverheadBudget | LogSpaced)  # their share falls as the run goes on
        if complaint is not None and not spaced:
            self._complaints.warn("share", complaint)

    # Recording

    def record(self, scalars: Mapping[str, float]) -> None:
        """Write numbers of your own, those of a schedule, say, into the run at the present step; and keep them.

        They stand beside what was measured at that step. Of two numbers under one key the later one counts. What is not
        a number is refused: left out with one warning, unless ``strict``. One call is one transaction of the run file.

        Args:
            scalars: Numbers by key: of Python or NumPy, tensors of one element. NaN and infinity are kept.

        Raises:
            ArgumentError: With ``strict=True``, something is not a number, or a key no string. Nothing was recorded.
            StoreError: With ``strict=True``, the file cannot be written.
        """
        numbers, refused = numbers_in(scalars)
        if refused:
            message = f"record() takes numbers by name, and refuses {', '.join(refused)}"
            if self.strict:
                raise ArgumentError(message)
            self._complaints.warn("numbers", message)
        if not numbers:
            return
        if not self.recorded or self.recorded[-1][0] != self.steps_done:
            self.recorded.append((self.steps_done, {}))
        self.recorded[-1][1].update(numbers)
        self._recorder.numbers(self.steps_done, numbers, self._present_epoch())
        self._loggers.numbers(self.steps_done, numbers)

    def event(self, kind: str, message: str) -> None:
        """Write into the run that something happened at the present step; the kind is a word, the message says what."""
        self._recorder.event(self.steps_done, kind, message, self._present_epoch())

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
        """The run in the store, begun with the first measurement or record."""
        return self._recorder.run

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called: the monitor then follows nothing, and writes to no file of its own."""
        return self._closed

    def _description(self) -> dict[str, Any]:
        return describe(self._config, self.objective, self.settings, self.cadence, self._optimizer)

    def _introduction(self) -> tuple[str, dict[str, Any]]:
        return self._recorder.name, self._description()

    def _logger_failed(self, logger: Logger, error: Exception) -> None:
        self._complaints.logger_failed(logger, self.steps_done, error)

    def _in_common(self) -> dict[str, str]:
        own = {"warm starts": self._survey.warm.enabled, "kinds of strictness": self.strict}
        return in_common(self.settings, self.cadence, self._optimizer, self.steps_done, **own)

    def close(self) -> None:
        """Detach, close the loggers, and the run file if the monitor opened it."""
        self._closed = True
        self.detach()
        try:
            self._loggers.close()
        finally:
            self._recorder.close()

    def __enter__(self) -> CurvatureMonitor:
        self.clock.start()
        return self

    def __exit__(self, *_: object) -> None:
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
        self.steps_done, self._epoch, self._agreed = int(state["steps_done"]), state["epoch"], False
        self._decision.renew()
        self.clock.load_state_dict(state["clock"])
        if state["cadence"] is not None and hasattr(self.cadence, "load_state_dict"):
            self.cadence.load_state_dict(state["cadence"])
        run = self._recorder.load_state_dict(state, self.steps_done)
        self._loggers.resume(self.steps_done, run)
        self._survey.warm.forget()

    def __repr__(self) -> str:
        what = self.settings.preset or list(self.settings.quantities)
        return (
            f"CurvatureMonitor({self.objective!r}, {what!r}, {self.cadence!r}, "
            f"{len(self.history)} measurements in {self.steps_done} steps)"
        )
