"""Making an operator and multiplying with it leaves everything as it was."""

from __future__ import annotations

import contextlib
import random

import numpy as np
import pytest
import torch
from nets import Drop, make
from oracles import criterion_loss, dense_hessian, relative
from torch import nn
from torch.nn import functional as F

from curvdiag.errors import CurvdiagError
from curvdiag.objective import Objective
from curvdiag.operators import Hessian


class Counting(nn.Module):
    """Buffers of every sort that a forward pass changes, frozen and unfrozen, and mixed training flags."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 4, max_norm=0.5)
        self.body = Drop()
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("scratch", torch.zeros(3), persistent=False)

    def forward(self, tokens):
        self.calls += 1
        self.scratch = self.scratch + 1  # Rebinds the buffer.
        return self.body(self.embed(tokens).mean(1))


def subject(dropout=0.5):
    torch.manual_seed(0)
    model = Counting()
    model.train()
    model.body.body[1].eval()
    model.body.body[3].p = dropout
    model.body.body[0].weight.requires_grad_(False)
    model.body.head.weight.grad = torch.full_like(model.body.head.weight, 2.0)
    model.embed.weight.register_hook(lambda grad: pytest.fail("a hook of the user's parameter was called"))
    return model, (torch.randint(7, (10, 5)), torch.randint(3, (10,)))


def snapshot(model):
    """Everything that a user could notice, with tensors' identities, versions and values."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {
        "identity": {k: (id(v), v.data_ptr()) for k, v in tensors.items()},
        "values": {k: v.detach().clone() for k, v in tensors.items()},
        "grad": {k: None if v.grad is None else (id(v.grad), v.grad.clone()) for k, v in tensors.items()},
        "requires_grad": {k: v.requires_grad for k, v in tensors.items()},
        "training": {k: m.training for k, m in model.named_modules()},
        "attributes": {k: sorted(vars(m)) for k, m in model.named_modules()},
        "hooks": {k: (len(m._forward_hooks), len(m._forward_pre_hooks)) for k, m in model.named_modules()},
        "state_dict": list(model.state_dict()),
        "torch rng": torch.get_rng_state(),
        "python rng": random.getstate(),
        "numpy rng": np.random.get_state()[1].tolist(),  # noqa: NPY002
        "modes": (
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.is_autocast_enabled("cpu"),
        ),
        "autocast": torch.get_autocast_dtype("cpu"),
        "backends": (
            torch.backends.cuda.flash_sdp_enabled(),
            torch.backends.cuda.mem_efficient_sdp_enabled(),
            torch.backends.cuda.math_sdp_enabled(),
            torch.backends.cudnn.enabled,
            torch.backends.cudnn.benchmark,
            torch.backends.mkldnn.enabled,
        ),
        "globals": (torch.get_default_dtype(), torch.get_num_threads(), torch.is_anomaly_enabled()),
    }


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def assert_no_trace(before, after):
    assert [key for key in before if not same(before[key], after[key])] == []


OPTIONS = {
    "kept": {},
    "rebuilt": {"memory": 0},
    "micro-batches": {"micro_batch": 3},
    "double": {"dtype": torch.float64},
    "shared": {"share": True},
    "finite differences": {"method": "finite-difference"},
}


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("options", OPTIONS)
def test_an_operator_leaves_no_trace(mode, options):
    model, batch = subject(dropout=0.5 if mode == "eval" else 0.0)
    before = snapshot(model)
    objective = Objective(model, F.cross_entropy, batch, mode=mode)
    assert_no_trace(before, snapshot(model))
    objective.value(), objective.gradient()
    assert_no_trace(before, snapshot(model))
    try:
        op = Hessian(objective, **OPTIONS[options])
    except CurvdiagError:
        # BatchNorm couples a batch that is not to be cut; what forward passes write, sharing cannot hide; and a
        # max_norm moves weights back that finite differences have moved.
        refused = {("train", "micro-batches"), ("train", "shared"), ("eval", "shared")}
        assert (mode, options) in refused or options == "finite differences"
        assert_no_trace(before, snapshot(model))
        return
    assert_no_trace(before, snapshot(model))
    assert (op @ torch.ones(op.size, 2, dtype=op.dtype)).isfinite().all()
    op.block("body.head.*").dense()
    assert_no_trace(before, snapshot(model))


@pytest.mark.parametrize("net", ["conv-batchnorm", "transformer-tied", "lstm"])
def test_known_nets_are_left_alone(net):
    model, batch = make(net, dtype=torch.float32)
    model.train()
    before = snapshot(model)
    Hessian(Objective(model, F.cross_entropy, batch)).dense()
    Hessian(Objective(model, F.cross_entropy, batch, mode="train"), memory=0).dense()
    assert_no_trace(before, snapshot(model))


class Broken(Exception):
    pass


@pytest.mark.parametrize("where", ["model", "loss"])
@pytest.mark.parametrize("call", [1, 2, 3, 4])
def test_an_exception_leaves_no_trace_either(where, call):
    model, batch = subject()
    calls = iter(range(1, 1000))

    def count():
        if next(calls) >= call:
            raise Broken

    if where == "model":
        model.body.head.register_forward_pre_hook(lambda *_: count())

    def loss(outputs, targets):
        if where == "loss":
            count()
        return F.cross_entropy(outputs, targets)

    before = snapshot(model)
    with contextlib.suppress(Broken, CurvdiagError):
        op = Hessian(Objective(model, loss, batch), memory=0)
        op @ torch.ones(op.size)
    assert_no_trace(before, snapshot(model))


CONTEXTS = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "set_grad_enabled": lambda: torch.set_grad_enabled(False),
    "flash attention": lambda: torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION),
}


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("memory", [None, 0], ids=["kept", "rebuilt"])
@pytest.mark.parametrize("net", ["conv-batchnorm", "transformer-tied", "lstm"])
def test_the_callers_contexts_change_no_number(net, memory, context):
    # Autocast leaves float64 alone, so that only float32 shows whether it is off.
    dtype, tolerance = (torch.float32, 2e-5) if context == "autocast" else (torch.float64, 1e-10)
    model, batch = make(net, dtype=dtype)
    truth = dense_hessian(model, criterion_loss(F.cross_entropy, batch))
    v = torch.ones(len(truth), dtype=torch.float64)
    gradient = Objective(model, F.cross_entropy, batch).gradient()
    outside = Hessian(Objective(model, F.cross_entropy, batch), memory=memory)
    with CONTEXTS[context]():
        before = snapshot(model)
        # Batches that a loader makes under inference_mode are inference tensors.
        made_here = tuple(part.clone() for part in batch)
        objective = Objective(model, F.cross_entropy, made_here)
        op = Hessian(objective, memory=memory)
        inside = op @ v
        assert relative(outside @ v, truth @ v) < tolerance
        assert relative(objective.gradient(), gradient) < tolerance
        assert_no_trace(before, snapshot(model))
    assert relative(inside, truth @ v) < tolerance
    assert relative(op @ v, truth @ v) < tolerance
    assert relative(op.dense(), truth) < tolerance


def test_a_training_step_goes_on_as_if_nothing_had_been():
    """Measured between ``backward`` and ``step``, and between two ``backward`` calls on one kept graph."""

    def train(measure):
        model, batch = make("conv-batchnorm", dtype=torch.float32)
        model.train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        objective = Objective(model, F.cross_entropy, batch)
        for _ in range(4):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(batch[0]), batch[1])
            loss.backward(retain_graph=True)
            if measure:
                op = Hessian(objective)
                op @ torch.ones(op.size)
            loss.backward()
            optimizer.step()
        return model.state_dict()

    quiet, measured = train(False), train(True)
    assert all(torch.equal(quiet[name], measured[name]) for name in quiet)


def test_memory_of_an_operator_is_given_back():
    import gc
    import weakref

    model, batch = make("mlp-tanh")
    op = Hessian(Objective(model, F.cross_entropy, batch))
    op @ torch.ones(op.size, dtype=torch.float64)
    gone = weakref.ref(op)
    gc.disable()
    try:
        del op
        assert gone() is None, "the operator is in a reference cycle: its graphs stay until the collector runs"
    finally:
        gc.enable()


def test_lists_and_dicts_that_a_forward_pass_fills_are_restored():
    class Logging(nn.Linear):
        def __init__(self):
            super().__init__(4, 3)
            self.seen, self.last = [], {}

        def forward(self, x):
            y = super().forward(x)
            self.seen.append(y)
            self.last["y"] = y
            return y

    model = Logging()
    seen, last = model.seen, model.last
    model(torch.randn(2, 4))
    kept = seen[0]
    Hessian(Objective(model, F.cross_entropy, (torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])))).dense()
    assert model.seen is seen
    assert model.last is last
    assert len(seen) == 1
    assert seen[0] is kept
    assert last == {"y": kept}
