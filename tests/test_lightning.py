"""CurvatureCallback in a real Lightning Trainer: the same training with and without it, and the oracle's numbers."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from lightning_runs import BATCH, FAST, dataset, fingerprint, fit, loader, module, package, same
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset

from curvdiag import Objective
from curvdiag.integrations.lightning import CurvatureCallback
from curvdiag.loaders import first_batches
from curvdiag.operators import Hessian
from curvdiag.record import RunStore

pytestmark = pytest.mark.filterwarnings("ignore:measuring every")


@pytest.fixture(params=["lightning.pytorch", "pytorch_lightning"])
def pl(request):
    return package(request.param)


@pytest.fixture
def one():
    return package()


def test_training_is_bit_identical_with_and_without_it(pl, tmp_path):
    bare = fingerprint(*fit(pl, []))
    callback = CurvatureCallback(store=tmp_path / "run.db", every=5, steps=10)
    watched = fingerprint(*fit(pl, [callback]))
    assert len(callback.monitor.history) == 3
    assert same(bare, watched)
    assert not same(bare, fingerprint(*fit(pl, [], seed=6)))  # the comparison can fail


def test_training_is_bit_identical_with_workers_that_persist(one):
    data = {"num_workers": 1, "persistent_workers": True}
    bare = fingerprint(*fit(one, [], data=loader(**data)))
    assert same(bare, fingerprint(*fit(one, [CurvatureCallback(every=5, **FAST)], data=loader(**data))))


def test_training_is_bit_identical_where_the_function_that_makes_the_objective_draws(one):
    def objective(net, trainer):
        torch.randn(3)
        return Objective(net.net, nn.CrossEntropyLoss(), tuple(next(iter(trainer.train_dataloader))))

    bare = fingerprint(*fit(one, []))
    assert same(bare, fingerprint(*fit(one, [CurvatureCallback(objective, every=5, **FAST)])))


class Noisy(Dataset):
    """Noise from generators of its own."""

    def __init__(self):
        self.inputs, self.targets = dataset().tensors
        self.drawing = [np.random.default_rng(0), torch.Generator().manual_seed(0), random.Random(0)]

    def __len__(self):
        return len(self.inputs)

    def __getitem__(self, index):
        numpys, torchs, pythons = self.drawing
        noise = numpys.normal() + torch.randn((), generator=torchs) + pythons.gauss(0, 1)
        return self.inputs[index] + 0.1 * float(noise), self.targets[index]


class Counting(IterableDataset):
    """Another order in each pass, which it counts."""

    passes = 0

    def __iter__(self):
        self.passes += 1
        order = torch.randperm(64, generator=torch.Generator().manual_seed(self.passes))
        yield from (dataset()[index] for index in order.tolist())


@pytest.mark.parametrize("kind", [Noisy, Counting])
def test_training_is_bit_identical_with_data_that_remember_what_was_read(one, kind):
    def run(callbacks):
        return fingerprint(*fit(one, callbacks, data=DataLoader(kind(), batch_size=BATCH)))

    bare = run([])
    assert same(bare, run([CurvatureCallback(every=5, **FAST)]))


def with_averages(pl):
    return {"callbacks": [pl.callbacks.EMAWeightAveraging()]}


def with_swapped_averages(pl):
    return {"callbacks": [pl.callbacks.StochasticWeightAveraging(swa_lrs=1e-2, swa_epoch_start=1)]}


def in_half_precision(pl):
    return {"precision": "bf16-mixed", "gradient_clip_val": 0.1, "accumulate_grad_batches": 2}


@pytest.mark.parametrize("how", [with_averages, with_swapped_averages, in_half_precision])
def test_training_is_bit_identical_beside_what_else_moves_weights(one, how):
    def run(*ours):
        options = how(one)
        theirs = options.pop("callbacks", [])
        return fingerprint(*fit(one, [*theirs, *ours], **options))

    callback = CurvatureCallback(every=3, **FAST)
    assert same(run(), run(callback))
    assert callback.monitor.history


def test_metrics_of_torchmetrics_are_as_they_would_be(one):
    from torchmetrics.classification import MulticlassAccuracy

    def states(callbacks):
        def step(net, batch, index):
            outputs = net(batch[0])
            net.log("accuracy", net.metric(outputs, batch[1]))
            return F.cross_entropy(outputs, batch[1])

        net = module(one, step=step, metric=MulticlassAccuracy(3, average="micro"))
        made, _ = fit(one, callbacks, net, max_epochs=1)
        kept = {name: int(value) for name, value in net.metric.metric_state.items()}
        return kept, net.metric._update_count, float(made.callback_metrics["accuracy"])

    bare = states([])
    assert bare == states([CurvatureCallback(every=3, **FAST)])
    assert bare[1] == 8


def test_training_is_bit_identical_under_a_loader_with_its_own_generator_and_accumulation(one):
    def run(callbacks):
        data = loader(generator=torch.Generator().manual_seed(9))
        return [
            *fingerprint(*fit(one, callbacks, data=data, accumulate_grad_batches=3)),
            ("own", data.generator.get_state()),
        ]

    callback = CurvatureCallback(every=2, **FAST)
    assert same(run([]), run([callback]))
    assert callback.monitor.steps_done == 6  # 8 batches in steps of 3, 3 and 2, twice


def test_one_line_measures_the_training_loss_of_the_usual_module(pl):
    callback = CurvatureCallback(every=8, tol=1e-4)
    _, net = fit(pl, [callback], max_epochs=1)
    batches = first_batches(loader(), 4)
    assert len(batches) == 4
    oracle = Objective(net.net, nn.CrossEntropyLoss(), batches)
    values = torch.linalg.eigvalsh(Hessian(oracle, dtype=torch.float64).dense())
    latest = callback.monitor.latest
    assert latest["curv/hessian/lambda_max"] == pytest.approx(float(values[-1]), rel=1e-3)
    assert callback.monitor.objective.size == 4 * BATCH


def test_a_function_gets_the_module_and_the_trainer_when_training_begins(one):
    seen = []

    def objective(net, trainer):
        seen.append((net, trainer, trainer.global_step, next(net.parameters()).device.type))
        return Objective(net.net, nn.CrossEntropyLoss(), first_batches(trainer.train_dataloader, 2))

    callback = CurvatureCallback(objective, every=4, measure=["lambda_max", "noise_scale"])
    made, net = fit(one, [callback])
    assert seen == [(net, made, 0, "cpu")]
    assert callback.monitor.objective.model is net.net
    assert "noise/scale" in callback.monitor.latest.scalars


def test_an_objective_made_beforehand_is_measured(one):
    net = module(one)
    callback = CurvatureCallback(Objective(net.net, nn.CrossEntropyLoss(), list(loader())), every=8, **FAST)
    fit(one, [callback], net)
    assert [found.step for found in callback.monitor.history] == [8, 16]


def test_epochs_and_the_loss_of_each_step_are_recorded(one):
    losses = []

    def step(net, batch, index):
        loss = F.cross_entropy(net(batch[0]), batch[1])
        if net.training:
            losses.append(float(loss))
        return {"loss": loss}

    callback = CurvatureCallback(every=2, **FAST)
    fit(one, [callback], module(one, step=step), accumulate_grad_batches=3)
    history = callback.monitor.history
    assert [found.step for found in history] == [2, 4, 6]
    # Epochs of 8 batches make steps of 3, 3 and 2.
    expected = [sum(losses[3:6]) / 3, sum(losses[8:11]) / 3, sum(losses[14:16]) / 2]
    assert [found["train/loss"] for found in history] == pytest.approx(expected[:1] + expected[1:], rel=1e-5)
    assert [found.epoch for found in history] == [6 / 8, 1 + 3 / 8, 2.0]


def test_steps_that_mixed_precision_skips_do_not_count(one, monkeypatch):
    plugin = one.plugins.MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**100))
    seen = []

    def step(net, batch, index):
        loss = F.cross_entropy(net(batch[0]).float(), batch[1])
        if net.training:
            seen.append(float(loss))
        return loss

    callback = CurvatureCallback(cadence=lambda step: step == 3, **FAST)
    made, _ = fit(one, [callback], module(one, step=step), max_epochs=12, plugins=[plugin])
    taken = int(made.optimizers[0].state[next(iter(made.optimizers[0].state))]["step"])
    assert 0 < taken < 96 == made.global_step
    assert callback.monitor.steps_done == taken
    third = len(seen) - taken + 2  # once the scale has come down no step is skipped
    assert callback.monitor.latest["train/loss"] == pytest.approx(seen[third], rel=1e-3)


def test_manual_optimization_with_two_optimizers_follows_the_one_of_the_objective(one):
    def optimizers(net):
        return [torch.optim.SGD(net.critic.parameters(), lr=0.1), torch.optim.SGD(net.net.parameters(), lr=0.1)]

    def step(net, batch, index):
        critic, player = net.optimizers()
        for _ in range(2):
            critic.zero_grad()
            net.manual_backward(100 + net.critic(batch[0]).square().mean())
            critic.step()
        player.zero_grad()
        net.manual_backward(F.cross_entropy(net(batch[0]), batch[1]))
        player.step()

    def objective(net, trainer):
        return Objective(net.net, nn.CrossEntropyLoss(), first_batches(trainer.train_dataloader, 2))

    def net():
        return module(one, optimizers, step, critic=nn.Linear(6, 1), automatic_optimization=False)

    callback = CurvatureCallback(objective, every=4, **FAST)
    made, _ = fit(one, [callback], net(), max_epochs=1)
    assert made.global_step == 24
    assert [found.step for found in callback.monitor.history] == [4, 8]
    assert callback.monitor.latest["train/loss"] < 5
    critics = CurvatureCallback(objective, optimizer=0, every=4, **FAST)
    fit(one, [critics], net(), max_epochs=1)
    assert critics.monitor.steps_done == 16


def test_the_run_file_holds_what_was_measured_and_is_closed(one, tmp_path):
    path = tmp_path / "run.db"
    told = []
    loggers = [lambda step, numbers: told.append(step)]  # of curvdiag, beside the trainer's
    callback = CurvatureCallback(store=path, every=8, name="first", loggers=loggers, **FAST)
    net = module(one)
    net.save_hyperparameters({"width": 8})
    fit(one, [callback], net)
    assert told == [8, 16]
    assert [file.name for file in tmp_path.iterdir()] == ["run.db"]  # no side files: it was closed
    with RunStore(path, readonly=True) as store:
        assert store.run().name == "first"
        assert store.run().config["hparams"] == {"width": 8}
        assert store.scalars("curv/hessian/lambda_max").steps.tolist() == [8, 16]
