"""Checkpoints written by the real trainers of Lightning and Transformers give what was measured in the training."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpointed import QUICK, curvature, data, net, numbers
from torch import Tensor
from torch.nn import functional as F

from curvdiag import CurvatureMonitor, Objective, RunStore
from curvdiag.checkpoints import scan

pytestmark = [pytest.mark.filterwarnings("ignore:measuring every"), pytest.mark.filterwarnings("ignore::UserWarning")]


def epochs(run_file: Path) -> list[float]:
    with RunStore(run_file, readonly=True) as store:
        return store.scalars("curv/hessian/trace").epochs.tolist()


def test_checkpoints_of_a_lightning_trainer(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning")
    from lightning.pytorch.callbacks import Callback, ModelCheckpoint

    class Classifier(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self, lr: float) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.net, self.criterion = net(), torch.nn.CrossEntropyLoss(weight=torch.ones(3))

        def training_step(self, batch: Any, index: int) -> Tensor:
            return self.criterion(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=self.hparams.lr)

    class Watched(Callback):
        def on_fit_start(self, trainer: Any, module: Any) -> None:
            watched = Objective(module.net, F.cross_entropy, data())
            self.monitor = CurvatureMonitor(watched, tmp_path / "live.db", every=2, preset="standard", **QUICK)
            self.monitor.attach(trainer.optimizers[0])

        def on_fit_end(self, trainer: Any, module: Any) -> None:
            self.monitor.close()

    folder = tmp_path / "ckpts"
    saved = ModelCheckpoint(folder, every_n_train_steps=2, save_top_k=-1, save_last=True)
    trainer = lightning.Trainer(
        max_epochs=2, accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[Watched(), saved],
    )  # fmt: skip
    dataset = torch.utils.data.TensorDataset(*data())
    trainer.fit(Classifier(0.3), torch.utils.data.DataLoader(dataset, batch_size=10))
    told: list[str] = []
    result = scan(
        Objective(net(9), F.cross_entropy, data()), folder, tmp_path / "scan.db", preset="standard", tell=told.append,
        **QUICK,
    )  # fmt: skip
    assert (result.measured, result.failed) == ((2, 4, 6, 8), ())
    assert any("last.ckpt are the same weights of step 8" in line for line in told)
    assert numbers(tmp_path / "scan.db") == numbers(tmp_path / "live.db")
    assert epochs(tmp_path / "scan.db") == [0, 0, 1, 1]


def test_checkpoints_of_a_transformers_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    pytest.importorskip("transformers")
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

    config = GPT2Config(
        vocab_size=11, n_positions=6, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    tokens = torch.randint(11, (8, 6), generator=torch.Generator().manual_seed(0))

    def objective(model: torch.nn.Module) -> Objective:
        def loss(model: Any, batch: Tensor) -> Tensor:
            logits = model(batch).logits[:, :-1]
            return F.cross_entropy(logits.transpose(1, 2), batch[:, 1:], reduction="none")

        return Objective.from_loss(model, loss, batch=tokens)

    class Watched(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            monitor.steps_done = state.global_step
            monitor.epoch(state.epoch)
            monitor.measure()

    torch.manual_seed(0)
    model = GPT2LMHeadModel(config)
    monitor = CurvatureMonitor(objective(model), tmp_path / "live.db", preset="standard", **QUICK)
    arguments = TrainingArguments(
        str(tmp_path / "out"), max_steps=4, save_steps=2, logging_steps=1, per_device_train_batch_size=4, report_to=[],
        use_cpu=True, disable_tqdm=True, learning_rate=0.01,
    )  # fmt: skip
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    Trainer(model, arguments, train_dataset=rows, callbacks=[Watched()]).train()
    monitor.close()
    torch.manual_seed(1)
    fresh = GPT2LMHeadModel(config)
    result = scan(objective(fresh), tmp_path / "out", tmp_path / "scan.db", preset="standard", **QUICK)
    assert (result.measured, result.failed) == ((2, 4), ())
    assert curvature(tmp_path / "scan.db") == curvature(tmp_path / "live.db")
    assert epochs(tmp_path / "scan.db") == epochs(tmp_path / "live.db") == [1, 2]
    assert numbers(tmp_path / "scan.db")["train/lr/0"] == pytest.approx({2: 0.0075, 4: 0.0025})

    model.save_pretrained(tmp_path / "pieces", max_shard_size="1KB")
    assert (tmp_path / "pieces" / "model.safetensors.index.json").exists()
    again = scan(
        objective(fresh), tmp_path / "pieces", tmp_path / "scan.db", at=[4], name="pieces", preset="standard", **QUICK
    )
    assert again.failed == ()
    whole, pieces = curvature(tmp_path / "live.db"), curvature(tmp_path / "scan.db", "pieces")
    assert pieces == {name: {4: values[4]} for name, values in whole.items()}
    assert os.listdir(tmp_path / "pieces").count("model-00001-of-00005.safetensors") == 1
