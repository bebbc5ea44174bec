"""What one measurement of a model consists of."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer

from curvdiag.errors import ArgumentError, out_of_step
from curvdiag.monitor.quantities import QUANTITIES, Scalars, Workbench
from curvdiag.monitor.settings import Settings
from curvdiag.monitor.warm import WarmStarts
from curvdiag.objective import Objective
from curvdiag.results import Result
from curvdiag.spectrum import SpectralDensity

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Measurement(Result):
    """What was measured at one step.

    Attributes:
        step: Optimizer step.
        epoch: Epoch, if known.
        scalars: Numbers by key; see :class:`~curvdiag.monitor.CurvatureMonitor` for the keys.
        densities: Spectral densities by operator and block.
        seconds: What it took.
        notes: What a reader should know: eigenpairs that have not converged, parameters without influence.
    """

    step: int
    epoch: float | None
    scalars: Scalars
    densities: dict[tuple[str, str], SpectralDensity]
    seconds: float
    notes: tuple[str, ...] = ()

    def __getitem__(self, key: str) -> float:
        return float(self.scalars[key])

    def plot(self, ax: Axes | None = None, **options: Any) -> Axes:
        """Draw the density of the whole model."""
        if ("hessian", "") not in self.densities:
            raise ArgumentError("no density was measured: preset='light' has none, nor measure= without 'density'")
        return self.densities["hessian", ""].plot(ax=ax, **options)


@dataclass
class Found:
    """What :func:`measure` found.

    Attributes:
        scalars, densities, notes: As in :class:`Measurement`.
        matvecs: Products with the Hessian, its blocks and the noise covariance.
        failures: What went wrong, by quantity.
    """

    scalars: Scalars
    densities: dict[tuple[str, str], SpectralDensity]
    notes: list[str]
    matvecs: int
    failures: dict[str, Exception] = field(default_factory=dict)


def measure(
    objective: Objective,
    settings: Settings,
    *,
    strict: bool = False,
    optimizer: Optimizer | None = None,
    warm: WarmStarts | None = None,
) -> Found:
    """Measure the quantities of the settings; one that fails does not take the others with it.

    On several ranks one that fails on any of them is given up on all, and the next one goes on. The ``optimizer`` is
    that of the training, for what depends on its steps; ``warm`` is what earlier measurements left for this one, and
    takes what it leaves for the next.

    Raises:
        Exception: With ``strict`` the first failure; without it the first where nothing succeeded.
        DistributedError: Ranks are gone, or disagree.
    """
    obstacle = settings.obstacle(objective)
    if obstacle is not None and settings.preset is None:
        raise obstacle
    names = settings.quantities if obstacle is None else settings.without_noise()
    work = Workbench(objective, settings, names, optimizer, warm)
    unreached = work.hessian.unreached if set(names) != {"noise_trace"} else []  # fails once for all that need it
    failures: dict[str, Exception] = {}
    for name in names:
        try:
            _attempt(name, work)
        except Exception as error:
            if strict or out_of_step(error):
                raise
            failures[name] = error.with_traceback(None)  # whose frames would hold on to the graphs
    if len(failures) == len(names):
        raise next(iter(failures.values()))
    if unreached:
        work.notes.append(f"the loss does not reach {', '.join(unreached)}: their rows are zero")
    return Found(work.scalars, work.densities, work.notes, work.matvecs, failures)


def _attempt(name: str, work: Workbench) -> None:
    """Measure one quantity, on all ranks or on none of them."""
    if work.objective.holders.alone:
        QUANTITIES[name](work)
        return
    before = work.content()
    try:
        with work.objective.holders.together(f"measurement of {name}"):
            QUANTITIES[name](work)
    except Exception:
        work.restore(before)  # one rank may have come further than another
        raise
