"""Ranks: what they exchange, how they agree, and what a group of some of them does."""

import copy
import pickle

import pytest
import torch
from ranks import launch

from curvdiag.distributed import ALONE, Ranks, ranks_of, shard
from curvdiag.errors import ArgumentError, DataError

SCRIPT = """
import copy, pickle
from torch import nn
from rank_failures import Fragile, data, fate, objective_of, one_vector
from data_parallel import Wire
from curvdiag import Hessian, NoiseCovariance, Objective, gradient_moments
from curvdiag.distributed import ALONE, ranks_of, shard
from curvdiag.distributed.control import timeout_of

ranks = ranks_of("world")
saved["place"] = ranks.rank, ranks.count, ranks.alone, ranks.first, repr(ranks), ranks.neighbours
saved["known"] = ranks_of(dist.group.WORLD) is ranks, copy.deepcopy(ranks) is ranks, ranks_of(None) is ALONE
saved["pickle"] = fate(lambda: pickle.dumps(ranks))
saved["timeout"] = timeout_of(dist.group.WORLD).total_seconds()

# Exchanges.
own = torch.arange(3.0) + 10 * rank
saved["sum"] = ranks.sum("sum of rows", lambda: own[None] * 2)
with Wire() as wire:
    saved["sum_"] = ranks.sum_(own.clone())
saved["wire"] = wire.calls
narrow = torch.bfloat16, torch.float16, torch.int64
saved["narrow"] = {str(dtype): ranks.sum_(torch.full((3,), 1.5, dtype=dtype)) for dtype in narrow}
saved["empty"] = ranks.sum_(torch.zeros(0)), ranks.concatenate(torch.zeros(0, 2), 0)
saved["strided"] = ranks.sum("sum of columns", lambda: torch.arange(6.0).view(2, 3).T)
saved["first_"] = ranks.first_(own.clone())
saved["first column"] = ranks.first_((torch.arange(4.0).view(2, 2).T + rank))
saved["concatenate"] = ranks.concatenate(torch.full((2, rank), float(rank)))
saved["rows"] = ranks.concatenate(torch.full((3 - rank, 2), rank), 0)
saved["types"] = fate(lambda: ranks.concatenate(torch.zeros(1, dtype=torch.float32 if rank else torch.float64)))
saved["shapes"] = fate(lambda: ranks.sum_(torch.zeros(2 + rank)))
saved["gather"] = ranks.gather({"rank": rank, "text": "x" * 3000 * rank})
saved["numbers"] = ranks.total(0.1 * (rank + 1)), ranks.least(10 - rank), ranks.of_first([rank])
colour = "blue" if rank else "red"
saved["agree"] = fate(lambda: ranks.agree("colours", "blue")), fate(lambda: ranks.agree("colours", colour))
saved["traffic"] = ranks.traffic.reductions, ranks.traffic.bytes


# Bodies within bodies.
def nested(outer, inner, wrapped=False):
    with ranks.together("outer"):
        if outer == rank:
            raise KeyError("outer")
        try:
            with ranks.together("inner"):
                if inner == rank:
                    raise ValueError("inner")
                ranks.sum_(torch.ones(1))
        except ValueError as error:
            if wrapped:
                raise TypeError("wrapped") from error
            raise
        ranks.sum_(torch.ones(1))


cases = {"none": (None, None), "outer": (2, None), "inner": (None, 1), "both": (2, 1), "wrapped": (None, 1, True)}
for name, options in cases.items():
    saved["nested", name] = fate(lambda: nested(*options)), float(ranks.sum_(torch.ones(1)))


def signed():
    with ranks.together("signed", lambda: rank):
        pass


def everybody():
    with ranks.together("everybody"):
        raise LookupError(f"number {rank}")


def caught():
    "An error that all have heard of and survived does not silence the next."
    with ranks.together("whole"):
        for turn in range(2):
            try:
                with ranks.together("part"):
                    if rank == turn:
                        raise ValueError(f"turn {turn}")
            except Exception as error:
                heard.append(f"{type(error).__name__}: {error}")
        if rank == 2:
            raise ValueError("in the end") from KeyError("no rank knows of this")


heard = []
saved["signed"], saved["everybody"], saved["caught"] = fate(signed), fate(everybody), fate(caught)
saved["heard"], saved["still"] = heard, float(ranks.sum_(torch.ones(1)))

# An objective over some of the ranks only, in which they have other numbers.
members = [2, 1]
group = dist.new_group(sorted(members))
saved["refused"] = fate(lambda: ranks_of("all")), fate(lambda: ranks_of(0))
if rank in members:
    part = ranks_of(group)
    saved["part"] = part.rank, part.count, ranks_of(group) is part
    saved["part first"] = part.first_(torch.tensor([float(rank)]))
    saved["part rows"] = part.concatenate(torch.full((rank,), float(rank)))
    objective = objective_of(Fragile(), rank, group)
    saved["part product"] = Hessian(objective) @ one_vector(objective)
    saved["part noise"] = NoiseCovariance(objective) @ one_vector(objective)
    saved["part moments"] = gradient_moments(objective).norms
    saved["part sizes"] = objective.size, objective.first_sample
    saved["part error"] = fate(lambda: Hessian(objective, memory=-1 if rank == 2 else None))
else:
    saved["outsider"] = fate(lambda: objective_of(Fragile(), rank, group))

# Halves, fewer parameters, values, and where a loss stops being finite.
objective = objective_of(Fragile(), rank)
saved["value"], saved["gradient"] = objective.value(), objective.gradient()
halves = objective.split(seed=3)
saved["halves"] = [(half.size, half.local_size, half.first_sample, half.value(), half.gradient()) for half in halves]
saved["restricted"] = objective.restricted_to("net.0*").gradient()
single = Objective(Fragile(), nn.CrossEntropyLoss(), data(rank, 1), group="world")
saved["too few"] = [fate(lambda: single.split(seed)) for seed in range(3)]

# Shards of what all ranks have.
x, y = data(9, 11)
pairs = [(x[:5], y[:5]), (x[5:6], y[5:6]), (x[6:], y[6:])]
saved["shard"] = shard((x, y)), shard([(x[:5], y[:5]), (x[5:], y[5:])]), shard(pairs, cut=False)
sharded = Objective(Fragile(), nn.CrossEntropyLoss(), shard((x, y)), group="world")
saved["shard product"] = Hessian(sharded) @ one_vector(objective)
saved["other data"] = fate(lambda: shard((x + rank, y)))
saved["too small"] = fate(lambda: shard((x[:2], y[:2]))), fate(lambda: shard([(x, y)], cut=False))
saved["uncut"] = fate(lambda: shard(batches=[(x, y[:3])]))
saved["one"] = shard({"a": x}), shard(batch=[x, y]), shard((x, y), None)
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return launch(SCRIPT, 3, tmp_path_factory.mktemp("ranks"), limit=300)


def test_each_rank_knows_its_place(runs):
    for rank, saved in enumerate(runs):
        assert saved["place"] == (rank, 3, False, rank == 0, f"rank {rank} of 3", 3)
        assert saved["known"] == (True, True, True)
        assert saved["pickle"][0] == "ArgumentError"
        assert saved["timeout"] == 60


def test_exchanges_give_the_same_on_all_ranks(runs):
    for saved in runs:
        assert torch.equal(saved["sum"], torch.tensor([[60.0, 66.0, 72.0]]))
        assert torch.equal(saved["sum_"], torch.tensor([30.0, 33.0, 36.0]))
        assert [numbers for _, numbers in saved["wire"]] == [6, 3]
        assert all(
            torch.equal(one, torch.full((3,), 3 if "int" in kind else 4.5).to(one))
            for kind, one in saved["narrow"].items()
        )
        assert [list(one.shape) for one in saved["empty"]] == [[0], [0, 2]]
        assert torch.equal(saved["strided"], 3 * torch.arange(6.0).view(2, 3).T)
        assert torch.equal(saved["first_"], torch.arange(3.0))
        assert torch.equal(saved["first column"], torch.arange(4.0).view(2, 2).T)
        assert torch.equal(saved["concatenate"], torch.tensor([[1.0, 2.0, 2.0]] * 2))
        assert torch.equal(saved["rows"], torch.tensor([0, 0, 0, 1, 1, 2])[:, None].expand(6, 2))
        assert saved["gather"] == [{"rank": i, "text": "x" * 3000 * i} for i in range(3)]
        assert saved["numbers"] == (0.1 * 1 + 0.1 * 2 + 0.1 * 3, 8, [0])
        assert saved["traffic"] == runs[0]["traffic"]


def test_ranks_that_disagree_are_all_told(runs):
    for saved in runs:
        assert saved["agree"][0] == ("nothing", "")
        assert saved["agree"][1][0] == "DistributedError"
        assert "different colours: red on rank 0, blue on rank 1, blue on rank 2" in saved["agree"][1][1]
        for name in ("types", "shapes", "signed"):
            assert saved[name][0] == "DistributedError"
            assert "disagree" in saved[name][1]


def test_an_error_in_a_body_within_a_body_is_told_once(runs):
    expected = {
        "none": [("nothing", "")] * 3,
        "outer": [("RankFailedError", "rank 2 failed: KeyError: 'outer'")] * 2 + [("KeyError", "'outer'")],
        "inner": [("RankFailedError", "rank 1 failed: ValueError: inner"), ("ValueError", "inner")] * 2,
        "wrapped": [("RankFailedError", "rank 1 failed: ValueError: inner"), ("TypeError", "wrapped")] * 2,
        "both": [
            ("RankFailedError", "rank 1 failed: ValueError: inner; rank 2 failed: KeyError: 'outer'"),
            ("ValueError", "inner"),
            ("KeyError", "'outer'"),
        ],
    }
    for name, fates in expected.items():
        assert [saved["nested", name] for saved in runs] == [(fate, 3.0) for fate in fates[:3]], name


def test_errors_on_all_ranks_are_their_own_and_later_ones_are_heard(runs):
    for rank, saved in enumerate(runs):
        assert saved["everybody"] == ("LookupError", f"number {rank}")
        assert saved["heard"] == [
            f"ValueError: turn {turn}"
            if turn == rank
            else f"RankFailedError: rank {turn} failed: ValueError: turn {turn}"
            for turn in range(2)
        ]
        last = (
            ("ValueError", "in the end") if rank == 2 else ("RankFailedError", "rank 2 failed: ValueError: in the end")
        )
        assert saved["caught"] == last
        assert saved["still"] == 3


def whole(*ranks):
    from rank_failures import Fragile, data
    from torch import nn

    from curvdiag import Objective

    parts = [data(rank) for rank in ranks]
    return Objective(Fragile(), nn.CrossEntropyLoss(), tuple(torch.cat(column) for column in zip(*parts, strict=True)))


def near(found, truth):
    return float((found - truth).norm()) <= 1e-12 * float(truth.norm())


def test_some_of_the_ranks_measure_by_themselves(runs):
    from rank_failures import one_vector

    from curvdiag import Hessian, NoiseCovariance, gradient_moments

    objective = whole(1, 2)
    for rank in (1, 2):
        saved = runs[rank]
        assert saved["part"] == (rank - 1, 2, True)
        assert float(saved["part first"]) == 1
        assert saved["part rows"].tolist() == [1, 2, 2]
        assert near(saved["part product"], Hessian(objective) @ one_vector(objective))
        assert near(saved["part noise"], NoiseCovariance(objective) @ one_vector(objective))
        assert near(saved["part moments"], gradient_moments(objective).norms)
        assert saved["part sizes"] == (8, 4 * (rank - 1))
        assert saved["part error"][0] == ("ArgumentError" if rank == 2 else "RankFailedError")
    assert runs[0]["outsider"][0] == "ArgumentError"
    for saved in runs:
        assert [kind for kind, _ in saved["refused"]] == ["ArgumentError"] * 2


def test_halves_values_and_gradients_are_those_of_one_process(runs):
    objective = whole(0, 1, 2)
    truth = objective.split(seed=3)
    for saved in runs:
        assert saved["value"] == pytest.approx(objective.value(), rel=1e-13)
        assert near(saved["gradient"], objective.gradient())
        assert near(saved["restricted"], objective.restricted_to("net.0*").gradient())
        for (size, _, _, value, slope), half in zip(saved["halves"], truth, strict=True):
            assert size == half.size == 6
            assert value == pytest.approx(half.value(), rel=1e-13)
            assert near(slope, half.gradient())
    for half in range(2):
        held = [saved["halves"][half][1:3] for saved in runs]
        assert [first for _, first in held] == [sum(size for size, _ in held[:i]) for i in range(3)]
    for saved in runs:
        assert {kind for kind, _ in saved["too few"]} <= {"DataError", "RankFailedError"}


def test_shards_are_contiguous_even_and_whole(runs):
    from rank_failures import data, one_vector

    from curvdiag import Hessian, Objective

    x, y = data(9, 11)
    assert [len(saved["shard"][0][1]) for saved in runs] == [3, 4, 4]
    assert torch.equal(torch.cat([saved["shard"][0][0] for saved in runs]), x)
    assert [[len(part[1]) for part in saved["shard"][1]] for saved in runs] == [[3], [2, 2], [4]]
    assert torch.equal(torch.cat([part[1] for saved in runs for part in saved["shard"][1]]), y)
    assert [[len(part[1]) for part in saved["shard"][2]] for saved in runs] == [[5], [1], [5]]
    from rank_failures import Fragile
    from torch import nn

    objective = Objective(Fragile(), nn.CrossEntropyLoss(), (x, y))
    for rank, saved in enumerate(runs):
        assert near(saved["shard product"], Hessian(objective) @ one_vector(objective))
        assert saved["other data"][0] == "DistributedError"
        assert "different data" in saved["other data"][1]
        assert [kind for kind, _ in saved["too small"]] == ["DataError"] * 2
        assert saved["uncut"][0] == "DataError"
        mapping, pair, everything = saved["one"]
        assert torch.equal(mapping["a"], x[[0, 3, 7][rank] : [3, 7, 11][rank]])
        assert [len(part) for part in pair] == [len(mapping["a"])] * 2
        assert torch.equal(everything[0], x)


def test_a_process_alone_exchanges_nothing():
    assert ALONE.alone
    assert ranks_of(None) is ALONE
    one = torch.ones(2)
    assert ALONE.sum_(one) is ALONE.first_(one) is ALONE.concatenate(one) is one
    assert ALONE.sum("x", lambda: one) is one
    assert (ALONE.gather(3), ALONE.total(2), ALONE.least(1), ALONE.of_first(4), ALONE.neighbours) == ([3], 2, 1, 4, 1)
    ALONE.agree("x", 1)
    with pytest.raises(KeyError), ALONE.together("x"):
        raise KeyError
    assert ALONE.traffic.reductions == 0
    assert pickle.loads(pickle.dumps(ALONE)) is ALONE
    assert copy.deepcopy(ALONE) is ALONE
    assert isinstance(ALONE, Ranks)


def test_a_group_needs_processes_that_know_each_other():
    with pytest.raises(ArgumentError, match="torchrun"):
        ranks_of("world")
    with pytest.raises(ArgumentError, match="torchrun"):
        shard((torch.ones(3), torch.ones(3)))
    with pytest.raises(DataError):
        shard(group=None)
