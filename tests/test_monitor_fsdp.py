"""A monitor under FSDP2: measured where the weights lie, training as without it."""

from __future__ import annotations

import pytest
import torch
from monitored import CLOCKED, same
from ranks import launch
from shard_cases import net, of_all

from curvdiag import CurvatureMonitor
from curvdiag.record import RunStore

pytestmark = pytest.mark.filterwarnings("ignore:measuring every")
FAST = {"steps": 4, "probes": 1, "every": 2}
PARAMS = {None: None, "full": "5.*"}
"""Each layer takes a search of its own: only the last one."""

SCRIPT = """
warnings.filterwarnings("ignore", "measuring every")
from monitored import numbers
from shard_cases import criterion, data, net, of_rank, sharded
from test_monitor_fsdp import FAST, PARAMS
from curvdiag import CurvatureMonitor
from curvdiag.errors import CurvdiagError

own = data(rank, torch.float64)[0]

def full(tensor):
    return tensor.full_tensor().detach().clone() if hasattr(tensor, "full_tensor") else tensor

def trained(name="", preset=None, fails=False, **options):
    torch.manual_seed(5 + rank)
    model = sharded(net(torch.float64), **options)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    monitor, loss = None, criterion(torch.float64)
    if name:
        objective = of_rank(model, rank, torch.float64, params=PARAMS[preset])
        store = os.path.join(folder, name + ".db")
        monitor = CurvatureMonitor(objective, store, preset=preset, **FAST).attach(optimizer)
        if fails and rank == 1:
            monitor._survey.take = None
    for step in range(3):
        optimizer.zero_grad()
        for part in range(2):  # accumulated on the shards
            model.set_requires_gradient_sync(part == 1)
            loss(model(own[0] + 0.1 * torch.randn_like(own[0])), own[1]).backward()
        optimizer.step()
        if step == 1:
            measured = [full(p) for p in model.parameters()]
    left = {
        "measured": measured,
        "weights": [full(p) for p in model.parameters()],
        "state": [full(v) for state in optimizer.state.values() for v in state.values()],
        "random": torch.get_rng_state(),
    }
    return left, monitor

KINDS = {"resharded": {}, "kept": {"reshard_after_forward": False}}
for kind, options in KINDS.items():
    saved["bare " + kind] = trained(**options)[0]
    saved["watched " + kind], monitor = trained(kind, preset="full" if kind == "kept" else None, **options)
    saved["numbers " + kind] = numbers(monitor)
    saved["store"] = monitor.store is not None
    monitor.close()

warnings.filterwarnings("ignore", "the measurement at step")
saved["watched failing"], monitor = trained("failing", fails=True)
saved["numbers failing"] = numbers(monitor)
monitor.close()

objective = of_rank(sharded(net(torch.float64)), rank, torch.float64)
for name in ("noise_scale", "preconditioned_lambda_max"):
    try:
        CurvatureMonitor(objective, measure=[name])
    except CurvdiagError as error:
        saved["refused " + name] = str(error)

exact = CurvatureMonitor(
    objective, os.path.join(folder, "exact.db"), measure=["trace"], hessian={"method": "exact"}
)
saved["exact"] = exact.measure() is None
exact.close()
"""


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.long)])
def ranks(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(f"fsdp{request.param}")
    return launch(SCRIPT, request.param, folder, limit=280), folder


@pytest.mark.parametrize("kind", ["resharded", "kept", "failing"])
def test_training_is_bit_identical_with_and_without_it(ranks, kind):
    for one in ranks[0]:
        assert same(one[f"watched {kind}"], one["bare resharded" if kind == "failing" else f"bare {kind}"])


@pytest.mark.parametrize("kind", ["resharded", "kept"])
def test_all_ranks_hold_the_same_numbers(ranks, kind):
    saved, folder = ranks
    assert [step for step, _, _ in saved[0][f"numbers {kind}"]] == [2]
    for one in saved[1:]:
        assert repr(one[f"numbers {kind}"]) == repr(saved[0][f"numbers {kind}"])
    assert [one["store"] for one in saved] == [True] + [False] * (len(saved) - 1)
    with RunStore(folder / f"{kind}.db", readonly=True) as store:
        assert store.scalars("curv/hessian/trace").steps.tolist() == [2]


@pytest.mark.parametrize("kind", ["resharded", "kept"])
def test_the_numbers_are_those_of_one_process_by_the_same_differences(ranks, kind):
    saved, _ = ranks
    model = net(torch.float64)
    for tensor, value in zip(model.parameters(), saved[0][f"watched {kind}"]["measured"], strict=True):
        tensor.data.copy_(value)
    preset = "full" if kind == "kept" else None
    alone = CurvatureMonitor(
        of_all(len(saved), torch.float64, model, params=PARAMS[preset]),
        hessian={"method": "finite-difference"},
        preset=preset,
        **FAST,
    ).measure()
    step, seen, _ = saved[0][f"numbers {kind}"][-1]
    assert step == 2
    compared = set(alone.scalars) - {*CLOCKED, "curv/cost/matvecs"}
    assert compared <= seen.keys()
    assert "curv/anisotropy/effective_rank" in compared
    for key in compared:
        if not key.endswith("residual"):
            assert float(alone.scalars[key]) == pytest.approx(seen[key], rel=1e-4, abs=1e-6), key


def test_it_takes_differences_by_itself_and_says_so(ranks):
    (_, _, notes), *_ = ranks[0][0]["numbers resharded"]
    assert any("the weights are sharded: products with the Hessian are finite differences" in note for note in notes)


def test_what_needs_whole_weights_is_left_out_of_full_and_refused_by_name(ranks):
    saved, _ = ranks
    (_, numbers, notes), *_ = saved[0]["numbers kept"]
    assert any("left out: noise_scale, noise_trace, cwgd, alignment need whole weights" in note for note in notes)
    assert any(key.startswith("curv/layer/") for key in numbers)
    assert not any(key.startswith("noise/") for key in numbers)
    for one in saved:
        for name in ("noise_scale", "preconditioned_lambda_max"):
            assert f"{name} needs whole weights, and these are spread over {len(saved)} ranks" in one[f"refused {name}"]


def test_a_rank_that_fails_ends_the_measurement_and_not_the_training(ranks):
    saved, folder = ranks
    for one in saved:
        assert one["numbers failing"] == []
    with RunStore(folder / "failing.db", readonly=True) as store:
        said = [event.message for event in store.events()]
    assert len(said) == 1
    assert all(message.startswith("rank 1 failed: TypeError") for message in said)


def test_exact_products_are_a_failure_that_says_what_remains(ranks):
    saved, folder = ranks
    assert all(one["exact"] for one in saved)
    with RunStore(folder / "exact.db", readonly=True) as store:
        (event,) = store.events()
    assert "what remains is Hessian(objective, method='finite-difference')" in event.message
