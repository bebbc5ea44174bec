"""Derivatives of each sample's loss along directions from what layers see: no gradient of a single sample is made.

A backward pass in forward mode along ``v`` tells of each call of a layer its inputs ``a``, the gradients ``d`` in its
outputs, and the derivatives ``a'`` and ``d'`` of both along ``v``. Summed over the positions of a sample,

    g_i = d a^T,    h_i v = d' a^T + d a'^T,

and ``v^T h_i v`` and ``||h_i v||^2`` need inner products of these vectors only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from curvdiag.data import Batch, sample_count
from curvdiag.samples.calls import NotCovered
from curvdiag.scaling.layer_products import Product, dual
from curvdiag.scaling.layer_recorder import Recorder
from curvdiag.scaling.sample_derivatives import Direction, Place


def by_layers(place: Place, batch: Batch, directions: Sequence[Direction], *, squares: bool) -> list[Tensor]:
    """Slopes, curvatures and with ``squares`` ``||hess t_i v||^2``, each ``[n, B]``.

    Knows linear layers, convolutions, embeddings, scales and shifts, where the samples are the first dimension.

    Raises:
        NotCovered: A parameter is used in another way.
    """
    found = place.inside(lambda: [_along(place, batch, direction, squares) for direction in directions])
    return [torch.stack(column) for column in zip(*found, strict=True)]


def _along(place: Place, batch: Batch, direction: Direction, squares: bool) -> list[Tensor]:
    with forward_ad.dual_level():
        chosen = tuple(forward_ad.make_dual(w, v) for w, v in zip(place.point, direction, strict=True))
        recorder = Recorder(chosen, sample_count(batch))
        with recorder:
            totals = place.totals(chosen, batch)
        products = _products(recorder, totals)
        primal, slopes = dual(totals)
        zero = torch.zeros_like(primal)
        found = [zero if slopes is None else slopes]
        found.append(sum((product.dot() for product in products), zero))
        if squares:
            found.append(sum((product.square() for product in products), zero))
    return found


def _products(recorder: Recorder, totals: Tensor) -> list[Product]:
    """``h_i v`` of every tensor that a call was made with, from one backward pass."""
    products = recorder.products()
    if recorder.uses and totals.requires_grad:
        deltas = torch.autograd.grad(totals.sum(), [use.output for use in recorder.uses], allow_unused=True)
        for use, delta in zip(recorder.uses, deltas, strict=True):
            if use.activation is not None and use.activation._version != use.version:
                raise NotCovered("an activation was changed in place after it was used")
            if delta is not None:
                use.add(products, *dual(delta))
    return products
