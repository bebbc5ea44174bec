"""Two processes of a Transformers Trainer with DDP: one measures, schedules choose alike, training is the same."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from curvdiag import RunStore

pytest.importorskip("transformers")

SCRIPT = """
import json, sys, warnings
import torch
import tiny_transformers as tiny
from curvdiag.integrations.transformers import CurvatureCallback
from curvdiag.optim import LPSGD
from curvdiag.schedules import AnisotropyP

folder, kind = sys.argv[1:]
warnings.filterwarnings("ignore", "measuring every")
schedules = None
if kind == "measured":
    schedules = lambda optimizer, monitor: AnisotropyP(optimizer, monitor, p_max=6.0)
watched = CurvatureCallback(
    [tiny.tokens()], f"{folder}/run.db", every=2, measure=["lambda_max", "anisotropy"], steps=8, probes=1,
    schedules=schedules,
)
trainer = tiny.trainer(
    f"{folder}/out", [] if kind == "plain" else [watched], optimizer=lambda p: LPSGD(p, lr=1e-3, p=4.0),
    ddp_backend="gloo", per_device_train_batch_size=2, lr_scheduler_type="constant",
)
trainer.train()
rank = trainer.args.process_index
assert trainer.args.world_size == 2 and type(trainer.model_wrapped).__name__ == "DistributedDataParallel"
told = {
    "weights": sum(float(p.double().abs().sum()) for p in trainer.model.parameters()),
    "p": trainer.optimizer.param_groups[0]["p"],
    "measured": 0 if watched.monitor is None else len(watched.monitor.history),
    "added": len(tiny.added(trainer)),
}
with open(f"{folder}/{kind}-{rank}.json", "w") as file:
    json.dump(told, file)
"""


@pytest.mark.long
def test_one_process_measures_and_all_train_as_without_it(tmp_path):
    (tmp_path / "train.py").write_text(SCRIPT)
    told = {}
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here), str(here.parent)]), "OMP_NUM_THREADS": "1"}
    for kind in ("plain", "watched", "measured"):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        subprocess.run(
            [*command, str(tmp_path / "train.py"), str(tmp_path), kind],
            env={**environment, "HF_HUB_OFFLINE": "1"},
            check=True,
            timeout=280,
        )
        told[kind] = [json.loads((tmp_path / f"{kind}-{rank}.json").read_text()) for rank in (0, 1)]
        assert told[kind][0]["weights"] == told[kind][1]["weights"]
    assert told["watched"][0]["weights"] == told["plain"][0]["weights"] != told["measured"][0]["weights"]
    assert [one["measured"] for one in told["watched"]] == [3, 0]
    assert [one["added"] for one in told["watched"]] == [3, 0]
    assert [one["measured"] for one in told["measured"]] == [3, 3]
    assert told["measured"][0]["p"] == told["measured"][1]["p"] != 4.0
    with RunStore(tmp_path / "run.db") as store:
        assert [run.measurements for run in store.runs()] == [3, 3]
