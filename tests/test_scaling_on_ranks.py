"""The test of C against H on several ranks: what one process finds in all samples, and errors that all hear of."""

from __future__ import annotations

import functools

import pytest
import scaling_shards as shards
from ranks import launch

from curvdiag.operators.objective_operator import ObjectiveOperator

MEASURE = """
import scaling_shards as shards
from curvdiag.distributed import Ranks

reduced, reduce = [], Ranks._reduce
Ranks._reduce = lambda self, tensor, place: (reduced.append(tensor.numel()), reduce(self, tensor, place))[1]
for name in shards.cases(world):
    reduced.clear()
    saved[name] = shards.measure(name, rank, world), list(reduced)
"""
FAIL = """
import scaling_shards as shards
from curvdiag.scaling import alike, duality
from curvdiag.scaling.directions import direction_samples

def tried(name, function):
    try:
        saved[name] = function()
    except Exception as error:
        saved[name] = type(error).__name__, str(error)

def stop(done, planned):
    if rank == 1 and done > planned // 2:
        raise ValueError("stopped by hand")

def problem(**options):
    return shards.problem(rank, world, **options)

options = {"directions": 4, "bootstrap": 0}
for method in ("dense", "kronecker", "matrix-free"):
    block = "2.weight" if method == "kronecker" else None
    tried(f"nan {method}", lambda: shards.scaling_test(problem(spoilt=1), block, method=method, **options))
tried("stopped", lambda: shards.scaling_test(problem(), progress=stop, method="dense", **options))
tried("seeds", lambda: shards.scaling_test(problem(), seed=rank, **options))
tried("directions", lambda: shards.scaling_test(problem(), directions=4 + rank))
tried("block", lambda: shards.scaling_test(problem(), ["0.weight", "2.weight"][rank], **options))
tried("vectors", lambda: direction_samples(problem(), torch.full((83, 2), 1.0 + rank)))
tried("bad argument", lambda: shards.scaling_test(problem(), directions=[4, 2][rank], bootstrap=0))

def of_sharded_weights():
    from torch.distributed.fsdp import fully_shard
    model, (x, y) = fully_shard(torch.nn.Linear(4, 3).double()), shards.data(images=False)
    return shards.scaling_test(shards.Objective(model, torch.nn.CrossEntropyLoss(), (x, y), group="world"))

tried("sharded", of_sharded_weights)
tried("one calls twice", lambda: shards.scaling_test(problem(twice=1), "2.weight", method="kronecker", **options))
tried("another way", lambda: shards.scaling_test(problem(twice=1), "2.weight", **options))
tried("soft labels", lambda: shards.scaling_test(problem(soft=1), "2.weight", **options))

enough = duality.free_bytes
duality.free_bytes = lambda device: 100 if rank == 1 else enough(device)
tried("no room for dualities", lambda: shards.scaling_test(problem(), "2.weight", **options))
duality.free_bytes = enough
alike.free_bytes = lambda device: 300_000 if rank == 1 else enough(device)
tried("no room for matrices", lambda: shards.scaling_test(problem(), **options))
tried("no room at all", lambda: shards.scaling_test(problem(), **{**options, "directions": 80}, method="matrix-free"))
alike.free_bytes = enough

eigh = torch.linalg.eigh
def turned(matrix):
    values, vectors = eigh(matrix)
    angle = torch.tensor(0.3, dtype=torch.float64)  # as where two eigenvalues are equal
    top = torch.stack([vectors[:, -1], vectors[:, -2]])
    vectors[:, -1] = angle.cos() * top[0] + angle.sin() * top[1]
    vectors[:, -2] = angle.cos() * top[1] - angle.sin() * top[0]
    return values, vectors
torch.linalg.eigh = turned if rank == 1 else eigh
tried("other eigenvectors", lambda: shards.measure("dense", rank, world))
torch.linalg.eigh = eigh
tried("in the end", lambda: shards.measure("dense", rank, world))
"""
# What logarithms, medians and parabolas make of measured numbers: they are no better known than these allow.
FITTED = ("_fits[", ".departure.")


@pytest.fixture(scope="module")
def alone() -> dict:
    """What one process finds, and how many vectors each of its products had."""
    found, vectors, apply = {}, [], ObjectiveOperator.apply

    def counted(self, rows):
        vectors.append(len(rows))
        return apply(self, rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ObjectiveOperator, "apply", counted)
        for name in shards.CASES:
            vectors.clear()
            found[name] = shards.measure(name), list(vectors)
    return found


@pytest.fixture(scope="module")
def on_ranks(tmp_path_factory):
    """What the ranks find, for a number of them; started when it is first asked for."""
    folder = tmp_path_factory.mktemp("ranks")
    return functools.cache(lambda world: launch(MEASURE, world, folder, limit=280))


@pytest.mark.parametrize(("world", "name"), [(world, name) for world in (2, 3) for name in shards.cases(world)])
def test_every_field_is_that_of_one_process(alone, on_ranks, world: int, name: str) -> None:
    single = name == "single precision"
    one = alone[name][0]
    for rank in on_ranks(world):
        # Eigenvectors have no sign, and so what couples two of them has none.
        for path, gap in shards.differences(one, rank[name][0], signs=True).items():
            if any(part in path for part in FITTED):
                assert gap < (1e-3 if single else 1e-9), path
            else:
                assert gap < (1e-5 if single else 1e-12), path
        assert str(rank[name][0].verdict.word) == one.verdict.word


def test_some_cases_have_verdicts_intervals_dualities_and_notes(alone) -> None:
    """So that the comparison above is one."""
    results = {name: result for name, (result, _) in alone.items()}
    assert {"proportional", "superlinear", "undecided"} <= {result.verdict.word for result in results.values()}
    assert results["found out"].method == "kronecker"
    assert results["kronecker"].duality is not None
    assert results["kronecker"].bounds.kappa_max is not None
    assert results["dense, coordinates"].held_out.departure is not None
    assert all(result.notes for result in results.values())


@pytest.mark.parametrize("world", [2, 3])
def test_all_ranks_have_the_same_bits(on_ranks, world: int) -> None:
    first, *others = on_ranks(world)
    for name in shards.cases(world):
        for rank in others:
            assert not any(shards.differences(first[name][0], rank[name][0]).values()), name


@pytest.mark.parametrize("name", ["products", "convolutions", "single precision"])
def test_a_product_is_one_reduction_of_its_vectors(alone, on_ranks, name: str) -> None:
    result, vectors = alone[name]
    for rank in on_ranks(2):
        large = [numbers for numbers in rank[name][1] if numbers >= result.size]
        assert large == [count * result.size for count in vectors]


def test_the_factors_of_a_layer_are_reduced_once_for_each_matrix(alone, on_ranks) -> None:
    size = alone["kronecker"][0].size
    for rank in on_ranks(3):
        large = [numbers for numbers in rank["kronecker"][1] if numbers >= size]
        # H of a half and of all samples in halves of their factors, the mean gradient, C.
        triangles = (5 * 6 // 2) * (6 * 7 // 2)
        assert sorted(large) == [size, triangles, triangles, size**2]


@pytest.fixture(scope="module")
def failed(tmp_path_factory) -> list[dict]:
    return launch(FAIL, 2, tmp_path_factory.mktemp("failed"), limit=280)


@pytest.mark.parametrize("method", ["dense", "kronecker", "matrix-free"])
def test_nan_on_one_rank_is_told_on_all(failed, method: str) -> None:
    first, second = (rank[f"nan {method}"] for rank in failed)
    assert second[0] == "NonFiniteError"
    assert first[0] == "RankFailedError"
    assert "rank 1 failed: NonFiniteError" in first[1]


def test_any_error_on_one_rank_ends_the_test_on_all(failed) -> None:
    assert failed[1]["stopped"] == ("ValueError", "stopped by hand")
    assert failed[0]["stopped"] == ("RankFailedError", "rank 1 failed: ValueError: stopped by hand")
    assert failed[1]["bad argument"][0] == "ArgumentError"
    assert "rank 1 failed: ArgumentError: a power law needs at least 3" in failed[0]["bad argument"][1]


def test_sharded_weights_are_refused_with_what_remains(failed) -> None:
    for rank in failed:
        assert rank["sharded"][0] == "ArgumentError"
        assert "needs whole weights" in rank["sharded"][1]


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("seeds", "seed=1, dtype=None on rank 1"),
        ("directions", "directions=5"),
        ("block", "1 tensors of 30 numbers"),
        ("vectors", "disagree in the derivatives along directions"),
    ],
)
def test_ranks_that_ask_for_different_things_are_told_so(failed, what: str, words: str) -> None:
    for rank in failed:
        assert rank[what][0] == "DistributedError"
        assert words in rank[what][1]


def test_what_one_rank_cannot_do_none_does(failed) -> None:
    for rank in failed:
        kind, words = rank["one calls twice"]
        assert kind == "ArgumentError"
        assert "called 2 times" in words
        assert rank["another way"].method == "dense"
        assert rank["soft labels"].method == "kronecker"
        assert rank["soft labels"].duality is None
        room = rank["no room for dualities"]
        assert room.duality is None
        assert "dense covariances of 30 weights" in room.notes[-1]
        assert rank["no room for matrices"].method == "matrix-free"
        assert rank["no room at all"][0] == "TooLargeError"
    assert failed[0]["one calls twice"][1].startswith("on rank 1: ")
    assert failed[0]["no room for dualities"].notes == (
        *failed[1]["no room for dualities"].notes[:-1],
        "no activity-weight duality: on rank 1: "
        + failed[1]["no room for dualities"].notes[-1].removeprefix("no activity-weight duality: "),
    )


def test_all_ranks_measure_along_the_eigenvectors_of_the_first(failed, alone) -> None:
    """Equal eigenvalues leave their eigenvectors open, and every processor rounds them in its own way."""
    for rank in failed:
        gaps = shards.differences(alone["dense"][0], rank["other eigenvectors"], signs=True)
        assert max(gap for path, gap in gaps.items() if ".noise" in path and "_fits" not in path) < 1e-12


def test_after_an_error_the_ranks_are_in_step(failed, alone) -> None:
    for rank in failed:
        gaps = shards.differences(alone["dense"][0], rank["in the end"], signs=True)
        assert max(gap for path, gap in gaps.items() if not any(part in path for part in FITTED)) < 1e-12
