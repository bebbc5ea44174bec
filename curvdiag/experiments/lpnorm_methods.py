"""The methods of the ``lpnorm`` experiment: optimizers, where their settings are looked for, and schedules."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch.nn import Parameter
from torch.optim import SGD, AdamW, Optimizer

from curvdiag.experiments.lpnorm_tuning import Range
from curvdiag.objective import Objective
from curvdiag.optim import GSGD, LPSGD, LPSGDM, Lion, SignSGD
from curvdiag.schedules import AnisotropyLR, AnisotropyP, CosineP, PredictedDecreaseP
from curvdiag.spectrum import Anisotropy

P_MAX = 6.0
"""The paper's choice in five of its seven settings; the same everywhere, so that nothing has a third number to tune."""
MEASURE = "effective_rank"
"""What AnisotropyP follows, and what is shown beside p."""
HIGH_ANISOTROPY = 0.01
"""Effective rank, as a share of the parameters, at which AnisotropyP gives ``p_max``: the same on both tasks.

Its default, the first measurement, would give ``p_max`` wherever the curvature is more anisotropic than at the
initialisation, which it mostly is; the row "constant p" is close to that.
"""
DECISIONS_PER_EPOCH = 2
"""How often PredictedDecreaseP chooses."""
RATE_SMOOTHING = 0.5
"""Of AnisotropyLR, whose default is meant for more measurements than there are here."""


@dataclass(frozen=True)
class Scene:
    """What a schedule may need to know.

    Attributes:
        epochs, steps_per_epoch: Of the run.
        measure_every: Steps between two measurements of the anisotropy.
        objective: The training loss on some of the training images.
        gauge: Measures the anisotropy of its Hessian.
    """

    epochs: int
    steps_per_epoch: int
    measure_every: int
    objective: Objective
    gauge: Callable[[], Anisotropy]


Build: TypeAlias = Callable[[Iterable[Parameter], float, float, int], Optimizer]
"""(parameters, learning rate, weight decay, steps of the run) -> optimizer."""


@dataclass(frozen=True)
class Method:
    """One row of the comparison.

    Attributes:
        build: Makes the optimizer.
        search: Where its settings are looked for.
        p: Makes its schedule of p, where it has one.
        p_per_step: Whether that is stepped after each step, and not after each epoch.
        rate: Wraps the learning-rate schedule, where more than warm-up and cosine is wanted.
        measured: Whether its schedules measure the anisotropy.
    """

    build: Build
    search: Range
    p: Callable[[Optimizer, Scene], Any] | None = None
    p_per_step: bool = False
    rate: Callable[[Any, Scene], Any] | None = None
    measured: bool = False


def _sgd(momentum: float) -> Build:
    return lambda params, lr, decay, steps: SGD(params, lr, momentum=momentum, weight_decay=decay)


def _adamw(params: Iterable[Parameter], lr: float, decay: float, steps: int) -> Optimizer:
    return AdamW(params, lr, weight_decay=decay)


def _lion(params: Iterable[Parameter], lr: float, decay: float, steps: int) -> Optimizer:
    return Lion(params, lr, weight_decay=decay)


def _sign_sgd(params: Iterable[Parameter], lr: float, decay: float, steps: int) -> Optimizer:
    return SignSGD(params, lr, weight_decay=decay)


def _gsgd(params: Iterable[Parameter], lr: float, decay: float, steps: int) -> Optimizer:
    return GSGD(params, lr, total_steps=steps, weight_decay=decay)


def _lpsgd(params: Iterable[Parameter], lr: float, decay: float, steps: int) -> Optimizer:
    return LPSGD(params, lr, P_MAX, weight_decay=decay)


def _lpsgdm(params: Iterable[Parameter], lr: float, decay: float, steps: int) -> Optimizer:
    return LPSGDM(params, lr, P_MAX, weight_decay=decay)


def _cosine_p(optimizer: Optimizer, scene: Scene) -> Any:
    return CosineP(optimizer, scene.epochs)


def _anisotropy_p(optimizer: Optimizer, scene: Scene) -> Any:
    high = HIGH_ANISOTROPY * sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    return AnisotropyP(optimizer, scene.gauge, measure=MEASURE, a_high=high, refresh=scene.measure_every)


def _predicted_decrease_p(optimizer: Optimizer, scene: Scene) -> Any:
    every = max(1, scene.steps_per_epoch // DECISIONS_PER_EPOCH)
    return PredictedDecreaseP(optimizer, scene.objective, every=every)


def _anisotropy_lr(scheduler: Any, scene: Scene) -> Any:
    return AnisotropyLR(scheduler, scene.gauge, smoothing=RATE_SMOOTHING, refresh=scene.measure_every)


# Each range begins at about the rate that the paper chose on CIFAR-10, or that is customary where it has none, and goes
# up, since runs of a few hundred steps want higher rates; its middle was set after four or five rates of each kind.
# PyTorch's SGD adds its decay to the gradient; all others shrink the weights by rate times decay.
_SGD = Range(lr=0.5, weight_decay=3e-4)
_ADAM = Range(lr=2e-2, weight_decay=3e-3)
_LION = Range(lr=3e-3, weight_decay=3e-3)
_SIGN = Range(lr=1e-2, weight_decay=3e-3)
_POWER = Range(lr=3e-2, weight_decay=3e-3)

METHODS: dict[str, Method] = {
    "SGD": Method(_sgd(0.0), _SGD),
    "SGD-M": Method(_sgd(0.9), _SGD),
    "SGD-M, AnisotropyLR": Method(_sgd(0.9), _SGD, rate=_anisotropy_lr, measured=True),
    "AdamW": Method(_adamw, _ADAM),
    "Lion": Method(_lion, _LION),
    "SignSGD": Method(_sign_sgd, _SIGN),
    "GSGD": Method(_gsgd, _POWER),
    "LPSGD, CosineP": Method(_lpsgd, _POWER, p=_cosine_p),
    "LPSGD, AnisotropyP": Method(_lpsgd, _POWER, p=_anisotropy_p, p_per_step=True, measured=True),
    "LPSGD, PredictedDecreaseP": Method(_lpsgd, _POWER, p=_predicted_decrease_p, p_per_step=True),
    "LPSGDM, constant p": Method(_lpsgdm, _POWER),
    "LPSGDM, CosineP": Method(_lpsgdm, _POWER, p=_cosine_p),
    "LPSGDM, AnisotropyP": Method(_lpsgdm, _POWER, p=_anisotropy_p, p_per_step=True, measured=True),
    "LPSGDM, PredictedDecreaseP": Method(_lpsgdm, _POWER, p=_predicted_decrease_p, p_per_step=True),
    "LPSGDM, CosineP, AnisotropyLR": Method(_lpsgdm, _POWER, p=_cosine_p, rate=_anisotropy_lr, measured=True),
}
"""By name, in the order of the table."""
BASELINES = ("SGD-M", "AdamW", "Lion")
"""What the paper compares with, in its order; every method is compared with the first two, and LPSGDM with all."""
PUBLISHED = "LPSGDM, CosineP"
"""The paper's method."""
CONTROLS = {
    **{name: "SGD" for name in METHODS if name.startswith("LPSGD,")},
    **{name: "LPSGDM, constant p" for name in METHODS if name.startswith("LPSGDM,") and METHODS[name].p is not None},
    "SGD-M, AnisotropyLR": "SGD-M",
    "LPSGDM, CosineP, AnisotropyLR": PUBLISHED,
}
"""What each method adds to: SGD with p = 2 throughout, LPSGDM with p = 6 throughout, the plain cosine of the rate."""
