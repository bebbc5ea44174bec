"""Made-up problems with known H and C: how often the held-out interval covers, and what the verdict says.

``H`` has eigenvalues over two decades. A sample's Hessian is ``h = W^T W / k`` with ``k`` rows of ``W`` drawn with
covariance ``H`` (``k = 1`` is rank one, ``k`` = the number of directions is full rank), its gradient is drawn with
covariance ``C = H^gamma``. Half of the samples gives the basis, the other half is measured, as in the scaling test.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from curvdiag.results import Result
from curvdiag.scaling import fits
from curvdiag.scaling.power_law import Directions, DirectionSamples, measure_power_law
from curvdiag.scaling.verdict import judge

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MINUTES = 5.0
Array = NDArray[np.float64]
GAMMAS = (1.0, 1.5, 2.0)
RANKS = ("one", "full")
SAMPLES = (100, 400, 2000, 4000)


@dataclass(frozen=True)
class Problem:
    """How samples are drawn.

    Attributes:
        rank: Of a sample's Hessian, ``"one"`` or ``"full"``.
        tails: Degrees of freedom of the samples' common scale (multivariate Student t); infinite is Gaussian.
        dependent: The gradient is a random sign times a power of the first row of ``W``, not drawn by itself.
        directions, decades: Of the spectrum of ``H``.
    """

    rank: str = "one"
    tails: float = np.inf
    dependent: bool = False
    directions: int = 20
    decades: float = 2.0

    @property
    def spectrum(self) -> Array:
        return np.logspace(0, -self.decades, self.directions)

    def draw(self, samples: int, generator: np.random.Generator) -> tuple[Array, Array]:
        """Rows ``W / sqrt(k)``, ``[N, k, D]``, in H's eigenbasis, and white gradients ``[N, D]``."""
        rows = 1 if self.rank == "one" else self.directions
        white = self._tailed((samples, rows, self.directions), generator)
        if self.dependent:
            gradients = white[:, 0] * generator.choice([-1.0, 1.0], (samples, 1))
        else:
            gradients = self._tailed((samples, self.directions), generator)
        return white * np.sqrt(self.spectrum / rows), gradients

    def _tailed(self, shape: tuple[int, ...], generator: np.random.Generator) -> Array:
        white = generator.standard_normal(shape)
        if np.isinf(self.tails):
            return white
        scale = generator.chisquare(self.tails, (shape[0],) + (1,) * (len(shape) - 1)) / (self.tails - 2)
        return white / np.sqrt(scale)


@dataclass(frozen=True)
class Calibration(Result):
    """One cell of the table.

    Attributes:
        rank, tails, dependent: Of the problem.
        gamma: ``C = H^gamma``.
        samples: All of them; half gives the basis.
        repetitions: How often the problem was drawn.
        exponent: Mean exponent of the population in the held-out basis, by the first method.
        coverage: Share of the 95 % intervals that cover it; by method, Theil-Sen's for the Theil-Sen fit of the
            population and the others' for its least-squares fit.
        bias: Mean of the held-out fit less that exponent; by method.
        in_sample_bias: Mean least-squares fit on the samples that gave the basis, less gamma.
        words: How often the verdict said what.
    """

    rank: str
    tails: float
    dependent: bool
    gamma: float
    samples: int
    repetitions: int
    exponent: float
    coverage: dict[str, float]
    bias: dict[str, float]
    in_sample_bias: float
    words: dict[str, int]

    @property
    def refused(self) -> float:
        """Share of the repetitions in which the verdict was not "proportional"."""
        return 1 - self.words.get("proportional", 0) / self.repetitions


def calibrate(
    problem: Problem,
    samples: int,
    *,
    gammas: Sequence[float] = GAMMAS,
    repetitions: int = 500,
    bootstrap: int = 300,
    methods: Sequence[str] = ("ols",),
    seed: int = 0,
) -> list[Calibration]:
    """Draw, measure and judge again and again; one row for each gamma, which share their draws."""
    drawn = list(_repeat(problem, samples, gammas, repetitions, bootstrap, methods, seed))
    rows = []
    for j, gamma in enumerate(gammas):
        cases = [repetition[j] for repetition in drawn]
        targets = {m: np.array([case.targets[m] for case in cases]) for m in methods}
        last = {m: [case.held_out.noise_fits[m] for case in cases] for m in methods}
        ends = {m: np.array([(f.low[-1], f.high[-1], f.exponent[-1]) for f in law]).T for m, law in last.items()}
        inside = {m: (low <= targets[m]) & (targets[m] <= high) for m, (low, high, _) in ends.items()}
        rows.append(
            Calibration(
                rank=problem.rank,
                tails=problem.tails,
                dependent=problem.dependent,
                gamma=gamma,
                samples=samples,
                repetitions=repetitions,
                exponent=float(targets[methods[0]].mean()),
                coverage={m: float(np.mean(hits)) for m, hits in inside.items()},
                bias={m: float(np.mean(fit - targets[m])) for m, (_, _, fit) in ends.items()},
                in_sample_bias=float(np.mean([case.in_sample for case in cases])) - gamma,
                words=dict(Counter(judge(case.held_out).word for case in cases)),
            )
        )
    return rows


def reproduce(
    out: Path, *, seed: int = 0, quick: bool = False, progress: Callable[[str], object] = print
) -> list[Path]:
    """Write ``calibration.png`` and ``calibration.json`` into ``out``."""
    from curvdiag.experiments.saved import make_folder, save

    make_folder(out)
    started, rows = time.perf_counter(), []
    sizes, repetitions = ((100, 400), 5) if quick else (SAMPLES, 500)
    for rank in RANKS:
        for samples in sizes:
            rows += calibrate(Problem(rank), samples, repetitions=repetitions, seed=seed)
            for row in rows[-len(GAMMAS) :]:
                progress(
                    f"rank {rank}, {samples:,} samples, gamma {row.gamma:g}: covered {row.coverage['ols']:.1%}, "
                    f"in-sample bias {row.in_sample_bias:+.3f}, not called proportional {row.refused:.1%}"
                )
    options = {"samples": sizes, "repetitions": repetitions, "ranks": RANKS, "gammas": GAMMAS, "quick": quick}
    results, seconds = [row.to_dict() for row in rows], time.perf_counter() - started
    return save("calibration", out, draw(rows), results, options=options, seed=seed, seconds=seconds)


def draw(rows: Sequence[Calibration]) -> Figure:
    """Coverage of the held-out intervals, and bias of the in-sample fit, against the number of samples."""
    from matplotlib.figure import Figure

    from curvdiag.plotting.style import INK, LINES, open_frame

    figure = Figure(figsize=(9.6, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.axhline(95, color=INK, linewidth=1, linestyle=(0, (6, 3)))
    right.axhline(0, color=INK, linewidth=1, linestyle=(0, (6, 3)))
    for gamma, (color, dashes, marker) in zip(GAMMAS, LINES[1:], strict=False):
        for rank in RANKS:
            some = [row for row in rows if row.gamma == gamma and row.rank == rank]
            sizes = [row.samples for row in some]
            look = {"color": color, "linestyle": dashes, "marker": marker, "mfc": color if rank == "one" else "white"}
            left.plot(
                sizes, [100 * row.coverage["ols"] for row in some], label=rf"$\gamma = {gamma:g}$, rank {rank}", **look
            )
            right.plot(sizes, [row.in_sample_bias for row in some], **look)
    left.set(title=f"95 % intervals, held out, {rows[0].repetitions} repetitions", ylabel="covered, %")
    right.set(title="the same samples for basis and numbers", ylabel="bias of the in-sample exponent")
    for ax in (left, right):
        ax.set(xlabel="samples", xscale="log")
        sizes = sorted({row.samples for row in rows})
        ax.set_xticks(sizes, [f"{size:,}" for size in sizes])
        ax.minorticks_off()
        open_frame(ax)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize="small", frameon=False)
    return figure


@dataclass(frozen=True)
class _Case:
    held_out: Directions
    targets: dict[str, float]
    in_sample: float


def _repeat(
    problem: Problem,
    samples: int,
    gammas: Sequence[float],
    repetitions: int,
    bootstrap: int,
    methods: Sequence[str],
    seed: int,
) -> Iterator[list[_Case]]:
    half, spectrum = samples // 2, problem.spectrum
    for repetition in range(repetitions):
        generator = np.random.default_rng([seed, repetition])
        rows, white = problem.draw(samples, generator)
        basis, whole = _basis(rows[:half]), _basis(rows)
        held, within = _curvatures(rows[half:], basis), _curvatures(rows, whole)
        cases = []
        for gamma in gammas:
            gradients = white * spectrum ** (gamma / 2)
            held_out = measure_power_law(
                DirectionSamples(torch.from_numpy(gradients[half:] @ basis), held),
                counts=[problem.directions],
                bootstrap=bootstrap,
                seed=repetition,
                methods=methods,
            )
            in_sample = np.log10((gradients @ whole).var(0))
            fitted = fits.least_squares(np.log10(within.numpy().mean(0)), in_sample)[0]
            x, y = (np.log10((basis**2 * (spectrum**power)[:, None]).sum(0)) for power in (1, gamma))
            targets = {m: float((fits.theil_sen if m == "theil-sen" else fits.least_squares)(x, y)[0]) for m in methods}
            cases.append(_Case(held_out, targets, float(fitted)))
        yield cases


def _basis(rows: Array) -> Array:
    """Eigenvectors of the mean of ``h`` as columns, largest eigenvalue first."""
    flat = rows.reshape(-1, rows.shape[-1])
    return np.linalg.eigh(flat.T @ flat)[1][:, ::-1]


def _curvatures(rows: Array, basis: Array) -> torch.Tensor:
    return torch.from_numpy(((rows @ basis) ** 2).sum(1))
