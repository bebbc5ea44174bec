"""What the optimizers refuse, and how clearly."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn
from update_rules import arrays, parameters, set_gradients

from curvdiag.errors import ArgumentError
from curvdiag.optim import GSGD, LPSGD, LPSGDM, Lion, SignSGD, Stacey


def gsgd(params, **options):
    return GSGD(params, total_steps=10, **options)


MAKERS = pytest.mark.parametrize("make", [LPSGD, LPSGDM, Lion, SignSGD, gsgd, Stacey])
BAD = [
    ("lr", -1e-3),
    ("lr", math.nan),
    ("lr", torch.tensor([0.1, 0.2])),
    ("lr", torch.tensor(-0.1)),
    ("lr", "fast"),
    ("weight_decay", -0.1),
    ("weight_decay", math.inf),
    ("eps", -1e-8),
    ("eps", math.nan),
    ("p", 1.9),
    ("p", math.nan),
    ("p", "6"),
    ("beta", 1.0),
    ("beta", -0.1),
    ("beta", math.nan),
    ("betas", (0.9, 1.0)),
    ("betas", (0.9,)),
]


OPTIONS = {LPSGD: {"eps", "p"}, LPSGDM: {"eps", "p", "beta"}, Lion: {"betas"}, Stacey: {"eps", "p"}}


@pytest.mark.parametrize(
    ("make", "key", "value"),
    [
        (make, key, value)
        for make in (LPSGD, LPSGDM, Lion, SignSGD, gsgd, Stacey)
        for key, value in BAD
        if key in {"lr", "weight_decay"} | OPTIONS.get(make, set())
    ],
)
def test_options_out_of_range_are_refused_wherever_they_come(make, key, value):
    one, two = parameters(0, shapes=[(3,), (3,)])
    for call in (lambda: make([one], **{key: value}), lambda: make([{"params": [one], key: value}])):
        with pytest.raises(ArgumentError, match=key[:4]):
            call()
    optimizer = make([one])
    with pytest.raises(ArgumentError, match=rf"parameter group 1.*{key[:4]}"):
        optimizer.add_param_group({"params": [two], key: value})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": [two]})


@pytest.mark.parametrize("make", [LPSGD, LPSGDM, Stacey])
@pytest.mark.parametrize("p", [1.5, math.nan, None])
def test_a_bad_p_put_in_later_is_noticed_before_anything_moves(make, p):
    one, two = parameters(0, shapes=[(3,), (3,)])
    set_gradients([one, two], 0)
    optimizer = make([{"params": [one]}, {"params": [two]}])
    before = arrays([one, two])
    optimizer.param_groups[1]["p"] = p
    with pytest.raises(ArgumentError, match=r"parameter group 1.*from 2"):
        optimizer.step()
    assert all(np.array_equal(a, b) for a, b in zip(arrays([one, two]), before, strict=True))


@MAKERS
@pytest.mark.parametrize("foreach", [True, False, None])
def test_sparse_gradients_and_complex_parameters_are_refused(make, foreach):
    table, dense = nn.Embedding(5, 2, sparse=True), torch.ones(2, requires_grad=True)
    table(torch.tensor([1, 3])).sum().backward()
    dense.grad = torch.ones(2)
    with pytest.raises(ArgumentError, match=r"parameter 1 of shape \(5, 2\) is sparse"):
        make([dense, table.weight], foreach=foreach).step()
    assert dense.tolist() == [1, 1]
    complex_one = torch.ones(2, dtype=torch.complex64, requires_grad=True)
    with pytest.raises(ArgumentError, match="view_as_real"):
        make([dense, complex_one], foreach=foreach)
    optimizer = make([dense])
    with pytest.raises(ArgumentError, match="view_as_real"):
        optimizer.add_param_group({"params": [complex_one]})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("make", [Lion, SignSGD, gsgd, Stacey, lambda ps, **o: LPSGD(ps, dual_norm=True, **o)])
def test_steps_that_cannot_be_differentiated_say_so(make):
    with pytest.raises(ArgumentError, match="differentiated"):
        make([torch.ones(2, requires_grad=True)], differentiable=True)


@pytest.mark.parametrize("make", [LPSGD, LPSGDM])
def test_foreach_and_differentiable_exclude_each_other(make):
    with pytest.raises(ArgumentError, match="exclude"):
        make([torch.ones(2, requires_grad=True)], differentiable=True, foreach=True)
