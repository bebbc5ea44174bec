"""Two processes of a Transformers Trainer with DDP: one measures, or both together; training is the same."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from curvdiag import RunStore

pytest.importorskip("transformers")

SCRIPT = """
import json, os, sys, warnings
import torch
import tiny_transformers as tiny
from curvdiag import Objective, OverheadBudget
from curvdiag.errors import CurvdiagError
from curvdiag.integrations.transformers import CurvatureCallback
from curvdiag.optim import LPSGD
from curvdiag.schedules import AnisotropyP

folder = sys.argv[1]
warnings.filterwarnings("ignore", "measuring every")

def of_both(model, args):
    return Objective.from_huggingface(model, [tiny.tokens(seed=args.process_index)], group="world")

def spoilt(model, args):
    if args.process_index == 1:
        raise ValueError("no batches here")
    return of_both(model, args)

def only_first(model, args):
    if args.process_index == 1:
        raise ValueError("these batches are not of this process")
    return Objective.from_huggingface(model, [tiny.tokens()])

def schedules(optimizer, monitor):
    return AnisotropyP(optimizer, monitor, p_max=6.0)

BY_CLOCK = {"cadence": OverheadBudget(0.5)}
KINDS = {
    "plain": None,
    "watched": ([tiny.tokens()], None, {"every": 2}),
    "first": (only_first, None, {"every": 3}),
    "shared": (of_both, None, {"every": 2}),
    "measured": ([tiny.tokens()], schedules, {"every": 2}),
    "together": (of_both, schedules, BY_CLOCK),
    "spoilt": (spoilt, None, {"every": 2}),
}

found = {}
for kind, given in KINDS.items():
    callbacks = []
    if given is not None:
        objective, chosen, when = given
        callbacks.append(CurvatureCallback(
            objective, f"{folder}/{kind}.db", measure=["lambda_max", "anisotropy"], steps=6, probes=1,
            schedules=chosen, **when,
        ))
    trainer = tiny.trainer(
        f"{folder}/out", callbacks, optimizer=lambda p: LPSGD(p, lr=1e-3, p=4.0),
        ddp_backend="gloo", per_device_train_batch_size=2, lr_scheduler_type="constant",
    )
    error = ""
    try:
        trainer.train()
    except Exception as raised:
        error = f"{type(raised).__name__}: {raised}"
    rank = trainer.args.process_index
    assert trainer.args.world_size == 2
    assert error or type(trainer.model_wrapped).__name__ == "DistributedDataParallel"
    monitor = callbacks[0].monitor if callbacks else None
    found[kind] = {
        "weights": [p.tolist() for p in trainer.model.parameters()],
        "random": torch.get_rng_state().tolist(),
        "p": trainer.optimizer.param_groups[0]["p"] if trainer.optimizer else None,
        "steps": [] if monitor is None else [one.step for one in monitor.history],
        "top": [] if monitor is None else [one["curv/hessian/lambda_max"] for one in monitor.history],
        "size": 0 if monitor is None else monitor.objective.size,
        "added": len(tiny.added(trainer)),
        "error": error,
    }
with open(f"{folder}/rank{rank}.json", "w") as file:
    json.dump(found, file)
torch.distributed.barrier()
sys.stdout.flush()
os._exit(0)  # see ranks.TAIL
"""


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What each of the two processes saw, by kind of training; and the folder."""
    folder = tmp_path_factory.mktemp("trainer")
    (folder / "train.py").write_text(SCRIPT)
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here), str(here.parent)]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*command, str(folder / "train.py"), str(folder)],
        env={**environment, "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)], folder


@pytest.mark.parametrize("kind", ["watched", "first", "shared"])
def test_training_is_bit_identical_with_and_without_it(seen, kind):
    for found in seen[0]:
        assert found[kind]["weights"] == found["plain"]["weights"]
        assert found[kind]["random"] == found["plain"]["random"]


@pytest.mark.parametrize(("kind", "steps"), [("watched", [2, 4, 6]), ("first", [3, 6])])
def test_with_an_objective_of_one_process_the_first_measures_and_writes(seen, kind, steps):
    (first, second), folder = seen
    assert (first[kind]["steps"], second[kind]["steps"]) == (steps, [])
    assert (first[kind]["added"], second[kind]["added"]) == (len(steps), 0)
    assert measured_at(folder, kind) == steps


def test_with_an_objective_of_both_they_measure_together_and_the_first_writes(seen):
    (first, second), folder = seen
    assert first["shared"]["top"] == second["shared"]["top"]
    assert first["shared"]["top"] != first["watched"]["top"]
    assert [found["shared"]["size"] for found in seen[0]] == [12, 12]
    assert (first["shared"]["added"], second["shared"]["added"]) == (3, 0)
    assert measured_at(folder, "shared") == first["shared"]["steps"] == second["shared"]["steps"] == [2, 4, 6]


@pytest.mark.parametrize("kind", ["measured", "together"])
def test_schedules_choose_alike_on_both(seen, kind):
    (first, second), folder = seen
    assert first[kind]["steps"] == second[kind]["steps"] == measured_at(folder, kind)
    assert first[kind]["steps"]
    for name in ("weights", "top", "p"):
        assert first[kind][name] == second[kind][name]
    assert first[kind]["weights"] != first["plain"]["weights"]


def test_an_objective_that_cannot_be_made_on_one_process_ends_both(seen):
    first, second = (found["spoilt"]["error"] for found in seen[0])
    assert second == "ValueError: no batches here"
    assert first.startswith("Rank")


def measured_at(folder, kind):
    with RunStore(folder / f"{kind}.db", readonly=True) as store:
        assert len(store.runs()) == 1
        return store.scalars("curv/hessian/lambda_max").steps.tolist()
