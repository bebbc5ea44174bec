"""A few eigenpairs by thick-restart Lanczos, with residuals, and a second look for what it may have missed.

The restart is that of Wu and Simon 2000 (SIAM J. Matrix Anal. Appl. 22); start vectors may be several, and
fresh ones may join later, as in Ruhe's band Lanczos (1979).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from curvdiag.errors import ArgumentError, NonFiniteError
from curvdiag.memory import free_bytes
from curvdiag.operators.base import LinearMap, linear_map
from curvdiag.results import Result
from curvdiag.spectrum.krylov import Subspace
from curvdiag.spectrum.lanczos import NON_FINITE, Progress, largest_weight, product, row_dots, working_dtype
from curvdiag.spectrum.probes import Seed, gaussian, resolve_seed

Which = Literal["LA", "SA", "LM", "BE"]

# A look for missed pairs ends when one would have escaped it with at most this probability, or after so many steps.
CHANCE, LOOK = 1e-2, 16
# Up to this order, and where the products allow it, the basis may span the whole space: it is small, and so are
# the eigenproblems of its projected matrix.
SMALL = 300


@dataclass(frozen=True)
class Eigenpairs(Result):
    """Approximate eigenpairs of a symmetric matrix.

    Attributes:
        values: Ritz values ``[k]``, float64: descending for LA and BE, descending by magnitude for LM,
            ascending for SA.
        vectors: Unit vectors ``[P, k]``, each contiguous in memory.
        residuals: ``||H v - lambda v||`` ``[k]``, absolute. The matrix has an eigenvalue within that distance.
        converged: Which residuals ``[k]`` met the tolerance.
        matvecs: Products made.
        which: Which pairs they are, as in :func:`top_eigenpairs`; ``"LM"`` from :func:`power_iteration`.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    converged: Tensor
    matvecs: int
    which: Which = "LA"

    figure = "eigenpairs"

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and lists, without the vectors."""
        plain = super().to_dict()
        del plain["vectors"]
        return plain

    def __str__(self) -> str:
        lines = [
            f"{value:14.6g} ± {residual:.2g}{'' if done else '  (not converged)'}"
            for value, residual, done in zip(
                self.values.tolist(), self.residuals.tolist(), self.converged.tolist(), strict=True
            )
        ]
        return "\n".join([f"{len(lines)} eigenpairs ({self.which}) from {self.matvecs} products", *lines])


def top_eigenpairs(
    op: Any,
    k: int = 1,
    *,
    which: Which = "LA",
    tol: float = 1e-3,
    start: Tensor | None = None,
    seed: Seed = 0,
    check_multiplicity: bool | Literal["auto"] = "auto",
    basis_size: int | None = None,
    max_matvecs: int | None = None,
    progress: Progress | None = None,
) -> Eigenpairs:
    """Extreme eigenpairs by thick-restart Lanczos with full orthogonalisation.

    A Krylov space sees of each eigenspace only the one direction that its start vector has there, and nothing
    that its start vector is orthogonal to. So, once the pairs have converged, a random vector outside all that was
    found begins a Lanczos run of its own, and whatever belongs among the wanted pairs joins them. The run goes on
    until an eigenvalue further out than the last wanted one, by ``tol`` times the largest, could have stayed hidden
    only if the random vector had next to nothing of its eigenvector, as at most one in a hundred has; or for sixteen
    steps where the wanted pairs stand too close to the others for that, and then one hardly further out can escape.

    Args:
        op: Any square symmetric object with ``shape`` and ``@``.
        k: How many pairs; more than ``P`` are clipped to ``P``.
        which: ``"LA"`` largest, ``"SA"`` smallest, ``"LM"`` largest by magnitude, ``"BE"`` from both ends, one
            more from the upper end where ``k`` is odd.
        tol: A pair has converged when its residual is at most ``tol`` times the largest absolute Ritz value.
            Its eigenvalue's error is then usually of order ``tol`` squared.
        start: One start vector ``[P]`` or several ``[P, j]``, say the eigenvectors of a slightly different matrix.
            Several are added up: a Krylov space of their sum holds all of them, at fewer products than a block.
        seed: For the random start, and the random vectors of the check.
        check_multiplicity: ``"auto"`` looks for missed pairs where they can matter: for ``k > 1``, and after a warm
            start; a single extreme value from a random start has the right value whatever its multiplicity. Where
            the wanted pairs stand clear of the others a look costs three or four products, where they do not up to
            sixteen, and it is repeated after each find. True always looks, False never.
        basis_size: Vectors of size ``P`` at which to restart; by default ``2 k + 16``, at least 24, or what
            half of the free memory holds. A matrix of order up to 300 that ``max_matvecs`` could exhaust needs no
            restart.
        max_matvecs: Most products, by default ``100 + 20 k``. Pairs that have not converged by then are returned
            and flagged.
        progress: Called with (pairs converged, pairs wanted) after each product.

    Raises:
        ArgumentError: An argument is out of range or of the wrong shape.
        NonFiniteError: A product held NaN or infinite numbers.
    """
    operator = linear_map(op)
    k = min(_positive("k", k), operator.size)
    if which not in ("LA", "SA", "LM", "BE"):
        raise ArgumentError(f'which is "LA", "SA", "LM" or "BE", not {which!r}')
    if not tol > 0:
        raise ArgumentError(f"the tolerance of an eigenpair is positive, not {tol}")
    limit = 100 + 20 * k if max_matvecs is None else _positive("max_matvecs", max_matvecs)
    if limit < k:
        raise ArgumentError(f"{k} eigenpairs need at least {k} products, but max_matvecs is {limit}")
    length = _basis_size(basis_size, k, operator, limit)
    # Room beyond the restart length for pending directions: the first, and a fresh one for each pair missed.
    space = Subspace(operator, min(length + k + 2, operator.size))
    fresh = _FreshVectors(operator, resolve_seed(seed))
    warm = start is not None and space.add(_start_vector(start, operator))
    if not warm:
        space.add(fresh())

    search = _Search(space, fresh, which, k, tol, limit, length, progress)
    look = (k > 1 or warm) if check_multiplicity == "auto" else bool(check_multiplicity)
    quick = k == 1 and look  # what a single value might have missed, the look finds
    settled = search.converge(quick)
    while look and settled and search.finds_more():
        settled = search.converge(quick)
    return search.result()


def power_iteration(
    op: Any,
    *,
    tol: float = 1e-3,
    max_matvecs: int = 100,
    start: Tensor | None = None,
    seed: Seed = 0,
    progress: Progress | None = None,
) -> Eigenpairs:
    """The eigenpair of largest magnitude by power iteration: two vectors of memory, many products.

    Kept for comparison with tools that have nothing else: :func:`top_eigenpairs` needs fewer products. Two
    eigenvalues of equal magnitude and opposite sign keep it from converging, and the result says so.

    Args:
        op: Any square symmetric object with ``shape`` and ``@``.
        tol: Stop when ``||H v - lambda v|| <= tol |lambda|``.
        max_matvecs: Most products.
        start: Start vector ``[P]``.
        seed: For a random start.
        progress: Called with (products done, most products).

    Raises:
        ArgumentError: An argument is out of range or of the wrong shape.
        NonFiniteError: A product held NaN or infinite numbers.
    """
    operator = linear_map(op)
    if not tol > 0:
        raise ArgumentError(f"the tolerance of an eigenpair is positive, not {tol}")
    vector = _FreshVectors(operator, resolve_seed(seed))()[None]
    if start is not None and bool(start.any()):
        vector = _start_vector(start, operator)[None]
    vector = vector / row_dots(vector, vector).sqrt().to(vector)
    value, residual, done, used = 0.0, 0.0, False, 0
    for used in range(1, _positive("max_matvecs", max_matvecs) + 1):
        image = product(operator, vector)
        value = float(row_dots(vector, image)[0])
        length = float(row_dots(image, image)[0].sqrt())
        if not math.isfinite(length):
            raise NonFiniteError(NON_FINITE)
        remainder = image - value * vector
        residual = float(row_dots(remainder, remainder)[0].sqrt())
        done = residual <= tol * abs(value)
        if progress is not None:
            progress(used, max_matvecs)
        if done or used == max_matvecs:
            break
        vector = image.div_(length)
    return Eigenpairs(
        torch.tensor([value], dtype=torch.float64),
        vector.T,
        torch.tensor([residual], dtype=torch.float64),
        torch.tensor([done]),
        used,
        "LM",
    )


class _Search:
    """The state of one search for eigenpairs: what is wanted, and how far it is."""

    def __init__(
        self,
        space: Subspace,
        fresh: _FreshVectors,
        which: Which,
        k: int,
        tol: float,
        limit: int,
        length: int,
        progress: Progress | None,
    ) -> None:
        self.space, self.fresh, self.which, self.k = space, fresh, which, k
        self.tol, self.limit, self.length, self.progress = tol, limit, length, progress
        self.read()

    def converge(self, quick: bool = False) -> bool:
        """Expand until the wanted pairs have converged; False where the products ran out before.

        Args:
            quick: Take small residuals for convergence, without waiting for the values to stand still.
        """
        space = self.space
        before: Tensor | None = None
        while True:
            # Early on, a Ritz pair of the bulk can have a small residual while a larger eigenvalue is still
            # invisible; it then moves at the next step.
            still = quick or not space.pending or self._moved(before) <= self.bound
            if self.settled and still:
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

    def finds_more(self) -> bool:
        """Run Lanczos from a random direction outside the processed vectors V; True once it upsets the wanted pairs.

        An eigenvector that the start vectors do not see lies outside V, and is one of the operator's part there, of
        which the run is an ordinary one. The pending directions take part: rounding blows up what the start vectors
        do not see, and a pending direction may already hold most of it.
        """
        space, operator = self.space, self.space.operator
        self._make_room(LOOK + 1)
        if not space.add_random(self.fresh()):
            return False
        first, before, ends = space.processed, self.values[self.best], self._ends()
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
            weight = max(largest_weight(alphas, betas, end) for end in ends)
            # A component of a random unit vector is about normal with variance 1 / dimension.
            if math.erf(math.sqrt(weight * (operator.size - first) / 2)) <= CHANCE:
                return False
            space.aim(remainder)
        return False

    def result(self) -> Eigenpairs:
        """The wanted pairs, sorted; rounding and any asymmetry of the products count into the residuals."""
        space, best = self.space, self.best
        rounding = 4 * torch.finfo(space.dtype).eps * space.scale
        residuals = (self.residuals[best].square() + space.defect**2 + rounding**2).sqrt()
        return Eigenpairs(
            self.values[best],
            space.vectors(self.coefficients[:, best]).T,
            residuals,
            residuals <= max(self.bound, rounding),
            space.matvecs,
            self.which,
        )

    def read(self) -> None:
        """Take the Ritz pairs of the space as it is."""
        self.values, self.coefficients, self.residuals = self.space.ritz()
        self.best = _select(self.values, self.which, self.k)
        self.bound = self.tol * float(self.values.abs().max()) if len(self.values) else 0.0
        self.settled = len(self.best) == self.k and bool((self.residuals[self.best] <= self.bound).all())

    def _ends(self) -> list[float]:
        """Where a missed eigenvalue would matter: at these points and further out."""
        values, low = self.values[self.best].tolist(), self.k // 2
        if self.which == "LM":
            return [abs(values[-1]) + self.bound, -abs(values[-1]) - self.bound]
        if self.which == "SA":
            return [values[-1] - self.bound]
        if self.which == "BE" and low:
            return [values[-low - 1] + self.bound, values[-low] - self.bound]
        return [values[-1] + self.bound]

    def _moved(self, before: Tensor | None) -> float:
        if before is None or len(before) != len(self.best):
            return math.inf
        return float((self.values[self.best] - before).abs().max())

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
        keep = min(self.k + (self.length - self.k) // 2, space.capacity - space.pending - need)
        kept = _select(self.values, self.which, max(self.k, min(keep, space.processed - 1)))
        space.restart(self.coefficients[:, kept], self.values[kept])
        self.read()


class _FreshVectors:
    """Gaussian vectors ``[P]``, a new one at each call."""

    def __init__(self, operator: LinearMap, seed: int) -> None:
        self.operator, self.seed, self.drawn = operator, seed, 0

    def __call__(self) -> Tensor:
        op, index = self.operator, self.drawn
        self.drawn += 1
        return gaussian(1, op.size, seed=self.seed, first=index, dtype=working_dtype(op), device=op.device)[0]


def _select(values: Tensor, which: Which, k: int) -> Tensor:
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


def _start_vector(start: Tensor, operator: LinearMap) -> Tensor:
    if not isinstance(start, Tensor) or start.ndim not in (1, 2) or start.shape[0] != operator.size:
        shape = getattr(start, "shape", None)
        raise ArgumentError(
            f"start is a tensor [{operator.size}] or [{operator.size}, j], not {type(start).__name__} of shape {shape}"
        )
    columns = start.detach().reshape(operator.size, -1)
    if not bool(columns.isfinite().all()):
        raise ArgumentError("the start vectors hold NaN or infinite numbers")
    return columns.sum(1).to(device=operator.device, dtype=working_dtype(operator))


def _basis_size(asked: int | None, k: int, operator: LinearMap, limit: int) -> int:
    least = k + 4
    if asked is not None:
        if _positive("basis_size", asked) < least:
            raise ArgumentError(f"{k} eigenpairs need a basis of at least {least} vectors, not {asked}")
        return asked
    if operator.size <= min(limit, SMALL):
        return operator.size
    fits = free_bytes(operator.device) // 2 // (operator.size * working_dtype(operator).itemsize)
    return max(least, min(max(2 * k + 16, 24), fits - k - 2))


def _positive(name: str, number: int) -> int:
    if isinstance(number, bool) or int(number) != number or number < 1:
        raise ArgumentError(f"{name} is a positive integer, not {number!r}")
    return int(number)
