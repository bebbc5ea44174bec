"""What deflation is worth: errors of traces at equal products, on a net small enough for LAPACK."""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
from digits import trained
from report import Row
from settings import Settings
from torch import Tensor, nn

from curvdiag import Hessian, Objective, SpectralDensity, spectral_density

WIDTH, SAMPLES, TRAINED, SEEDS = 24, 512, 1500, 20
STEPS, PROBES, DEFLATE = 80, 4, 10
SECTION = f"Errors of plain quadrature in those of deflated, at equal products, over {SEEDS} seeds"
TARGETS = {"trained": {"tr H": 3.0, "tr H^2": 10.0}, "initial": {"tr H": 0.9, "tr H^2": 0.9}}
"""Least ratio of root-mean-square errors."""


def deflation_rows(settings: Settings) -> list[Row]:
    """Both states of the net, ten eigenpairs deflated and as many as the density itself finds worth it."""
    width, seeds = (8, 3) if settings.quick else (WIDTH, SEEDS)
    return [*state_rows("trained", width, TRAINED, seeds), *state_rows("initial", width, 0, seeds)]


def state_rows(state: str, width: int, steps: int, seeds: int) -> list[Row]:
    """One state of the net; products are in single precision, as those of a net."""
    matrix = dense(width, steps)
    single, truth = matrix.float(), traces_of(matrix)

    @functools.cache
    def plain(probes: int, seed: int) -> SpectralDensity:
        return spectral_density(single, steps=STEPS, probes=probes, seed=seed)

    rows = []
    for deflate in (DEFLATE, "auto"):
        found = [spectral_density(single, steps=STEPS, probes=PROBES, deflate=deflate, seed=s) for s in range(seeds)]
        others = [plain(round(density.matvecs / density.steps), seed) for seed, density in enumerate(found)]
        rows += ratio_rows(state, deflate, truth, found, others)
    return rows


def dense(width: int, steps: int) -> Tensor:
    """The Hessian of the digits' MLP after so many steps, in double precision."""
    model, (images, classes) = trained(width, steps)
    objective = Objective(model, nn.CrossEntropyLoss(), batches=[(images[:SAMPLES], classes[:SAMPLES])])
    matrix = Hessian(objective, dtype=torch.float64).dense(chunk=256)
    return (matrix + matrix.T) / 2


def traces_of(matrix: Tensor) -> dict[str, float]:
    """From LAPACK's eigenvalues."""
    eigenvalues = np.linalg.eigvalsh(matrix.numpy())
    return {"tr H": float(eigenvalues.sum()), "tr H^2": float(np.square(eigenvalues).sum())}


def ratio_rows(
    state: str,
    deflate: int | str,
    truth: dict[str, float],
    deflated: list[SpectralDensity],
    plain: list[SpectralDensity],
) -> list[Row]:
    """Plain quadrature takes as many products, up to half a probe, for which its error is put right.

    The error of independent probes falls with the root of their number.
    """
    mean = {way: np.mean([d.matvecs for d in found]) for way, found in (("plain", plain), ("deflated", deflated))}
    note = f"{np.mean([len(d.deflated) for d in deflated]):.0f} eigenvalues deflated, {mean['deflated']:.0f} products"
    rows = []
    for name, true in truth.items():
        errors = {
            "plain": [
                (traces(d)[name] / true - 1) * math.sqrt(d.matvecs / e.matvecs)
                for d, e in zip(plain, deflated, strict=True)
            ],
            "deflated": [traces(d)[name] / true - 1 for d in deflated],
        }
        rms = {way: float(np.sqrt(np.mean(np.square(values)))) for way, values in errors.items()}
        ratio, least = rms["plain"] / rms["deflated"], TARGETS[state][name]
        words = f"{note}; relative errors {rms['plain']:.1e} and {rms['deflated']:.1e}"
        net, what = f"digits MLP, {state}", f"{name}, deflate={deflate}"
        target = f"at least {least:g}"
        rows.append(Row(SECTION, net, what, ratio, *spread(errors), target, ratio >= least, words, "times"))
    return rows


def spread(errors: dict[str, list[float]]) -> tuple[float, float]:
    """Quartiles of the ratio, from 400 bootstrap samples of the seeds."""
    draw = np.random.default_rng(0)
    plain, deflated = (np.square(errors[way]) for way in ("plain", "deflated"))
    picks = draw.integers(len(plain), size=(400, len(plain)))
    ratios = np.sqrt(plain[picks].mean(1) / deflated[picks].mean(1))
    low, high = np.quantile(ratios, (0.25, 0.75))
    return float(low), float(high)


def traces(density: SpectralDensity) -> dict[str, float]:
    return {"tr H": density.trace().value, "tr H^2": density.squared_frobenius_norm().value}
