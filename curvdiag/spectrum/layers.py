"""Spectra of all layers at once: each step is one pass over the data, whatever their number.

The layers run Lanczos side by side, each on the diagonal block of its own parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.linalg import eigh_tridiagonal

from curvdiag.distributed import collectively
from curvdiag.errors import ArgumentError
from curvdiag.estimate import Estimate
from curvdiag.memory import free_bytes
from curvdiag.modes import outside_modes
from curvdiag.operators.blocks import Blocks
from curvdiag.operators.objective_operator import ObjectiveOperator
from curvdiag.parameters import Selection
from curvdiag.results import Result
from curvdiag.seeds import Seed, resolve_seed
from curvdiag.spectrum.density import SpectralDensity
from curvdiag.spectrum.eigenpairs import Eigenpairs
from curvdiag.spectrum.lanczos import Progress, Recurrence, Tridiagonal, chance_of_hiding, largest_weight
from curvdiag.spectrum.vectors import working_dtype

STEPS, PROBES, TOL = 20, 3, 1e-2
LIMIT = 200
"""Steps after which a largest eigenvalue that has not converged is given up."""
CHANCE = 1e-2
"""Of a larger eigenvalue that goes unseen..."""
APART = 1e-2
"""...and stands out by this part of the largest that is seen, or by the tolerance."""


@dataclass(frozen=True)
class LayerSpectrum(Result):
    """The spectrum of one layer's diagonal block.

    Attributes:
        size: Order ``P_l`` of the block.
        lambda_max: Its largest Ritz value, from below.
        residual: The block has an eigenvalue within this distance of ``lambda_max``; absolute.
        converged: The residual met the tolerance, ``tol * |lambda_max|``, or is rounding.
        trace: ``tr(H_ll)``.
        density: Of its eigenvalues.
        matvecs: Products made with the block.
    """

    size: int
    lambda_max: float
    residual: float
    converged: bool
    trace: Estimate
    density: SpectralDensity
    matvecs: int

    @property
    def top(self) -> Eigenpairs:
        """``lambda_max`` as an eigenpair, for ``anisotropy(density, top)``; its vector ``[P_l, 0]`` is not known."""
        value, residual = torch.tensor([[self.lambda_max], [self.residual]], dtype=torch.float64)
        return Eigenpairs(value, torch.empty(self.size, 0), residual, torch.tensor([self.converged]), self.matvecs)

    def __str__(self) -> str:
        tail = "" if self.converged else "  (not converged)"
        return f"{self.lambda_max:.6g} ± {self.residual:.2g}{tail}, trace {self.trace}, {self.size:,} parameters"


@dataclass(frozen=True)
class LayerSpectra(Result):
    """The spectra of several layers, by name: ``found["blocks.0"].lambda_max``.

    Attributes:
        layers: In the order in which they were given.
        tol: Tolerance of the largest eigenvalues, 1e-2 where none was given.
        matvecs: Products with blocks, of all layers together.
        graphs: Graphs built for them.
    """

    layers: Mapping[str, LayerSpectrum]
    tol: float
    matvecs: int
    graphs: int

    figure = "layers"

    def __getitem__(self, name: str) -> LayerSpectrum:
        return self.layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def lambda_max(self) -> dict[str, float]:
        """The largest eigenvalue of each layer."""
        return {name: layer.lambda_max for name, layer in self.layers.items()}

    def __str__(self) -> str:
        width = max(map(len, self.layers))
        return "\n".join(f"{name:{width}s}  {layer}" for name, layer in self.layers.items())


@outside_modes
@collectively
def layer_spectra(
    op: ObjectiveOperator,
    layers: Mapping[str, Selection] | None = None,
    *,
    steps: int | None = None,
    probes: int | None = None,
    tol: float | None = None,
    seed: Seed = 0,
    progress: Progress | None = None,
) -> LayerSpectra:
    """Density, trace and largest eigenvalue of each layer's block, by Lanczos on all of them in lockstep.

    The same numbers as ``spectral_density(op.block(layer), ...)`` gives layer by layer. No basis is stored:
    ``lambda_max`` and its residual ``beta_m |s_m|`` come from the tridiagonal matrix (Paige 1980), so that memory is
    three vectors a probe over all layers together.

    Args:
        op: A matrix of an objective: a Hessian, a Gauss-Newton matrix, a noise covariance, a block of one.
        layers: Selections of parameters by name, which may overlap. By default each module with its own parameters;
            a tied tensor belongs to the module that the model lists first.
        steps: Lanczos steps of the densities, 20 by default. More than the size of a layer are clipped.
        probes: Random vectors, 3 by default.
        tol: Go on, each layer from its best probe alone, until the residual of its ``lambda_max`` is at most
            ``tol * |lambda_max|`` and an eigenvalue above by more, or by more than 1 %, would hide from the probe with
            a chance of at most 1 %. Without ``steps`` only ``lambda_max`` is wanted: one probe by default, and a layer
            drops out of the pass once that is so. After :data:`LIMIT` steps it is given up.
        seed: An integer, or a generator that advances.
        progress: Called with (products done, products planned); with ``tol`` the most that there can be.

    Raises:
        ArgumentError: ``op`` has no layers, there is no layer, or a number makes no sense.
        ParameterError: A selection matches nothing.
        NonFiniteError: A product held NaN or infinite numbers.
    """
    if not isinstance(op, ObjectiveOperator):
        raise ArgumentError(f"layers are those of an objective's matrix, such as a Hessian, and not of {op!r}")
    if tol is not None and not (tol > 0 and math.isfinite(tol)):
        raise ArgumentError(f"tol is a positive fraction of lambda_max, not {tol}")
    lean = tol is not None and steps is None
    probes = _count(probes if probes is not None else 1 if lean else PROBES, "probes")
    steps = _count(steps if steps is not None else LIMIT if lean else STEPS, "steps")
    blocks, seed = op.blocks(layers), resolve_seed(seed)
    blocks.refresh()
    report = None if progress is None else _reporter(blocks, steps, probes, tol, progress)
    made: dict[str, list[Tridiagonal]] = {name: [] for name in blocks.sizes}
    tops: dict[str, Top] = {}
    group = _at_once(blocks, probes)
    for first in range(0, probes, group):
        runs = _started(blocks, seed, first, min(group, probes - first))
        _advance(blocks, runs, steps, tol if lean else None, report)
        for name in list(runs):
            run = runs.pop(name).result(resumable=tol is not None and not lean)
            made[name].append(replace(run, position=None))
            top = Top.of(run, working_dtype(blocks))
            tops[name] = max(top, tops.get(name, top), key=lambda one: one.value)
    if tol is not None and not lean:
        wanted = [n for n, one in tops.items() if not _settled(one.run.alphas, one.run.betas, blocks.sizes[n], tol)]
        left = {name: Recurrence(tops.pop(name).run, blocks.operators[name].space) for name in wanted}
        _advance(blocks, left, LIMIT, tol, report)
        tops |= {name: Top.of(run.result(), working_dtype(blocks)) for name, run in left.items()}
    asked = None if lean else steps
    found = {
        name: _spectrum(block, made[name], tops[name], tol or TOL, asked) for name, block in blocks.operators.items()
    }
    return LayerSpectra(found, tol or TOL, blocks.cost.matvecs, blocks.cost.graphs)


@dataclass(frozen=True)
class Top:
    """The largest Ritz value of several start vectors.

    Attributes:
        value: Itself.
        residual: ``beta_m |s_m|`` for the last component ``s_m`` of its eigenvector of the tridiagonal matrix.
        rounding: What the residual cannot fall below.
        run: The run of its start vector, alone.
    """

    value: float
    residual: float
    rounding: float
    run: Tridiagonal

    @classmethod
    def of(cls, run: Tridiagonal, dtype: torch.dtype) -> Top:
        pairs = [_largest_ritz(a[:n], b[:n]) for a, b, n in zip(run.alphas, run.betas, run.lengths, strict=True)]
        best = max(range(len(pairs)), key=lambda i: pairs[i][0])
        scale = max(float(np.abs(run.alphas[best]).max()), float(run.betas[best].max()))
        return cls(*pairs[best], 4 * torch.finfo(dtype).eps * scale, run.only(best))

    def converged(self, tol: float) -> bool:
        return self.residual <= max(tol * abs(self.value), self.rounding)


def _started(blocks: Blocks, seed: int, first: int, count: int) -> dict[str, Recurrence]:
    dtype, device = working_dtype(blocks), blocks.device
    spaces = {name: block.space for name, block in blocks.operators.items()}
    return {
        name: Recurrence(space.rademacher(count, seed=seed, first=first, dtype=dtype, device=device), space)
        for name, space in spaces.items()
    }


def _advance(
    blocks: Blocks,
    runs: Mapping[str, Recurrence],
    limit: int,
    tol: float | None,
    report: Callable[[], object] | None,
) -> None:
    """Take the runs to ``limit`` steps, or to the order of their blocks; with ``tol`` until each has settled.

    With ``tol`` the coefficients are looked at after each step, so that the host waits for the device once a step for
    each layer. Without, it never does.
    """
    active = dict(runs)
    while active := {name: run for name, run in active.items() if run.done < min(limit, blocks.sizes[name])}:
        products = blocks.apply({name: run.current.to(blocks.dtype) for name, run in active.items()})
        for name, run in active.items():
            run.advance(products.pop(name).to(run.current.dtype))
        if report is not None:
            report()
        if tol is not None:
            active = {
                name: run for name, run in active.items() if not _settled(*run.coefficients(), blocks.sizes[name], tol)
            }


def _settled(alphas: np.ndarray, betas: np.ndarray, size: int, tol: float) -> bool:
    """Whether the largest Ritz value of some start vectors, given their coefficients ``[k, m]``, is ``lambda_max``.

    Its residual is small; and the start vector would hide an eigenvalue that stands out from it with a chance of at
    most :data:`CHANCE`. Early on a Ritz value of the bulk can have a small residual while a larger one is invisible.
    """
    if not (np.isfinite(alphas).all() and np.isfinite(betas).all()):
        return True  # the result says so
    value, residual, i = max((*_largest_ritz(a, b), i) for i, (a, b) in enumerate(zip(alphas, betas, strict=True)))
    if betas[i, -1] == 0:
        return True  # the Krylov space is exhausted
    if residual > tol * abs(value):
        return False
    weight = largest_weight(alphas[i].tolist(), betas[i].tolist(), value + max(tol, APART) * abs(value))
    return not chance_of_hiding(weight, size) > CHANCE  # what overflowed is no chance at all


def _largest_ritz(alphas: np.ndarray, betas: np.ndarray) -> tuple[float, float]:
    """The largest eigenvalue of a tridiagonal matrix, and the residual of its Ritz vector."""
    last = len(alphas) - 1
    (value,), vector = eigh_tridiagonal(alphas, betas[:-1], select="i", select_range=(last, last))
    return float(value), float(betas[-1] * abs(vector[-1, 0]))


def _spectrum(
    block: ObjectiveOperator, made: list[Tridiagonal], top: Top, tol: float, asked: int | None
) -> LayerSpectrum:
    nodes, weights = (np.concatenate(parts) for parts in zip(*(run.quadrature() for run in made), strict=True))
    taken = nodes.shape[1]
    note = f"{asked} steps clipped to {taken}, the order of the matrix" if asked and taken < asked else ""
    density = SpectralDensity(
        nodes, weights, block.size, steps=taken, matvecs=sum(run.matvecs for run in made), note=note
    )
    residual = math.hypot(top.residual, top.rounding)
    return LayerSpectrum(
        block.size, top.value, residual, top.converged(tol), density.trace(), density, block.cost.matvecs
    )


def _at_once(blocks: Blocks, probes: int) -> int:
    """How many probes of all layers fit at once: three vectors and their products each, in half the free memory."""
    spaces = [block.space for block in blocks.operators.values()]
    one = 5 * sum(space.longest for space in spaces) * working_dtype(blocks).itemsize
    return max(1, min(probes, spaces[0].fitting(free_bytes(blocks.device), 2 * one, blocks.device)))


def _reporter(blocks: Blocks, steps: int, probes: int, tol: float | None, progress: Progress) -> Callable[[], object]:
    extra = max(0, LIMIT - steps) if tol is not None else 0
    planned = sum(probes * min(steps, n) + min(extra, max(0, n - steps)) for n in blocks.sizes.values())
    return lambda: progress(blocks.cost.matvecs, planned)


def _count(given: int, what: str) -> int:
    if isinstance(given, bool) or int(given) != given or given < 1:
        raise ArgumentError(f"spectra of layers take a positive number of {what}, not {given!r}")
    return int(given)
