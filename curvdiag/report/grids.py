"""Spectral densities over a run as one grid of bytes: the logarithm of the density, on one axis for all times."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from curvdiag.plotting.eigenvalue_axis import EigenvalueAxis, atoms, choose_axis
from curvdiag.plotting.style import short
from curvdiag.report.encoding import packed
from curvdiag.report.thinning import evenly

if TYPE_CHECKING:
    from curvdiag.record.series import DensitySeries
    from curvdiag.spectrum.density import SpectralDensity

CELLS = 320  # along the eigenvalues: four to a kernel's width
FINER = 8  # nodes are gathered on a grid this many times finer before they are smoothed
TYPICAL = 50  # densities that an axis is chosen from
FEW = 4  # ticks
LEVELS = 255  # 0 is below the floor; a level is then 2 to 5 % of the density


def grid(series: DensitySeries, limit: int) -> dict[str, Any] | None:
    """The densities of one operator or block for a page; None where none is finite, and can be drawn.

    The density of cell ``i`` at a level ``q > 0`` is ``exp(floor + (q - 1) (top - floor) / 254)``; level 0 lies below
    ``exp(floor)``, a twentieth of the height of one single eigenvalue.

    Args:
        series: Densities over a run.
        limit: Times to keep, at most; evenly spaced where there are more, with the first and the last.

    Returns:
        ``steps``, ``epochs``, ``lowest``, ``highest`` ``[T]`` and ``levels`` ``[T, cells]`` in base64; ``centres``, the
        eigenvalues of the cells in base64; ``positions``: of the first and last cell on the axis; ``ticks`` as pairs
        (position, label); ``floor``, ``top``, ``unit``, ``scale``, ``size``; ``measured``: how many there are in all.
    """
    drawable = np.array([i for i, one in enumerate(series.densities) if is_finite(one)], dtype=np.int64)
    if not len(drawable):
        return None
    kept = drawable[evenly(len(drawable), limit)]
    densities = [series.densities[i] for i in kept]
    axis = choose_axis(typical([series.densities[i] for i in drawable]))
    edges = np.linspace(axis.low, axis.high, CELLS + 1)
    centres = 0.5 * (edges[1:] + edges[:-1])
    heights = smoothed(densities, axis)
    floor = math.log(min(axis.one_eigenvalue(one.size) for one in densities) / 20)
    top = max(math.log(max(float(heights.max()), 1e-300)), floor + math.log(10))
    known = [atoms(one)[0] for one in densities]
    ticks = linear_ticks(axis.low, axis.high) if axis.linear else logarithmic_ticks(axis)
    places = axis.position(np.array(ticks, dtype=np.float64))
    return {
        "operator": series.operator,
        "block": series.block,
        "steps": packed(series.steps[kept]),
        "epochs": packed(series.epochs[kept]),
        "lowest": packed(np.array([nodes.min() for nodes in known])),
        "highest": packed(np.array([nodes.max() for nodes in known])),
        "levels": packed(quantised(heights, floor, top), "u1"),
        "cells": CELLS,
        "centres": packed(axis.eigenvalue(centres)),
        "positions": [float(centres[0]), float(centres[-1])],
        "ticks": [[float(place), short(tick)] for place, tick in zip(places, ticks, strict=True)],
        "floor": floor,
        "top": top,
        "unit": axis.unit,
        "scale": "linear" if axis.linear else "symmetric logarithmic",
        "size": max(one.size for one in densities),
        "measured": len(series),
    }


def is_finite(density: SpectralDensity) -> bool:
    nodes, weights = atoms(density)
    return bool(len(nodes) and np.isfinite(nodes).all() and np.isfinite(weights).all())


def typical(densities: Sequence[SpectralDensity]) -> list[SpectralDensity]:
    """Enough of the densities to choose an axis for all: some evenly, and those that hold the ends of all spectra."""
    ends = np.array([(nodes.min(), nodes.max()) for nodes, _ in map(atoms, densities)])
    chosen = {*evenly(len(densities), TYPICAL).tolist(), int(ends[:, 0].argmin()), int(ends[:, 1].argmax())}
    return [densities[i] for i in sorted(chosen)]


def smoothed(densities: Sequence[SpectralDensity], axis: EigenvalueAxis) -> np.ndarray:
    """``[T, cells]``: what :meth:`EigenvalueAxis.smooth` gives in the middle of each cell, to about a part in 300.

    Each node is shared between the two nearest points of a fine grid, and that is smoothed once for all times: the
    kernels of all nodes one by one would take many seconds for a long run of many layers.
    """
    fine = CELLS * FINER
    spacing = (axis.high - axis.low) / fine
    gathered = np.zeros((len(densities), fine + 1))
    for row, density in zip(gathered, densities, strict=True):
        nodes, weights = atoms(density)
        at = np.clip((axis.position(nodes) - axis.low) / spacing, 0, fine)
        left = np.minimum(at.astype(np.int64), fine - 1)
        share = at - left
        row += np.bincount(left, weights * (1 - share), fine + 1) + np.bincount(left + 1, weights * share, fine + 1)
    points = axis.low + spacing * np.arange(fine + 1)
    centres = axis.low + (axis.high - axis.low) * (np.arange(CELLS) + 0.5) / CELLS
    kernel = np.exp(-0.5 * ((points[:, None] - centres) / axis.width) ** 2) / (math.sqrt(2 * math.pi) * axis.width)
    return gathered @ kernel


def quantised(heights: np.ndarray, floor: float, top: float) -> np.ndarray:
    """Levels of 1 to 255 over ``log(heights)`` from ``floor`` to ``top``; 0 below."""
    logs = np.log(np.maximum(heights, 1e-300))
    levels = 1 + np.round((logs - floor) / (top - floor) * (LEVELS - 1))
    return np.where(logs < floor, 0, np.clip(levels, 1, LEVELS)).astype(np.uint8)


def logarithmic_ticks(axis: EigenvalueAxis) -> list[float]:
    """Powers of ten; on a short axis 2 and 5 times these as well."""
    ticks = axis.ticks()
    if len(ticks) > FEW:
        return ticks
    low, high = axis.eigenvalue(np.array([axis.low, axis.high]))
    powers = range(math.floor(math.log10(axis.threshold)), math.ceil(math.log10(max(-low, high))))
    sizes = [one * 10.0**k for k in powers for one in (1, 2, 5) if one * 10.0**k >= axis.threshold]
    return [tick for tick in sorted([*(-size for size in sizes), 0.0, *sizes]) if low <= tick <= high]


def linear_ticks(low: float, high: float) -> list[float]:
    """Five to ten round numbers between two ends."""
    raw = (high - low) / 6
    power = 10.0 ** math.floor(math.log10(raw)) if raw > 0 else 1.0
    step = min((factor * power for factor in (1, 2, 5, 10)), key=lambda one: abs(math.log(one / raw)) if raw > 0 else 0)
    first = math.ceil(low / step - 1e-9)
    return [step * k for k in range(first, math.floor(high / step + 1e-9) + 1)]
