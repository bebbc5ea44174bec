"""A monitor under DDP: all ranks measure together and hold the same numbers, one writes, training is as without it."""

from __future__ import annotations

import monitored
import pytest
import torch
from monitored import same
from ranks import launch
from torch.nn import functional as F

from curvdiag import CurvatureMonitor, Objective, OverheadBudget
from curvdiag.monitor.agreement import cadence_in_words
from curvdiag.monitor.decision import Decision
from curvdiag.optim import LPSGD
from curvdiag.record import RunStore
from curvdiag.schedules import AnisotropyLR, AnisotropyP, PredictedDecreaseP

pytestmark = pytest.mark.filterwarnings("ignore:measuring every")

SCRIPT = """
warnings.filterwarnings("ignore", "measuring every")
import monitored
from monitored import numbers, shard, trained
from torch.nn import functional as F
from curvdiag import CurvatureMonitor, Objective, OverheadBudget
from curvdiag.errors import DistributedError
from test_monitor_on_ranks import followed

data = shard(rank, world)
KINDS = {
    "plain": (monitored.noisy, {}),
    "static": (monitored.noisy, {"static_graph": True, "micro_batches": 1}),
    "unused": (monitored.Branching, {"find_unused_parameters": True}),
    "views": (monitored.noisy, {"gradient_as_bucket_view": True}),
}

def watcher(name, **options):
    def watch(model, optimizer):
        options.setdefault("every", 2)
        objective = Objective(model, F.cross_entropy, data, group="world")
        monitor = CurvatureMonitor(objective, os.path.join(folder, name + ".db"), steps=6, probes=2, **options)
        watch.monitor = monitor.attach(optimizer)
    return watch

for kind, (net, options) in KINDS.items():
    saved["bare " + kind] = trained(data, net(), **options)
    told = []
    watch = watcher(kind, preset="full" if kind == "plain" else "light", loggers=[lambda *one: told.append(one)])
    saved["watched " + kind] = trained(data, net(), watch=watch, **options)
    monitor = watch.monitor
    saved["numbers " + kind], saved["told " + kind] = numbers(monitor), len(told)
    if kind == "plain":
        monitor.record({"own/number": 3.5})
        monitor.event("word", "something happened")
        saved["store"], saved["recorded"] = monitor.store is not None, monitor.recorded
    monitor.close()

# The clock's own answers, as different on different ranks as can be.
class Contrary:
    def observe(self, **_):
        pass
    def __call__(self, step):
        return step in ((1, 4) if rank == 0 else (2, 3, 5))
    def __repr__(self):
        return "Contrary()"

for name, cadence in (("contrary", Contrary()), ("budget", OverheadBudget(0.3))):
    watch = watcher(name, every=None, cadence=cadence, measure=["trace"])
    trained(data, monitored.noisy(), watch=watch, steps=12)
    saved[name] = [one.step for one in watch.monitor.history]
    watch.monitor.close()

# Left at a checkpoint, and continued.
def resume(state):
    watch = watcher("resumed", preset="light", cadence=None)
    def load(model, optimizer):
        watch(model, optimizer)
        if state is not None:
            watch.monitor.load_state_dict(state)
    trained(data, monitored.noisy(), watch=load, steps=4)
    state = watch.monitor.state_dict()
    watch.monitor.close()
    return state

saved["states"] = [resume(None)]
saved["states"].append(resume(saved["states"][0]))

# What differs between ranks.
DIFFERENT = {
    "cadence": {"every": 2 + rank},
    "function": {"every": None, "cadence": (lambda n: lambda step: step % n == 0)(2 + rank)},
    "probes": {"seed": rank},
    "quantities": {"measure": ["trace"] if rank else ["lambda_max"]},
    "steps": {},
    "weights": {},
}
for name, options in DIFFERENT.items():
    watch = watcher("different", **{"measure": ["trace"], **options})
    net = monitored.noisy()
    def spoil(model, optimizer):
        watch(model, optimizer)
        if name == "steps":
            watch.monitor.steps_done = rank
        if name == "weights":
            with torch.no_grad():
                net[0].weight[0, 0] += rank
    try:
        trained(data, net, watch=spoil, steps=2)
        saved["different " + name] = ""
    except DistributedError as error:
        saved["different " + name] = str(error)
    watch.monitor.close()

for kind in ("measured", "predicted"):
    saved[kind] = followed(kind, data, group="world")
"""


def followed(kind, data, group=None):
    """p and the rate by what was measured: choices and weights."""
    found = {"p": [], "lr": []}

    def watch(model, optimizer):
        objective = Objective(model, F.cross_entropy, data, group=group)
        monitor = CurvatureMonitor(objective, every=2, steps=6, probes=2).attach(optimizer)
        constant = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1)
        chooses = (
            AnisotropyP(optimizer, monitor)
            if kind == "measured"
            else PredictedDecreaseP(optimizer, monitor, per_group=True)
        )
        found["schedules"] = [chooses, AnisotropyLR(constant, monitor)]
        found["optimizer"] = optimizer

    def after_step(step):
        for schedule in found["schedules"]:
            schedule.step()
        for key in ("p", "lr"):
            found[key].append(found["optimizer"].param_groups[0][key])

    left = monitored.trained(
        data,
        monitored.smooth(),
        watch=watch,
        after_step=after_step,
        optimizer=lambda parameters: LPSGD(parameters, lr=0.5, p=6.0),
        micro_batches=1,
    )
    return {"p": found["p"], "lr": found["lr"], "weights": left["weights"]}


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request, tmp_path_factory):
    """What each rank saw; the number of them; and the folder."""
    folder = tmp_path_factory.mktemp(f"ranks{request.param}")
    return launch(SCRIPT, request.param, folder, limit=280), request.param, folder


@pytest.mark.parametrize("kind", ["plain", "static", "unused", "views"])
def test_training_is_bit_identical_with_and_without_it(ranks, kind):
    saved, _, _ = ranks
    for one in saved:
        assert same(one[f"bare {kind}"], one[f"watched {kind}"])
        assert same(one[f"bare {kind}"]["weights"], saved[0][f"bare {kind}"]["weights"])


@pytest.mark.parametrize("kind", ["plain", "static", "unused", "views"])
def test_all_ranks_hold_the_first_ones_numbers_to_the_last_bit(ranks, kind):
    saved, _, _ = ranks
    first = saved[0][f"numbers {kind}"]
    assert [step for step, _, _ in first] == [2, 4, 6]
    assert all(monitored.CLOCKED[0] in scalars for _, scalars, _ in first)
    for one in saved[1:]:
        assert repr(one[f"numbers {kind}"]) == repr(first)


def test_the_numbers_are_those_of_one_process_with_all_samples(ranks):
    """At the first measured step, from the weights that were trained by several."""
    saved, world, _ = ranks
    model = monitored.noisy()
    watched = saved[0]["numbers plain"][-1][1]
    for tensor, value in zip(model.parameters(), saved[0]["watched plain"]["weights"], strict=True):
        tensor.data.copy_(value)
    for buffer, value in zip(model.buffers(), saved[0]["watched plain"]["left"][0], strict=True):
        buffer.copy_(value)
    batches = [monitored.shard(rank, world) for rank in range(world)]
    alone = CurvatureMonitor(Objective(model, F.cross_entropy, batches), preset="full", steps=6, probes=2).measure()
    compared = {key for key in alone.scalars if key not in monitored.CLOCKED}
    assert compared <= watched.keys()
    for key in compared - {"curv/cost/matvecs"}:
        assert float(alone.scalars[key]) == pytest.approx(watched[key], rel=1e-6, abs=1e-9, nan_ok=True), key


def test_the_first_rank_alone_writes_and_tells(ranks):
    saved, _, folder = ranks
    assert [one["store"] for one in saved] == [True] + [False] * (len(saved) - 1)
    assert [one["told plain"] for one in saved] == [3] + [0] * (len(saved) - 1)
    assert all(one["recorded"] == [(6, {"own/number": 3.5})] for one in saved)
    with RunStore(folder / "plain.db", readonly=True) as store:
        (run,) = store.runs()
        assert store.scalars("curv/hessian/trace").steps.tolist() == [2, 4, 6]
        assert store.scalars("own/number").steps.tolist() == [6]
        assert [event.message for event in store.events() if event.kind == "word"] == ["something happened"]
        assert f"on {len(saved)} ranks" in run.config["curvdiag"]["objective"]


def test_a_cadence_that_reads_the_clock_is_decided_by_the_first_rank(ranks):
    saved, _, _ = ranks
    assert all(one["contrary"] == [1, 4] for one in saved)
    assert all(one["budget"] == saved[0]["budget"] for one in saved)
    assert saved[0]["budget"][0] == 1


def test_a_resumed_training_goes_on_in_the_same_run(ranks):
    saved, _, folder = ranks
    for part in (0, 1):
        told = [{name: one["states"][part][name] for name in ("run", "run_name", "steps_done")} for one in saved]
        assert told == [told[0]] * len(saved)
        assert told[0]["run"] is not None
        assert told[0]["steps_done"] == 4 * (part + 1)
    with RunStore(folder / "resumed.db", readonly=True) as store:
        assert len(store.runs()) == 1
        assert store.scalars("curv/hessian/trace").steps.tolist() == [2, 4, 6, 8]


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("cadence", ("different cadences", "Every(steps=2) on rank 0", "Every(steps=3) on rank 1")),
        ("function", ("different cadences", "lambda", "on rank 1")),
        ("probes", ("different seed: 0 on rank 0, 1 on rank 1",)),
        ("quantities", ("different quantities: lambda_max on rank 0, trace on rank 1",)),
        ("steps", ("different counts of steps: 1 on rank 0, 2 on rank 1",)),
        ("weights", ("the ranks have different weights",)),
    ],
)
def test_ranks_that_differ_are_told_so_at_the_first_measurement(ranks, what, words):
    for one in ranks[0]:
        for word in words:
            assert word in one[f"different {what}"]


@pytest.mark.parametrize("kind", ["measured", "predicted"])
def test_schedules_choose_alike_on_all_ranks_and_as_one_process_does(ranks, kind):
    saved, _, _ = ranks
    for one in saved[1:]:
        assert same(one[kind], saved[0][kind])
    alone, together = followed(kind, monitored.shard(0, 1)), saved[0][kind]
    assert len({*alone["p"]}) > 1, "p has to move, or nothing is compared"
    assert len({*alone["lr"]}) > 1
    for key in ("p", "lr"):
        assert together[key] == pytest.approx(alone[key], rel=1e-8)
    for ours, theirs in zip(together["weights"], alone["weights"], strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-8, atol=1e-10)


# Decisions, without processes


class Stage:
    """A first rank whose word is heard, and a clock that is set."""

    alone, first = False, True

    def __init__(self):
        self.elapsed = self.measuring = self.last = 0.0
        self.said = 0

    def of_first(self, value, place):
        self.said += 1
        return value


def measured_at(cadence, pace, measurement, steps, *, alone=False):
    """The steps of a run whose training steps take ``pace(step)`` seconds, and the looks at the cadence."""
    stage, found = Stage(), []
    stage.alone = alone
    decision = Decision(cadence, stage, stage)
    for step in range(1, steps + 1):
        stage.elapsed += pace(step)
        if decision.due(step):
            found.append(step)
            stage.elapsed += measurement
            stage.measuring += measurement
            stage.last = measurement
    return found, stage.said


def by_one_process(cadence, pace, measurement, steps):
    return measured_at(cadence, pace, measurement, steps, alone=True)[0]


class Listener(Stage):
    """Another rank, which hears that the first one measures at steps 1 and 4, and looks at each step."""

    first = False

    def of_first(self, value, place):
        assert value is None
        step = int(place.removeprefix("decision at step "))
        return step in (1, 4), step + 1


class Own:
    def observe(self, **_):
        pass

    def __call__(self, step):
        raise AssertionError("only the first rank asks its cadence")


def test_the_other_ranks_do_as_they_are_told_and_ask_no_cadence_of_their_own():
    stage = Listener()
    decision = Decision(Own(), stage, stage)
    assert [step for step in range(1, 7) if decision.due(step)] == [1, 4]


def test_few_looks_decide_as_a_look_at_each_step_would():
    steady = (lambda step: 0.01), 1.0, 20_000
    found, looks = measured_at(OverheadBudget(0.1), *steady)
    assert found == by_one_process(OverheadBudget(0.1), *steady)
    assert len(found) > 20
    assert looks < 15 * len(found)


def test_steps_that_become_slower_cost_no_more_than_their_own_delay():
    slower = (lambda step: 0.01 if step < 1000 else 0.1), 1.0, 2000
    found, _ = measured_at(OverheadBudget(0.1), *slower)
    expected = by_one_process(OverheadBudget(0.1), *slower)
    assert found[0] == expected[0] == 1
    # Left at step 900, where they looked, were 900 steps at the old pace: half of them pass before the next look.
    assert expected[1] == 1080
    assert found[1] == 1350


def test_functions_of_the_step_are_told_apart_by_what_they_do():
    def made(steps):
        return lambda step: step % steps == 0

    assert cadence_in_words(made(2)) == cadence_in_words(made(2))
    assert cadence_in_words(made(2)) != cadence_in_words(made(3))
    assert cadence_in_words(lambda step: step == 1) != cadence_in_words(lambda step: step == 2)
    assert cadence_in_words(OverheadBudget(0.2)) == "OverheadBudget(fraction=0.2)"
