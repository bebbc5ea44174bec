"""The search for wanted eigenpairs in a growing, restarted subspace, and the look for what it missed."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from curvdiag.operators.base import LinearMap
from curvdiag.spectrum.eigenpairs import Eigenpairs, Which
from curvdiag.spectrum.krylov import Subspace
from curvdiag.spectrum.lanczos import Progress, chance_of_hiding, largest_weight
from curvdiag.spectrum.vectors import working_dtype

# A look for missed pairs ends when one would have escaped it with at most this probability, or after so many steps.
CHANCE, LOOK = 1e-2, 16
# By default it looks for eigenvalues that stand out from the last wanted one by this part of the largest.
NOTABLE = 0.01
# The next Ritz pair has settled when its residual is at most this part of its distance from the wanted one. A hidden
# eigenvalue further out would be passing through there.
SETTLED = 0.4
# So many points between the last wanted eigenvalue and the next stand for all that could be hidden there.
BETWEEN = 8
OTHER_END: dict[Which, Which] = {"LA": "SA", "SA": "LA"}


class Search:
    """The state of one search for eigenpairs: what is wanted, and how far it is."""

    def __init__(
        self,
        space: Subspace,
        fresh: FreshVectors,
        which: Which,
        k: int,
        tol: float,
        limit: int,
        length: int,
        progress: Progress | None,
        notable: float = NOTABLE,
        random_start: bool = False,
    ) -> None:
        self.space, self.fresh, self.which, self.k = space, fresh, which, k
        self.tol, self.limit, self.length, self.progress = tol, limit, length, progress
        self.notable = max(tol, notable)
        # Coefficients of the run from a random start vector, up to the first restart or look; None where it was given.
        self.first_run: tuple[list[float], list[float]] | None = ([], []) if random_start else None
        self.plain = random_start
        self.largest = 0.0
        self.read()

    def converge(self, quick: bool = False, next_too: bool = False) -> bool:
        """Expand until the wanted pairs have converged; False where the products ran out before.

        Args:
            quick: Take small residuals for convergence, without waiting for the values to stand still.
            next_too: Wait for the pair after the wanted one to settle as well.
        """
        space = self.space
        before: Tensor | None = None
        while True:
            # Early on, a Ritz pair of the bulk can have a small residual while a larger eigenvalue is still
            # invisible; it then moves at the next step.
            still = quick or not space.pending or self._moved(before) <= self.bound
            if self.settled and still and (not next_too or not space.pending or self._next_settled()):
                return True
            if space.matvecs >= self.limit:
                return False
            if not space.pending and not space.add(self.fresh()):
                return self.settled
            self._make_room()
            if space.pending > 1 and len(self.best):
                worst = self.best[self.residuals[self.best].argmax()]
                space.aim(space.coupling @ self.coefficients[:, worst])
            before = self.values[self.best]
            self._expand()
            if self.plain and self.first_run is not None:
                self.first_run[0].append(float(space.projected[-1, -1]))
                self.first_run[1].append(float(space.coupling[:, -1].norm()))

    def finds_more(self) -> bool:
        """Run Lanczos from a random direction outside the processed vectors V; True once it upsets the wanted pairs.

        An eigenvector that the start vectors do not see lies outside V, and is one of the operator's part there, of
        which the run is an ordinary one. The pending directions take part: rounding blows up what the start vectors
        do not see, and a pending direction may already hold most of it.
        """
        space, operator, points = self.space, self.space.operator, self._points()
        self.plain = False
        self._make_room(LOOK + 1)
        if not space.add_random(self.fresh()):
            return False
        first, before = space.processed, self.values[self.best]
        betas: list[float] = []
        for _ in range(LOOK):
            if space.matvecs >= self.limit or space.capacity == space.used < operator.size:
                return False
            self._expand()
            if not self.settled or self._moved(before) > self.bound:
                return True
            remainder = space.coupling[:, -1]
            betas.append(float(remainder.norm()))
            if betas[-1] == 0:  # the random direction reaches no further
                return False
            alphas = space.projected.diag()[first:].tolist()
            outside = operator.size - first
            if all(
                known * chance_of_hiding(largest_weight(alphas, betas, point), outside) <= CHANCE
                for point, known in points
            ):
                return False
            space.aim(remainder)
        return False

    def result(self) -> Eigenpairs:
        """The wanted pairs, sorted; rounding and any asymmetry of the products count into the residuals."""
        space, best = self.space, self.best
        residuals = space.bounds(self.residuals[best])
        return Eigenpairs(
            self.values[best],
            space.vectors(self.coefficients[:, best]).T,
            residuals,
            residuals <= max(self.bound, space.rounding),
            space.matvecs,
            self.which,
        )

    def read(self) -> None:
        """Take the Ritz pairs of the space as it is."""
        self.values, self.coefficients, self.residuals = self.space.ritz()
        self.best = select(self.values, self.which, self.k)
        if len(self.values):  # also one that a restart has dropped: no Ritz value lies outside the spectrum
            self.largest = max(self.largest, float(self.values.abs().max()))
        self.bound = self.tol * self.largest
        self.settled = len(self.best) == self.k and bool((self.residuals[self.best] <= self.bound).all())

    def _points(self) -> list[tuple[float, float]]:
        """Where a missed eigenvalue would matter, and how likely each had stayed hidden before the look.

        A random start vector shows every eigenvalue but a copy of one. A near copy at distance ``d`` from a Ritz value
        can have next to nothing of its Ritz vector only where the start had that much less of it than of the other
        one: a ratio of two normal numbers, below ``residual / d`` with a chance of about ``2/pi`` times that. What
        lies between the last wanted one and the copies has to escape both random vectors.
        """
        values = self.values[self.best]
        leeway = 2 / (math.pi * CHANCE) * self.space.bounds(self.residuals[self.best])
        points = []
        for end, side in self._ends():
            copies = (side * values - leeway)[side * values > side * end]
            nearest = max(side * end, float(copies.min())) if len(copies) else side * end
            points.append((side * nearest if self.first_run else end, 1.0))
            if self.first_run:
                between = torch.linspace(end, side * nearest, BETWEEN + 1, dtype=torch.float64)[:-1].tolist()
                points += [(point, self._hidden_from_start(point)) for point in between]
        return points

    def _hidden_from_start(self, point: float) -> float:
        """How likely the start vector's run would not have shown an eigenvalue at ``point``."""
        alphas, betas = self.first_run or ([], [])
        if 0 in betas:  # its Krylov space is exhausted
            return 0.0
        return chance_of_hiding(largest_weight(alphas, betas, point), self.space.operator.size)

    def _ends(self) -> list[tuple[float, int]]:
        """From where on a missed eigenvalue would belong among the wanted, and whether that is up (1) or down (-1)."""
        values, low = self.values[self.best].tolist(), self.k // 2
        aside = self.notable * float(self.values.abs().max())
        if self.which == "LM":
            return [(abs(values[-1]) + aside, 1), (-abs(values[-1]) - aside, -1)]
        if self.which == "SA":
            return [(values[-1] - aside, -1)]
        if self.which == "BE" and low:
            return [(values[-low - 1] + aside, 1), (values[-low] - aside, -1)]
        return [(values[-1] + aside, 1)]

    def _moved(self, before: Tensor | None) -> float:
        if before is None or len(before) != len(self.best):
            return math.inf
        return float((self.values[self.best] - before).abs().max())

    def _next_settled(self) -> bool:
        which = "LA" if self.which == "BE" else self.which  # of a single pair from both ends, which is the upper one
        both = select(self.values, which, 2)
        if len(both) < 2:
            return False
        values = self.values[both].abs() if self.which == "LM" else self.values[both]
        gap = abs(float(values[0] - values[1]))
        return float(self.residuals[both[1]]) <= max(SETTLED * gap, self.bound)

    def _expand(self) -> None:
        self.space.expand()
        self.read()
        if self.progress is not None:
            self.progress(int((self.residuals[self.best] <= self.bound).sum()), self.k)

    def _make_room(self, need: int = 1) -> None:
        """Restart where the basis is full, or where ``need`` more vectors do not fit."""
        space = self.space
        if space.capacity == space.operator.size:
            return
        if space.processed < self.length and space.used + need <= space.capacity:
            return
        self.plain = False
        keep = min(self.k + (self.length - self.k) // 2, space.capacity - space.pending - need)
        kept = self._kept(max(self.k, min(keep, space.processed - 1)))
        space.restart(self.coefficients[:, kept], self.values[kept])
        self.read()

    def _kept(self, keep: int) -> Tensor:
        """Which ``keep`` Ritz pairs a restart keeps: the wanted, and beyond them as many as from the other end.

        The wider the spectrum that is left, the slower the wanted pairs converge: what lies far out at the other end
        would have to be found again after each restart. So TRLan keeps both ends (Yamazaki et al. 2010, ACM TOMS 37).
        """
        if self.which not in OTHER_END:
            return select(self.values, self.which, keep)
        other = (keep - self.k) // 2
        ends = (self.which, keep - other), (OTHER_END[self.which], other)
        return torch.cat([select(self.values, which, count) for which, count in ends])


class FreshVectors:
    """Gaussian vectors ``[local]``, a new one at each call."""

    def __init__(self, operator: LinearMap, seed: int) -> None:
        self.operator, self.seed, self.drawn = operator, seed, 0

    def __call__(self) -> Tensor:
        op, index = self.operator, self.drawn
        self.drawn += 1
        return op.space.gaussian(1, seed=self.seed, first=index, dtype=working_dtype(op), device=op.device)[0]


def select(values: Tensor, which: Which, k: int) -> Tensor:
    """Indices of the ``k`` wanted among ascending values, in the order of the result."""
    n = len(values)
    k = min(k, n)
    ascending = torch.arange(n)
    if which == "SA":
        return ascending[:k]
    if which == "LA":
        return ascending.flip(0)[:k]
    if which == "LM":
        return values.abs().argsort(descending=True, stable=True)[:k]
    low = k // 2
    return torch.cat([ascending.flip(0)[: k - low], ascending[:low].flip(0)])
