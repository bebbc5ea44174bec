"""CWGD as curvdiag measures it along a run of SGD on a quadratic, where the known one does not change.

The objective's sample ``i`` has the loss ``1/2 x^T H x + e_i^T x``: its gradient is ``H x + e_i``, its Hessian ``H``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from curvdiag.experiments.cwgd_cells import ETA_MAX, START
from curvdiag.experiments.quadratics import Array, cosine, curvatures_of, noise_of
from curvdiag.noise.cwgd import cwgd
from curvdiag.objective import Objective
from curvdiag.operators.hessian import Hessian
from curvdiag.results import Result


@dataclass(frozen=True)
class MeasuredRun(Result):
    """CWGD at equal distances along one run of SGD with cosine.

    Attributes:
        condition, noise, batch_size, steps, rotated: Of the run; rotated is a Hessian that is not diagonal.
        at: Steps ``[n]`` before which it was measured.
        known: ``2 tr(H^-1 C)`` with the distribution's ``C``.
        values: What was measured ``[n]``, by way.
        wander: Largest ``|CWGD_t / CWGD_0 - 1|``, by way.
        spread: Standard deviation of ``CWGD_t`` along the run over its mean, by way.
    """

    condition: float
    noise: str
    batch_size: int
    steps: int
    rotated: bool
    at: tuple[int, ...]
    known: float
    values: dict[str, list[float]]
    wander: dict[str, float]
    spread: dict[str, float]


def rotation(dimension: int, generator: np.random.Generator) -> Array:
    """A random orthogonal matrix (uniform)."""
    basis, triangle = np.linalg.qr(generator.standard_normal((dimension, dimension)))
    return basis * np.sign(triangle.diagonal())


def measured_run(
    condition: float = 100.0,
    noise: str = "isotropic",
    batch_size: int = 16,
    steps: int = 2000,
    *,
    rotated: bool = False,
    points: int = 9,
    probe_samples: int = 256,
    probes: int = 20,
    seed: int = 0,
) -> MeasuredRun:
    """Run SGD and measure CWGD at ``points`` steps, about ``T / (points - 1)`` apart.

    In the diagonal and the full form with one fixed probe set and fixed random vectors; in the diagonal form as
    published, from the mini-batch of that step, with fresh signs and finite differences of gradients; and in the full
    form from that mini-batch.

    Args:
        probe_samples: Of the fixed probe set.
        probes: Of the diagonal form.
    """
    generator = np.random.default_rng(seed)
    curvatures = curvatures_of(condition)
    spread = np.sqrt(noise_of(noise, curvatures))
    basis = rotation(len(curvatures), generator) if rotated else np.eye(len(curvatures))
    hessian = (basis * curvatures) @ basis.T
    x = START * basis.sum(1)
    fixed = _samples(probe_samples, spread, basis, generator)
    rates = ETA_MAX * cosine(steps)
    at = np.unique(np.linspace(0, steps - 1, points).round().astype(int))
    values: dict[str, list[float]] = {}
    for t in range(steps):
        batch = _samples(batch_size, spread, basis, generator)
        if t in at:
            for name, measure in _ways(hessian, x, fixed, batch, probes, seed, t).items():
                values.setdefault(name, []).append(measure())
        x = x - rates[t] * (hessian @ x + batch.mean(0))
    return MeasuredRun(
        condition=condition,
        noise=noise,
        batch_size=batch_size,
        steps=steps,
        rotated=rotated,
        at=tuple(at.tolist()),
        known=float(2 * np.sum(spread**2 / curvatures)),
        values=values,
        wander={name: max(abs(v / one[0] - 1) for v in one) for name, one in values.items()},
        spread={name: float(np.std(one, ddof=1) / np.mean(one)) for name, one in values.items()},
    )


def _samples(count: int, spread: Array, basis: Array, generator: np.random.Generator) -> Array:
    return (generator.standard_normal((count, len(spread))) * spread) @ basis.T


def _ways(
    hessian: Array, x: Array, fixed: Array, batch: Array, probes: int, seed: int, t: int
) -> dict[str, Callable[[], float]]:
    own, fresh = _objective(hessian, x, fixed), _objective(hessian, x, batch)

    def published() -> float:
        products = Hessian(fresh, method="finite-difference")
        return cwgd(fresh, "diagonal", probes=probes, seed=seed + t, hessian=products).value.value

    return {
        "diagonal, fixed probe set": lambda: cwgd(own, "diagonal", probes=probes, seed=seed).value.value,
        "full, fixed probe set": lambda: cwgd(own, "full", delta=_small(hessian), seed=seed).value.value,
        "diagonal, mini-batch, finite differences": published,
        "full, mini-batch": lambda: cwgd(fresh, "full", delta=_small(hessian), seed=seed + t).value.value,
    }


def _small(hessian: Array) -> float:
    """A delta that changes no eigenvalue by more than a millionth."""
    return 1e-6 * float(np.linalg.eigvalsh(hessian)[0])


def _objective(hessian: Array, x: Array, noise: Array) -> Objective:
    matrix = torch.from_numpy(hessian)
    model = nn.ParameterList([nn.Parameter(torch.from_numpy(x.copy()))])

    def loss(module: nn.Module, samples: Tensor) -> Tensor:
        weights = module[0]  # type: ignore[index]
        return 0.5 * weights @ (matrix @ weights) + samples @ weights

    return Objective.from_loss(model, loss, batch=torch.from_numpy(noise))
