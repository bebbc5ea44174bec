"""The Lanczos runs of a density's probes, a group at a time, with what is deflated kept out of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from curvdiag.operators.base import LinearMap
from curvdiag.spectrum.deflation import Deflation
from curvdiag.spectrum.lanczos import Progress, Reorthogonalize, Tridiagonal, lanczos
from curvdiag.spectrum.vectors import working_dtype

# What is left of a sign vector outside the deflated directions is no direction of its own below this share of it.
VANISHED = 1e-6


class Quadrature:
    """Nodes and weights from as many probes as are asked for.

    Args:
        operator: The matrix.
        deflation: What is kept out of the probes; a run of its own that serves as a probe is the first of them.
        seed: Of the probes.
        group: How many advance in lockstep.
        reorthogonalize: As in :func:`lanczos`.
        progress: Called with (products done, products planned).

    Attributes:
        nodes: One array ``[probes, m]`` for each group so far.
        weights: The same; each row adds up to 1.
        matvecs: Products so far, with those of the deflation.
        probes: Probes so far.
    """

    def __init__(
        self,
        operator: LinearMap,
        deflation: Deflation,
        seed: int,
        group: int,
        reorthogonalize: Reorthogonalize = "none",
        progress: Progress | None = None,
    ) -> None:
        self.operator, self.deflation, self.seed, self.group = operator, deflation, seed, group
        self.reorthogonalize, self.progress = reorthogonalize, progress
        self.nodes: list[np.ndarray] = []
        self.weights: list[np.ndarray] = []
        self.matvecs, self.probes = deflation.matvecs, 0
        # What the first run has not yet taken would be taken without reorthogonalisation.
        self.waiting = deflation.probe if reorthogonalize == "none" else None
        if self.waiting is not None:
            self.matvecs = 0  # counted when it is taken

    def take(self, probes: int, steps: int, planned: int) -> None:
        """Add ``probes`` more, of ``steps`` steps each."""
        for run in self._runs(probes, steps, planned):
            self._add(run)

    def take_until(
        self, probes: int, steps: int, settled: Callable[[Tridiagonal], bool], look: int, growth: float
    ) -> tuple[int, bool]:
        """Add ``probes`` more, of as many steps as the first group takes to be settled, at most ``steps``.

        Looks after ``look`` steps and each time when there are ``growth`` times as many. Returns the steps, and whether
        it was settled.
        """
        count = min(self.group, probes - (self.waiting is not None))
        run: Tensor | Tridiagonal = self.starts(count)
        taken = min(look, steps)
        while True:
            report = self._report(self.matvecs + steps * probes)
            run = lanczos(
                self.operator, run, taken, progress=report, resumable=True, projection=self.deflation.projection
            )
            done = settled(run)
            if done or taken >= steps:
                break
            taken = min(math.ceil(growth * taken), steps)
        self._add(replace(run, position=None))
        self.take(probes - count, taken, self.matvecs + (probes - count) * taken)
        return taken, done

    def _add(self, run: Tridiagonal) -> None:
        theta, weight = run.quadrature()
        self.nodes.append(theta)
        self.weights.append(weight)
        self.matvecs += run.matvecs
        self.probes += len(theta)

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Nodes and weights ``[probes, m]`` of all probes, padded with weight 0 where a run ended early."""
        longest = max(part.shape[1] for part in self.nodes)
        sides = [(0, 0), (0, longest)]
        nodes = [np.pad(part, sides, "edge")[:, :longest] for part in self.nodes]
        weights = [np.pad(part, sides)[:, :longest] for part in self.weights]
        return np.concatenate(nodes), np.concatenate(weights)

    def starts(self, count: int) -> Tensor:
        """Random signs ``[count, local]`` outside the deflated directions, which no probe so far has used."""
        first = self.probes + (0 if self.deflation.probe is not None and self.waiting is None else self.deflation.used)
        op, space, dtype = self.operator, self.operator.space, working_dtype(self.operator)
        rows = space.rademacher(count, seed=self.seed, first=first, dtype=dtype, device=op.device)
        projection = self.deflation.projection
        if projection is None:
            return rows
        self._outside(rows)
        for i in torch.nonzero(space.dots(rows, rows) <= VANISHED * op.size)[:, 0].tolist():
            # All of it lay in the deflated directions, as may happen at a small order.
            rows[i] = space.gaussian(1, seed=self.seed, first=first + i, dtype=dtype, device=op.device)[0]
            self._outside(rows[i : i + 1])
        return rows

    def _outside(self, rows: Tensor) -> None:
        assert self.deflation.projection is not None
        for _ in range(2):  # twice, for rounding
            self.deflation.projection(rows)

    def _runs(self, probes: int, steps: int, planned: int) -> Iterator[Tridiagonal]:
        if self.waiting is not None and probes:
            going, self.waiting = self.waiting, None
            over = going.betas[0, -1] == 0 or going.alphas.shape[1] >= steps
            yield going if over else lanczos(self.operator, going, steps, progress=self._report(planned))
            probes -= 1
        for first in range(0, probes, self.group):
            yield lanczos(
                self.operator,
                self.starts(min(self.group, probes - first)),
                steps,
                reorthogonalize=self.reorthogonalize,
                progress=self._report(planned),
                projection=self.deflation.projection,
            )

    def _report(self, planned: int) -> Progress | None:
        progress, spent = self.progress, self.matvecs
        return None if progress is None else lambda done, _total: progress(spent + done, planned)
