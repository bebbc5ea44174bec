"""Cosine annealing, divided by how much curvature-weighted gradient diversity there is."""

from __future__ import annotations

import math
from typing import Literal, get_args

from torch.optim import Optimizer

from curvdiag.errors import ArgumentError
from curvdiag.noise.cwgd_result import CWGD
from curvdiag.schedules.following import Following
from curvdiag.schedules.measured_lr import FactorLR
from curvdiag.schedules.source import Measured

Form = Literal["full", "diagonal"]
QUANTITIES: dict[Form, str] = {"full": "cwgd", "diagonal": "cwgd_diagonal"}


class CWGDCosineLR(FactorLR):
    """``lr = eta_cos(t) / (1 + alpha CWGD_t / CWGD_0)``, with ``CWGD_0`` the first measurement.

    Hamza and Goel, arXiv:2606.30455; ``eta_cos`` is that of ``torch.optim.lr_scheduler.CosineAnnealingLR``, and CWGD is
    :func:`curvdiag.noise.cwgd.cwgd`.

    Beware of what the formula does by itself: while CWGD stays what it was, as with a constant Hessian and noise that
    does not depend on the weights, ``CWGD_t / CWGD_0`` is 1 and this is cosine annealing from ``lr / (1 + alpha)``. A
    comparison with plain cosine then only shows that its peak rate was too high: with a rate that falls to zero, half
    the peak leaves a final error that is ``1 - 2^(-1/3)`` = 20.6 % lower, whatever the condition number, batch and
    noise. Compare with cosine from ``lr / (1 + alpha)``, with cosine from its best rate, and with ``normalized=True``:
    ``eta_cos (1 + alpha) / (1 + alpha CWGD_t / CWGD_0)``, which is plain cosine while CWGD is constant, and keeps only
    what is adaptive.

    Until the first measurement the rate is plain cosine, and with ``normalized=False`` it falls by ``1 + alpha`` when
    that comes: make one before the training (``monitor.measure()``), or the schedule gets a jump. A measurement that
    is NaN, negative, or fails is logged, and the last one held; so is zero where it would be ``CWGD_0``, and the rate
    then stays plain cosine until a positive one comes.

    With a monitor whose cadence reads the clock (``OverheadBudget``, its default) two runs differ, and a resumed one is
    not bit-identical: give it ``every=``.

    Args:
        optimizer: Whose rates are set. A group whose rate is zero keeps it.
        T_max: Steps to ``eta_min``. As with PyTorch's, the rate rises again after that.
        source: A monitor that measures ``"cwgd"`` (or ``"cwgd_diagonal"``), or a function that gives the
            number or a :class:`~curvdiag.noise.CWGD`.
        alpha: Not negative; 1 in the paper.
        eta_min: Of the cosine, before the division.
        normalized: See above.
        form: Which of the monitor's two: ``"full"`` (``2 tr((|H| + delta)^-1 C)``), or ``"diagonal"``, the published
            one. A function gives whichever it likes.
        refresh: Call a function every so many steps (published: about ``T_max / 8``); a monitor has a cadence of its
            own.
        last_epoch: -1 to begin.

    Raises:
        ArgumentError: An argument is out of its range, or the monitor does not measure CWGD.

    Attributes:
        cwgd, first: The measurement that it goes by, and the first one; None before.
    """

    remembered = ("cwgd", "first")

    def __init__(
        self,
        optimizer: Optimizer,
        T_max: int,
        source: Measured,
        *,
        alpha: float = 1.0,
        eta_min: float = 0.0,
        normalized: bool = False,
        form: Form = "full",
        refresh: int = 1,
        last_epoch: int = -1,
    ) -> None:
        if not T_max >= 1:
            raise ArgumentError(f"CWGDCosineLR: T_max is a number of steps, at least 1, not {T_max!r}")
        if not (alpha >= 0 and math.isfinite(alpha)):
            raise ArgumentError(f"CWGDCosineLR: alpha is a finite number of at least 0, not {alpha}")
        if not (eta_min >= 0 and math.isfinite(eta_min)):
            raise ArgumentError(f"CWGDCosineLR: eta_min is a finite rate of at least 0, not {eta_min}")
        if form not in get_args(Form):
            raise ArgumentError(f'CWGDCosineLR: the form of CWGD is "full" or "diagonal", not {form!r}')
        self.T_max, self.alpha, self.eta_min, self.normalized = T_max, float(alpha), float(eta_min), normalized
        self.cwgd: float | None = None
        self.first: float | None = None
        following = Following(
            source,
            {"cwgd": f"noise/{QUANTITIES[form]}"},
            needs=[QUANTITIES[form]],
            refresh=refresh,
            owner="CWGDCosineLR",
            name="cwgd_cosine",
            inside=lambda answer: answer.value if isinstance(answer, CWGD) else answer,
        )
        super().__init__(optimizer, following, last_epoch)

    def take(self, numbers: dict[str, float]) -> str:
        cwgd = numbers["cwgd"]
        if cwgd < 0 or (cwgd == 0 and self.first is None):
            return f"CWGD = {cwgd:g} is not positive, and cannot be compared with"
        self.cwgd = cwgd
        self.first = cwgd if self.first is None else self.first
        return ""

    @property
    def divisor(self) -> float:
        """What the cosine's rate is divided by."""
        if self.cwgd is None or self.first is None:
            return 1.0
        divisor = 1 + self.alpha * (self.cwgd / self.first)
        return divisor / (1 + self.alpha) if self.normalized else divisor

    def factors(self) -> list[float]:
        falling = (1 + math.cos(math.pi * self.last_epoch / self.T_max)) / 2
        bases = [float(lr) for lr in self.base_lrs]
        cosines = [self.eta_min + (base - self.eta_min) * falling for base in bases]
        return [cosine / base / self.divisor if base else 0.0 for cosine, base in zip(cosines, bases, strict=True)]

    def choice(self) -> dict[str, float]:
        return {"divisor": self.divisor}
