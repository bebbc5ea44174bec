"""Spectra of data on several ranks: the numbers of one process, the same bits everywhere, one reduction a product."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from ranks import launch
from spectra_of_ranks import CUTS, SAMPLES, algorithms, differences, layers, objective, others

from curvdiag import Hessian, NoiseCovariance

MEASURE = """
import spectra_of_ranks as spectra
from curvdiag import Hessian, NoiseCovariance, layer_spectra, spectral_density, top_eigenpairs
from curvdiag.operators.objective_operator import ObjectiveOperator

reduced, reduce = [], dist.all_reduce
def counting(tensor, *args, **kwargs):
    reduced.append((tensor.numel(), tensor.dtype))
    return reduce(tensor, *args, **kwargs)
dist.all_reduce = counting
products, multiply = [], ObjectiveOperator._whole
ObjectiveOperator._whole = lambda self, rows: (products.append(rows.numel()), multiply(self, rows))[1]
forms, take = [], ObjectiveOperator._whole_forms
ObjectiveOperator._whole_forms = lambda self, rows: (forms.append(len(rows)), take(self, rows))[1]

for dtype in (torch.float32, torch.float64):
    objective = spectra.objective(rank, world, dtype)
    H, C = Hessian(objective), NoiseCovariance(objective)
    for name, function in spectra.algorithms(H, C, H.space).items():
        reduced.clear(), products.clear(), forms.clear()
        before = objective.ranks.traffic.reductions, objective.ranks.traffic.bytes
        saved[name, dtype] = function()
        traffic = objective.ranks.traffic
        large = [n for n, _ in reduced if n >= H.size]
        saved["traffic", name, dtype] = {
            "products": list(products), "forms": list(forms),
            "large": large, "others": max((n for n, _ in reduced if n < H.size)),
            "reductions": traffic.reductions - before[0],
            "bytes": (traffic.bytes - before[1]) // dtype.itemsize,
        }
    saved["layers", dtype] = spectra.layers(H)
    saved["others", dtype] = spectra.others(objective)

objective = spectra.objective(rank, world)
H, C = Hessian(objective), NoiseCovariance(objective)

def tried(name, function):
    try:
        saved[name] = function()
    except Exception as error:
        saved[name] = type(error).__name__, str(error)

def stop(done, planned):
    if rank == 1 and done > 9:
        raise ValueError("stopped by hand")

tried("stopped", lambda: spectral_density(H, progress=stop))
tried("eigenpairs of another seed", lambda: top_eigenpairs(H, 2, seed=rank))
tried("density of another seed", lambda: spectral_density(H, seed=rank, steps=3))
tried("other counts", lambda: spectral_density(H, steps=5, probes=2 + rank))

from curvdiag.spectrum import lanczos, density, deflation, budget, eigen, trace
enough = lanczos.free_bytes
lanczos.free_bytes = lambda device: 1000 if rank == 1 else enough(device)
tried("basis too large", lambda: spectral_density(H, steps=10, reorthogonalize="full"))
lanczos.free_bytes = enough

advance = lanczos.Recurrence.advance
def failing(self, fresh, orthogonalise=None):
    if rank == 1 and self.done == 4:
        raise MemoryError("no room for a vector")
    return advance(self, fresh, orthogonalise)
lanczos.Recurrence.advance = failing
tried("fails in the loop", lambda: spectral_density(H, steps=10))
tried("fails in layers", lambda: layer_spectra(H, steps=6))
lanczos.Recurrence.advance = advance

for module in (lanczos, density, deflation, budget, eigen, trace):
    module.free_bytes = lambda device: 2 * 24 * H.size * 8 if rank == 1 else enough(device)
saved["little memory"] = {
    name: function() for name, function in spectra.algorithms(H, C, H.space).items() if name in spectra.TIGHT
}
"""

DTYPES = (torch.float32, torch.float64)
LIMITS = {torch.float32: 1e-5, torch.float64: 1e-12}


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    return functools.cache(lambda world: launch(MEASURE, world, tmp_path_factory.mktemp("spectra"), limit=400))


@pytest.fixture(params=[2, 3], ids=["2 ranks", "3 ranks"])
def found(request, launched):
    return launched(request.param)


@pytest.fixture(params=DTYPES, ids=["float32", "float64"])
def dtype(request):
    return request.param


NAMES = list(algorithms(torch.eye(107), None, Hessian(objective()).space))


@pytest.fixture(scope="module")
def alone():
    expected = {}
    for one in DTYPES:
        problem = objective(dtype=one)
        H = Hessian(problem)
        tools = algorithms(H, NoiseCovariance(problem), H.space)
        expected |= {(name, one): function() for name, function in tools.items()}
        expected |= {("layers", one): layers(H), ("others", one): others(problem)}
    return expected


@pytest.mark.parametrize("name", NAMES)
def test_each_algorithm_gives_the_numbers_of_one_process(found, alone, name, dtype):
    worst = differences(found[0][name, dtype], alone[name, dtype])
    assert max(worst.values()) <= LIMITS[dtype], worst


@pytest.mark.parametrize("name", NAMES)
def test_all_ranks_have_the_same_bits(found, name, dtype):
    first = found[0][name, dtype]
    for other in (rank[name, dtype] for rank in found[1:]):
        for part, value in first.items():
            np.testing.assert_array_equal(other[part], value, err_msg=part)


@pytest.mark.parametrize("name", NAMES)
def test_each_product_is_one_reduction_and_nothing_else_of_that_size_is_sent(found, name, dtype):
    for rank in found:
        traffic = rank["traffic", name, dtype]
        assert traffic["products"] or traffic["forms"]
        assert traffic["large"] == traffic["products"]
        if name != "joint":  # where a covariance adds up the means of its samples besides
            assert traffic["reductions"] == len(traffic["products"]) + len(traffic["forms"])
            double = 8 // dtype.itemsize  # in which forms are added up
            assert traffic["bytes"] == sum(traffic["products"]) + double * sum(traffic["forms"])
        assert traffic["others"] <= 16  # rounds of status


def test_layer_spectra_are_those_of_one_process(found, alone, dtype):
    expected = alone["layers", dtype]
    assert len(expected) == 2 * 3 * 3
    for rank in found:
        assert rank["layers", dtype].keys() == expected.keys()
        for key, value in rank["layers", dtype].items():
            if key[-1] == "n":
                assert value == expected[key]
            else:
                np.testing.assert_allclose(value, expected[key], rtol=LIMITS[dtype])


def test_other_matrices_have_the_spectra_of_one_process(found, alone, dtype):
    for name, expected in alone["others", dtype].items():
        for what, numbers in expected.items():
            worst = differences(found[-1]["others", dtype][name][what], numbers)
            worst.pop("ends", None)  # densities are compared by their moments: a node of next to no weight is anywhere
            assert max(worst.values()) <= LIMITS[dtype], (name, what, worst)


def test_a_rank_that_fails_ends_the_measurement_on_all_and_is_named(found):
    for case, kind, words in (
        ("stopped", "ValueError", "stopped by hand"),
        ("fails in the loop", "MemoryError", "no room for a vector"),
        ("fails in layers", "MemoryError", "no room for a vector"),
    ):
        for number, rank in enumerate(found):
            error, message = rank[case]
            assert error == (kind if number == 1 else "RankFailedError"), case
            assert words in message
            assert number == 1 or f"rank 1 failed: {kind}" in message


def test_other_seeds_and_counts_on_another_rank_are_told(found):
    for rank in found:
        for case in ("eigenpairs of another seed", "density of another seed"):
            error, message = rank[case]
            assert error == "DistributedError"
            assert "same seed" in message
        assert rank["other counts"][0] == "DistributedError"


def test_too_little_memory_on_one_rank_is_the_same_error_on_all(found):
    for rank in found:
        error, message = rank["basis too large"]
        assert error == "TooLargeError"
        assert "stored Lanczos basis" in message
        assert f"more than the {1000 // len(found)} B free" in message  # what the rank has that has least


def test_ranks_with_less_memory_make_the_others_decide_as_they_do(found):
    for name, numbers in found[0]["little memory"].items():
        for other in found[1:]:
            for part, value in numbers.items():
                np.testing.assert_array_equal(other["little memory"][name][part], value)
    assert "nothing deflated: that takes" in found[0]["little memory"]["deflated"]["counts"][-1]


def test_the_parts_of_the_data_are_unequal_and_complete():
    assert all(sum(cut) == SAMPLES and len(set(cut)) == len(cut) for cut in CUTS.values())
