"""What the spectrum algorithms find, in plain numbers; an objective in parts; a matrix in parts."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from curvdiag import (
    GaussNewton,
    Hessian,
    NoiseCovariance,
    Objective,
    diagonal,
    frobenius_norm,
    layer_spectra,
    measure_spectrum,
    power_iteration,
    spectral_density,
    top_eigenpairs,
    trace,
)
from curvdiag.distributed import ALONE, Ranks
from curvdiag.noise.cwgd_full import full_form
from curvdiag.operators.base import Cost, SymmetricOperator
from curvdiag.operators.scaled import Scaled
from curvdiag.scaling.joint_traces import joint_traces
from curvdiag.schedules.predicted_decrease import predicted_decrease
from curvdiag.space import Piece, ShardedSpace, Space, WholeSpace
from curvdiag.space.probes import gaussian

SAMPLES = 23
TIGHT = ("density", "deflated", "auto", "five", "measured", "hutchinson")
"""Algorithms whose groups and bases depend on free memory."""
CUTS = {1: [SAMPLES], 2: [14, 9], 3: [10, 8, 5]}


def objective(rank: int = 0, world: int = 1, dtype: torch.dtype = torch.float64) -> Objective:
    """A smooth net of 107 parameters on this rank's share of 23 samples, the shares of unequal sizes."""
    generator = torch.Generator().manual_seed(5)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 3)).to(dtype)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.7)
    x = torch.randn(SAMPLES, 6, generator=generator, dtype=torch.float64).to(dtype)
    y = torch.randint(3, (SAMPLES,), generator=generator)
    own = slice(sum(CUTS[world][:rank]), sum(CUTS[world][: rank + 1]))
    return Objective(net, F.cross_entropy, (x[own], y[own]), group=None if world == 1 else "world")


def moments(density: Any) -> np.ndarray:
    """Of each probe: ``tr H^k / P`` for k = 1 to 4, over the largest absolute eigenvalue to the same power."""
    scale = max(abs(density.lambda_max), abs(density.lambda_min))
    return np.stack([density.per_probe(lambda x, k=k: (x / scale) ** k) for k in range(1, 5)])


def density_numbers(density: Any) -> dict[str, Any]:
    support = np.array([density.lambda_min, density.lambda_max])
    return {"moments": moments(density), "ends": support, "deflated": density.deflated} | {
        "counts": (density.matvecs, density.steps, density.probes, density.note)
    }


def pair_numbers(pairs: Any, space: Space) -> dict[str, Any]:
    vectors = space.gathered(pairs.vectors.T.contiguous())
    return {
        "values": pairs.values.numpy(),
        "squares": vectors.double().square().sum(1).numpy(),
        "vectors": vectors.numpy(),
        "counts": (pairs.matvecs, *pairs.converged.tolist()),
    }


def estimate_numbers(estimate: Any) -> dict[str, Any]:
    return {"value": np.asarray(estimate.value), "error": np.asarray(estimate.standard_error)}


def algorithms(op: Any, other: Any, space: Space) -> dict[str, Callable[[], dict[str, Any]]]:
    """Every algorithm by name; each gives arrays, and counts that must be the same."""
    start = space.part(gaussian(2, space.size, seed=8, dtype=torch.float64)).T

    def density(**options: Any) -> Callable[[], dict[str, Any]]:
        return lambda: density_numbers(spectral_density(op, seed=3, **{"steps": 12, "probes": 3, **options}))

    def pairs(k: int, **options: Any) -> Callable[[], dict[str, Any]]:
        return lambda: pair_numbers(top_eigenpairs(op, k, seed=3, **options), space)

    def traces(method: Any) -> Callable[[], dict[str, Any]]:
        return lambda: estimate_numbers(trace(op, method=method, probes=13, seed=3))

    def whole_diagonal() -> dict[str, Any]:
        found = diagonal(op, 5, seed=3)
        rows = torch.from_numpy(np.stack([found.value, found.standard_error]))
        return {"diagonal": space.gathered(rows).numpy()}

    def measured() -> dict[str, Any]:
        found = measure_spectrum(op, 3, steps=15, probes=3, seed=3)
        return density_numbers(found.density) | pair_numbers(found.eigenpairs, space)

    def decrease() -> dict[str, Any]:
        return {"value": predicted_decrease(op, start[:, 0], (op @ start).to(start)).numpy()}

    def joint() -> dict[str, Any]:
        table = joint_traces(op, other, 5, 3, True, None).table
        return {"table": table / np.abs(table).max(1, keepdims=True)}

    def full() -> dict[str, Any]:
        found = full_form(op, start.T.to(op.dtype).contiguous(), delta=3.0, steps=8, max_steps=8)
        return {"value": np.array([found.value.value, found.with_tenfold.value])} | {"counts": (found.matvecs,)}

    return {
        "density": density(),
        "partial": density(reorthogonalize="partial"),
        "full": density(reorthogonalize="full"),
        "deflated": density(deflate=5),
        "auto": density(deflate="auto", steps=30),
        "rtol": density(rtol=0.4, probes=4, steps=30),
        "top": pairs(1),
        "five": pairs(5, tol=1e-4),
        "both ends": pairs(4, which="BE"),
        "restarted": pairs(3, basis_size=9, tol=1e-4),
        "warm": pairs(1, start=start),
        "power": lambda: pair_numbers(power_iteration(op, seed=3, max_matvecs=7), space),
        "hutchinson": traces("hutchinson"),
        "hutch++": traces("hutch++"),
        "xtrace": traces("xtrace"),
        "exact trace": lambda: estimate_numbers(trace(op, method="xtrace", probes=space.size)),
        "norm": lambda: estimate_numbers(frobenius_norm(op, 5, seed=3)),
        "diagonal": whole_diagonal,
        "measured": measured,
        "decrease": decrease,
        "joint": joint,
        "full form": full,
    }


def layers(op: Any) -> dict[Any, Any]:
    found = {}
    for case, options in {"steps": {"steps": 6}, "tol": {"tol": 1e-2}, "both": {"steps": 4, "tol": 1e-3}}.items():
        spectra = layer_spectra(op, seed=3, **options)
        for name, layer in spectra.layers.items():
            found[case, name] = np.array([layer.lambda_max, layer.trace.value, layer.density.moment(2).value])
            found[case, name, "n"] = layer.matvecs, layer.converged
    return found


def others(objective: Objective) -> dict[str, Any]:
    """Other matrices of the objective, and a scaled one, by their largest eigenvalue and trace."""
    H = Hessian(objective)
    scale = torch.linspace(0.5, 2, H.size, dtype=H.dtype)
    named = {"H": H, "G": GaussNewton(objective), "C": NoiseCovariance(objective), "scaled": Scaled(H, scale)}
    found = {}
    for name, op in named.items():
        tools = algorithms(op, op, op.space)
        found[name] = {what: tools[what]() for what in ("top", "density", "hutchinson")}
    return found


def differences(found: dict[str, Any], expected: dict[str, Any]) -> dict[str, float]:
    """The largest difference of each array as a share of its largest entry; infinite where counts differ."""
    assert found.keys() == expected.keys()
    worst = {}
    for name, reference in expected.items():
        if name == "counts":
            worst[name] = 0.0 if found[name] == reference else math.inf
            continue
        own, wanted = np.asarray(found[name], np.float64), np.asarray(reference, np.float64)
        if own.shape != wanted.shape or not np.array_equal(np.isnan(own), np.isnan(wanted)):
            worst[name] = math.inf
            continue
        if name == "vectors":  # up to their sign
            own = own * np.sign((own * wanted).sum(1, keepdims=True))
        scale = np.nanmax(np.abs(wanted), initial=1e-300)
        worst[name] = float(np.nanmax(np.abs(own - wanted), initial=0) / scale)
    return worst


SHAPES = [(11, 30), (40,), (), (3, 5, 7), (1,), (26, 4)]
SIZE = sum(math.prod(shape) for shape in SHAPES)


def pieces(rank: int, world: int) -> list[Piece]:
    """Most parameters in rows; the fourth in columns; the scalar on each rank, and counted by the first."""
    found, offset = [], 0
    for i, shape in enumerate(SHAPES):
        start, extent = [0] * len(shape), list(shape)
        if shape:
            dim = 1 if i == 3 else 0
            each = -(-shape[dim] // world)
            start[dim] = min(rank * each, shape[dim])
            extent[dim] = min((rank + 1) * each, shape[dim]) - start[dim]
        found.append(Piece(offset, torch.Size(shape), tuple(start), torch.Size(extent), bool(shape) or rank == 0))
        offset += math.prod(shape)
    return found


class Factored(SymmetricOperator):
    """``diag(d) + F^T S F`` of known numbers, of which this rank holds its columns: no whole vector is ever made."""

    def __init__(self, dtype: torch.dtype, ranks: Ranks = ALONE, seed: int = 1, spikes: float = 0.0) -> None:
        generator = torch.Generator().manual_seed(seed)
        diagonal = torch.randn(1, SIZE, generator=generator, dtype=torch.float64) * 0.3
        diagonal[0, [3, 200, 400, 570]] += spikes * torch.tensor([1.0, 1.1, 1.2, 1.3], dtype=torch.float64)
        factors = torch.randn(12, SIZE, generator=generator, dtype=torch.float64) / SIZE**0.5
        self.signs = torch.tensor([8.0, 5, 3.5, 2.5, 2, -6, -3, 1.5, 1.2, -1, 0.8, 0.5], dtype=dtype)
        if spikes:
            self.signs *= 0.01
        self.size, self.dtype, self.device, self.cost = SIZE, dtype, torch.device("cpu"), Cost()
        self.where: Space = WholeSpace(SIZE)
        if not ranks.alone:
            self.where = ShardedSpace(pieces(ranks.rank, ranks.count), SIZE, ranks)
        self.diagonal, self.factors = (self.where.part(rows).to(dtype) for rows in (diagonal, factors))

    @property
    def space(self) -> Space:
        return self.where

    def apply(self, rows: Tensor) -> Tensor:
        self.cost.matvecs += len(rows)
        inside = self.where.complete((self.where.counted(rows) @ self.where.counted(self.factors).T).contiguous())
        return rows * self.diagonal + (inside * self.signs) @ self.factors
