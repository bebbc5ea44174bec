"""A growing orthonormal basis in which a symmetric operator is known up to a few outstanding directions.

The rows of the basis are ``n`` *processed* vectors V, whose products are known, and ``b`` *pending* ones F:

    H V = V T + F C,    T [n, n] symmetric,   C [b, n]

One pending direction is ordinary Lanczos with full orthogonalisation; several arise from several start
vectors, or from a fresh one put in later. The residual of a Ritz pair (theta, V s) is F C s exactly, and
replacing V by some of its Ritz vectors keeps the relation: the thick restart. That takes products in full single
precision, also where the process has its own rounded to TF32.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from curvdiag.errors import NonFiniteError
from curvdiag.operators.base import LinearMap
from curvdiag.operators.precision import multiplication
from curvdiag.spectrum.lanczos import BREAKDOWN
from curvdiag.spectrum.vectors import NON_FINITE, product, remove_components, wide_dtype, working_dtype

# Of what the basis lacks in orthogonality, a new vector takes over as large a part as the last pass took of it. Up to
# this one it needs no other pass.
SMALL_PART = 0.1


class Subspace:
    """Basis, projected matrix and coupling; the vectors in the operator's precision, the rest in float64.

    Attributes:
        capacity: How many vectors, processed and pending, fit before a restart is due.
        scale: The largest coefficient seen: a lower estimate of the operator's norm.
        defect: By how much products so far break the symmetry of the projected matrix: rounding, or worse.
        matvecs: Products made.
    """

    def __init__(self, operator: LinearMap, capacity: int) -> None:
        self.operator = operator
        self.capacity = capacity
        self.dtype = working_dtype(operator)
        self.rows = torch.empty(capacity, operator.space.local, dtype=self.dtype, device=operator.device)
        self.processed = 0
        self.pending = 0
        self.projected = torch.zeros(0, 0, dtype=torch.float64)
        self.coupling = torch.zeros(0, 0, dtype=torch.float64)
        self.scale = 0.0
        self.defect = 0.0
        self.matvecs = 0

    @property
    def used(self) -> int:
        return self.processed + self.pending

    def add(self, vector: Tensor) -> bool:
        """Make what is new in ``vector`` ``[local]`` a pending direction; False where nothing is.

        ``vector`` is overwritten.
        """
        before = float(self._length(vector))
        if not before > 0 or self.used >= min(self.capacity, self.operator.size):
            return False
        length = before
        # Twice is enough (Giraud et al. 2005); a third time where nearly all was old.
        for _ in range(3 if self.used else 0):
            remove_components(self.operator.space, vector, self.rows[: self.used])
            length = float(self._length(vector))
        if length <= 64 * torch.finfo(self.dtype).eps * before:
            return False
        self.rows[self.used] = vector / length
        self.pending += 1
        self.coupling = torch.cat([self.coupling, self.coupling.new_zeros(1, self.processed)])
        return True

    def add_random(self, vector: Tensor) -> bool:
        """Make the first pending direction what ``vector`` ``[local]`` has outside V; False where there is nothing.

        ``vector`` is overwritten.
        """
        pending = self.rows[self.processed : self.used]
        direction = self.operator.space.components(pending, vector).cpu().double()
        if self.add(vector):
            rest = self._length(vector)[None].cpu().double()
            direction = torch.cat([direction, rest])
        self.aim(direction)
        return self.pending > 0

    def expand(self) -> None:
        """Process the first pending direction with one product; its remainder becomes the last pending one."""
        n, b = self.processed, self.pending
        basis = self.rows[: n + b]
        fresh = product(self.operator, basis[n : n + 1])[0]
        self.matvecs += 1
        column = self._orthogonalise(fresh, basis)
        beta = float(column[-1])
        self.scale = max(self.scale, float(column.abs().max()))
        self.defect = math.hypot(self.defect, float((column[:n] - self.coupling[0]).norm()))
        # Row n of the relation by symmetry: what V sees of the new vector is the old coupling to it.
        projected = torch.zeros(n + 1, n + 1, dtype=torch.float64)
        projected[:n, :n] = self.projected
        projected[n, :n] = projected[:n, n] = self.coupling[0]
        projected[n, n] = column[n]
        coupling = torch.zeros(b, n + 1, dtype=torch.float64)
        coupling[: b - 1, :n] = self.coupling[1:]
        coupling[: b - 1, n] = column[n + 1 : n + b]
        coupling[b - 1, n] = column[n + b]
        self.projected, self.coupling = projected, coupling
        self.processed, self.pending = n + 1, b - 1
        if beta > BREAKDOWN * torch.finfo(self.dtype).eps * self.scale and self.used < self.operator.size:
            torch.div(fresh, beta, out=self.rows[self.used])
            self.pending += 1
        else:
            self.coupling = coupling[: b - 1]

    def _orthogonalise(self, fresh: Tensor, basis: Tensor) -> Tensor:
        """Take from the product with the first pending direction what the basis has of it, in place.

        What the processed vectors have is known by symmetry, and is zero but for a few of them; there are few pending
        ones. Once both are gone, one pass against the whole basis has only rounding to remove. Another one follows
        where it found more than that: what breaks the symmetry, or rounding that is large beside what is left.

        Returns:
            The components ``[n + b]`` and the length of the rest, in float64 on the CPU.
        """
        n, space, wide = self.processed, self.operator.space, wide_dtype(fresh.device)
        coupled = self.coupling[0].nonzero()
        first = int(coupled[0]) if len(coupled) else n
        known = torch.zeros(len(basis), dtype=self.dtype, device=fresh.device)
        if first < n:
            known[first:n] = self.coupling[0, first:]
            fresh.addmv_(basis[first:n].T, known[first:n], alpha=-1)
        known[n:] = remove_components(space, fresh, basis[n:])
        components = known.to(wide)
        for _ in range(2):
            found = remove_components(space, fresh, basis).to(wide)
            components += found
            column = torch.cat([components, torch.stack([self._length(fresh).to(wide), found.norm()])]).cpu().double()
            if not bool(column.isfinite().all()):
                raise NonFiniteError(NON_FINITE)
            if column[-1] <= SMALL_PART * column[-2]:
                break
        return column[:-1]

    def ritz(self) -> tuple[Tensor, Tensor, Tensor]:
        """Ritz values ``[n]`` ascending, coefficients ``[n, n]`` in columns, residual norms ``[n]``."""
        values, coefficients = torch.linalg.eigh(self.projected)
        residuals = (self.coupling @ coefficients).square().sum(0).sqrt()
        return values, coefficients, residuals

    @property
    def rounding(self) -> float:
        """What no residual can be known to be below."""
        return 4 * torch.finfo(self.dtype).eps * self.scale

    def bounds(self, residuals: Tensor) -> Tensor:
        """The ``residuals`` of Ritz pairs with rounding and any asymmetry of the products counted in."""
        return (residuals.square() + self.defect**2 + self.rounding**2).sqrt()

    @multiplication("ieee")
    def aim(self, direction: Tensor) -> None:
        """Turn the pending directions so that the first is along ``direction`` ``[b]``, in their coordinates."""
        if self.pending < 2 or float(direction.norm()) == 0:
            return
        rotation, _ = torch.linalg.qr(torch.cat([direction[:, None], torch.eye(self.pending, dtype=torch.float64)], 1))
        self.coupling = rotation.T @ self.coupling
        n = self.processed
        turn = rotation.T.to(self.rows)
        self.rows[n : self.used] = turn @ self.rows[n : self.used]

    @multiplication("ieee")
    def restart(self, coefficients: Tensor, values: Tensor) -> None:
        """Keep only the Ritz vectors with these coefficients ``[n, p]`` and values ``[p]``."""
        n, p, b = self.processed, coefficients.shape[1], self.pending
        turn = coefficients.T.to(self.rows)
        # In pieces along the vectors: a whole second basis would double the memory.
        for first in range(0, self.rows.shape[1], 1 << 20):
            piece = slice(first, first + (1 << 20))
            self.rows[:p, piece] = turn @ self.rows[:n, piece]
        self.rows[p : p + b] = self.rows[n : n + b].clone()
        self.projected = torch.diag(values)
        self.coupling = self.coupling @ coefficients
        self.processed = p

    @multiplication("ieee")
    def vectors(self, coefficients: Tensor) -> Tensor:
        """Ritz vectors as contiguous rows ``[p, local]``."""
        return coefficients.T.to(self.rows) @ self.rows[: self.processed]

    def _length(self, vector: Tensor) -> Tensor:
        return self.operator.space.dots(vector[None], vector[None])[0].sqrt()
