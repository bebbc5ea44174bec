"""A training run with the monitor attached ends with the same bits as the run without it."""

from __future__ import annotations

import copy
import functools
import random
import warnings
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from curvdiag import CurvatureMonitor, CurvdiagWarning, Every, LogSpaced, Objective, OverheadBudget
from curvdiag.errors import DataError

EPOCHS, SAMPLES, BATCH = 2, 22, 5


class Augmented(Dataset):
    """Images that are other ones at each reading, with numbers from all three global generators."""

    def __init__(self):
        generator = torch.Generator().manual_seed(3)
        self.images = torch.randn(SAMPLES, 1, 6, 6, generator=generator)
        self.classes = torch.randint(3, (SAMPLES,), generator=generator)

    def __len__(self):
        return SAMPLES

    def __getitem__(self, index):
        noise = 0.1 * torch.randn(1, 6, 6) + 0.1 * random.random() + 0.1 * np.random.rand()  # noqa: NPY002
        return (self.images[index] + noise).float(), self.classes[index]


def net():
    return nn.Sequential(
        *(nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Dropout2d(0.2)),
        *(nn.Flatten(), nn.Linear(64, 6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 3)),
    )


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, fused=True),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, foreach=True, amsgrad=True),
}
LOADERS = {
    "plain": {},
    "workers": {"num_workers": 2},
    "persistent": {"num_workers": 2, "persistent_workers": True},
}
CADENCES = {
    "every": lambda: Every(2),
    "log-spaced": lambda: LogSpaced(4),
    "budget": lambda: OverheadBudget(0.9),
    "function": lambda: lambda step: step in (1, 3, 6, 7),
    "default": lambda: None,
}


@dataclass
class Run:
    """All that a training run leaves behind, and what it did on the way."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    seen: list
    generator: torch.Generator

    def trace(self):
        return {
            "batches and losses": self.seen,
            "parameters": dict(self.model.named_parameters()),
            "buffers": dict(self.model.named_buffers()),
            "optimizer": self.optimizer.state_dict(),
            "grad": {name: p.grad for name, p in self.model.named_parameters()},
            "requires_grad": {name: p.requires_grad for name, p in self.model.named_parameters()},
            "training": {name: m.training for name, m in self.model.named_modules()},
            "attributes": {name: sorted(vars(m)) for name, m in self.model.named_modules()},
            "hooks": {name: len(m._forward_hooks) + len(m._backward_hooks) for name, m in self.model.named_modules()},
            "torch rng": torch.get_rng_state(),
            "python rng": random.getstate(),
            "numpy rng": np.random.get_state()[1].tolist(),  # noqa: NPY002
            "loader rng": self.generator.get_state(),
            "modes": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")),
            "default dtype": torch.get_default_dtype(),
        }


def same(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def differing(one, other):
    return [key for key in one if not same(one[key], other[key])]


def seed():
    torch.manual_seed(5)
    random.seed(6)
    np.random.seed(7)  # noqa: NPY002


def train(optimizer="sgd", loader="plain", watch=None, disturb=None, own_generator=True):
    """A run of two epochs; ``watch(model, loader)`` gives its monitor, ``disturb`` is called in its middle."""
    seed()
    model = net()
    model[1].weight.requires_grad_(False)  # frozen: neither to be unfrozen nor to get a gradient
    opt = OPTIMIZERS[optimizer]([p for p in model.parameters() if p.requires_grad])
    generator = torch.Generator().manual_seed(8)
    batches = DataLoader(
        Augmented(), BATCH, shuffle=True, generator=generator if own_generator else None, **LOADERS[loader]
    )
    run, monitor = Run(model, opt, [], generator), None
    if watch is not None:
        monitor = watch(model, batches)
        monitor.attach(opt)
    for _ in range(EPOCHS):
        model.train()
        for inputs, targets in batches:
            opt.zero_grad()
            loss = F.cross_entropy(model(inputs + 0.1 * random.random()), targets)
            loss.backward()
            if disturb is not None and len(run.seen) in (3, 6):
                disturb(run, batches)
            opt.step()
            run.seen.append((inputs, targets, loss.detach()))
    if monitor is not None:
        monitor.close()
    return run, monitor


@functools.cache
def reference(optimizer, loader, own_generator=True):
    return train(optimizer, loader, own_generator=own_generator)[0].trace()


def objective(model, source, mode="eval"):
    if source != "batch":
        return Objective(model, F.cross_entropy, source, mode=mode)
    data = Augmented()
    return Objective(model, F.cross_entropy, (data.images[:8], data.classes[:8]), mode=mode)


def monitor(model, source, cadence="every", preset="standard", store=None):
    return CurvatureMonitor(
        objective(model, source), store, cadence=CADENCES[cadence](), preset=preset, steps=6, probes=2
    )


# Each pair of optimizer, loader, cadence, preset and source of data occurs in some row, but for a few.
@pytest.mark.filterwarnings("ignore:measuring every")
@pytest.mark.parametrize(
    ("optimizer", "loader", "cadence", "preset", "source"),
    [
        ("sgd", "plain", "every", "full", "loader"),
        ("sgd", "plain", "log-spaced", "light", "batch"),
        ("sgd", "workers", "log-spaced", "standard", "loader"),
        ("sgd", "persistent", "function", "light", "loader"),
        ("sgd", "persistent", "budget", "full", "batch"),
        ("adamw-fused", "plain", "budget", "light", "loader"),
        ("adamw-fused", "plain", "function", "standard", "batch"),
        ("adamw-fused", "workers", "every", "light", "batch"),
        ("adamw-fused", "workers", "function", "full", "loader"),
        ("adamw-fused", "persistent", "log-spaced", "full", "loader"),
        ("adamw-fused", "persistent", "every", "standard", "loader"),
        ("adamw-foreach", "plain", "log-spaced", "full", "batch"),
        ("adamw-foreach", "workers", "budget", "standard", "batch"),
        ("adamw-foreach", "workers", "every", "full", "loader"),
        ("adamw-foreach", "persistent", "function", "light", "loader"),
        ("adamw-foreach", "plain", "default", "standard", "loader"),
    ],
)
def test_a_monitored_run_ends_with_the_same_bits(optimizer, loader, cadence, preset, source, tmp_path):
    def watch(model, batches):
        data = batches if source == "loader" else "batch"
        return monitor(model, data, cadence, preset, tmp_path / "run.db")

    run, watching = train(optimizer, loader, watch)
    assert differing(reference(optimizer, loader), run.trace()) == []
    assert watching.steps_done == EPOCHS * 5
    least = {"every": 5, "log-spaced": 5, "function": 4, "budget": 1, "default": 1}[cadence]
    assert len(watching.history) >= least


def test_a_run_is_repeatable_and_another_seed_is_noticed():
    assert differing(reference("sgd", "plain"), train()[0].trace()) == []
    once = reference("sgd", "plain")
    assert set(differing(once, reference("adamw-fused", "plain"))) >= {"batches and losses", "parameters", "optimizer"}


VANDALS = {
    "draws from torch": lambda run: torch.rand(1),
    "draws from python": lambda run: random.random(),
    "draws from numpy": lambda run: np.random.rand(),  # noqa: NPY002
    "draws from the loader's generator": lambda run: torch.rand(1, generator=run.generator),
    "one layer in eval mode": lambda run: run.model[1].eval(),
    "runs the model": lambda run: run.model(torch.zeros(2, 1, 6, 6)),
    "adds to the gradient": lambda run: run.model[0].weight.grad.add_(1e-6),
    "unfreezes": lambda run: run.model[1].weight.requires_grad_(),
    "leaves a hook": lambda run: run.model[1].register_forward_hook(lambda *_: None),
}


@pytest.mark.parametrize("what", VANDALS)
def test_the_comparison_notices_a_vandal(what):
    run, _ = train(disturb=lambda run, _: VANDALS[what](run))
    assert differing(reference("sgd", "plain"), run.trace())


@pytest.mark.parametrize("loader", ["plain", "workers", "persistent"])
def test_an_objective_made_of_the_loader_in_the_middle_of_its_epoch(loader):
    """Reading a loader with persistent workers would end the epoch; refusing it is right, too."""
    refused = []

    def disturb(run, batches):
        try:
            assert CurvatureMonitor(objective(run.model, batches), steps=6, probes=2).measure() is not None
        except DataError:
            refused.append(True)

    run, _ = train("sgd", loader, disturb=disturb, own_generator=False)
    assert not refused or loader == "persistent"
    assert differing(reference("sgd", loader, own_generator=False), run.trace()) == []


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_measuring_between_backward_and_step_leaves_the_gradients(mode):
    def disturb(run, _):
        dropouts = [(m, m.p) for m in run.model.modules() if isinstance(m, nn.Dropout | nn.Dropout2d)]
        for module, _ in dropouts if mode == "train" else ():
            module.p = 0.0  # an objective in train mode refuses dropout
        before = {name: (p.grad, p.grad.clone()) for name, p in run.model.named_parameters() if p.grad is not None}
        watching = CurvatureMonitor(objective(run.model, "batch", mode), preset="full", steps=6, probes=2)
        assert watching.measure() is not None
        for name, p in run.model.named_parameters():
            if p.grad is not None:
                grad, values = before[name]
                assert p.grad is grad
                assert torch.equal(grad, values)
        for module, rate in dropouts:
            module.p = rate

    run, _ = train(disturb=disturb)
    assert differing(reference("sgd", "plain"), run.trace()) == []


class Half(torch.autograd.Function):
    """Has no second derivative, and says so."""

    @staticmethod
    def forward(ctx, x):
        return 0.5 * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return 0.5 * grad


def test_measurements_that_fail_leave_no_trace():
    """At the forward pass, at the graph, and at the product: whatever point they had reached."""

    class Countdown:  # not a list, which a measurement would restore
        def __init__(self, count):
            self.count = count

    class Fails(nn.Module):
        def __init__(self, kind, at):
            super().__init__()
            self.kind, self.left = kind, Countdown(at)

        def forward(self, x):
            if not self.training:
                self.left.count -= 1
                if self.left.count < 0 and self.kind == "forward":
                    random.random(), np.random.rand(), torch.rand(1)  # noqa: NPY002
                    raise RuntimeError("broken")
            return Half.apply(x) if self.kind == "second derivative" and not self.training else x

    for kind in ("forward", "second derivative"):

        def watch(model, batches, kind=kind):
            model.append(Fails(kind, at=5))
            return monitor(model, "batch")

        with pytest.warns(CurvdiagWarning, match="failed and training goes on"):
            run, watching = train(watch=watch)
        expected = reference("sgd", "plain")
        del run.model[-1]
        assert differing(expected, run.trace()) == []
        assert len(watching.history) < 5


def train_scaled(make_optimizer, watch):
    """In bfloat16 autocast with a loss scale; the third step's gradients are infinite and it is skipped."""
    seed()
    model = net()
    opt = make_optimizer(model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    data = Augmented()
    watching = watch(model) if watch else None
    if watching:
        watching.attach(opt)
    seen = []
    for step in range(8):
        inputs, targets = torch.randn(6, 1, 6, 6), data.classes[:6]
        opt.zero_grad(set_to_none=False)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = F.cross_entropy(model(inputs), targets) * (float("inf") if step == 2 else 1.0)
            if watching and step in (1, 4):
                assert watching.measure() is not None  # inside autocast, between forward and backward pass
            scaler.scale(loss).backward()
        if watching and step == 5:
            watching.measure()
        scaler.step(opt)
        scaler.update()
        seen.append(loss.detach())
    trace = Run(model, opt, seen, torch.Generator()).trace() | {"scaler": scaler.state_dict()}
    return trace, watching


@pytest.mark.filterwarnings("ignore:measuring every")
@pytest.mark.parametrize("optimizer", ["sgd", "adamw-fused"])
def test_under_autocast_with_a_loss_scale(optimizer):
    quiet, _ = train_scaled(OPTIMIZERS[optimizer], None)
    watched, watching = train_scaled(OPTIMIZERS[optimizer], lambda model: monitor(model, "batch"))
    assert differing(quiet, watched) == []
    assert quiet["scaler"]["scale"] == 2.0**10  # halved once, doubled once
    assert watching.steps_done == 7
    assert [m.step for m in watching.history] == [1, 2, 3, 4, 4, 6]


def test_the_autocast_of_the_training_does_not_reach_the_measurement():
    model = net()
    watching = CurvatureMonitor(objective(model, "batch"), preset="light", tol=1e-6, probes=2, warm=False)
    outside = watching.measure()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = watching.measure()
        assert torch.is_autocast_enabled("cpu")
    assert inside["curv/hessian/lambda_max"] == outside["curv/hessian/lambda_max"]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_under_modes_without_gradients(mode):
    model = net()
    watching = CurvatureMonitor(objective(model, "batch"), preset="full", steps=6, probes=2)
    outside = watching.measure()
    with mode():
        inside = watching.measure()
        made_inside = CurvatureMonitor(objective(model, "batch"), preset="full", steps=6, probes=2).measure()
        assert not torch.is_grad_enabled()
        assert torch.is_inference_mode_enabled() == (mode is torch.inference_mode)
    assert torch.is_grad_enabled()
    for key, value in outside.scalars.items():
        if key.startswith(("curv/hessian", "curv/layer", "curv/anisotropy")):
            assert inside[key] == made_inside[key] == float(value), key
    (model(torch.randn(2, 1, 6, 6)).sum()).backward()  # and nothing of the model became an inference tensor


@pytest.mark.filterwarnings("ignore:measuring every", "ignore:Dynamo does not know")
@pytest.mark.parametrize("what", ["model", "optimizer step"])
def test_what_is_compiled_trains_to_the_same_bits(what):
    def run(watched):
        seed()
        torch._dynamo.reset()
        model = net()
        opt = OPTIMIZERS["sgd"](model.parameters())
        compiled = torch.compile(model, backend="eager") if what == "model" else model
        step = torch.compile(lambda: opt.step(), backend="eager") if what == "optimizer step" else opt.step
        watching = monitor(compiled, "batch", "every", "full") if watched else None
        if watching:
            watching.attach(opt)
        seen = []
        for _ in range(6):
            opt.zero_grad()
            loss = F.cross_entropy(compiled(torch.randn(5, 1, 6, 6)), torch.randint(3, (5,)))
            loss.backward()
            step()
            seen.append(loss.detach())
        return Run(model, opt, seen, torch.Generator()).trace(), watching

    quiet, _ = run(False)
    watched, watching = run(True)
    assert differing(quiet, watched) == []
    assert len(watching.history) == 3


class Keeper(nn.Module):
    """Keeps a counter, a cache in the precision of its first call, and its last output, as plain attributes."""

    def __init__(self):
        super().__init__()
        self.linear, self.calls, self.last = nn.Linear(4, 3), 0, None

    def forward(self, x):
        self.calls += 1
        if not hasattr(self, "cache"):
            self.cache = torch.arange(4).to(x.dtype) / 4
        self.last = self.linear(x * self.cache) * (1 + 1e-3 * self.calls * self.training)
        return self.last


def test_plain_attributes_that_a_forward_pass_sets_are_restored():
    def run(watched):
        seed()
        model = Keeper()
        opt = torch.optim.SGD(model.parameters(), lr=0.1)
        inputs, targets = torch.randn(6, 4), torch.randint(3, (6,))
        options = {"preset": "full", "steps": 4, "probes": 2, "hessian": {"dtype": torch.float64}}
        if watched:
            watching = CurvatureMonitor(Objective(model, F.cross_entropy, (inputs, targets)), **options)
            assert watching.measure() is not None
            assert not hasattr(model, "cache")
        for _ in range(3):
            opt.zero_grad()
            F.cross_entropy(model(inputs), targets).backward()
            before = model.last
            if watched:
                assert watching.measure() is not None
            assert model.last is before
            opt.step()
        return Run(model, opt, [model.calls, model.cache, model.last.detach()], torch.Generator()).trace()

    assert differing(run(False), run(True)) == []


@pytest.mark.filterwarnings("ignore:measuring every")
def test_lbfgs_trains_to_the_same_bits_and_counts_each_step_once():
    def run(watched):
        seed()
        model, data, closures = net().eval(), Augmented(), []
        opt = torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=5, line_search_fn="strong_wolfe")
        watching = monitor(model, "batch") if watched else None
        if watching:
            watching.attach(opt)

        def closure():
            opt.zero_grad()
            loss = F.cross_entropy(model(data.images[:8]), data.classes[:8])
            loss.backward()
            closures.append(loss.detach())
            return loss

        for _ in range(4):
            opt.step(closure)
        return Run(model, opt, closures, torch.Generator()).trace(), watching, len(closures)

    quiet, _, _ = run(False)
    watched, watching, closures = run(True)
    assert differing(quiet, watched) == []
    assert closures > 8
    assert watching.steps_done == 4
    assert [m.step for m in watching.history] == [2, 4]


def test_two_monitors_on_one_optimizer_and_a_copied_optimizer():
    """Hooks stay with the monitor: state, checkpoints and copies of the optimizer know nothing of them."""
    seed()
    model = net()
    opt = OPTIMIZERS["sgd"](model.parameters())
    before = copy.deepcopy(opt.state_dict())
    one, two = monitor(model, "batch"), monitor(model, "batch", preset="light")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CurvdiagWarning)
        one.attach(opt)
        two.attach(opt)
        assert same(before, opt.state_dict())
        for _ in range(2):
            opt.step()
        copy.deepcopy(opt).step()
    assert (one.steps_done, two.steps_done) == (2, 2)
    one.detach()
    two.detach()
    assert not opt._optimizer_step_post_hooks
