"""What fails on one rank ends the call on all of them, with a word of which rank it was; then all can go on."""

import pytest
import torch
from ranks import launch, started

BAD = 1

SCRIPT = """
import functools
from rank_failures import *
from curvdiag import per_sample_gradients
from curvdiag.weights import Weights
from curvdiag.errors import DistributedError

model = Fragile()
objective = objective_of(model, rank)
truth = Hessian(objective) @ one_vector(objective)


def after():
    "Whether all are in step again, and measure what they did before."
    model.error, model.nan = None, False
    return bool(torch.equal(Hessian(objective) @ one_vector(objective), truth))


def full(error, *args, **options):
    raise error


LATER = {"noise product": [1], "noise scale": [1, 2], "differences": [9]}  # passes that are still well

# An exception out of the model of one rank, at once and later on.
calls = calls_of(objective)
saved["calls"] = list(calls)
for name, call in calls.items():
    for later in (0, *LATER.get(name, ())):
        if rank == 1:
            model.error, LEFT[0] = ValueError("broken cable"), later
        saved[name, later] = fate(call), after()

# Not a number in the samples of one rank.
for name in ("objective", "value", "gradient", "moments", "hessian", "noise covariance", "gauss-newton"):
    model.nan = rank == 1
    saved["nan", name] = fate(calls[name]), after()

# Too little memory, which is no error of curvdiag's, in every graph that is rebuilt.
if rank == 1:
    model.error, LEFT[0] = MemoryError("full"), 0
saved["memory"] = fate(calls["hessian product"]), after()

# No room for a copy of the weights, before anything is exchanged.
copied = Weights.of
for name in ("value", "gradient"):
    Weights.of = functools.partial(full, MemoryError("no room")) if rank == 1 else copied
    found = fate(calls[name])
    Weights.of = copied
    saved["picture", name] = found, after()

# The very same exception twice.
same = RuntimeError("the same object")
for name in ("first", "second"):
    if rank == 1:
        model.error, LEFT[0] = same, 0
    saved["same", name] = fate(calls["value"]), after()

# An argument that only one rank gives wrongly, and a loss that is none on one of them.
saved["argument"] = fate(lambda: Hessian(objective, memory=-1 if rank == 1 else None)), after()
whole = Hessian(objective)
saved["shape"] = fate(lambda: whole @ one_vector(objective)[: -1 if rank == 1 else None]), after()
criterion = nn.CrossEntropyLoss(reduction="sum" if rank == 1 else "mean")
saved["sum"] = fate(lambda: Objective(model, criterion, data(rank), group="world")), after()
batches = [] if rank == 1 else [data(rank)]
saved["empty"] = fate(lambda: Objective(model, nn.CrossEntropyLoss(), batches, group="world")), after()
saved["restriction"] = fate(lambda: objective.restricted_to("nothing*" if rank == 1 else "net.0*")), after()
saved["block"] = fate(lambda: Hessian(objective).block("nothing*" if rank == 1 else "net.0*")), after()
tall = torch.zeros(3 if rank == 1 else 4, 2, 4).double(), torch.zeros(4, 2).long()
uneven = lambda model, batch: model(batch[0][:, 0]).square().mean(1)
saved["split"] = fate(lambda: Objective.from_loss(model, uneven, batch=tall, group="world").split()), after()

# Weights of one rank that change under an operator, and models that differ.
shared = Hessian(objective, share=True)
with torch.no_grad():
    before = model.net[0].weight.clone()
    model.net[0].weight[0, 0] += 0.5 * (rank == 1)
saved["stale"] = fate(lambda: shared @ one_vector(objective))
saved["stale cwgd"] = fate(lambda: cwgd(objective, hessian=shared))
saved["weights"] = fate(lambda: Hessian(objective)), fate(lambda: gradient_moments(objective)), fate(objective.value)
with torch.no_grad():
    model.net[0].weight.copy_(before)
saved["restored"] = after()

other = Fragile() if rank != 1 else nn.Sequential(nn.Linear(4, 3)).double()
saved["models"] = fate(lambda: objective_of(other, rank)), after()
few = None if rank != 1 else ["net.0*"]
entropy, own = nn.CrossEntropyLoss(), data(rank)
saved["parameters"] = fate(lambda: Objective(model, entropy, own, params=few, group="world")), after()
mode = "eval" if rank != 1 else "train"
saved["modes"] = fate(lambda: Objective(model, entropy, own, mode=mode, group="world")), after()

# Different vectors, numbers of vectors, blocks, and calls.
hessian = Hessian(objective)
vector = one_vector(objective)
saved["vectors"] = fate(lambda: hessian @ (vector + 1e-9 * (rank == 1))), after()
saved["last entry"] = fate(lambda: hessian @ torch.cat([vector[:-1], vector[-1:] + (rank == 1)])), after()
saved["count"] = fate(lambda: hessian @ torch.stack([vector] * (2 + (rank == 1)), 1)), after()
one, two = hessian.block("net.0.bias"), hessian.block(["net.0.bias", "net.4.bias"])
saved["blocks"] = fate(lambda: (one if rank != 1 else two) @ torch.ones(6 if rank != 1 else 9).double()), after()
alike = [hessian.block("net.2.bias"), hessian.block("net.4.weight")]
rows = [{"a": torch.ones(1, 5).double()}, {"a": torch.ones(1, 15).double()}]
cut = hessian.blocks({"a": "net.2.bias" if rank != 1 else "net.4.weight"})
saved["shapes of blocks"] = fate(lambda: cut.apply(rows[rank == 1])), after()
saved["places"] = fate(objective.value if rank != 1 else objective.gradient), after()
saved["seeds"] = fate(lambda: trace(hessian, probes=3, seed=rank)), after()
saved["other layer"] = fate(lambda: objective.restricted_to("net.2.bias" if rank != 1 else "net.0.bias")), after()
restricted = objective.restricted_to("net.0.bias")
saved["fine"] = fate(lambda: Hessian(restricted) @ torch.ones(6).double())
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return launch(SCRIPT, 3, tmp_path_factory.mktemp("ranks"), limit=300)


def failed(saved, key, rank, error, words):
    """A rank's own error on the one that fails, and on the others one that names it."""
    (kind, text), in_step = saved[key]
    assert in_step, key
    if rank == BAD:
        assert kind == error, (key, kind, text)
        assert words in text, key
    else:
        assert kind == "RankFailedError", (key, kind, text)
        assert text.startswith(f"rank {BAD} failed: {error}: "), key
        assert words in text, key


def told(fate, rank, *words):
    """An error of disagreement on every rank."""
    kind, text = fate
    assert kind == "DistributedError", (rank, kind, text)
    assert all(word in text for word in words), text


def test_an_exception_on_one_rank_ends_every_call_on_all_and_they_go_on(runs):
    for rank, saved in enumerate(runs):
        assert len(saved["calls"]) == 29
        for name in saved["calls"]:
            failed(saved, (name, 0), rank, "ValueError", "broken cable")
        for key in (("noise product", 1), ("noise scale", 1), ("noise scale", 2), ("differences", 9)):
            failed(saved, key, rank, "ValueError", "broken cable")


def test_numbers_that_are_none_on_one_rank_are_its_error(runs):
    for rank, saved in enumerate(runs):
        for name in ("objective", "gradient", "moments", "hessian", "noise covariance", "gauss-newton"):
            failed(saved, ("nan", name), rank, "NonFiniteError", "nan")
        assert saved["nan", "value"] == (("nothing", ""), True)


def test_lack_of_memory_and_repeated_exceptions_are_told_each_time(runs):
    for rank, saved in enumerate(runs):
        failed(saved, "memory", rank, "MemoryError", "full")
        for name in ("value", "gradient"):
            failed(saved, ("picture", name), rank, "MemoryError", "no room")
        for name in ("first", "second"):
            failed(saved, ("same", name), rank, "RuntimeError", "the same object")


def test_arguments_losses_and_data_of_one_rank_are_its_error(runs):
    for rank, saved in enumerate(runs):
        failed(saved, "argument", rank, "ArgumentError", "memory is a number of bytes")
        failed(saved, "shape", rank, "ArgumentError", "cannot multiply")
        failed(saved, "sum", rank, "LossError", "reduction='sum'")
        failed(saved, "empty", rank, "DataError", "no batch")
        failed(saved, "restriction", rank, "ParameterError", "nothing")
        failed(saved, "block", rank, "ParameterError", "nothing")
        failed(saved, "split", rank, "DataError", "splitting needs")


def test_weights_that_differ_are_told(runs):
    for rank, saved in enumerate(runs):
        for name in ("stale", "stale cwgd"):
            kind, text = saved[name]
            assert kind == ("StaleWeightsError" if rank == BAD else "RankFailedError"), (name, kind, text)
        for fate in saved["weights"]:
            told(fate, rank, "different weights", "on rank 1", "those of the first")
        assert saved["restored"]


def test_models_parameters_and_modes_that_differ_are_told(runs):
    for rank, saved in enumerate(runs):
        for name, words in (("models", "parameters"), ("parameters", "parameters"), ("modes", "modes: eval on rank 0")):
            fate, in_step = saved[name]
            told(fate, rank, words)
            assert in_step
        fate, in_step = saved["other layer"]
        told(fate, rank, "different chosen parameters")
        assert in_step


def test_vectors_blocks_and_calls_that_differ_are_told(runs):
    for rank, saved in enumerate(runs):
        for name, words in (
            ("vectors", ["disagree", "product of 1 vectors"]),
            ("last entry", ["disagree"]),
            ("count", ["rank 0 in the product of 2 vectors", "rank 1 in the product of 3 vectors"]),
            ("blocks", ["disagree"]),
            ("shapes of blocks", ["disagree"]),
            ("places", ["rank 0 in the loss", "rank 1 in the gradient"]),
            ("seeds", ["disagree", "same seed"]),
        ):
            fate, in_step = saved[name]
            told(fate, rank, *words)
            assert in_step
        assert saved["fine"] == ("nothing", "")


KILLED = """
import signal, time
from rank_failures import *

signal.signal(signal.SIGTERM, signal.SIG_IGN)  # which torchrun sends the others, maybe before they have said what is up
model = Fragile()
objective = objective_of(model, rank)
hessian = Hessian(objective, memory=0)
vector = one_vector(objective)
hessian @ vector

if rank == 1:
    model.forward = lambda x: os.kill(os.getpid(), signal.SIGKILL)
started = time.perf_counter()
found = fate(lambda: hessian @ vector)
seconds = time.perf_counter() - started
again = fate(objective.value)
torch.save((found, again, seconds), os.path.join(folder, f"killed-{rank}.pt"))
os._exit(0)
"""


def test_a_rank_that_is_killed_in_a_product_ends_it_on_the_others(tmp_path):
    timeout = 60
    run = started(KILLED, 3, tmp_path, timeout=timeout)
    assert run.returncode != 0
    for rank in (0, 2):
        (kind, text), (later, words), seconds = torch.load(tmp_path / f"killed-{rank}.pt")
        assert kind == "RankLostError", text
        assert "a rank is gone" in text
        assert f"seen by rank {rank} of 3" in text
        assert (later, words) == (kind, text)
        assert seconds < timeout
    assert not (tmp_path / "killed-1.pt").exists()
