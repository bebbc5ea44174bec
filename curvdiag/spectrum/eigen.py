"""A few eigenpairs by thick-restart Lanczos, with residuals, and a second look for what it may have missed.

The restart is that of Wu and Simon 2000 (SIAM J. Matrix Anal. Appl. 22); start vectors may be several, and
fresh ones may join later, as in Ruhe's band Lanczos (1979).
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from curvdiag.distributed import collectively
from curvdiag.errors import ArgumentError, NonFiniteError
from curvdiag.memory import free_bytes
from curvdiag.modes import outside_modes
from curvdiag.operators.base import LinearMap, linear_map
from curvdiag.seeds import Seed, resolve_seed
from curvdiag.space import Space
from curvdiag.spectrum.eigenpairs import Eigenpairs, Which
from curvdiag.spectrum.krylov import Subspace
from curvdiag.spectrum.lanczos import Progress
from curvdiag.spectrum.search import NOTABLE, FreshVectors, Search
from curvdiag.spectrum.vectors import NON_FINITE, product, working_dtype

# Up to this order, and where the products allow it, the basis may span the whole space: it is small, and so are
# the eigenproblems of its projected matrix.
SMALL = 300
# Beside the part of a single start vector along its eigenvector, a random vector has a part of about this size along
# every other one, whatever the order of the matrix, at a tolerance of 1e-2 or more. What is hidden shows once it is
# larger than the tolerance, so at 1e-3 half of this is as safe.
SHARE = 0.06


@outside_modes
@collectively
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
    that its start vector is orthogonal to. So, once several pairs have converged, a random vector outside all that was
    found begins a Lanczos run of its own, and whatever belongs among the wanted pairs joins them. The run goes on
    until an eigenvalue further out than the last wanted one, by a hundredth of the largest or by ``tol`` times it,
    could have stayed hidden only if the random vector had next to nothing of its eigenvector, as at most one in a
    hundred has; or for sixteen steps where the wanted pairs stand too close to the others for that, and then one hardly
    further out can escape. After a random start that holds for copies of what was found, and others count as hidden
    only from both random vectors.

    A single pair takes no look. A random start sees every eigenvalue, and a given one is mixed with a random
    vector, so that it does too. From the eigenvector of a slightly different matrix it takes about three quarters of a
    cold run's products, on some nets less and on others more; where the leading eigenvector is a new one,
    orthogonal to ``start``, it takes as many as a cold run. Both miss the largest eigenvalue about once in a
    hundred runs or less, with two exceptions. At ``tol=1e-2``, of two eigenvalues within a tenth of each other
    either takes the smaller for the largest in up to one run of thirty. And ``start`` may be exactly the
    eigenvector straight below it, which at ``tol=1e-2`` is then taken for the largest in about one run of twelve
    where the largest is larger by half, in one of five where it is by a seventh; at 1e-3 in one of a hundred and
    of fifteen. To be as sure as a cold run costs as much as one: ``check_multiplicity=True`` is, and misses one of a
    hundred.

    Args:
        op: Any square symmetric object with ``shape`` and ``@``.
        k: How many pairs; more than ``P`` are clipped to ``P``.
        which: ``"LA"`` largest, ``"SA"`` smallest, ``"LM"`` largest by magnitude, ``"BE"`` from both ends, one
            more from the upper end where ``k`` is odd.
        tol: A pair has converged when its residual is at most ``tol`` times the largest absolute Ritz value seen.
            Its eigenvalue's error is then usually of order ``tol`` squared.
        start: One start vector ``[P]`` or several ``[P, j]``, say the eigenvectors of a slightly different matrix.
            Several are added up: a Krylov space of their sum holds all of them, at fewer products than a block. It pays
            for ``k = 1``. For five or ten pairs leave it out: a cold run finds them all while it finds the last.
        seed: For the random start, and the random vectors of the check.
        check_multiplicity: ``"auto"`` looks for missed pairs where they can matter, for ``k > 1``: a single extreme
            value has the right value whatever its multiplicity. Where the wanted pairs stand clear of the others a look
            costs three or four products, where they do not up to sixteen, and it is repeated after each find. True
            always looks, for what stands out by ``tol`` times the largest also where that is less than a hundredth;
            False never. Both take ``start`` as it is.
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
    return search_eigenpairs(
        linear_map(op),
        k,
        which=which,
        tol=tol,
        start=start,
        seed=resolve_seed(seed),
        check_multiplicity=check_multiplicity,
        basis_size=basis_size,
        max_matvecs=max_matvecs,
        progress=progress,
    ).result()


def search_eigenpairs(
    operator: LinearMap,
    k: int,
    *,
    which: Which = "LA",
    tol: float = 1e-3,
    start: Tensor | None = None,
    seed: int = 0,
    check_multiplicity: bool | Literal["auto"] = "auto",
    basis_size: int | None = None,
    max_matvecs: int | None = None,
    progress: Progress | None = None,
    space: Subspace | None = None,
) -> Search:
    """The finished search of :func:`top_eigenpairs`, with all that its subspace knows besides the wanted pairs.

    Args:
        space: A subspace to go on in, from a cold start, instead of a new one; with room for ``k + 6`` vectors.
    """
    k = check_wanted(k, tol, operator.size)
    if which not in ("LA", "SA", "LM", "BE"):
        raise ArgumentError(f'which is "LA", "SA", "LM" or "BE", not {which!r}')
    limit = 100 + 20 * k if max_matvecs is None else _positive("max_matvecs", max_matvecs)
    if limit < k:
        raise ArgumentError(f"{k} eigenpairs need at least {k} products, but max_matvecs is {limit}")
    fresh, mixed = FreshVectors(operator, seed), False
    random_start = space is None and start is None and check_multiplicity == "auto"
    if space is None:
        length = _basis_size(basis_size, k, operator, limit)
        # Room beyond the restart length for pending directions: the first, and a fresh one for each pair missed.
        space = Subspace(operator, min(length + k + 2, operator.size))
        mixed = k == 1 and start is not None and check_multiplicity == "auto"
        given = _start_vector(start, operator) if start is not None else fresh()
        if mixed:
            _mix(operator.space, given, fresh(), SHARE * min(1.0, tol / 1e-2) ** 0.3)
        if not space.add(given):
            mixed = False
            space.add(fresh())
    else:
        length = space.capacity - k - 2

    notable = tol if check_multiplicity is True else NOTABLE
    search = Search(space, fresh, which, k, tol, limit, length, progress, notable, random_start)
    look = k > 1 if check_multiplicity == "auto" else bool(check_multiplicity)
    quick = k == 1 and look  # what a single value might have missed, the look finds
    settled = search.converge(quick, next_too=mixed)
    while look and settled and search.finds_more():
        settled = search.converge(quick)
    return search


def check_wanted(k: int, tol: float, size: int) -> int:
    """How many pairs are wanted of a matrix of order ``size``.

    Raises:
        ArgumentError: ``k`` is no positive integer, or the tolerance not positive.
    """
    if not tol > 0:
        raise ArgumentError(f"the tolerance of an eigenpair is positive, not {tol}")
    return min(_positive("k", k), size)


@outside_modes
@collectively
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
    dots = operator.space.dots
    if not tol > 0:
        raise ArgumentError(f"the tolerance of an eigenpair is positive, not {tol}")
    vector = FreshVectors(operator, resolve_seed(seed))()[None]
    if start is not None:
        given = _start_vector(start, operator)[None]
        if float(dots(given, given)[0]) > 0:
            vector = given
    vector = vector / dots(vector, vector).sqrt().to(vector)
    value, residual, done, used = 0.0, 0.0, False, 0
    for used in range(1, _positive("max_matvecs", max_matvecs) + 1):
        image = product(operator, vector)
        value = float(dots(vector, image)[0])
        length = float(dots(image, image)[0].sqrt())
        if not math.isfinite(length):
            raise NonFiniteError(NON_FINITE)
        remainder = image - value * vector
        residual = float(dots(remainder, remainder)[0].sqrt())
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


def _start_vector(start: Tensor, operator: LinearMap) -> Tensor:
    local = operator.space.local
    if not isinstance(start, Tensor) or start.ndim not in (1, 2) or start.shape[0] != local:
        shape = getattr(start, "shape", None)
        raise ArgumentError(f"start is a tensor [{local}] or [{local}, j], not {type(start).__name__} of shape {shape}")
    columns = start.detach().reshape(local, -1)
    if not bool(columns.isfinite().all()):
        raise ArgumentError("the start vectors hold NaN or infinite numbers")
    return columns.sum(1).to(device=operator.device, dtype=working_dtype(operator))


def _mix(space: Space, start: Tensor, noise: Tensor, share: float) -> None:
    """Add to ``start`` ``[local]``, in place, a random vector ``share sqrt(P)`` times as long; zero stays zero."""
    length = space.dots(start[None], start[None]).sqrt()
    factor = share * math.sqrt(space.size) * length / space.dots(noise[None], noise[None]).sqrt()
    start.addcmul_(noise, factor.to(noise))


def _basis_size(asked: int | None, k: int, operator: LinearMap, limit: int) -> int:
    least = k + 4
    if asked is not None:
        if _positive("basis_size", asked) < least:
            raise ArgumentError(f"{k} eigenpairs need a basis of at least {least} vectors, not {asked}")
        return asked
    if operator.size <= min(limit, SMALL):
        return operator.size
    space, device = operator.space, operator.device
    fits = space.fitting(free_bytes(device), 2 * space.longest * working_dtype(operator).itemsize, device)
    return max(least, min(max(2 * k + 16, 24), fits - k - 2))


def _positive(name: str, number: int) -> int:
    if isinstance(number, bool) or int(number) != number or number < 1:
        raise ArgumentError(f"{name} is a positive integer, not {number!r}")
    return int(number)
