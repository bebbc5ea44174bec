"""Quadratics and a quartic on which gradient noise or curvature change along the way.

States ``x`` are ``[S, M, d]``, in the eigenbasis of the Hessian unless said otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from curvdiag.experiments.cwgd_measured import rotation
from curvdiag.experiments.quadratics import Array, curvatures_of, cwgd, excess, noise_of
from curvdiag.noise.cwgd_result import FRACTION

STEPS, CONDITION = 2000, 100.0
REFRESHES, PROBES = 8, 20
"""Hutchinson's diagonal is taken anew every T/8 steps, from 20 probes, as published."""


@dataclass
class _Quadratic:
    """What the cases share."""

    steps: int = STEPS
    condition: float = CONDITION
    batch_size: int = 16
    scale: float = 10.0
    """Every coordinate of the start."""

    def __post_init__(self) -> None:
        self.curvatures = curvatures_of(self.condition)
        self._diagonal = np.empty(0)

    def start(self, seeds: int, methods: int) -> Array:
        return np.full((seeds, methods, len(self.curvatures)), self.scale)

    def error(self, x: Array) -> Array:
        return excess(x**2, self.curvatures)

    def refreshes(self, t: int) -> bool:
        return t % max(1, self.steps // REFRESHES) == 0

    def _normal(self, seeds: int, generator: np.random.Generator) -> Array:
        """The mean of a mini-batch of standard normal numbers ``[S, 1, d]``."""
        return generator.standard_normal((seeds, 1, len(self.curvatures))) / np.sqrt(self.batch_size)


def hutchinson(signs: Array, products: Array) -> Array:
    """The diagonal ``[S, 1, d]`` from signs and products ``[S, probes, d]``, as curvdiag's diagonal CWGD takes it.

    Sizes of the entries, none smaller than a thousandth of the largest.
    """
    diagonal = (signs * products).mean(1, keepdims=True)
    top = diagonal.max(-1, keepdims=True)
    return np.maximum(np.abs(diagonal), FRACTION * np.where(top > 0, top, np.abs(diagonal).max(-1, keepdims=True)))


@dataclass
class Regression(_Quadratic):
    """Least squares ``1/2 (a^T x - xi)^2`` with Gaussian inputs of covariance ``H``: the noise falls with the error.

    ``C = (x^T H x + 1) H + H x x^T H``. With ``"mini-batch"`` both the variances and Hutchinson's diagonal come from
    the mini-batch, whose own Hessian is not diagonal.
    """

    name: str = "linear regression"
    forms: tuple[str, ...] = ("known", "mini-batch")

    def draw(self, seeds: int, t: int, generator: np.random.Generator) -> tuple[Array, Array]:
        size, d = self.batch_size, len(self.curvatures)
        inputs = generator.standard_normal((seeds, size, d)) * np.sqrt(self.curvatures)
        if self.refreshes(t):
            signs = generator.choice([-1.0, 1.0], (seeds, PROBES, d))
            self._diagonal = hutchinson(signs, (signs @ inputs.transpose(0, 2, 1)) @ inputs / size)
        return inputs, generator.standard_normal((seeds, 1, size))

    def gradient(self, x: Array, draw: Any, t: int) -> Array:
        inputs, targets = draw
        return (x @ inputs.transpose(0, 2, 1) - targets) @ inputs / self.batch_size

    def cwgd(self, form: str, x: Array, draw: Any, t: int) -> Array:
        if form == "known":
            quadratic = np.sum(self.curvatures * x**2, axis=-1)
            return 2 * (len(self.curvatures) * (quadratic + 1) + quadratic)
        inputs, targets = draw
        squares = (x @ inputs.transpose(0, 2, 1) - targets) ** 2
        mean = self.gradient(x, draw, t)
        variances = (squares @ inputs**2 / self.batch_size - mean**2) * (self.batch_size / (self.batch_size - 1))
        return cwgd(variances, self._diagonal)

    def expected_noise(self, second: Array) -> Array:
        """Variances of the mini-batch gradient in expectation, from second moments: for the exact recursion."""
        quadratic = np.sum(self.curvatures * second, axis=-1, keepdims=True)
        return ((quadratic + 1) * self.curvatures + self.curvatures**2 * second) / self.batch_size


@dataclass
class Multiplicative(_Quadratic):
    """Noise of variance ``1 + lambda_k x_k^2`` in mode ``k``: it falls with the loss of the mode, in slow ones last.

    With ``"mini-batch"`` the variances are those over the mini-batch; the Hessian is diagonal, and Hutchinson's
    diagonal exact.
    """

    name: str = "noise 1 + \N{GREEK SMALL LETTER LAMDA}x\N{SUPERSCRIPT TWO}"
    forms: tuple[str, ...] = ("known", "mini-batch")

    def draw(self, seeds: int, t: int, generator: np.random.Generator) -> tuple[Array, Array]:
        freedom = self.batch_size - 1
        chi_square = generator.standard_gamma(freedom / 2, (seeds, 1, len(self.curvatures))) * 2
        return self._normal(seeds, generator), chi_square / freedom

    def gradient(self, x: Array, draw: Any, t: int) -> Array:
        return self.curvatures * x + np.sqrt(self.variances(x)) * draw[0]

    def variances(self, x: Array) -> Array:
        """Of one sample's gradient."""
        return 1 + self.curvatures * x**2

    def cwgd(self, form: str, x: Array, draw: Any, t: int) -> Array:
        return cwgd(self.variances(x) * (1.0 if form == "known" else draw[1]), self.curvatures)

    def expected_noise(self, second: Array) -> Array:
        return (1 + self.curvatures * second) / self.batch_size


@dataclass
class Rotated(Multiplicative):
    """The same, seen in coordinates in which the Hessian is not diagonal: full form against diagonal form.

    The steps are the same as in the eigenbasis; only the diagonal form sees the coordinates. It takes the true
    diagonal of ``H``, or Hutchinson's from 20 probes; the variances are known.
    """

    name: str = "the same, H rotated"
    forms: tuple[str, ...] = ("full", "diagonal", "diagonal, 20 probes")
    turn: int = 0
    """Seed of the coordinates."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.basis = rotation(len(self.curvatures), np.random.default_rng(self.turn))
        self.hessian = (self.basis * self.curvatures) @ self.basis.T

    def draw(self, seeds: int, t: int, generator: np.random.Generator) -> tuple[Array, Array]:
        if self.refreshes(t):
            signs = generator.choice([-1.0, 1.0], (seeds, PROBES, len(self.curvatures)))
            self._diagonal = hutchinson(signs, signs @ self.hessian)
        return super().draw(seeds, t, generator)

    def cwgd(self, form: str, x: Array, draw: Any, t: int) -> Array:
        if form == "full":
            return cwgd(self.variances(x), self.curvatures)
        diagonal = self.hessian.diagonal() if form == "diagonal" else self._diagonal
        return cwgd(self.variances(x) @ (self.basis**2).T, diagonal)


@dataclass
class Turning(_Quadratic):
    """A Hessian that turns by a right angle along the way, in the planes of modes ``k`` and ``d - 1 - k``.

    What was sharp at the start is flat at the end. The noise stays where it was: ``"proportional"`` to the Hessian at
    the start, or its ``"inverse"``. States are in the fixed coordinates.
    """

    noise: str = "proportional"
    name: str = ""
    forms: tuple[str, ...] = ("full", "diagonal")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.name = f"turning H, {self.noise} noise"
        self.variances = noise_of(self.noise, self.curvatures)

    def hessian(self, t: int) -> tuple[Array, Array]:
        """At step ``t``: the diagonal ``[d]``, and entries ``(k, d - 1 - k)``, ``[d]``."""
        angle = np.pi / 2 * t / self.steps
        other = self.curvatures[::-1]
        diagonal = np.cos(angle) ** 2 * self.curvatures + np.sin(angle) ** 2 * other
        half = len(self.curvatures) // 2
        sign = np.r_[np.ones(half), -np.ones(len(self.curvatures) - half)]  # symmetric: the entry of k and its partner
        return diagonal, np.cos(angle) * np.sin(angle) * (self.curvatures - other) * sign

    def draw(self, seeds: int, t: int, generator: np.random.Generator) -> Array:
        return self._normal(seeds, generator) * np.sqrt(self.variances)

    def gradient(self, x: Array, draw: Any, t: int) -> Array:
        diagonal, across = self.hessian(t)
        return diagonal * x + across * x[..., ::-1] + draw

    def cwgd(self, form: str, x: Array, draw: Any, t: int) -> Array:
        diagonal, _ = self.hessian(t)
        if form == "diagonal":
            value = cwgd(self.variances, diagonal)
        else:  # the inverse of a 2 by 2 block has the other entry of the diagonal over the determinant
            value = cwgd(self.variances, self.curvatures * self.curvatures[::-1] / diagonal[::-1])
        return np.full(x.shape[:2], value)

    def error(self, x: Array) -> Array:
        diagonal, across = self.hessian(self.steps)
        return 0.5 * np.sum(x * (diagonal * x + across * x[..., ::-1]), axis=-1)


@dataclass
class Quartic(_Quadratic):
    """``sum_k lambda_k (x_k^2 / 2 + x_k^4 / 4)`` with constant noise: the curvature falls on the way to the minimum."""

    scale: float = 1.0
    name: str = "quartic"
    forms: tuple[str, ...] = ("known",)
    variances: Array = field(default_factory=lambda: np.ones(1))

    def draw(self, seeds: int, t: int, generator: np.random.Generator) -> Array:
        return self._normal(seeds, generator)

    def gradient(self, x: Array, draw: Any, t: int) -> Array:
        return self.curvatures * (x + x**3) + draw

    def cwgd(self, form: str, x: Array, draw: Any, t: int) -> Array:
        return cwgd(self.variances, self.curvatures * (1 + 3 * x**2))

    def error(self, x: Array) -> Array:
        return np.sum(self.curvatures * (x**2 / 2 + x**4 / 4), axis=-1)


def all_cases(steps: int = STEPS) -> list[Any]:
    """Every case, in the order of the figure."""
    return [
        Regression(steps),
        Multiplicative(steps),
        Rotated(steps),
        Turning(steps, noise="proportional"),
        Turning(steps, noise="inverse"),
        Quartic(steps),
    ]
