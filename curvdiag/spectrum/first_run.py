"""The Lanczos run that finds what to deflate, and for how long it pays to go on with it."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from curvdiag.operators.base import LinearMap
from curvdiag.spectrum.krylov import Subspace
from curvdiag.spectrum.lanczos import Position, Progress, Tridiagonal
from curvdiag.spectrum.vectors import wide_dtype

# A pair is deflated when its residual is at most this share of its own eigenvalue, ...
TOLERANCE = 1e-2
# ... and, where the number is chosen, when it is at least this share of the rest's sum of squares, or of fourth powers.
SHARE = 1e-3
# Products between two looks at what deflation would gain, and without a gain before the search for more ends.
LOOK, PATIENCE = 4, 12
# The variance of tr H may grow by this, for the products that it costs, where that of tr H^2 falls for it.
DEARER = 1.1


class FirstRun:
    """A Lanczos run with full orthogonalisation from one probe, restarted only where it must be."""

    def __init__(self, operator: LinearMap, start: Tensor, length: int) -> None:
        self.size = operator.size
        self.space = Subspace(operator, min(length + 1, operator.size))
        self.space.add(start[0].clone())
        self.whole = True  # not restarted: the projected matrix is that of a Lanczos run

    def step(self) -> None:
        """One product."""
        space = self.space
        if space.used == space.capacity < self.size:
            values, coefficients, _ = space.ritz()
            kept = torch.from_numpy(np.argsort(-np.abs(values.numpy()), kind="stable")[: space.capacity - 6].copy())
            space.restart(coefficients[:, kept], values[kept])
            self.whole = False
        space.expand()

    def until_converged(self, k: int, limit: int, progress: Progress | None) -> None:
        """Until the ``k`` pairs of largest magnitude are good enough, in at most ``limit`` products."""
        space = self.space
        while space.pending and space.matvecs < limit:
            self.step()
            if progress is not None:
                progress(space.matvecs, limit)
            if space.processed > k:
                values, _, residuals = ritz_pairs(space)
                first = np.argsort(-np.abs(values), kind="stable")[:k]
                if (residuals[first] <= TOLERANCE * np.abs(values[first])).all():
                    return

    def go_on_while_it_pays(self, limit: int, planned: int, progress: Progress | None) -> None:
        """For as long as deflation gains more than it costs, beside ``planned`` products of probes."""
        space, best, last = self.space, math.inf, 0
        while space.pending and space.matvecs < limit:
            self.step()
            if progress is not None:
                progress(space.matvecs, limit)
            if space.matvecs % LOOK == 0:
                gain = sum(self.gains(settled_pairs(space), planned))
                if gain < best:
                    best, last = gain, space.matvecs
                elif space.matvecs - last >= PATIENCE:
                    return

    def gains(self, chosen: np.ndarray, planned: int, localised: np.ndarray | float = 0.0) -> tuple[float, float]:
        """Logarithms of what deflation multiplies the variances of ``tr H`` and ``tr H^2`` by, at equal products.

        A probe is exact for multiples of the identity, so what counts is the spread about the mean. An eigenvector on
        few coordinates adds less to it: by ``localised``, its sum of fourth powers, which is 1 on a single one.
        """
        values, coefficients, _ = self.space.ritz()
        # What a probe sees: the sum over eigenvalues, with a random weight of mean 1 for each.
        weights = self.size * coefficients[0].numpy() ** 2
        whole = weights.copy()
        whole[chosen] = 1 - localised
        rest = np.delete(np.arange(len(values)), chosen)
        dearer = math.log1p(self.space.matvecs / planned)
        logs = []
        for function in (values.numpy(), values.numpy() ** 2):
            before, after = _spread(function, whole), _spread(function[rest], weights[rest])
            logs.append(math.log(max(after / before, 1e-30)) + dearer if before > 0 else dearer)
        return logs[0], logs[1]

    def worthwhile(self, planned: int, most: int) -> np.ndarray:
        """At most ``most`` pairs to deflate, largest magnitude first; none where that does not pay."""
        values, coefficients, _ = self.space.ritz()
        chosen = settled_pairs(self.space)
        if len(chosen):
            squares = values.numpy() ** 2
            others = np.delete(np.arange(len(values)), chosen)
            weights = self.size * coefficients[0].numpy()[others] ** 2
            counts = [squares[chosen] ** p >= SHARE * float(weights @ squares[others] ** p) for p in (1, 2)]
            chosen = chosen[counts[0] | counts[1]][:most]
        if not len(chosen):
            return chosen
        rows = self.space.vectors(coefficients[:, torch.from_numpy(chosen)])
        space = self.space.operator.space
        partial = torch.stack([space.counted(row).square().square_().sum() for row in rows])
        fourth = space.complete(partial.to(wide_dtype(partial.device))).cpu().double().numpy()
        trace, norm = self.gains(chosen, planned, np.minimum(fourth, 1.0))
        return chosen if trace <= math.log(DEARER) and trace + norm < 0 else chosen[:0]

    def probe(self) -> Tridiagonal | None:
        """This run as one of the density's, which may go on."""
        if not self.whole:
            return None
        space, n, ended = self.space, self.space.processed, self.space.pending == 0
        current = torch.zeros_like(space.rows[n - 1]) if ended else space.rows[n].clone()
        beta = 0.0 if ended else float(space.coupling[0, -1])
        dtype = wide_dtype(current.device)
        numbers = [torch.tensor([x], dtype=dtype, device=current.device) for x in (beta, space.scale)]
        return Tridiagonal(
            alphas=space.projected.diagonal()[None].numpy().copy(),
            betas=np.append(space.projected.diagonal(1).numpy(), beta)[None],
            norms=np.array([math.sqrt(self.size)]),
            lengths=np.array([n]),
            basis=None,
            matvecs=n,
            position=Position(space.rows[n - 1].clone()[None], current[None], *numbers),
        )


def _spread(values: np.ndarray, weights: np.ndarray) -> float:
    """Sum of squares about the mean."""
    total = weights.sum()
    return float(weights @ (values - weights @ values / total) ** 2) if total > 0 else 0.0


def settled_pairs(space: Subspace) -> np.ndarray:
    """Indices of the Ritz pairs good enough to be deflated, largest magnitude first."""
    values, _, residuals = ritz_pairs(space)
    order = np.argsort(-np.abs(values), kind="stable")
    return order[(residuals[order] <= TOLERANCE * np.abs(values[order])) & (values[order] != 0)]


def ritz_pairs(space: Subspace) -> tuple[np.ndarray, Tensor, np.ndarray]:
    """Ritz values ``[n]`` ascending, coefficients ``[n, n]``, residuals ``[n]`` with rounding and asymmetry."""
    values, coefficients, residuals = space.ritz()
    return values.numpy(), coefficients, space.bounds(residuals).numpy()
