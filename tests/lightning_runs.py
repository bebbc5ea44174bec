"""A small LightningModule in either package, its data, and a silent Trainer: shared by the tests of Lightning."""

from __future__ import annotations

import importlib
import logging
import random
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

BATCH, SAMPLES = 8, 64
QUIET = {
    "accelerator": "cpu",
    "devices": 1,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "use_distributed_sampler": False,
}
FAST = {"preset": "light", "probes": 1}


def package(name: str = "lightning.pytorch") -> ModuleType:
    for logger in ("lightning.pytorch", "pytorch_lightning"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    return importlib.import_module(name)


def dataset() -> TensorDataset:
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(SAMPLES, 6, generator=generator)
    return TensorDataset(inputs, (inputs[:, :2].sum(1) > 0).long() + (inputs[:, 2] > 0.5).long())


def loader(**options: Any) -> DataLoader:
    return DataLoader(dataset(), batch_size=BATCH, **{"shuffle": True, **options})


def module(
    pl: ModuleType,
    optimizers: Callable[[Any], Any] | None = None,
    step: Callable[..., Any] | None = None,
    **attributes: Any,
) -> Any:
    """Dropout, BatchNorm, a logged loss; ``optimizers(self)`` and ``step(self, batch, batch_idx)`` replace its own."""

    class Net(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 3))
            for name, value in attributes.items():
                setattr(self, name, value)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.net(inputs)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if step is not None:
                return step(self, batch, batch_idx)
            loss = F.cross_entropy(self(batch[0]), batch[1])
            self.log("train_loss", loss)
            return loss

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=1e-2) if optimizers is None else optimizers(self)

    torch.manual_seed(0)
    return Net()


def trainer(pl: ModuleType, callbacks: list[Any], **options: Any) -> Any:
    given = {"max_epochs": 2, "logger": False, "enable_checkpointing": False, **QUIET, **options}

    class Trainer(pl.Trainer):  # a user's own
        pass

    return Trainer(callbacks=callbacks, **given)


def fit(pl: ModuleType, callbacks: list[Any], net: Any = None, data: Any = None, seed: int = 5, **options: Any) -> Any:
    """The trainer and the module after a training from a fixed seed."""
    net = module(pl) if net is None else net
    made, path = (
        trainer(pl, callbacks, **{k: v for k, v in options.items() if k != "ckpt_path"}),
        options.get("ckpt_path"),
    )
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - the state that must stay as it is
    made.fit(net, loader() if data is None else data, ckpt_path=path)
    return made, net


def fingerprint(made: Any, net: Any) -> list[Any]:
    """Everything that training leaves: weights, buffers, optimizer states, random states."""
    found: list[Any] = [(name, tensor.clone()) for name, tensor in net.state_dict().items()]
    for optimizer in made.optimizers:
        state = optimizer.state_dict()
        for index, entries in state["state"].items():
            found += [(f"{index} {name}", value) for name, value in entries.items()]
        found += [("group", dict(group)) for group in state["param_groups"]]
    found += [("torch", torch.get_rng_state()), ("python", random.getstate())]
    found += [("numpy", np.random.get_state()[1].tolist())]  # noqa: NPY002
    return found


def same(one: list[Any], other: list[Any]) -> bool:
    return len(one) == len(other) and all(
        a == b and (torch.equal(x, y) if isinstance(x, Tensor) else x == y)
        for (a, x), (b, y) in zip(one, other, strict=True)
    )
