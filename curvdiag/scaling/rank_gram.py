"""The nonzero eigenvalues of C where samples lie on several ranks, which show each other their gradients."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from curvdiag.objective import Objective
from curvdiag.samples import per_sample_gradients
from curvdiag.samples.streaming import result_dtype
from curvdiag.scaling.alike import free_here

# Bytes of gradients that go around at a time, those of all ranks together.
SHOWN = 1 << 26


def values_on_ranks(objective: Objective, dtype: torch.dtype | None) -> NDArray[np.float64] | None:
    """Eigenvalues of C, descending, all but zeros that follow from fewer samples than parameters; on all ranks alike.

    From products of centred gradients, as :func:`curvdiag.operators.gram.gram`. Every rank keeps its own gradients,
    and all ``N P`` numbers go to every rank once. None where they do not fit.
    """
    ranks, count, size = objective.ranks, objective.size, objective.parameters.size
    each = size * result_dtype(objective, dtype).itemsize
    # Its own gradients, also while they are put together, what is shown, and the products with the solver's copies.
    need = 2 * objective.local_size * each + 3 * max(SHOWN, ranks.count * each) + 4 * 8 * count**2
    if ranks.least(free_here(objective) - need, "free memory") < 0:
        return None
    weights = objective.weights(dtype=dtype)
    with ranks.together("gradients of samples"):
        own = torch.cat(list(per_sample_gradients(objective, weights, dtype=dtype)))
    products = _products(objective, own, max(1, SHOWN // (ranks.count * each)))
    # Centred twice: products with the mean gradient go from rows and from columns.
    products -= products.mean(0, keepdim=True)
    products -= products.mean(1, keepdim=True)
    with ranks.together("eigenvalues of products of gradients"):
        values = torch.linalg.eigvalsh((products + products.T) / (2 * count)).flip(0)
    return ranks.first_(values, "eigenvalues of the first rank")[: min(count, size)].cpu().numpy()


def _products(objective: Objective, own: Tensor, step: int) -> Tensor:
    """``g_i . g_j`` ``[N, N]`` from this rank's ``own`` gradients ``[n, P]``, ``step`` of each rank at a time."""
    ranks = objective.ranks
    held = ranks.gather(len(own), "counting of samples")
    out = torch.zeros(len(own), objective.size, dtype=torch.float64, device=own.device)
    for start in range(0, max(held), step):
        shown = ranks.concatenate(own[start : start + step], 0, "gradients of samples").double()
        met = torch.cat([part.double() @ shown.T for part in own.split(step)])
        first = 0
        for rank, samples in enumerate(held):
            here = max(0, min(step, samples - start))
            at = sum(held[:rank]) + start
            out[:, at : at + here] = met[:, first : first + here]
            first += here
    return ranks.concatenate(out, 0, "products of gradients")
