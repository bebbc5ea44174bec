"""What the ``geometry`` experiment compares, and what it finds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from curvdiag.results import Result

GD, SIGN, COSINE, ANISOTROPY = "GD", "signGD", "cosine p", "anisotropy p"
PREDICTED, UNSMOOTHED = "predicted p", "predicted p, unsmoothed"
METHODS = (GD, SIGN, COSINE, ANISOTROPY, PREDICTED, UNSMOOTHED)
ANGLES = {"as published": 0.0, "turned by 45°": math.pi / 4}


@dataclass(frozen=True)
class Path2D(Result):
    """One descent.

    Attributes:
        points: ``theta`` before each step and after the last, ``[T + 1, 2]``.
        p: At each step, ``[T]``; infinite for signGD.
    """

    points: Tensor
    p: tuple[float, ...]


@dataclass(frozen=True)
class Outcome(Result):
    """Where descents from many starts end.

    Attributes:
        distance: From the optimum: the median, and the two values between which nine in ten of the starts lie.
        loss: The same of the losses.
        nearer: Share of the starts from which the method ends nearer than GD from the same start, with a 95 % interval
            (Wilson).
        lower: The same for a lower loss.
        jumps: Mean share of the steps at which ``p`` moved by more than a half.
        multiplier: Of the published rates.
    """

    distance: tuple[float, float, float]
    loss: tuple[float, float, float]
    nearer: tuple[float, float, float]
    lower: tuple[float, float, float]
    jumps: float
    multiplier: float = 1.0


@dataclass(frozen=True)
class Geometry(Result):
    """What the experiment found.

    Attributes:
        paths: By toy and method, from one start.
        outcomes: By toy, angle, rates (``"published"`` or ``"best"``), steps and method.
        starts, steps, seed: As given.
    """

    paths: Mapping[str, Mapping[str, Path2D]]
    outcomes: Mapping[str, Mapping[str, Mapping[str, Mapping[int, Mapping[str, Outcome]]]]]
    starts: int
    steps: tuple[int, ...]
    seed: int
