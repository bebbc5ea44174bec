"""Spectra of a matrix of which each rank holds a part of every vector: as of whole vectors, and as of LAPACK."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from ranks import launch
from spectra_of_ranks import SIZE, Factored, algorithms, density_numbers, differences, pieces

from curvdiag import spectral_density

MEASURE = """
import spectra_of_ranks as spectra
from torch.utils._python_dispatch import TorchDispatchMode
from curvdiag import spectral_density, top_eigenpairs, trace
from curvdiag.distributed import ranks_of
from curvdiag.space import Piece, ShardedSpace, probes
from curvdiag.spectrum import density, eigen, deflation, budget, lanczos

probes.AT_ONCE = 64  # so that pieces of probes are smaller than shards
ranks = ranks_of("world")

class Longest(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.side, self.numbers = 0, 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, (list, tuple)) else [out]:
            if isinstance(one, torch.Tensor):
                self.side = max(self.side, *one.shape, 0)
                self.numbers = max(self.numbers, one.numel())
        return out

reduced, reduce = [], dist.all_reduce
def counting(tensor, *args, **kwargs):
    reduced.append(tensor.numel())
    return reduce(tensor, *args, **kwargs)
dist.all_reduce = counting

for dtype in (torch.float32, torch.float64):
    A, B = spectra.Factored(dtype, ranks), spectra.Factored(dtype, ranks, seed=2)
    for name, function in spectra.algorithms(A, B, A.space).items():
        saved[name, dtype] = function()
    saved["dense", dtype] = A.dense(chunk=200)
    saved["local"] = A.space.local, A.space.owned

spiked = spectra.Factored(torch.float64, ranks, spikes=50.0)
saved["spiked"] = spectra.density_numbers(spectral_density(spiked, steps=30, deflate="auto"))

A = spectra.Factored(torch.float64, ranks)
for name, function in {
    "density": lambda: spectral_density(A, steps=9, probes=2, reorthogonalize="full"),
    "auto": lambda: spectral_density(A, steps=30, deflate="auto"),
    "top": lambda: top_eigenpairs(A, 5, basis_size=12),
    "hutchinson": lambda: trace(A, probes=6),
    "hutch++": lambda: trace(A, method="hutch++", probes=12),
    "xtrace": lambda: trace(A, method="xtrace", probes=12),
}.items():
    reduced.clear()
    with Longest() as longest:
        function()
    saved["seen", name] = longest.side, longest.numbers, max(reduced)

def tried(name, function):
    try:
        saved[name] = function()
    except Exception as error:
        saved[name] = type(error).__name__, str(error)

tried("scipy", A.to_scipy)
tried("whole vector", lambda: A @ torch.ones(A.size, dtype=torch.float64))
tried("whole start", lambda: top_eigenpairs(A, start=torch.ones(A.size)))
tried("missing", lambda: ShardedSpace([p for p in spectra.pieces(rank, world) if p.offset], A.size, ranks))
tried("twice", lambda: ShardedSpace([Piece(0, torch.Size([5]), (0,), torch.Size([5]))], 5, ranks))
apply = A.apply
def spoilt(rows):
    product = apply(rows)
    if rank == 1:
        product[:, 0] = float("nan")
    return product
A.apply = spoilt
for name, function in {
    "density": lambda: spectral_density(A, steps=4),
    "top": lambda: top_eigenpairs(A),
    "hutchinson": lambda: trace(A),
    "xtrace": lambda: trace(A, method="xtrace"),
}.items():
    tried(f"nan {name}", function)
A.apply = apply

def stop(done, planned):
    if rank == 1 and done > 9:
        raise ValueError("stopped by hand")
tried("stopped", lambda: spectral_density(A, progress=stop))
enough = lanczos.free_bytes
for module in (lanczos, density, deflation, budget, eigen):
    module.free_bytes = lambda device: 2 * 60 * A.space.local * 8 if rank == 1 else enough(device)
little = spectra.algorithms(A, A, A.space)
saved["little memory"] = {name: little[name]() for name in spectra.TIGHT}
lanczos.free_bytes = lambda device: 2 * 8 * A.space.local * 8 if rank == 1 else enough(device)
tried("no room", lambda: spectral_density(A, steps=20, reorthogonalize="full"))
"""

DTYPES = (torch.float32, torch.float64)
LIMITS = {torch.float32: 1e-5, torch.float64: 1e-12}
NAMES = list(algorithms(torch.eye(3), None, Factored(torch.float64).space))


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    return functools.cache(lambda world: launch(MEASURE, world, tmp_path_factory.mktemp("shards"), limit=400))


@pytest.fixture(params=[2, 3], ids=["2 ranks", "3 ranks"])
def found(request, launched):
    return launched(request.param)


@pytest.fixture(params=DTYPES, ids=["float32", "float64"])
def dtype(request):
    return request.param


@pytest.fixture(scope="module")
def alone():
    expected = {}
    for one in DTYPES:
        A, B = Factored(one), Factored(one, seed=2)
        expected |= {(name, one): function() for name, function in algorithms(A, B, A.space).items()}
        expected["dense", one] = A.dense()
    return expected


@pytest.mark.parametrize("name", NAMES)
def test_each_algorithm_gives_on_shards_what_it_gives_on_whole_vectors(found, alone, name, dtype):
    worst = differences(found[0][name, dtype], alone[name, dtype])
    assert max(worst.values()) <= LIMITS[dtype], worst


@pytest.mark.parametrize("name", NAMES)
def test_all_ranks_have_the_same_bits(found, name, dtype):
    for other in found[1:]:
        for part, value in found[0][name, dtype].items():
            np.testing.assert_array_equal(other[name, dtype][part], value, err_msg=part)


def test_eigenpairs_and_exact_traces_are_those_of_lapack(found, alone):
    matrix = alone["dense", torch.float64]
    values, vectors = torch.linalg.eigh(matrix)
    for rank in found:
        assert torch.allclose(rank["dense", torch.float64], matrix, rtol=0, atol=1e-14)
        five = rank["five", torch.float64]
        np.testing.assert_allclose(five["values"], values.flip(0)[:5], atol=1e-8)
        along = np.abs((five["vectors"] * vectors.T.flip(0)[:5].numpy()).sum(1))
        np.testing.assert_allclose(along, 1, atol=1e-5)
        exact = rank["exact trace", torch.float64]
        assert float(exact["value"]) == pytest.approx(float(matrix.trace()), rel=1e-12)
        deflated = rank["deflated", torch.float64]["deflated"]
        largest = values[values.abs().argsort(descending=True)[:5]]
        np.testing.assert_allclose(deflated, largest, rtol=1e-3)


@pytest.mark.parametrize("method", ["hutchinson", "hutch++", "xtrace"])
def test_traces_lie_within_their_errors(found, alone, method):
    exact = float(alone["dense", torch.float64].trace())
    estimate = found[0][method, torch.float64]
    assert abs(float(estimate["value"]) - exact) < 4 * float(estimate["error"])


def test_eigenvectors_on_one_rank_alone_are_known_by_all_to_be_no_noise_of_the_probes(found):
    expected = density_numbers(spectral_density(Factored(torch.float64, spikes=50.0), steps=30, deflate="auto"))
    assert "it would not pay" in expected["counts"][-1]
    for rank in found:
        assert max(differences(rank["spiked"], expected).values()) < 1e-12


@pytest.mark.parametrize("name", ["density", "auto", "top", "hutchinson", "hutch++", "xtrace"])
def test_no_rank_ever_holds_a_tensor_as_long_as_the_matrix(found, name):
    for rank in found:
        local, owned = rank["local"]
        side, _, reduced = rank["seen", name]
        assert owned <= local < 0.7 * SIZE
        assert side <= local
        assert reduced <= 300  # numbers of a small matrix, never of a vector


def test_the_shards_are_what_the_test_means_them_to_be():
    for world in (2, 3):
        held = [pieces(rank, world) for rank in range(world)]
        assert sum(piece.size for own in held for piece in own if piece.counted) == SIZE
        assert sum(not piece.counted for own in held for piece in own) == world - 1
        assert len({sum(piece.size for piece in own) for own in held}) == world  # of unequal sizes


def test_what_shards_cannot_do_is_refused_and_says_what_remains(found):
    for number, rank in enumerate(found):
        kind, message = rank["scipy"]
        assert kind == "ArgumentError"
        assert "top_eigenpairs" in message
        kind, message = rank["whole vector"]
        assert kind == "ArgumentError"
        assert f"this rank holds {rank['local'][0]}" in message
        kind, message = rank["whole start"]
        assert kind == "ArgumentError"
        assert f"[{rank['local'][0]}]" in message
        for case in ("missing", "twice"):
            kind, message = rank[case]
            assert kind == "DistributedError", (number, message)
            assert "shards overlap" in message


def test_numbers_that_are_not_finite_on_one_rank_are_the_same_error_on_all(found):
    for rank in found:
        for name in ("density", "top", "hutchinson", "xtrace"):
            kind, message = rank[f"nan {name}"]
            assert kind == "NonFiniteError", name
            assert "NaN" in message


def test_a_rank_that_fails_or_has_little_memory_is_heard_by_all(found):
    for number, rank in enumerate(found):
        kind, message = rank["stopped"]
        assert kind == ("ValueError" if number == 1 else "RankFailedError")
        assert "stopped by hand" in message
        assert rank["no room"][0] == "TooLargeError"
        for name, numbers in found[0]["little memory"].items():
            for part, value in numbers.items():
                np.testing.assert_array_equal(rank["little memory"][name][part], value)
