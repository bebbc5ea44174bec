"""The learning rate at which a step of SGD gains most, from measured gradient, noise and curvature."""

from __future__ import annotations

import math
from typing import Any

from torch.optim import Optimizer

from curvdiag.errors import ArgumentError
from curvdiag.noise.noise_scale import NoiseScale
from curvdiag.schedules.following import Following
from curvdiag.schedules.measured_lr import FactorLR
from curvdiag.schedules.source import Measured

KEYS = {
    "gradient_square": "noise/gradient_square",
    "gradient_curvature": "noise/gradient_curvature",
    "trace_hc": "noise/trace_hc",
}


class NoiseCurvatureLR(FactorLR):
    """``lr = scale ||g||^2 / (g^T H g + tr(H C) / B)``: the best step of plain SGD with batches of ``B``.

    McCandlish et al. 2018, arXiv:1812.06162: on a quadratic the expected loss after one step is least there. It looks
    one step ahead and no further: along a narrow valley that is a small rate, and a schedule that plans ahead may do
    better with another. With momentum the rate means another thing; ``scale`` is there for it.

    ``||g||^2`` and the denominator are smoothed apart, and only then divided. Where either is not positive (the
    gradient cannot be told from its noise, or the curvature along it is negative), the rate is held, and
    that is logged.

    Of a monitor and of a :class:`~curvdiag.noise.NoiseScale` both ``||g||^2`` and ``g^T H g`` are those of the
    population: what the noise of the probe set's mean gradient adds to them is taken off. Either may then be negative,
    mostly where the probe set is small, or learnt by heart: take samples that are not trained on. The ratio of two
    noisy numbers is biased still, the less the more they are smoothed.

    Until the first measurement the rates are the initial ones.

    With a monitor whose cadence reads the clock (``OverheadBudget``, its default) two runs differ, and a resumed one is
    not bit-identical: give it ``every=``.

    Args:
        optimizer: The rate is absolute and goes to the first parameter group; the others keep the ratio of their
            initial rates to that group's.
        source: A monitor that measures ``"noise_scale"``, or a function that gives a
            :class:`~curvdiag.noise.NoiseScale` (``noise_scale(objective, curvature=True)``), or a mapping with
            ``"gradient_square"``, ``"gradient_curvature"`` and ``"trace_hc"``, which are taken as they are.
        batch_size: ``B``, in samples for each optimizer step: all ranks and accumulated micro-batches together.
        scale: Of the rate.
        smoothing: Weight of the old values, in [0, 1).
        low, high: Bounds of the first group's rate, before other schedules multiply it; no upper one by default.
        refresh: Call a function every so many steps; a monitor has a cadence of its own.
        last_epoch: -1 to begin.

    Raises:
        ArgumentError: An argument is out of its range, the first group's rate is zero, or the monitor does not measure
            the noise scale.

    Attributes:
        rate: Of the first group, by the last usable measurement; None before.
    """

    remembered = ("rate",)

    def __init__(
        self,
        optimizer: Optimizer,
        source: Measured,
        batch_size: float,
        *,
        scale: float = 1.0,
        smoothing: float = 0.9,
        low: float = 0.0,
        high: float | None = None,
        refresh: int = 1,
        last_epoch: int = -1,
    ) -> None:
        if not (batch_size > 0 and math.isfinite(batch_size)):
            raise ArgumentError(f"NoiseCurvatureLR: a batch size is a positive number of samples, not {batch_size}")
        if not (scale > 0 and math.isfinite(scale)):
            raise ArgumentError(f"NoiseCurvatureLR: scale is a positive number, not {scale}")
        top = math.inf if high is None else float(high)
        if not 0 <= low <= top or top == 0:
            raise ArgumentError(f"NoiseCurvatureLR: rates are clipped to 0 <= low <= high, not to {low} and {high}")
        self.batch_size, self.scale, self.low, self.high = float(batch_size), float(scale), float(low), top
        self.rate: float | None = None
        following = Following(
            source,
            KEYS,
            needs=["noise_scale"],
            refresh=refresh,
            owner="NoiseCurvatureLR",
            name="noise_curvature",
            smoothing=smoothing,
            inside=_of_population,
        )
        groups = optimizer.param_groups if isinstance(optimizer, Optimizer) else []  # PyTorch refuses anything else
        if groups and not float(groups[0].get("initial_lr", groups[0]["lr"])) > 0:
            raise ArgumentError(
                "NoiseCurvatureLR: the first parameter group's rate is zero, and the others' are set by their ratio to "
                "it; give it a positive one, or put another group first"
            )
        super().__init__(optimizer, following, last_epoch)

    def take(self, numbers: dict[str, float]) -> str:
        curvature = numbers["gradient_curvature"] + numbers["trace_hc"] / self.batch_size
        smooth = self.following.followed.take({"square": numbers["gradient_square"], "curvature": curvature})
        if not smooth["curvature"] > 0:
            return f"g^T H g + tr(HC)/B = {smooth['curvature']:.3g} is not positive: the quadratic has no best step"
        if not smooth["square"] > 0:
            return f"|g|^2 = {smooth['square']:.3g} is not positive: the gradient cannot be told from its noise"
        rate = self.scale * smooth["square"] / smooth["curvature"]
        if not (math.isfinite(rate) and rate > 0):
            return f"the rate {rate} is out of range"
        self.rate = min(max(rate, self.low), self.high)
        return ""

    def factors(self) -> list[float]:
        factor = 1.0 if self.rate is None else self.rate / float(self.base_lrs[0])
        return [factor] * len(self.base_lrs)

    def choice(self) -> dict[str, float]:
        return {} if self.rate is None else {"rate": self.rate}


def _of_population(answer: Any) -> Any:
    if not isinstance(answer, NoiseScale):
        return answer
    if answer.population_curvature is None:
        raise ArgumentError("the noise scale was measured without curvature: noise_scale(..., curvature=True)")
    return {
        "gradient_square": answer.gradient_square,
        "gradient_curvature": answer.population_curvature,
        "trace_hc": answer.trace_hc,
    }
