"""The formulas of a plan on several ranks, against rings played through, sums by hand and tensors that are counted."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from curvdiag import Objective
from curvdiag.errors import ArgumentError
from curvdiag.operators.plan import GraphBytes
from curvdiag.spectrum.collectives import Units, all_reduced, gathered, padded, ring_steps, units_of
from curvdiag.spectrum.hardware import HARDWARE, LATENCY, Hardware, Rates
from curvdiag.spectrum.objective_work import blocks_of, sharding_of
from curvdiag.spectrum.scale import BUILD, COPIED, MOVED, PASSES, Run, Work, data_parallel, sharded
from curvdiag.spectrum.scale_plan import plan_ranks

BLOCK = ((6, 10), (6,))
UNITS = Units(((4, 5),), (BLOCK, BLOCK))
"""152 numbers: a root of 20, and two groups of 66."""


def work(**changes) -> Work:
    usual = {
        "size": 100,
        "weights": 200,
        "samples": 12,
        "flops": 1e6,
        "graph": GraphBytes(100.0, 50.0),
        "walking": GraphBytes(10.0, 5.0),
        "activations": GraphBytes(1.0, 7.0),
        "units": UNITS,
        "batch": 2,
    }
    return Work(**{**usual, **changes})


def ring(ranks: int, chunks: list[torch.Tensor], *, gather: bool) -> tuple[list[torch.Tensor], int, int]:
    """A reduce-scatter on a ring, and with ``gather`` an all-gather behind it: results, numbers sent by one, steps."""
    held = [vector.clone().chunk(ranks) for vector in chunks]
    sent = steps = 0
    for step in range(ranks - 1):
        parcels = [held[rank][(rank - step) % ranks].clone() for rank in range(ranks)]
        for rank in range(ranks):
            held[(rank + 1) % ranks][(rank - step) % ranks].add_(parcels[rank])
        sent, steps = sent + parcels[0].numel(), steps + 1
    for step in range((ranks - 1) * gather):
        parcels = [held[rank][(rank + 1 - step) % ranks].clone() for rank in range(ranks)]
        for rank in range(ranks):
            held[(rank + 1) % ranks][(rank + 1 - step) % ranks].copy_(parcels[rank])
        sent, steps = sent + parcels[0].numel(), steps + 1
    return [torch.cat(parts) for parts in held], sent, steps


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_a_ring_that_is_played_through_sends_what_the_formulas_say(ranks: int) -> None:
    vectors = [torch.randn(60, dtype=torch.float64) for _ in range(ranks)]
    whole, sent, steps = ring(ranks, vectors, gather=True)
    for vector in whole:
        torch.testing.assert_close(vector, torch.stack(vectors).sum(0))
    assert sent == pytest.approx(all_reduced(60, ranks))
    assert steps == 2 * ring_steps(ranks)
    _, sent, steps = ring(ranks, vectors, gather=False)
    assert sent == pytest.approx(gathered(60, ranks))
    assert steps == ring_steps(ranks)


def test_one_rank_sends_nothing() -> None:
    assert all_reduced(100, 1) == gathered(100, 1) == UNITS.sent(1, 4) == 0
    for way in (data_parallel, sharded):
        share = way(work(), 1, Rates(flops=1e9), Run(10, 2))
        assert (share.sent, share.collectives, share.communication) == (0, 0, 0)


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_shards_are_filled_up_as_torch_cuts_them(ranks: int) -> None:
    shapes = [(10, 3), (3,), (1, 4), (7, 2, 2)]
    largest = [len(torch.zeros(shape).chunk(ranks)[0]) * torch.zeros(shape)[0].numel() for shape in shapes]
    assert padded(shapes, ranks) == ranks * sum(largest)


def test_a_gradient_of_units_gathers_all_but_the_root_twice() -> None:
    assert UNITS.size == 152
    assert (UNITS.gathers(), UNITS.scatters(), UNITS.gathers(reshard=False)) == (5, 3, 3)
    assert UNITS.sent(2, 4) == 4 * (2 * 20 + 3 * 132) / 2
    assert UNITS.sent(2, 4, reshard=False) == 4 * 2 * 152 / 2
    assert UNITS.numbers(4) == 20 + 2 * (80 + 8)  # six rows in four shards of two
    assert UNITS.largest(4) == 88


def test_memory_and_traffic_of_a_data_parallel_rank_by_hand() -> None:
    share = data_parallel(work(), 4, Rates(), Run(steps=10, probes=3, deflated=2, basis=26))
    assert share.samples == 3
    assert share.memory == {
        "weights": 800,
        "copies": 800,
        "vectors": 400 * (26 + 1 + 2),  # the run that deflates holds more than three for each probe
        "graphs": 250,
        "in a product": 25,
    }
    assert share.peak == sum(share.memory.values())
    assert share.sent == 2 * 3 / 4 * 400
    assert share.collectives == pytest.approx(1 / 3)
    assert share.products == 56
    plain = data_parallel(work(), 4, Rates(), Run(10, 3))
    assert plain.memory["vectors"] == 400 * 9
    assert (plain.fits, plain.seconds) == (None, None)


def test_time_of_a_data_parallel_rank_by_hand() -> None:
    rates = Rates(flops=1e9, bandwidth=1e6, latency=1e-3, memory_bandwidth=1e5)
    share = data_parallel(work(), 4, rates, Run(10, 3))
    assert share.compute == pytest.approx(2 * 3 * 1e6 / 1e9 + PASSES * 2 * 400 / 1e5)
    assert share.communication == pytest.approx(600 / 1e6 + 2 * 3 * 1e-3 / 3)  # three probes share the latency
    assert share.seconds == pytest.approx(30 * (share.compute + share.communication))


def test_graphs_that_do_not_fit_are_rebuilt_for_all_probes_at_once() -> None:
    room = 2 * 800 + 2000  # a graph of ten samples takes 600; half of 2000 is enough
    roomy = data_parallel(work(), 1, Rates(flops=1e9, memory=room), Run(10, 1))
    assert not roomy.notes
    tight = data_parallel(work(), 1, Rates(flops=1e9, memory=2 * 800 + 1300), Run(10, 1))
    assert "built anew" in tight.notes[0]
    assert tight.memory["graphs"] == 150  # of one sample: an eighth of 1300 is 162
    assert tight.compute == pytest.approx((2 + BUILD) / 2 * roomy.compute)


def test_memory_and_traffic_of_a_sharded_rank_by_hand() -> None:
    share = sharded(work(size=152, weights=152), 4, Rates(), Run(10, 3))
    numbers = 20 + 2 * 88  # filled up
    assert share.samples == 3
    assert share.memory["weights"] == share.memory["copies"] == numbers // 4 * 4
    assert share.memory["vectors"] == 9 * 38 * 4
    assert share.memory["activations"] == 1 + 2 * 7
    assert share.memory["gathered"] == 4 * (4 * 88 + 2 * 20)
    assert share.memory["in a product"] == 3 * 38 * 4
    passes = 2  # of two samples, then one
    assert share.sent == 2 * passes * (2 * 20 + 3 * 176) * 4 * 3 / 4
    assert share.collectives == 2 * passes * (5 + 3)
    assert "2 passes of 2 samples" in share.notes[0]


def test_time_of_a_sharded_rank_by_hand() -> None:
    rates = Rates(flops=1e9, bandwidth=1e6, latency=1e-3)
    share = sharded(work(), 4, rates, Run(10, 3))
    assert share.compute == pytest.approx(2 * 3 * 1e6 / 1e9)
    assert share.communication == pytest.approx(share.sent / 1e6 + share.collectives * 3 * 1e-3)
    slow = sharded(work(), 4, replace(rates, memory_bandwidth=1e5), Run(10, 3))
    touched = (2 * PASSES + MOVED) * 100 / 4 + 4 * COPIED * (20 + 2 * 88)
    assert slow.compute - share.compute == pytest.approx(touched * 4 / 1e5)
    again = sharded(work(recomputed=True), 4, rates, Run(10, 3))
    assert again.compute == pytest.approx(4 / 3 * share.compute)


def test_sharded_memory_falls_as_one_over_the_ranks_and_a_constant() -> None:
    big = work(units=Units(((64, 5),), (((64, 10),),) * 4), size=2880, weights=2880)
    peaks = {ranks: sharded(big, ranks, Rates(), Run(10, 1)) for ranks in (1, 2, 4, 8)}
    constant = {ranks: share.memory["gathered"] + share.memory["activations"] for ranks, share in peaks.items()}
    assert len(set(constant.values())) == 1
    rest = {ranks: ranks * (share.peak - constant[ranks]) for ranks, share in peaks.items()}
    assert len(set(rest.values())) == 1


def test_measured_times_are_used_where_there_are_no_flops() -> None:
    measured = work(product_seconds=lambda n: 3.0 * n, gradient_seconds=lambda n: 1.0 + n, dot_seconds=0.5)
    whole = data_parallel(measured, 4, Rates(bandwidth=1.0), Run(1, 1))
    assert whole.compute == pytest.approx(9 + PASSES * 0.5)
    part = sharded(measured, 4, Rates(bandwidth=1.0), Run(1, 1))
    # Two passes of two samples in each of two gradients; an inner product touches twice 100 numbers.
    touched = (2 * PASSES + MOVED) * 100 / 4 + 4 * COPIED * (20 + 2 * 88)
    assert part.compute == pytest.approx(2 * 2 * (1 + 2) + touched * 0.5 / 200)
    assert sharded(work(), 4, Rates(bandwidth=1.0), Run(1, 1)).compute is None


def test_rings_through_several_nodes_go_at_the_pace_of_the_slower_wire() -> None:
    slow = Hardware("slow", 1e12, 1e9, 1e11, link=100e9, node=4, network=10e9)
    inside, outside = slow.rates(4), slow.rates(8)
    assert inside.bandwidth == pytest.approx(2.5 * outside.bandwidth)
    assert inside.latency == LATENCY
    assert Rates(bandwidth=7.0).over(inside).bandwidth == 7.0
    assert Rates(bandwidth=7.0).over(inside).flops == inside.flops
    # Half of NVLink's 600 and 900 GB/s, eight adapters of 200 and 400 Gb/s.
    for name, link, node in (("A100", 300e9, 200e9), ("H100", 450e9, 400e9)):
        named = HARDWARE[name]
        assert named.rates(16).bandwidth / named.rates(8).bandwidth == pytest.approx(node / link)


def test_groups_are_the_innermost_modules_that_are_sharded() -> None:
    shapes = [("emb.weight", (9, 2)), ("h.0.w", (3, 3)), ("h.1.w", (3, 3)), ("h.1.inner.w", (2,)), ("h.10.w", (5,))]
    units = units_of(shapes, ["h.0", "h.1", "h.1.inner"])
    assert units.root == ((9, 2), (5,))
    assert units.others == (((3, 3),), ((3, 3),), ((2,),))
    nested = nn.ModuleDict({"e": nn.Linear(2, 2), "h": nn.ModuleList(nn.Sequential(nn.Linear(2, 2)) for _ in range(3))})
    assert blocks_of(nested) == ["h.0", "h.1", "h.2"]
    assert sharding_of(nested).root == ((2, 2), (2,))
    assert blocks_of(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))) == ["0", "2"]
    assert sharding_of(nn.Linear(3, 2)).others == ()


def net(samples: int = 400) -> Objective:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(60, 200), nn.Tanh(), nn.Linear(200, 200), nn.Tanh(), nn.Linear(200, 5))
    return Objective(model, F.cross_entropy, (torch.randn(samples, 60), torch.randint(5, (samples,))))


@pytest.mark.parametrize("deflate", [0, 4])
def test_one_rank_is_planned_as_one_process_is(deflate: int) -> None:
    clock = itertools.count().__next__  # a second for each passage that is timed
    plan = net(3000).plan(steps=20, probes=2, deflate=deflate, world_size=1, clock=clock)
    share = plan.on_ranks.data_parallel
    assert share.peak - share.memory["weights"] == pytest.approx(plan.peak_bytes, rel=0.02)
    assert share.memory["graphs"] == pytest.approx(plan.graphs.bytes_kept, rel=0.02)
    assert share.products == plan.products
    assert share.seconds == pytest.approx(plan.seconds - BUILD)


def test_the_operations_of_a_gradient_are_counted() -> None:
    """Three matrix products for each linear layer, but the first needs no gradient of its inputs."""
    plan = net().plan(steps=2, probes=1, world_size=2, flops=1e9, bandwidth=1e9, clock=lambda: 0.0).on_ranks
    operations = 200 * 2 * (2 * 60 * 200 + 3 * 200 * 200 + 3 * 200 * 5)
    for share in plan.shares:
        assert share.compute == pytest.approx(2 * operations / 1e9)


def test_it_prints_both_ways_side_by_side_and_becomes_plain_numbers() -> None:
    plan = net().plan(steps=30, probes=3, world_size=8, hardware="H100")
    text = str(plan)
    assert "on 8 ranks, H100" in text
    lines = {line.split("  ")[1].strip(): line for line in text.splitlines() if line.startswith("  ")}
    for row in ("each rank", "weights", "vectors", "graphs", "gathered", "peak", "sent", "a product", "the density"):
        assert row in lines, text
    assert "data-parallel" in lines["each rank"]
    assert "sharded" in lines["each rank"]
    column = lines["each rank"].index("sharded")
    assert all(lines[row][column - 1] == " " != lines[row][column] for row in ("weights", "vectors", "peak", "sent"))
    shares = plan.to_dict()["on_ranks"]["shares"]
    assert [share["ranks"] for share in shares] == [8, 8]
    only = net().plan(steps=30, world_size=8, sharded=True).on_ranks
    assert only.data_parallel is None
    assert "give bandwidth=" in str(only)
    assert net().plan(steps=3).on_ranks is None


def test_what_does_not_fit_is_said() -> None:
    tight = Rates(memory=900.0)
    text = str(plan_ranks(work(), Run(10, 1), 2, rates=tight))
    assert "does not fit" in text
    assert "give hardware= or flops=" in text


@pytest.mark.parametrize(
    ("wish", "words"),
    [
        ({"world_size": 0}, "world_size"),
        ({"world_size": 2.5}, "world_size"),
        ({"world_size": True}, "world_size"),
        ({"world_size": 2, "hardware": "Z80"}, "'H100'"),
        ({"world_size": 2, "bandwidth": 0}, "bandwidth"),
        ({"world_size": 2, "flops": -1e9}, "flops"),
        ({"world_size": 2, "latency": "fast"}, "latency"),
        ({"world_size": 2, "bandwidth": float("nan")}, "bandwidth"),
        ({"bandwidth": 1e9}, "give world_size="),
        ({"sharded": True}, "give world_size="),
    ],
)
def test_wrong_wishes_are_refused_before_anything_is_measured(wish: dict, words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        net(8).plan(**wish, clock=None)
